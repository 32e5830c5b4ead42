//! Dispatch and combine of the three orders, forward and backward.
//!
//! `cargo bench --bench orders`. Throughput is of the fewest bytes that must move: the tokens and the rows that are taken,
//! each read or written once.

mod support;

use criterion::{BenchmarkId, Criterion, Throughput};
use fsmoe::Result;
use fsmoe::autograd::Init;
use fsmoe::device::Lane;
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Capacity, GateContext, MoeConfig, gate};
use fsmoe::tensor::DType;
use std::hint::black_box;
use support::{STEP, criterion, normal};

/// T, M, E and k.
const TOKENS: usize = 4096;
const HIDDEN: usize = 512;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

fn main() -> Result<()> {
    let mut c = criterion();
    orders(&mut c)?;
    c.final_summary();
    Ok(())
}

fn orders(c: &mut Criterion) -> Result<()> {
    let lane = Lane::cpu();
    let config = MoeConfig { experts: EXPERTS, top_k: TOP_K, hidden: HIDDEN, ..MoeConfig::default() };
    let gate = gate::build(&Init::new(&lane, DType::F32, 3), &config)?;
    let x = normal(&lane, 1, [TOKENS, HIDDEN]);
    let cx = GateContext {
        lane: &lane,
        groups: 1,
        capacity: Capacity::Dropless,
        exact_capacity: true,
        step: STEP,
        ranks: None,
    };
    let (routing, _) = gate.forward(&cx, &x)?;
    let (dx, dy) = (normal(&lane, 2, [TOKENS, HIDDEN]), normal(&lane, 3, [TOKENS, HIDDEN]));

    let mut group = c.benchmark_group("order");
    let row = (HIDDEN * size_of::<f32>()) as u64;
    let (tokens, choices) = (TOKENS as u64 * row, (TOKENS * TOP_K) as u64 * row);
    for &kind in OrderKind::ALL {
        let order = kind.build();
        let (rows, saved) = order.dispatch(&lane, &routing, &x)?;
        let out = normal(&lane, 4, *rows.data.shape());

        group.throughput(Throughput::Bytes(tokens + choices));
        group.bench_function(BenchmarkId::new("dispatch", kind), |b| {
            b.iter(|| order.dispatch(&lane, &routing, black_box(&x)).expect("a dispatch"))
        });
        group.bench_function(BenchmarkId::new("dispatch_backward", kind), |b| {
            b.iter(|| order.dispatch_backward(&lane, &routing, &saved, &x, black_box(&out), &dx).expect("a backward"))
        });
        group.bench_function(BenchmarkId::new("combine", kind), |b| {
            b.iter(|| order.combine(&lane, &routing, &saved, black_box(&out)).expect("a combine"))
        });
        // Reads dy and the rows, for the weights' gradient, and writes the rows' gradient.
        group.throughput(Throughput::Bytes(tokens + 2 * choices));
        group.bench_function(BenchmarkId::new("combine_backward", kind), |b| {
            b.iter(|| order.combine_backward(&lane, &routing, &saved, black_box(&out), &dy).expect("a backward"))
        });
    }
    group.finish();
    Ok(())
}
