//! Prints what memory-bound operations reach, on shapes larger than any cache.

use fsmoe::device::cuda::Cuda;
use fsmoe::device::{ExpertKernels, Gelu, MathKernels, MemoryKernels};
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Tensor};

use super::support::gpu;

/// The median of the times of `launch`, in seconds.
pub(super) fn seconds(lane: &Cuda, launch: &dyn Fn()) -> f64 {
    launch();
    let mut times: Vec<f64> = (0..15)
        .map(|_| {
            let start = lane.mark(true).unwrap();
            launch();
            let end = lane.mark(true).unwrap();
            start.elapsed_ms(&end).unwrap() * 1e-3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The same of one of `n` launches in a CUDA graph, so without what the host takes to launch; they are given their number.
pub(super) fn replayed_seconds(lane: &Cuda, n: usize, launch: &dyn Fn(usize)) -> f64 {
    launch(0);
    let all = || {
        (0..n).for_each(launch);
        Ok(())
    };
    let (graph, ()) = lane.capture(&[], all).unwrap();
    seconds(lane, &|| graph.replay().unwrap()) / n as f64
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_bandwidth_of_memory_bound_operations() {
    let lane = gpu().fork().unwrap();
    let report = |name: &str, bytes: usize, launch: &dyn Fn()| {
        let seconds = seconds(&lane, launch);
        println!("{name:48} {:9.1} us {:8.1} GB/s", seconds * 1e6, bytes as f64 / seconds / 1e9);
    };
    let tensor = |shape: &[usize], dtype: DType| {
        let t = lane.alloc(shape.into(), dtype).unwrap();
        let rng = Counter { seed: 1, purpose: Purpose::Test, step: shape.len() as u64 };
        lane.normal(rng, 0, &t).unwrap();
        t
    };
    let (bf16, f32) = (DType::BF16, DType::F32);
    let (rows, cols) = (16384, 14336);
    let n = rows * cols;
    let [x, y, z] = [(); 3].map(|()| tensor(&[rows, cols], bf16));
    let [gate_up, d_gate_up] = [(); 2].map(|()| tensor(&[rows, 2 * cols], bf16));
    let halves = |t: &Tensor| [0, cols].map(|start| t.narrow(1, start, cols).unwrap());
    let ([gate, up], [d_gate, d_up]) = (halves(&gate_up), halves(&d_gate_up));

    report("copy bf16, one stretch", 4 * n, &|| lane.copy(&x, &y).unwrap());
    for form in [Gelu::Erf, Gelu::Tanh] {
        report(&format!("gelu bf16 {form:?}"), 4 * n, &|| lane.gelu(form, &x, &y).unwrap());
        report(&format!("gelu backward bf16 {form:?}"), 6 * n, &|| lane.gelu_backward(form, &x, &y, &z).unwrap());
    }
    report("swiglu bf16, halves", 6 * n, &|| lane.swiglu(&gate, &up, &y).unwrap());
    report("swiglu backward bf16, halves", 10 * n, &|| {
        lane.swiglu_backward(&gate, &up, &x, &d_gate, &d_up).unwrap();
    });
    report("copy bf16, columns of a wider matrix", 4 * n, &|| lane.copy(&gate, &y).unwrap());
    let turned = lane.alloc([cols, rows].into(), bf16).unwrap();
    report("copy bf16, transposed", 4 * n, &|| lane.copy(&x.t().unwrap(), &turned).unwrap());
    report("add bf16", 6 * n, &|| lane.add(&x, &y, &z).unwrap());
    let bias = tensor(&[cols], bf16);
    report("add bf16, a row to each", 4 * n, &|| lane.add(&x, &bias, &z).unwrap());
    let wide = tensor(&[rows, cols], f32);
    report("copy bf16 to f32", 6 * n, &|| lane.copy(&x, &wide).unwrap());
    report("copy f32 to bf16", 6 * n, &|| lane.copy(&wide, &x).unwrap());
    report("axpby bf16 onto f32", 10 * n, &|| lane.axpby(1.0, &x, 1.0, &wide).unwrap());
    report("fill bf16", 2 * n, &|| lane.fill(&z, 1.0).unwrap());
    let [one, row] = [1, cols].map(|n| tensor(&[n], f32));
    report("dot bf16 of two", 4 * n, &|| lane.dot(&x, &y, &one).unwrap());
    report("dot f32 with itself", 4 * n, &|| lane.dot(&wide, &wide, &one).unwrap());
    report("sum_rows bf16 (16384, 14336)", 2 * n, &|| lane.sum_rows(&x, &row).unwrap());
    let narrow = x.reshape([n / 64, 64]).unwrap();
    let few = tensor(&[64], f32);
    report("sum_rows bf16 (3670016, 64)", 2 * n, &|| lane.sum_rows(&narrow, &few).unwrap());
    report("softmax bf16 (16384, 14336)", 4 * n, &|| lane.softmax(&x, &y).unwrap());
    for width in [8, 128, 1024] {
        let logits = tensor(&[32768, width], f32);
        let probs = lane.alloc([32768, width].into(), f32).unwrap();
        let bytes = 8 * 32768 * width;
        report(&format!("softmax f32 (32768, {width})"), bytes, &|| lane.softmax(&logits, &probs).unwrap());
        report(&format!("sigmoid f32 (32768, {width})"), bytes, &|| lane.sigmoid(&logits, &probs).unwrap());
        let norm = lane.alloc([32768].into(), f32).unwrap();
        report(&format!("normalise_l2 f32 (32768, {width})"), bytes, &|| {
            lane.normalise_l2(&logits, 1e-6, &probs, &norm).unwrap();
        });
        let rng = Counter { seed: 1, purpose: Purpose::GateNoise, step: 1 };
        report(&format!("normal f32 (32768, {width})"), bytes / 2, &|| lane.normal(rng, 0, &probs).unwrap());
    }
    // Products: TFLOP/s in place of bandwidth.
    let (m, k, n) = (8192, 4096, 14336);
    let (a, b, c) = (tensor(&[m, k], bf16), tensor(&[k, n], bf16), lane.alloc([m, n].into(), bf16).unwrap());
    let time = seconds(&lane, &|| lane.gemm(1.0, &a, &b, 0.0, &c).unwrap());
    println!("gemm bf16 8192 x 4096 x 14336: {:.1} TFLOP/s", 2.0 * (m * k * n) as f64 / time / 1e12);
    let grad = lane.alloc([k, n].into(), bf16).unwrap();
    let time = seconds(&lane, &|| lane.gemm(1.0, &a.t().unwrap(), &c, 0.0, &grad).unwrap());
    println!("gemm bf16, a transposed: {:.1} TFLOP/s", 2.0 * (m * k * n) as f64 / time / 1e12);
}
