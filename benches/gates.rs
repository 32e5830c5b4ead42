//! The gates whole, and the routing kernels alone.
//!
//! `cargo bench --bench gates`. Throughput is tokens per second.

mod support;

use criterion::{BenchmarkId, Criterion, Throughput};
use fsmoe::Result;
use fsmoe::autograd::Init;
use fsmoe::device::Lane;
use fsmoe::moe::gate::{self, GateKind};
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Assignment, Capacity, Gate, GateContext, MoeConfig, Routing, RoutingGrad};
use fsmoe::tensor::{DType, Tensor};
use std::hint::black_box;
use support::{STEP, criterion, normal};

/// T, M and E of the gates.
const TOKENS: usize = 4096;
const HIDDEN: usize = 256;
const EXPERTS: usize = 32;

fn main() -> Result<()> {
    let mut c = criterion();
    gates(&mut c)?;
    kernels(&mut c)?;
    c.final_summary();
    Ok(())
}

/// A random gradient for everything in a routing.
fn gradient(lane: &Lane, routing: &Routing) -> RoutingGrad {
    let like = |stream, t: &Tensor| normal(lane, stream, *t.shape());
    let (combine, dispatch) = match &routing.assignment {
        Assignment::TokenChoice { weights, .. } | Assignment::ExpertChoice { weights, .. } => (like(10, weights), None),
        Assignment::Dense { dispatch, combine } => (like(10, combine), Some(like(11, dispatch))),
    };
    RoutingGrad { combine, dispatch, balance: normal(lane, 12, [1]), z: normal(lane, 13, [1]) }
}

fn gates(c: &mut Criterion) -> Result<()> {
    let lane = Lane::cpu();
    let x = normal(&lane, 1, [TOKENS, HIDDEN]);
    let dx = normal(&lane, 2, [TOKENS, HIDDEN]);
    let mut group = c.benchmark_group("gate");
    group.throughput(Throughput::Elements(TOKENS as u64));
    for kind in GateKind::ALL {
        let soft = *kind == GateKind::Soft;
        let config = MoeConfig {
            gate: *kind,
            order: if soft { OrderKind::GShard } else { OrderKind::Tutel },
            experts: EXPERTS,
            top_k: 2,
            hidden: HIDDEN,
            // As many slots in all as the others take choices.
            soft_slots: 2 * TOKENS / EXPERTS / 8,
            groups: if soft { 8 } else { 1 },
            capacity: Capacity::Factor(1.25),
            ..MoeConfig::default()
        };
        let gate: Box<dyn Gate> = gate::build(&Init::new(&lane, DType::F32, 3), &config)?;
        let cx = GateContext {
            lane: &lane,
            groups: config.groups,
            capacity: config.capacity,
            exact_capacity: true,
            step: STEP,
            ranks: None,
        };
        let (routing, _) = gate.forward(&cx, &x)?;
        let grad = gradient(&lane, &routing);
        group.bench_function(BenchmarkId::new("forward", kind), |b| {
            b.iter(|| gate.forward(&cx, black_box(&x)).expect("a forward"))
        });
        group.bench_function(BenchmarkId::new("forward+backward", kind), |b| {
            b.iter(|| {
                let (routing, saved) = gate.forward(&cx, black_box(&x)).expect("a forward");
                gate.backward(&cx, &x, &routing, &saved, &grad, &dx).expect("a backward");
            })
        });
    }
    group.finish();
    Ok(())
}

fn kernels(c: &mut Criterion) -> Result<()> {
    const TOKENS: usize = 8192;
    const EXPERTS: usize = 64;
    const K: usize = 4;
    const CAPACITY: usize = TOKENS * K / EXPERTS;
    let lane = Lane::cpu();
    let probs = lane.empty([TOKENS, EXPERTS], DType::F32)?;
    lane.softmax(&normal(&lane, 1, [TOKENS, EXPERTS]), &probs)?;
    let experts = lane.empty([TOKENS, K], DType::I32)?;
    lane.top_k(&probs, None, None, &experts)?;
    let slots = lane.empty([TOKENS, K], DType::I32)?;
    let tokens = lane.empty([EXPERTS, CAPACITY], DType::I32)?;
    let weights = lane.empty([EXPERTS, CAPACITY], DType::F32)?;
    let mut group = c.benchmark_group("routing");
    group.throughput(Throughput::Elements(TOKENS as u64));
    group.bench_function("top_k", |b| b.iter(|| lane.top_k(black_box(&probs), None, None, &experts).expect("top_k")));
    group.bench_function("assign_slots", |b| {
        b.iter(|| lane.assign_slots(black_box(&experts), None, EXPERTS, 1, CAPACITY, &slots).expect("assign_slots"))
    });
    group.bench_function("expert_choice", |b| {
        b.iter(|| lane.expert_choice(black_box(&probs), 1, CAPACITY, &tokens, &weights).expect("expert_choice"))
    });
    group.finish();
    Ok(())
}
