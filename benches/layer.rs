//! The whole MoE layer, forward and forward + backward, beside one dense FFN of the same useful FLOPs.
//!
//! `cargo bench --bench layer`. Throughput is of the useful FLOPs, T·k rows through the experts' matrices, so Gelem/s
//! reads as GFLOP/s; a layer's over its dense baseline's is the layer's efficiency.

mod support;

use criterion::{BenchmarkId, Criterion, Throughput};
use fsmoe::Result;
use fsmoe::autograd::{Init, Tape};
use fsmoe::device::{Gelu, Lane};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{MoeConfig, MoeLayer};
use fsmoe::tensor::{DType, Tensor};
use std::hint::black_box;
use support::{STEP, criterion, normal};

/// (T, M, H): the layer of the tiny presets, and one of larger matrices.
const SHAPES: [(usize, usize, usize); 2] = [(2048, 128, 256), (1024, 512, 1024)];
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

fn main() -> Result<()> {
    let mut c = criterion();
    for shape in SHAPES {
        for expert in [ExpertKind::Gpt, ExpertKind::Mixtral] {
            let (t, m, h) = shape;
            let matrices = if expert == ExpertKind::Gpt { 2 } else { 3 };
            let forward = (2 * t * TOP_K * m * h * matrices) as u64;
            layer(&mut c, &format!("{expert}-T{t}-M{m}-H{h}"), shape, expert, forward)?;
            dense(&mut c, &format!("dense-{matrices}x-T{t}-M{m}-H{h}"), shape, matrices, forward)?;
        }
    }
    c.final_summary();
    Ok(())
}

fn layer(
    c: &mut Criterion,
    name: &str,
    (tokens, hidden, ffn): (usize, usize, usize),
    expert: ExpertKind,
    flops: u64,
) -> Result<()> {
    let lane = Lane::cpu();
    let mut group = c.benchmark_group("layer");
    for order in [OrderKind::Tutel, OrderKind::Ragged] {
        let config = MoeConfig {
            order,
            expert,
            experts: EXPERTS,
            top_k: TOP_K,
            hidden,
            ffn,
            gelu: Gelu::Tanh,
            ..MoeConfig::default()
        };
        let layer = MoeLayer::new(&Init::new(&lane, DType::F32, 3), &config)?;
        let (x, dy) = (normal(&lane, 1, [tokens, hidden]), normal(&lane, 2, [tokens, hidden]));
        let d_aux = lane.full([1], DType::F32, 1.0)?;
        group.throughput(Throughput::Elements(flops));
        group.bench_function(BenchmarkId::new(format!("forward/{order}"), name), |b| {
            b.iter(|| {
                let tape = Tape::inference(&lane);
                layer.forward(&tape, &tape.constant(black_box(&x).clone()), STEP).expect("a forward")
            })
        });
        group.throughput(Throughput::Elements(3 * flops));
        group.bench_function(BenchmarkId::new(format!("forward+backward/{order}"), name), |b| {
            b.iter(|| {
                let tape = Tape::new(&lane);
                let out = layer.forward(&tape, &tape.leaf(black_box(&x).clone()), STEP).expect("a forward");
                tape.backward(&[(&out.y, dy.clone()), (&out.aux_loss, d_aux.clone())]).expect("a backward")
            })
        });
    }
    group.finish();
    Ok(())
}

/// The matrix products alone of one FFN over T·k rows, the layer's experts being one.
fn dense(
    c: &mut Criterion,
    name: &str,
    (tokens, hidden, ffn): (usize, usize, usize),
    matrices: usize,
    flops: u64,
) -> Result<()> {
    let lane = Lane::cpu();
    let rows = tokens * TOP_K;
    let (x, act) = (normal(&lane, 1, [rows, hidden]), normal(&lane, 2, [rows, ffn]));
    let (dx, d_act) = (normal(&lane, 3, [rows, hidden]), normal(&lane, 4, [rows, ffn]));
    // Every matrix as (H, M): which way a product goes changes its shape, not its FLOPs.
    let weights: Vec<Tensor> = (0..matrices).map(|i| normal(&lane, 10 + i as u64, [ffn, hidden])).collect();
    let grads: Vec<Tensor> = (0..matrices).map(|i| normal(&lane, 20 + i as u64, [ffn, hidden])).collect();
    // All but the last go up, from M to H.
    let is_up = |i: usize| i + 1 < matrices;
    let forward = || -> Result<()> {
        for (i, w) in weights.iter().enumerate() {
            if is_up(i) {
                lane.gemm(1.0, &x, &w.t()?, 0.0, &d_act)?;
            } else {
                lane.gemm(1.0, &act, w, 0.0, &dx)?;
            }
        }
        Ok(())
    };
    let backward = || -> Result<()> {
        for (i, (w, dw)) in weights.iter().zip(&grads).enumerate() {
            if is_up(i) {
                lane.gemm(1.0, &act, w, 0.0, &dx)?;
                lane.gemm(1.0, &act.t()?, &x, 1.0, dw)?;
            } else {
                lane.gemm(1.0, &x, &w.t()?, 0.0, &d_act)?;
                lane.gemm(1.0, &act.t()?, &x, 1.0, dw)?;
            }
        }
        Ok(())
    };
    let mut group = c.benchmark_group("layer");
    group.throughput(Throughput::Elements(flops));
    group.bench_function(BenchmarkId::new("forward", name), |b| b.iter(|| forward().expect("products")));
    group.throughput(Throughput::Elements(3 * flops));
    group.bench_function(BenchmarkId::new("forward+backward", name), |b| {
        b.iter(|| {
            forward().expect("products");
            // The weights' gradients add up over iterations; from a bounded number of them nothing overflows.
            backward().expect("products");
        })
    });
    group.finish();
    Ok(())
}
