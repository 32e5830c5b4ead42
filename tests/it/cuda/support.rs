//! The comparison of one operation on the GPU with the same on the CPU in f64.

use std::sync::OnceLock;

use fsmoe::Result;
use fsmoe::bench::against;
pub(super) use fsmoe::bench::against::tolerance;
use fsmoe::device::cpu::Cpu;
use fsmoe::device::cuda::Cuda;
use fsmoe::device::{Lane, MemoryKernels};
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Shape, Tensor};

/// What the kernels take.
pub(super) const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// The GPU, opened once; tests take turns on its one lane.
pub(super) fn gpu() -> Cuda {
    static GPU: OnceLock<Cuda> = OnceLock::new();
    GPU.get_or_init(|| Cuda::new(0).unwrap()).clone()
}

/// Fails if `measured` is more than a quarter above `documented`, the figure in docs/performance.md, which holds on an H200;
/// on another card it says that nothing is asserted. Noise stays below a quarter.
pub(super) fn assert_as_documented(what: &str, measured: f64, documented: f64) {
    let card = gpu().name().unwrap();
    if card.contains("H200") {
        assert!(measured <= 1.25 * documented, "{what}: {measured:.3}, documented as {documented:.3}");
    } else {
        println!("{what}: {measured:.3} on {card}, where no figure is documented: not asserted");
    }
}

/// An operation's input. The oracle is given the same values, after rounding, in f64.
pub(super) enum In {
    /// In the type under test.
    Data(Shape, Vec<f64>),
    /// In the accumulation type.
    Acc(Shape, Vec<f64>),
    /// i32.
    Int(Shape, Vec<i32>),
}

/// An operation's output: poisoned beforehand, or, for what an operation adds to, an input.
pub(super) enum Out {
    /// In the type under test.
    Data(Shape),
    /// In the accumulation type.
    Acc(Shape),
    /// In the accumulation type, of values that the operation rounds to the type under test on the way: its tolerance.
    Rounded(Shape),
    /// i32, compared exactly.
    Int(Shape),
    /// Holds something that is added to.
    Add(In),
}

/// Shorthands.
pub(super) fn data(shape: impl Into<Shape>, values: Vec<f64>) -> In {
    In::Data(shape.into(), values)
}
pub(super) fn acc(shape: impl Into<Shape>, values: Vec<f64>) -> In {
    In::Acc(shape.into(), values)
}
pub(super) fn int(shape: impl Into<Shape>, values: Vec<i32>) -> In {
    In::Int(shape.into(), values)
}

const POISON: i32 = -0x5555_5556;

fn input(input: &In, dtype: DType) -> Tensor {
    let lane = Lane::cpu();
    match input {
        In::Int(shape, v) => Tensor::from_slice(v, *shape).unwrap(),
        In::Acc(shape, v) => lane.cast(&Tensor::from_slice(v, *shape).unwrap(), dtype.accumulate()).unwrap(),
        In::Data(shape, v) => lane.cast(&Tensor::from_slice(v, *shape).unwrap(), dtype).unwrap(),
    }
}

fn output(out: &Out, dtype: DType) -> Tensor {
    match out {
        Out::Add(i) => input(i, dtype),
        Out::Int(shape) => Tensor::from_slice(&vec![POISON; shape.elements()], *shape).unwrap(),
        Out::Acc(shape) | Out::Rounded(shape) => input(&In::Acc(*shape, vec![f64::NAN; shape.elements()]), dtype),
        Out::Data(shape) => input(&In::Data(*shape, vec![f64::NAN; shape.elements()]), dtype),
    }
}

/// A host tensor of any float type as f64.
pub(super) fn wide(t: &Tensor) -> Vec<f64> {
    Lane::cpu().cast(t, DType::F64).unwrap().to_vec().unwrap()
}

fn widened(t: Tensor) -> Tensor {
    if t.dtype() == DType::I32 { t } else { Lane::cpu().cast(&t, DType::F64).unwrap() }
}

/// A host tensor's copy on the GPU.
pub(super) fn up(t: &Tensor) -> Tensor {
    let (gpu, shape) = (gpu(), *t.shape());
    let out = MemoryKernels::alloc(&gpu, shape, t.dtype()).unwrap();
    gpu.upload(t, &out).unwrap();
    out
}

/// A GPU tensor's copy on the host.
pub(super) fn down(t: &Tensor) -> Tensor {
    let out = Tensor::host(*t.shape(), t.dtype());
    gpu().download(t, &out).unwrap();
    out
}

/// `n` values spread evenly over `low..high`, the same for the same seed.
pub(super) fn uniform(seed: u64, n: usize, low: f64, high: f64) -> Vec<f64> {
    let rng = Counter { seed, purpose: Purpose::Test, step: 0 };
    (0..n as u64).map(|i| low + (high - low) * rng.uniform(i)).collect()
}

/// The bytes of a contiguous host tensor.
pub(super) fn bytes(t: &Tensor) -> Vec<u8> {
    let length = t.elements() * t.dtype().size();
    // SAFETY: a contiguous host tensor that nothing writes to.
    unsafe { std::slice::from_raw_parts(t.ptr().cast_const(), length) }.to_vec()
}

/// Runs an operation on the CPU in f64 and twice on the GPU in `dtype`: the GPU's runs must agree to the bit, and with
/// the CPU within the tolerance; integers exactly.
///
/// Called through [`compare!`], which writes the operation out for both backends.
pub(super) fn run(
    what: &str,
    dtype: DType,
    inputs: &[In],
    outputs: &[Out],
    cpu: impl Fn(&Cpu, &[Tensor], &[Tensor]) -> Result<()>,
    cuda: impl Fn(&Cuda, &[Tensor], &[Tensor]) -> Result<()>,
) {
    let right: Vec<Tensor> = outputs.iter().map(|o| widened(output(o, dtype))).collect();
    let wide_inputs: Vec<Tensor> = inputs.iter().map(|i| widened(input(i, dtype))).collect();
    cpu(&Cpu, &wide_inputs, &right).unwrap_or_else(|e| panic!("{what} in f64 on the CPU: {e}"));

    let device_inputs: Vec<Tensor> = inputs.iter().map(|i| up(&input(i, dtype))).collect();
    let mut runs = (0..2).map(|_| {
        let outputs: Vec<Tensor> = outputs.iter().map(|o| up(&output(o, dtype))).collect();
        cuda(&gpu(), &device_inputs, &outputs).unwrap_or_else(|e| panic!("{what} in {dtype} on the GPU: {e}"));
        outputs.iter().map(down).collect::<Vec<_>>()
    });
    let (got, again) = (runs.next().unwrap(), runs.next().unwrap());
    for (n, ((got, again), right)) in got.iter().zip(&again).zip(&right).enumerate() {
        assert_eq!(bytes(got), bytes(again), "{what} in {dtype}: output {n} differs between two runs");
        let allowed = tolerance(if matches!(outputs[n], Out::Rounded(_)) { dtype } else { got.dtype() });
        assert_close(&format!("{what} in {dtype}: output {n}"), got, right, allowed);
    }
}

/// Fails unless [`against::compare`] finds max|got − right| / max|right| within `tolerance`.
pub(super) fn assert_close(what: &str, got: &Tensor, right: &Tensor, tolerance: f64) {
    assert_eq!(got.shape(), right.shape(), "{what}");
    against::compare(what, got, right, tolerance).unwrap_or_else(|e| panic!("{e}"));
}

/// `compare!(what, dtype, [inputs], [outputs], |kernels, inputs, outputs| kernels.operation(…))`: see [`run`].
macro_rules! compare {
    ($what:expr, $dtype:expr, $inputs:expr, $outputs:expr, |$k:ident, $i:ident, $o:ident| $op:expr) => {
        $crate::cuda::support::run(
            $what,
            $dtype,
            &$inputs,
            &$outputs,
            |$k: &fsmoe::device::cpu::Cpu, $i: &[fsmoe::tensor::Tensor], $o: &[fsmoe::tensor::Tensor]| $op,
            |$k: &fsmoe::device::cuda::Cuda, $i: &[fsmoe::tensor::Tensor], $o: &[fsmoe::tensor::Tensor]| $op,
        )
    };
}
pub(super) use compare;
