//! Runs kernels with known answers: what tells a GPU that works from one that is merely there.

use std::ffi::c_void;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use super::{CudaError, Launch, Modules};

/// The known answers of Philox4x32-10 (counter, key, output), from the Random123 library of its authors.
const PHILOX_ANSWERS: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
    ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
    ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
    (
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
    ),
];

/// Threads of the reduction's one block: several warps, and not a power of two of them.
const THREADS: u32 = 352;

/// Loads every embedded kernel onto the GPU and runs two of them, a random number generator and a block-wide reduction,
/// whose answers are known to the bit.
///
/// # Errors
///
/// [`CudaError::SelfTest`] on a wrong answer, [`CudaError::Driver`] when something does not load or run.
pub fn selftest(modules: &Modules) -> Result<(), CudaError> {
    modules.load_all()?;
    let stream = modules.context().new_stream().map_err(CudaError::driver("creating a stream for the self-test"))?;
    philox(modules, &stream)?;
    reduce(modules, &stream)
}

fn philox(modules: &Modules, stream: &std::sync::Arc<CudaStream>) -> Result<(), CudaError> {
    let counters: Vec<u32> = PHILOX_ANSWERS.iter().flat_map(|(counter, ..)| *counter).collect();
    let keys: Vec<u32> = PHILOX_ANSWERS.iter().flat_map(|(_, key, _)| *key).collect();
    let expected: Vec<u32> = PHILOX_ANSWERS.iter().flat_map(|(.., bits)| *bits).collect();

    let copying = || CudaError::driver("copying the self-test's data");
    let counters = stream.clone_htod(&counters).map_err(copying())?;
    let keys = stream.clone_htod(&keys).map_err(copying())?;
    let mut out = stream.alloc_zeros::<u32>(expected.len()).map_err(copying())?;
    let mut count = PHILOX_ANSWERS.len() as i32;
    {
        let (mut counters, _counters) = counters.device_ptr(stream);
        let (mut keys, _keys) = keys.device_ptr(stream);
        let (mut out, _out) = out.device_ptr_mut(stream);
        let mut arguments = [pointer(&mut counters), pointer(&mut keys), pointer(&mut out), pointer(&mut count)];
        let launch = Launch { grid: (1, 1, 1), block: (32, 1, 1), shared: 0 };
        // SAFETY: three addresses and an int are its parameters, and the buffers hold 4, 2 and 4 words for each of `count`.
        unsafe { modules.function("selftest_philox")?.launch(stream, launch, &mut arguments, "3 counters")? };
    }
    let got = stream.clone_dtoh(&out).map_err(CudaError::driver("running the self-test of Philox"))?;
    compare("Philox4x32-10", &got, &expected)
}

fn reduce(modules: &Modules, stream: &std::sync::Arc<CudaStream>) -> Result<(), CudaError> {
    // Small integers: their sum is exact in whatever order. All are negative, so a zero that crept in would be the maximum.
    let values: Vec<f32> = (0..THREADS).map(|i| -1.0 - ((i * 37) % 101) as f32).collect();
    let sum: f32 = values.iter().sum();
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let expected = [sum, max].repeat(THREADS as usize);

    let copying = || CudaError::driver("copying the self-test's data");
    let input = stream.clone_htod(&values).map_err(copying())?;
    let mut out = stream.alloc_zeros::<f32>(expected.len()).map_err(copying())?;
    {
        let (mut input, _input) = input.device_ptr(stream);
        let (mut out, _out) = out.device_ptr_mut(stream);
        let mut arguments = [pointer(&mut input), pointer(&mut out)];
        let launch = Launch { grid: (1, 1, 1), block: (THREADS, 1, 1), shared: 0 };
        // SAFETY: two addresses are its parameters; the buffers hold one and two floats for each of the block's threads.
        unsafe { modules.function("selftest_reduce")?.launch(stream, launch, &mut arguments, "one block")? };
    }
    let got = stream.clone_dtoh(&out).map_err(CudaError::driver("running the self-test of reductions"))?;
    compare("block reduction", &got, &expected)
}

fn pointer<T>(value: &mut T) -> *mut c_void {
    (value as *mut T).cast()
}

fn compare<T: PartialEq + std::fmt::Debug>(test: &'static str, got: &[T], expected: &[T]) -> Result<(), CudaError> {
    match got.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(index) => Err(CudaError::SelfTest {
            test,
            index,
            got: format!("{:?}", got[index]),
            expected: format!("{:?}", expected[index]),
        }),
    }
}
