//! A schedule of one's own, compared with the library's on the same costs, and run.
//!
//! `cargo run --release --example custom_policy`
//!
//! The policy keeps FSMoE's three lanes and puts the weight gradients last: backward, the data gradients of all chunks are
//! computed first, so that the gradients of the tokens are on their way back as early as possible, and the weight gradients
//! fill the time in which they travel. (Zero-bubble pipelines split the backward in the same way; Qi et al. 2024.)
//!
//! At the end both run training steps of a tiny model on four ranks, threads of this process: with the same gradients, to the
//! bit.

use fsmoe::Result;
use fsmoe::bench::schedule::{self, Settings, Shape};
use fsmoe::bench::schedule_table;
use fsmoe::comm::{AllToAllKind, Sizes, Topology, local};
use fsmoe::device::{Lane, LaneKind};
use fsmoe::engine::{TaskGraph, TaskId};
use fsmoe::moe::distributed::Parallel;
use fsmoe::report::{Plans, gantt};
use fsmoe::schedule::policy::{FsMoe, all};
use fsmoe::schedule::{
    BlockShape, Degree, Gradients, LayerCosts, LayerOp, LayerPass, LayerShape, ModelCosts, Pass, Planner, Policy,
    Profile, Stage, layer_graph,
};
use fsmoe::tensor::DType;
use std::sync::Arc;
use std::time::Duration;

struct WeightsLast;

impl Policy for WeightsLast {
    fn name(&self) -> &str {
        "weights-last"
    }

    fn degrees(&self, costs: &LayerCosts) -> Vec<Degree> {
        (1..=costs.max_chunks).map(Degree::all_first).collect()
    }

    fn same_both_ways(&self) -> bool {
        false
    }

    fn gradients(&self) -> Gradients {
        Gradients::Fitted
    }

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        let r = pass.degree.r;
        // Where each chunk has got to. A lane runs its tasks in the order they are added here.
        let mut ways = vec![pass.after; r];
        let add = |graph: &mut TaskGraph<LayerOp>, lane, stage, chunk, after: Option<TaskId>| {
            graph.add(lane, LayerOp::Chunk { block: pass.block, pass: pass.pass, stage, chunk, of: r }, after)
        };
        for (chunk, way) in ways.iter_mut().enumerate() {
            for (phase, exchange) in costs.dispatch.iter().enumerate() {
                *way = Some(add(graph, exchange.lane, Stage::Dispatch(phase as u8), chunk, *way)?);
            }
            if let Some(gather) = costs.all_gather {
                *way = Some(add(graph, gather.lane, Stage::AllGather, chunk, *way)?);
            }
        }
        for s in pass.slices {
            graph.add(s.lane, LayerOp::Reduce(s.slice), pass.after)?;
        }
        let mut experts = Vec::new();
        for (chunk, way) in ways.iter_mut().enumerate() {
            let expert = add(graph, LaneKind::Compute, Stage::Expert, chunk, *way)?;
            experts.push(expert);
            *way = Some(expert);
            if let Some(scatter) = costs.reduce_scatter {
                *way = Some(add(graph, scatter.lane, Stage::ReduceScatter, chunk, *way)?);
            }
            for (phase, exchange) in costs.combine.iter().enumerate() {
                *way = Some(add(graph, exchange.lane, Stage::Combine(phase as u8), chunk, *way)?);
            }
        }
        if pass.pass == Pass::Backward {
            for (chunk, &expert) in experts.iter().enumerate() {
                add(graph, LaneKind::Compute, Stage::WeightGrad, chunk, Some(expert))?;
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    // Four blocks on FSMoE's 32 GPUs and published costs.
    let world = Topology::new(Sizes::new(32, 4, 8, 4, 8))?;
    let (tokens, hidden) = (2048, 2048);
    let attention = 8.0 * tokens as f64 * (hidden * hidden) as f64;
    let block = BlockShape {
        gemms: vec![attention],
        mp_reduced: tokens * hidden,
        mp_gathered: tokens * hidden,
        sharded: 4 * (hidden * hidden) as u64,
        replicated: 0,
        moe: Some(LayerShape {
            tokens: tokens / world.sizes().mp,
            rows_per_token: 2.4,
            hidden,
            ffn: 4 * hidden,
            experts: 4,
            gemms: 2,
            all_to_all: AllToAllKind::Direct,
        }),
    };
    let model = ModelCosts::new(&vec![block; 4], &world, &Profile::published()?)?;

    let mut planner = Planner::new();
    let mut plans = Plans::default();
    let mut policies = all();
    policies.push(Box::new(WeightsLast));
    for policy in &policies {
        let plan = planner.plan(&**policy, &model)?;
        plans.add(&plan, &planner.bound(&**policy, &model)?, model.exposed(&plan));
    }
    print!("{plans}");

    // Both backwards of one layer, each at its best.
    let Some(costs) = &model.blocks[0].moe else { return Ok(()) };
    for policy in [&FsMoe as &dyn Policy, &WeightsLast] {
        let best = planner.best(policy, costs, Pass::Backward)?;
        let pass = LayerPass { block: 0, pass: Pass::Backward, degree: best.degree, after: None, slices: &[] };
        let graph = layer_graph(policy, costs, &pass)?;
        let timeline = model.simulator().timeline(&graph, |op| model.price(op));
        print!("\n{}, r = {}\n{}", policy.name(), best.degree.r, gantt(&timeline, 100));
    }
    run()
}

/// Steps under both, planned on what these ranks are measured to cost. A policy under which gradients differ is an error.
fn run() -> Result<()> {
    let (shape, all_to_all): (Shape, _) = ("tiny".parse()?, AllToAllKind::Direct);
    let topology = Topology::new(shape.sizes(4, 2))?;
    let settings = Settings {
        dtype: DType::F32,
        emulate: None,
        all_to_all,
        steps: 5,
        measure: Duration::from_millis(300),
        trace: false,
    };
    let policies: [Arc<dyn Policy>; 2] = [Arc::new(FsMoe), Arc::new(WeightsLast)];
    let outcomes = local::run(4, Duration::from_secs(60), |world| {
        let parallel = Parallel::new(&Lane::cpu(), world, topology, all_to_all.build())?;
        schedule::run(&parallel, &shape, &settings, &policies)
    })?;
    for outcome in outcomes.iter().take(1) {
        print!("\n{}gradients differ by {}\n", schedule_table(&outcome.rows), outcome.difference);
    }
    Ok(())
}
