//! The CUDA device: what holds on every machine, and, marked as ignored, what needs a GPU:
//! `cargo test --test it -- --ignored cuda`.

#![allow(clippy::unwrap_used, reason = "clippy takes helpers of tests for code that is shipped")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fsmoe::device::Gelu;
use fsmoe::device::cuda::{
    self, Activations, Context, CudaError, CudaSlice, Element, GateUp, GateUpMut, Matrix, MatrixMut, Modules, Stream,
};
use half::{bf16, f16};

// ---------------------------------------------------------------------------------------------------------------------
// Without a GPU

#[test]
fn the_probe_is_whole_on_every_machine() {
    let probe = cuda::probe::probe();
    let labels: Vec<_> = probe.lines().into_iter().map(|(label, _)| label).collect();
    for label in ["CUDA driver", "GPU", "cuBLAS", "NCCL", "CUDA kernels", "usable GPU"] {
        assert!(labels.contains(&label), "no line for {label} in:\n{probe}");
    }
    let json = serde_json::to_value(&probe).unwrap();
    assert!(json["driver"].is_object() && json["usable"].is_object(), "{json}");
    if probe.usable.found().is_some() {
        assert!(probe.driver.found().is_some() && probe.kernels.found().is_some() && probe.cublas.found().is_some());
    }
}

/// Kind (1 is PTX, 2 machine code) and architecture of every image in a fat binary: containers end to end, each a
/// 16-byte header (magic, version, header's length, body's length) and images with headers of their own.
fn images(mut fat_binary: &[u8]) -> Vec<(u16, u32)> {
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let mut found = Vec::new();
    while !fat_binary.is_empty() {
        assert_eq!(u32_at(fat_binary, 0), 0xBA55_ED50, "not a fat binary container");
        let (container, rest) = fat_binary.split_at(usize::from(u16_at(fat_binary, 6)) + u64_at(fat_binary, 8));
        let mut body = &container[usize::from(u16_at(container, 6))..];
        while !body.is_empty() {
            found.push((u16_at(body, 0), u32_at(body, 28)));
            body = &body[u32_at(body, 4) as usize + u64_at(body, 8)..];
        }
        fat_binary = rest;
    }
    found
}

#[test]
fn the_fat_binary_has_code_for_sm_80_sm_90a_and_the_future() {
    let Ok(embedded) = cuda::kernels_embedded() else {
        assert!(cuda::fat_binary().is_empty());
        return;
    };
    assert_eq!(embedded.archs, ["sm_80", "sm_90a", "compute_80"]);
    let images = images(cuda::fat_binary());
    for image in [(1, 80), (2, 80), (2, 90)] {
        assert_eq!(images.iter().filter(|i| **i == image).count(), images.len() / 3, "{image:?} in {images:?}");
    }

    let Some(cuobjdump) = installed_cuobjdump() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kernels.fatbin");
    std::fs::write(&file, cuda::fat_binary()).unwrap();
    let output = Command::new(cuobjdump).args(["--list-elf", "--list-ptx"]).arg(&file).output().unwrap();
    let listing = String::from_utf8_lossy(&output.stdout);
    for image in [".sm_80.cubin", ".sm_90a.cubin", ".sm_80.ptx"] {
        assert_eq!(listing.matches(image).count(), images.len() / 3, "{image} in:\n{listing}");
    }
}

/// The cuobjdump that `scripts/install-cuda.sh` installs, if it did.
fn installed_cuobjdump() -> Option<PathBuf> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda/lib")).ok()?;
    entries.flatten().map(|e| e.path().join("site-packages/nvidia/cu13/bin/cuobjdump")).find(|path| path.is_file())
}

// ---------------------------------------------------------------------------------------------------------------------
// On a GPU

struct Gpu {
    modules: Arc<Modules>,
    activations: Activations,
    stream: Arc<Stream>,
}

fn gpu() -> Gpu {
    let context: Arc<Context> = cuda::open(0).unwrap();
    let modules = Arc::new(Modules::new(&context).unwrap());
    Gpu { activations: Activations::new(modules.clone()), modules, stream: context.new_stream().unwrap() }
}

/// An element type, as the tests need it: through f64, and to the bit.
trait Real: Element + Copy + std::fmt::Debug {
    const NAME: &'static str;
    /// The largest error, relative to the largest value of the tensor.
    const TOLERANCE: f64;
    const POISON: Self;
    fn round(x: f64) -> Self;
    fn wide(self) -> f64;
    fn bits(self) -> u32;
}

macro_rules! real {
    ($type:ty, $name:literal, $tolerance:literal, $round:expr, $wide:expr) => {
        impl Real for $type {
            const NAME: &'static str = $name;
            const TOLERANCE: f64 = $tolerance;
            const POISON: Self = Self::NAN;
            fn round(x: f64) -> Self {
                $round(x)
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            fn bits(self) -> u32 {
                self.to_bits().into()
            }
        }
    };
}
real!(bf16, "bf16", 1e-2, bf16::from_f64, bf16::to_f64);
real!(f16, "f16", 2e-3, f16::from_f64, f16::to_f64);
real!(f32, "f32", 1e-5, |x| x as f32, f64::from);

/// Random values, those of a fixed seed.
struct Random(u64);

impl Random {
    /// Uniform in [0, 1): splitmix64.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Values in [-6, 6), rounded to T; both activations bend there and are nearly straight outside.
    fn values<T: Real>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::round(12.0 * self.unit() - 6.0)).collect()
    }
}

/// Elements before and after every buffer that no kernel may touch: a multiple of 16 bytes of every type.
const GUARD: usize = 64;

/// A matrix inside a larger buffer on the GPU, with guard zones around it and perhaps gaps between its rows.
struct Guarded<T: Real> {
    buffer: CudaSlice<T>,
    /// Where it begins; an offset past the guard zone takes it off its 16-byte boundary.
    start: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<T: Real> Guarded<T> {
    /// Holds `values`, or, without any, is poisoned all over.
    fn new(stream: &Arc<Stream>, values: Option<&[T]>, [rows, cols, stride]: [usize; 3], offset: usize) -> Self {
        let start = GUARD + offset;
        let mut host = vec![T::POISON; start + rows * stride + GUARD];
        if let Some(values) = values {
            for (row, values) in values.chunks_exact(cols).enumerate() {
                host[start + row * stride..][..cols].copy_from_slice(values);
            }
        }
        Self { buffer: stream.clone_htod(&host).unwrap(), start, rows, cols, stride }
    }

    /// The elements in use: without the gap after the last row.
    fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + (self.rows - 1) * self.stride + self.cols
    }

    fn matrix(&self) -> Matrix<'_, T> {
        Matrix { data: self.buffer.slice(self.range()), stride: self.stride }
    }

    fn matrix_mut(&mut self) -> MatrixMut<'_, T> {
        let range = self.range();
        MatrixMut { data: self.buffer.slice_mut(range), stride: self.stride }
    }

    /// What it holds, row after row, having checked that nothing around and between the rows was written to.
    fn read(&self, stream: &Arc<Stream>, what: &str) -> Vec<T> {
        let host = stream.clone_dtoh(&self.buffer).unwrap();
        let mut values = Vec::new();
        for (at, value) in host.into_iter().enumerate() {
            let (row, col) = match at.checked_sub(self.start) {
                Some(inside) => (inside / self.stride, inside % self.stride),
                None => (self.rows, 0),
            };
            if row < self.rows && col < self.cols {
                values.push(value);
            } else {
                assert_eq!(value.bits(), T::POISON.bits(), "{what}: wrote element {at}, which is outside the matrix");
            }
        }
        values
    }
}

/// The largest error relative to the largest right value; NaN, which a poisoned element left behind, counts as infinite.
fn assert_close<T: Real>(got: &[T], right: &[f64], what: &str) {
    assert_eq!(got.len(), right.len(), "{what}");
    let largest = right.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    for (at, (got, right)) in got.iter().zip(right).enumerate() {
        let error = (got.wide() - right).abs() / largest.max(f64::MIN_POSITIVE);
        assert!(
            error <= T::TOLERANCE,
            "{what}: element {at} is {got:?}, should be {right}, off by {error:e} of the max"
        );
    }
}

/// Runs `launch` on two poisoned outputs: the same bits must come out. Returns them.
fn twice<T: Real>(
    gpu: &Gpu,
    layout: [usize; 3],
    offset: usize,
    what: &str,
    mut launch: impl FnMut(&mut Guarded<T>),
) -> Vec<T> {
    let mut run = || {
        let mut output = Guarded::new(&gpu.stream, None, layout, offset);
        launch(&mut output);
        output.read(&gpu.stream, what)
    };
    let (first, second) = (run(), run());
    let bits = |values: &[T]| values.iter().map(|x| x.bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&second), "{what}: two runs differ");
    first
}

// The references, in f64.

/// The error function by its series of positive terms, 2/√π · e^(−x²) · Σ 2ⁿ x^(2n+1) / (2n+1)!!.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, 0.0, 0.0);
    while f64::abs(term) > f64::abs(sum) * 1e-17 {
        sum += term;
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

fn gelu(form: Gelu, x: f64) -> f64 {
    use std::f64::consts::{FRAC_1_SQRT_2, PI};
    match form {
        Gelu::Erf => 0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2)),
        Gelu::Tanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    }
}

/// By the central difference of fourth order: an independent check of the kernel's formula.
fn derivative(f: impl Fn(f64) -> f64, x: f64) -> f64 {
    let h = 1e-3;
    (8.0 * (f(x + h) - f(x - h)) - (f(x + 2.0 * h) - f(x - 2.0 * h))) / (12.0 * h)
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn the_references_are_right() {
    // Abramowitz and Stegun, table 7.1.
    for (x, value) in [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (-2.0, -0.995_322_265_0)] {
        assert!((erf(x) - value).abs() < 1e-10, "erf({x}) = {}", erf(x));
    }
    assert!((erf(6.0) - 1.0).abs() < 1e-14);
    // d silu/dx at 0 is 1/2, at 1: s(1 + 1 - s).
    let s = 1.0 / (1.0 + (-1.0f64).exp());
    assert!((derivative(silu, 0.0) - 0.5).abs() < 1e-10);
    assert!((derivative(silu, 1.0) - s * (2.0 - s)).abs() < 1e-10);
}

const SIZES: [usize; 6] = [1, 7, 8, 1023, 4096 * 3 + 5, 1 << 20];

fn check_gelu<T: Real>(gpu: &Gpu) {
    let mut random = Random(1);
    for form in [Gelu::Erf, Gelu::Tanh] {
        for n in SIZES {
            let (x, dy) = (random.values::<T>(n), random.values::<T>(n));
            // Off the 16-byte boundary: everything, then the output alone.
            for (offset_in, offset_out) in [(0, 0), (1, 1), (0, 3)] {
                let what = format!("{form:?} {} n={n} offsets {offset_in} {offset_out}", T::NAME);
                let layout = [1, n, n];
                let x_gpu = Guarded::new(&gpu.stream, Some(&x), layout, offset_in);
                let dy_gpu = Guarded::new(&gpu.stream, Some(&dy), layout, offset_in);
                let y = twice(gpu, layout, offset_out, &what, |y| {
                    let (x, mut y) = (x_gpu.matrix().data, y.matrix_mut().data);
                    gpu.activations.gelu_forward::<T>(&gpu.stream, form, &x, &mut y).unwrap();
                });
                let right: Vec<_> = x.iter().map(|x| gelu(form, x.wide())).collect();
                assert_close(&y, &right, &format!("forward {what}"));

                let dx = twice(gpu, layout, offset_out, &what, |dx| {
                    let (dy, x, mut dx) = (dy_gpu.matrix().data, x_gpu.matrix().data, dx.matrix_mut().data);
                    gpu.activations.gelu_backward::<T>(&gpu.stream, form, &dy, &x, &mut dx).unwrap();
                });
                let right: Vec<_> =
                    x.iter().zip(&dy).map(|(x, dy)| dy.wide() * derivative(|x| gelu(form, x), x.wide())).collect();
                assert_close(&dx, &right, &format!("backward {what}"));
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn gelu_agrees_with_the_f64_reference() {
    let gpu = gpu();
    check_gelu::<bf16>(&gpu);
    check_gelu::<f16>(&gpu);
    check_gelu::<f32>(&gpu);
}

/// (rows, cols), and how much longer than cols the strides of gate, up and the output are.
const MATRICES: [([usize; 2], [usize; 3]); 9] = [
    ([1, 1], [0, 0, 0]),
    ([1, 7], [0, 0, 0]),
    ([3, 8], [0, 0, 0]),
    ([5, 1023], [0, 0, 0]),
    ([5, 1023], [1, 1, 1]),
    ([7, 64], [3, 0, 13]),
    ([33, 96], [8, 16, 24]),
    ([3, 4096 * 3 + 5], [0, 3, 8]),
    ([300, 1001], [7, 7, 7]),
];

fn check_swiglu<T: Real>(gpu: &Gpu) {
    let mut random = Random(2);
    for ([rows, cols], [more_gate, more_up, more_out]) in MATRICES {
        let n = rows * cols;
        let (gate, up, dout) = (random.values::<T>(n), random.values::<T>(n), random.values::<T>(n));
        let wide = || gate.iter().zip(&up).map(|(gate, up)| (gate.wide(), up.wide())).zip(&dout);
        let right_out: Vec<_> = wide().map(|((gate, up), _)| silu(gate) * up).collect();
        let right_gate: Vec<_> = wide().map(|((gate, up), d)| d.wide() * up * derivative(silu, gate)).collect();
        let right_up: Vec<_> = wide().map(|((gate, _), d)| d.wide() * silu(gate)).collect();

        for offset in [0, 1] {
            let what = format!("{} ({rows}, {cols}) strides +{more_gate} +{more_up} +{more_out}", T::NAME);
            let what = format!("{what} offset {offset}");
            let layout = |more| [rows, cols, cols + more];
            let gate_gpu = Guarded::new(&gpu.stream, Some(&gate), layout(more_gate), offset);
            let up_gpu = Guarded::new(&gpu.stream, Some(&up), layout(more_up), offset);
            let dout_gpu = Guarded::new(&gpu.stream, Some(&dout), layout(more_out), offset);
            let inputs = || GateUp::Apart { gate: gate_gpu.matrix(), up: up_gpu.matrix() };

            let out = twice(gpu, layout(more_out), offset, &what, |out| {
                let mut out = out.matrix_mut();
                gpu.activations.swiglu_forward(&gpu.stream, rows, cols, &inputs(), &mut out).unwrap();
            });
            assert_close(&out, &right_out, &format!("forward {what}"));

            let mut other = Vec::new();
            let dgate = twice(gpu, layout(more_gate), offset, &what, |dgate| {
                let mut dup = Guarded::new(&gpu.stream, None, layout(more_up), offset);
                let mut gradients = GateUpMut::Apart { gate: dgate.matrix_mut(), up: dup.matrix_mut() };
                gpu.activations
                    .swiglu_backward(&gpu.stream, rows, cols, &dout_gpu.matrix(), &inputs(), &mut gradients)
                    .unwrap();
                other.push(dup.read(&gpu.stream, &what));
            });
            assert_close(&dgate, &right_gate, &format!("backward, gate, {what}"));
            assert_close(&other[0], &right_up, &format!("backward, up, {what}"));
            assert!(other[0].iter().zip(&other[1]).all(|(a, b)| a.bits() == b.bits()), "{what}: two runs differ");

            // The same with gate and up as the halves of one buffer.
            let joined: Vec<T> =
                gate.chunks_exact(cols).zip(up.chunks_exact(cols)).flat_map(|(g, u)| [g, u].concat()).collect();
            let layout = [rows, 2 * cols, 2 * cols + more_gate];
            let both = Guarded::new(&gpu.stream, Some(&joined), layout, offset);
            let inputs = GateUp::Halves(both.matrix());
            let halves_out = twice(gpu, [rows, cols, cols + more_out], offset, &what, |out| {
                let mut out = out.matrix_mut();
                gpu.activations.swiglu_forward(&gpu.stream, rows, cols, &inputs, &mut out).unwrap();
            });
            assert!(halves_out.iter().zip(&out).all(|(a, b)| a.bits() == b.bits()), "forward, halves, {what}");
            let gradient = twice(gpu, layout, offset, &what, |both| {
                let mut gradients = GateUpMut::Halves(both.matrix_mut());
                let dout = dout_gpu.matrix();
                gpu.activations.swiglu_backward(&gpu.stream, rows, cols, &dout, &inputs, &mut gradients).unwrap();
            });
            let right: Vec<f64> = right_gate
                .chunks_exact(cols)
                .zip(right_up.chunks_exact(cols))
                .flat_map(|(gate, up)| [gate, up].concat())
                .collect();
            assert_close(&gradient, &right, &format!("backward, halves, {what}"));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn swiglu_agrees_with_the_f64_reference() {
    let gpu = gpu();
    check_swiglu::<bf16>(&gpu);
    check_swiglu::<f16>(&gpu);
    check_swiglu::<f32>(&gpu);
}

/// Far from zero exp overflows inside; the results must not.
#[test]
#[ignore = "needs a CUDA device"]
fn activations_are_finite_far_from_zero() {
    fn check<T: Real>(gpu: &Gpu) {
        let x: Vec<T> = [0.0, -0.0, 20.0, -20.0, 200.0, -200.0, 3e4, -3e4].map(T::round).to_vec();
        let layout = [1, x.len(), x.len()];
        let x_gpu = Guarded::new(&gpu.stream, Some(&x), layout, 0);
        let ones = Guarded::new(&gpu.stream, Some(&vec![T::round(1.0); x.len()]), layout, 0);
        // Above zero the value is x and the slope 1, below both are 0, to the last bit that T shows of them.
        let ramp: Vec<f64> = x.iter().map(|x| x.wide().max(0.0)).collect();
        let step: Vec<f64> = x.iter().map(|x| if x.wide() == 0.0 { 0.5 } else { f64::from(x.wide() > 0.0) }).collect();
        for form in [Gelu::Erf, Gelu::Tanh] {
            let y = twice(gpu, layout, 0, "forward", |y| {
                let (x, mut y) = (x_gpu.matrix().data, y.matrix_mut().data);
                gpu.activations.gelu_forward::<T>(&gpu.stream, form, &x, &mut y).unwrap();
            });
            assert_close(&y, &ramp, &format!("{form:?} {} far from zero", T::NAME));
            let dx = twice(gpu, layout, 0, "backward", |dx| {
                let (dy, x, mut dx) = (ones.matrix().data, x_gpu.matrix().data, dx.matrix_mut().data);
                gpu.activations.gelu_backward::<T>(&gpu.stream, form, &dy, &x, &mut dx).unwrap();
            });
            assert_close(&dx, &step, &format!("{form:?} {} derivative far from zero", T::NAME));
        }
        let inputs = GateUp::Apart { gate: x_gpu.matrix(), up: ones.matrix() };
        let out = twice(gpu, layout, 0, "swiglu", |out| {
            gpu.activations.swiglu_forward(&gpu.stream, 1, x.len(), &inputs, &mut out.matrix_mut()).unwrap();
        });
        assert_close(&out, &ramp, &format!("SwiGLU {} far from zero", T::NAME));
        let dgate = twice(gpu, layout, 0, "swiglu", |dgate| {
            let mut dup = Guarded::new(&gpu.stream, None, layout, 0);
            let mut gradients = GateUpMut::Apart { gate: dgate.matrix_mut(), up: dup.matrix_mut() };
            gpu.activations.swiglu_backward(&gpu.stream, 1, x.len(), &ones.matrix(), &inputs, &mut gradients).unwrap();
        });
        assert_close(&dgate, &step, &format!("SwiGLU {} derivative far from zero", T::NAME));
    }
    let gpu = gpu();
    check::<bf16>(&gpu);
    check::<f16>(&gpu);
    check::<f32>(&gpu);
}

#[test]
#[ignore = "needs a CUDA device"]
fn bad_launches_are_refused_with_the_rule() {
    let gpu = gpu();
    let short = gpu.stream.alloc_zeros::<f32>(7).unwrap();
    let mut out = gpu.stream.alloc_zeros::<f32>(8).unwrap();
    let error = gpu.activations.gelu_forward(&gpu.stream, Gelu::Erf, &short, &mut out).unwrap_err().to_string();
    assert!(error.contains("gelu_forward_f32") && error.contains("y has 8 elements and x has 7"), "{error}");

    let inputs = GateUp::Halves(Matrix { data: short.slice(..), stride: 8 });
    let mut matrix = MatrixMut { data: out.slice_mut(..), stride: 4 };
    let error = gpu.activations.swiglu_forward(&gpu.stream, 1, 4, &inputs, &mut matrix).unwrap_err().to_string();
    assert!(error.contains("gate_up has 7 elements, too few for 1 rows of 8"), "{error}");

    // Nothing to do is no error, though a grid of no blocks would be.
    let mut none = gpu.stream.alloc_zeros::<f32>(1).unwrap();
    gpu.activations.gelu_forward::<f32>(&gpu.stream, Gelu::Tanh, &short.slice(..0), &mut none.slice_mut(..0)).unwrap();

    let error = gpu.modules.function("gelu_sideways_f32").unwrap_err();
    assert!(matches!(error, CudaError::Driver { .. }) && error.to_string().contains("'gelu_sideways_f32'"), "{error}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn every_kernel_loads_and_the_self_test_passes() {
    let gpu = gpu();
    gpu.modules.load_all().unwrap();
    cuda::selftest(&gpu.modules).unwrap();
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_probe_finds_the_gpu() {
    let probe = cuda::probe::probe();
    println!("{probe}");
    assert!(probe.driver.found().is_some(), "{probe}");
    assert!(probe.cublas.found().is_some(), "{probe}");
    let gpus = probe.gpus.found().unwrap();
    assert!(gpus[0].memory > 1 << 30 && gpus[0].multiprocessors > 0 && !gpus[0].name.is_empty(), "{probe}");
    assert_eq!(probe.usable.found().map(String::as_str), Some("cuda:0"), "{probe}");
}

/// Prints the memory bandwidth that the activations reach on shapes larger than any cache.
#[test]
#[ignore = "needs a CUDA device"]
fn activations_bandwidth() {
    fn report(gpu: &Gpu, name: &str, bytes: usize, mut launch: impl FnMut()) {
        launch();
        gpu.stream.synchronize().unwrap();
        let rounds = 50;
        let start = std::time::Instant::now();
        (0..rounds).for_each(|_| launch());
        gpu.stream.synchronize().unwrap();
        let seconds = start.elapsed().as_secs_f64() / f64::from(rounds);
        println!("{name:32} {:8.1} us {:8.1} GB/s", seconds * 1e6, bytes as f64 / seconds / 1e9);
    }
    let gpu = gpu();
    let (rows, cols) = (16384, 14336);
    let n = rows * cols;
    let stream = &gpu.stream;
    let buffer = |n| stream.alloc_zeros::<bf16>(n).unwrap();
    let (x, dout, mut out, mut both) = (buffer(2 * n), buffer(n), buffer(n), buffer(2 * n));
    for form in [Gelu::Erf, Gelu::Tanh] {
        report(&gpu, &format!("gelu_forward_bf16 {form:?}"), 4 * n, || {
            gpu.activations.gelu_forward::<bf16>(stream, form, &dout, &mut out).unwrap();
        });
        let x = x.slice(..n);
        report(&gpu, &format!("gelu_backward_bf16 {form:?}"), 6 * n, || {
            gpu.activations.gelu_backward::<bf16>(stream, form, &dout.slice(..), &x, &mut out).unwrap();
        });
    }
    let inputs = GateUp::Halves(Matrix { data: x.slice(..), stride: 2 * cols });
    report(&gpu, "swiglu_forward_bf16", 6 * n, || {
        let mut out = MatrixMut { data: out.slice_mut(..), stride: cols };
        gpu.activations.swiglu_forward(stream, rows, cols, &inputs, &mut out).unwrap();
    });
    report(&gpu, "swiglu_backward_bf16", 10 * n, || {
        let mut gradients = GateUpMut::Halves(MatrixMut { data: both.slice_mut(..), stride: 2 * cols });
        let dout = Matrix { data: dout.slice(..), stride: cols };
        gpu.activations.swiglu_backward(stream, rows, cols, &dout, &inputs, &mut gradients).unwrap();
    });
}
