//! GELU and SwiGLU: views inside larger buffers, whose surroundings must stay as they were.

use fsmoe::device::cpu::Cpu;
use fsmoe::device::{ExpertKernels, Gelu, MemoryKernels};
use fsmoe::tensor::{DType, Layout, Tensor};

use super::support::{DTYPES, assert_close, bytes, down, gpu, tolerance, uniform, up, wide};

/// Elements before and after every buffer that no kernel may touch: a multiple of 16 bytes of every type.
const GUARD: usize = 64;

/// A matrix inside a larger buffer on the GPU, with guard zones around it and perhaps gaps between its rows.
struct Guarded {
    host: Tensor,
    buffer: Tensor,
    /// Where it begins; an offset past the guard zone takes it off its 16-byte boundary.
    start: usize,
    shape: [usize; 2],
    stride: usize,
}

impl Guarded {
    /// Holds `values`, or, without any, is poisoned all over.
    fn new(dtype: DType, values: Option<&[f64]>, [rows, cols, stride]: [usize; 3], offset: usize) -> Self {
        let start = GUARD + offset;
        let mut all = vec![f64::NAN; start + rows * stride + GUARD];
        for (row, values) in values.unwrap_or_default().chunks_exact(cols).enumerate() {
            all[start + row * stride..][..cols].copy_from_slice(values);
        }
        let host = Tensor::host([all.len()], dtype);
        Cpu.copy(&Tensor::from_slice(&all, [all.len()]).unwrap(), &host).unwrap();
        Guarded { buffer: up(&host), host, start, shape: [rows, cols], stride }
    }

    fn view_of(&self, buffer: &Tensor) -> Tensor {
        let layout = Layout::strided(self.shape.into(), &[self.stride, 1], self.start).unwrap();
        Tensor::new(buffer.storage().clone(), layout, buffer.dtype()).unwrap()
    }

    fn view(&self) -> Tensor {
        self.view_of(&self.buffer)
    }

    /// Its values in f64, for the oracle.
    fn wide(&self) -> Tensor {
        let out = Tensor::host(self.shape, DType::F64);
        Cpu.copy(&self.view_of(&self.host), &out).unwrap();
        out
    }

    /// What it holds on the GPU, having checked that nothing around and between the rows was written to.
    fn read(&self, what: &str) -> Tensor {
        let now = down(&self.buffer);
        let size = now.dtype().size();
        let (before, after) = (bytes(&self.host), bytes(&now));
        for at in 0..now.elements() {
            let inside = at
                .checked_sub(self.start)
                .is_some_and(|i| i / self.stride < self.shape[0] && i % self.stride < self.shape[1]);
            let range = at * size..(at + 1) * size;
            assert!(inside || before[range.clone()] == after[range], "{what}: wrote element {at}, outside the matrix");
        }
        let out = Tensor::host(self.shape, now.dtype());
        Cpu.copy(&self.view_of(&now), &out).unwrap();
        out
    }
}

/// Runs `launch` on two poisoned outputs: the same bits must come out. Returns them.
fn twice(dtype: DType, layout: [usize; 3], offset: usize, what: &str, launch: impl Fn(&Tensor)) -> Tensor {
    let run = || {
        let output = Guarded::new(dtype, None, layout, offset);
        launch(&output.view());
        output.read(what)
    };
    let (first, second) = (run(), run());
    assert_eq!(bytes(&first), bytes(&second), "{what}: two runs differ");
    first
}

/// Values in [-6, 6): both activations bend there and are nearly straight outside.
fn values(seed: u64, n: usize) -> Vec<f64> {
    uniform(seed, n, -6.0, 6.0)
}

fn f64_like(t: &Tensor) -> Tensor {
    Tensor::host(*t.shape(), DType::F64)
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gelu_agrees_with_the_cpu() {
    for dtype in DTYPES {
        for form in [Gelu::Erf, Gelu::Tanh] {
            for n in [1, 7, 8, 1023, 4096 * 3 + 5, 1 << 20] {
                // Off the 16-byte boundary: everything, then the output alone.
                for (offset_in, offset_out) in [(0, 0), (1, 1), (0, 3)] {
                    let what = format!("{form:?} {dtype} n={n} offsets {offset_in} {offset_out}");
                    let layout = [1, n, n];
                    let x = Guarded::new(dtype, Some(&values(1, n)), layout, offset_in);
                    let dy = Guarded::new(dtype, Some(&values(2, n)), layout, offset_in);
                    let (right, d_right) = (f64_like(&x.wide()), f64_like(&x.wide()));
                    Cpu.gelu(form, &x.wide(), &right).unwrap();
                    Cpu.gelu_backward(form, &x.wide(), &dy.wide(), &d_right).unwrap();

                    let y = twice(dtype, layout, offset_out, &what, |y| gpu().gelu(form, &x.view(), y).unwrap());
                    assert_close(&format!("forward {what}"), &y, &right, tolerance(dtype));
                    let dx = twice(dtype, layout, offset_out, &what, |dx| {
                        gpu().gelu_backward(form, &x.view(), &dy.view(), dx).unwrap();
                    });
                    assert_close(&format!("backward {what}"), &dx, &d_right, tolerance(dtype));
                    gpu().gelu_backward(form, &x.view(), &dy.view(), &dy.view()).unwrap();
                    assert_eq!(bytes(&dy.read(&what)), bytes(&dx), "backward in place {what}");
                }
            }
        }
    }
}

/// The 16-bit forms of GELU are within two units in the last place of the value wherever that is above 1e-4.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gelu_is_accurate_value_by_value() {
    let n = 20_001;
    let x: Vec<f64> = (0..n).map(|i| -4.0 + 8.0 * i as f64 / (n - 1) as f64).collect();
    for (dtype, unit) in [(DType::BF16, 1.0 / 128.0), (DType::F16, 1.0 / 1024.0)] {
        let x = Guarded::new(dtype, Some(&x), [1, n, n], 0);
        let right = f64_like(&x.wide());
        Cpu.gelu(Gelu::Erf, &x.wide(), &right).unwrap();
        let y = twice(dtype, [1, n, n], 0, "gelu", |y| gpu().gelu(Gelu::Erf, &x.view(), y).unwrap());
        for (got, right) in wide(&y).iter().zip(wide(&right)).filter(|(_, right)| right.abs() > 1e-4) {
            let error = ((got - right) / right).abs();
            assert!(error < 2.0 * unit, "gelu in {dtype}: {got} for {right}, off by {error:.1e} of it");
        }
    }
}

/// (rows, cols), and how much longer than cols the strides of gate, up and the gradients are.
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

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_swiglu_agrees_with_the_cpu() {
    for dtype in DTYPES {
        for ([rows, cols], [more_gate, more_up, more_out]) in MATRICES {
            let n = rows * cols;
            let (gate, up, dout) = (values(1, n), values(2, n), values(3, n));
            for offset in [0, 1] {
                let what =
                    format!("{dtype} ({rows}, {cols}) strides +{more_gate} +{more_up} +{more_out} from {offset}");
                let layout = |more| [rows, cols, cols + more];
                let gate_gpu = Guarded::new(dtype, Some(&gate), layout(more_gate), offset);
                let up_gpu = Guarded::new(dtype, Some(&up), layout(more_up), offset);
                // The result and its gradient have no gaps.
                let dout_gpu = Guarded::new(dtype, Some(&dout), layout(0), offset);
                let [right, right_gate, right_up] = [(); 3].map(|()| f64_like(&gate_gpu.wide()));
                Cpu.swiglu(&gate_gpu.wide(), &up_gpu.wide(), &right).unwrap();
                Cpu.swiglu_backward(&gate_gpu.wide(), &up_gpu.wide(), &dout_gpu.wide(), &right_gate, &right_up)
                    .unwrap();

                let out = twice(dtype, layout(0), offset, &what, |out| {
                    gpu().swiglu(&gate_gpu.view(), &up_gpu.view(), out).unwrap();
                });
                assert_close(&format!("forward {what}"), &out, &right, tolerance(dtype));
                let backward = |d_gate: &Tensor, d_up: &Tensor| {
                    gpu().swiglu_backward(&gate_gpu.view(), &up_gpu.view(), &dout_gpu.view(), d_gate, d_up).unwrap();
                };
                let d_gate = twice(dtype, layout(more_gate), offset, &what, |d_gate| {
                    let d_up = Guarded::new(dtype, None, layout(more_out), offset);
                    backward(d_gate, &d_up.view());
                    assert_close(&format!("backward, up, {what}"), &d_up.read(&what), &right_up, tolerance(dtype));
                });
                assert_close(&format!("backward, gate, {what}"), &d_gate, &right_gate, tolerance(dtype));

                // The same with gate and up as the halves of one buffer.
                let joined: Vec<f64> =
                    gate.chunks_exact(cols).zip(up.chunks_exact(cols)).flat_map(|(g, u)| [g, u].concat()).collect();
                let halves = |t: &Tensor| [0, cols].map(|start| t.narrow(1, start, cols).unwrap());
                let both_layout = [rows, 2 * cols, 2 * cols + more_gate];
                let both = Guarded::new(dtype, Some(&joined), both_layout, offset);
                let [gate_half, up_half] = halves(&both.view());
                let halves_out = twice(dtype, layout(0), offset, &what, |out| {
                    gpu().swiglu(&gate_half, &up_half, out).unwrap();
                });
                assert_eq!(bytes(&halves_out), bytes(&out), "forward, halves, {what}");
                let gradient = twice(dtype, both_layout, offset, &what, |both| {
                    let [d_gate, d_up] = halves(both);
                    gpu().swiglu_backward(&gate_half, &up_half, &dout_gpu.view(), &d_gate, &d_up).unwrap();
                });
                let [d_gate, d_up] = halves(&gradient);
                assert_close(&format!("backward, gate half, {what}"), &d_gate, &right_gate, tolerance(dtype));
                assert_close(&format!("backward, up half, {what}"), &d_up, &right_up, tolerance(dtype));
            }
        }
    }
}

/// Far from zero exp overflows inside; the results must not.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_activations_are_finite_far_from_zero() {
    for dtype in DTYPES {
        let x = [0.0, -0.0, 20.0, -20.0, 200.0, -200.0, 3e4, -3e4];
        let layout = [1, x.len(), x.len()];
        let x_gpu = Guarded::new(dtype, Some(&x), layout, 0);
        let ones = Guarded::new(dtype, Some(&[1.0; 8]), layout, 0);
        // Above zero the value is x and the slope 1, below both are 0, to the last bit that the type shows of them.
        let ramp: Vec<f64> = wide(&x_gpu.wide()).iter().map(|x| x.max(0.0)).collect();
        let step: Vec<f64> = x.iter().map(|x| if *x == 0.0 { 0.5 } else { f64::from(*x > 0.0) }).collect();
        let [ramp, step] = [ramp, step].map(|v| Tensor::from_slice(&v, [1, 8]).unwrap());
        for form in [Gelu::Erf, Gelu::Tanh] {
            let y = twice(dtype, layout, 0, "forward", |y| gpu().gelu(form, &x_gpu.view(), y).unwrap());
            assert_close(&format!("{form:?} {dtype} far from zero"), &y, &ramp, tolerance(dtype));
            let dx = twice(dtype, layout, 0, "backward", |dx| {
                gpu().gelu_backward(form, &x_gpu.view(), &ones.view(), dx).unwrap();
            });
            assert_close(&format!("{form:?} {dtype} derivative far from zero"), &dx, &step, tolerance(dtype));
        }
        let out = twice(dtype, layout, 0, "swiglu", |out| gpu().swiglu(&x_gpu.view(), &ones.view(), out).unwrap());
        assert_close(&format!("SwiGLU {dtype} far from zero"), &out, &ramp, tolerance(dtype));
        let d_gate = twice(dtype, layout, 0, "swiglu", |d_gate| {
            let d_up = Guarded::new(dtype, None, layout, 0);
            gpu().swiglu_backward(&x_gpu.view(), &ones.view(), &ones.view(), d_gate, &d_up.view()).unwrap();
        });
        assert_close(&format!("SwiGLU {dtype} derivative far from zero"), &d_gate, &step, tolerance(dtype));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_activations_refuse_what_breaks_a_rule() {
    let gpu = gpu();
    let t = |shape: [usize; 2]| up(&Tensor::host_zeros(shape, DType::F32));
    let fails = |result: fsmoe::Result<()>, words: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    let (x, buffer) = (t([3, 4]), t([3, 8]));
    let part = |start| buffer.narrow(1, start, 4).unwrap();
    fails(gpu.gelu(Gelu::Erf, &x, &t([4, 3])), "gelu: a tensor is f32 (4, 3), expected f32 (3, 4)");
    fails(gpu.gelu(Gelu::Erf, &x, &part(0)), "contiguous");
    fails(gpu.gelu_backward(Gelu::Erf, &x, &t([3, 4]), &x), "shares memory");
    fails(gpu.swiglu_backward(&x, &x, &x, &part(0), &part(3)), "d_gate and d_up share memory");
    fails(gpu.swiglu(&t([4, 3]).t().unwrap(), &x, &t([3, 4])), "rows must be contiguous");
    gpu.swiglu_backward(&x, &x, &x, &part(4), &part(0)).unwrap();
    // Nothing to do is no error, though a grid of no blocks would be.
    for shape in [[0, 3], [3, 0]] {
        gpu.gelu(Gelu::Tanh, &t(shape), &t(shape)).unwrap();
        gpu.swiglu(&t(shape), &t(shape), &t(shape)).unwrap();
    }
}
