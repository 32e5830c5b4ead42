//! The planner: exact search on the simulator.

use super::step::Pending;
use super::{
    Degree, GradGroup, Gradients, LayerCosts, LayerOp, LayerPass, ModelCosts, Pass, Policy, Slice, SliceTask, Windows,
    step_graph,
};
use crate::device::LaneKind;
use crate::engine::{Bound, LANES, Simulator, TaskGraph};
use crate::error::{Result, config_err};
use serde::Serialize;

/// A plan for a step: how every MoE layer is cut, and where gradients are reduced.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The policy's name.
    pub policy: String,
    /// Forward and backward of each block; none without an MoE layer.
    pub degrees: Vec<Option<[Degree; 2]>>,
    /// Where gradients are reduced.
    pub windows: Windows,
    /// What the step takes, simulated.
    pub seconds: f64,
}

/// What one way of cutting a layer's pass comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// How it is cut.
    pub degree: Degree,
    /// What the pass takes.
    pub seconds: f64,
    /// By lane: what a slice of gradients of x seconds on it adds to: with the slice, the pass takes exactly
    /// max(`seconds`, `around` + x).
    pub around: [f64; 3],
}

impl Candidate {
    /// By lane: the longest slice that the pass is not longer for.
    pub fn idle(&self) -> [f64; 3] {
        self.around.map(|around| (self.seconds - around).max(0.0))
    }
}

/// Less than this part of a time is rounding: equally fast, and the first is taken.
const ROUNDING: f64 = 1e-12;

/// How much a second of a lane's idle time is worth beside a second of the pass, when gradients are left over. The best
/// price depends on how much is left, so all are tried; at 0 every pass is the fastest alone, at 1 it takes the most
/// gradients per second of delay.
const PRICES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// Makes plans. Reused, it keeps its memory: a graph is built and simulated in microseconds.
#[derive(Debug, Default)]
pub struct Planner {
    simulator: Simulator,
    graph: TaskGraph<LayerOp>,
}

impl Planner {
    /// One that has planned nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every way in which a policy may cut a pass through a layer, with what it comes to. `lanes` are those that slices of
    /// gradients run on.
    ///
    /// # Errors
    /// If the policy offers a degree that the layer cannot be cut in.
    pub fn candidates(
        &mut self,
        policy: &dyn Policy,
        costs: &LayerCosts,
        pass: Pass,
        lanes: &[LaneKind],
    ) -> Result<Vec<Candidate>> {
        // A slice per lane, told apart by their bytes, whose costs are what is tried.
        let slice = |lane: LaneKind| Slice { group: GradGroup::Dense, begin: 0, end: 1 + lane as u64 };
        let slices: Vec<SliceTask> =
            lanes.iter().map(|&lane| SliceTask { slice: slice(lane), lane, after: None }).collect();
        let mut candidates = Vec::new();
        for degree in policy.degrees(costs) {
            self.graph.clear();
            let part = LayerPass { block: 0, pass, degree, after: None, slices: &slices };
            policy.layer(&mut self.graph, costs, &part)?;
            let cost = |op: &LayerOp, tried: Option<LaneKind>, x: f64| match *op {
                LayerOp::Chunk { stage, of, .. } => costs.seconds(stage, of),
                LayerOp::Reduce(s) if Some(s) == tried.map(slice) => x,
                LayerOp::Reduce(_) | LayerOp::Dense { .. } => 0.0,
            };
            let seconds = self.simulator.makespan(&self.graph, |op| cost(op, None, 0.0));
            let mut around = [seconds; 3];
            for &lane in lanes {
                // As long as the pass, the slice is on the longest way through the graph; the rest of the way is what
                // does not depend on its length.
                let with = self.simulator.makespan(&self.graph, |op| cost(op, Some(lane), seconds));
                around[lane as usize] = with - seconds;
            }
            candidates.push(Candidate { degree, seconds, around });
        }
        if candidates.is_empty() {
            config_err!("policy {} offers no way to cut a layer of up to {} chunks", policy.name(), costs.max_chunks);
        }
        Ok(candidates)
    }

    /// The fastest way to cut a pass through a layer by itself.
    ///
    /// # Errors
    /// As [`Planner::candidates`].
    pub fn best(&mut self, policy: &dyn Policy, costs: &LayerCosts, pass: Pass) -> Result<Candidate> {
        let candidates = self.candidates(policy, costs, pass, &[])?;
        Ok(candidates[first_least(candidates.iter().map(|c| c.seconds))])
    }

    /// The best plan of a policy for a step of a model.
    ///
    /// # Errors
    /// As [`Planner::candidates`]; also if the model has no blocks.
    pub fn plan(&mut self, policy: &dyn Policy, model: &ModelCosts) -> Result<Plan> {
        if model.blocks.is_empty() {
            config_err!("a plan for a model without blocks");
        }
        let choices = Choices::new(self, policy, model)?;
        let prices = if policy.gradients() == Gradients::Fitted { &PRICES[..] } else { &PRICES[..1] };
        let mut best: Option<Plan> = None;
        for &price in prices {
            let mut plan = choices.plan(policy, model, price);
            let graph = step_graph(policy, model, &plan)?;
            plan.seconds = self.simulator.makespan(&graph, |op| model.seconds(op));
            if best.as_ref().is_none_or(|best| plan.seconds < best.seconds * (1.0 - ROUNDING)) {
                best = Some(plan);
            }
        }
        best.map_or_else(|| config_err!("no plan"), Ok)
    }

    /// What no plan of a policy can beat: the busiest lane's tasks, gradients included, at each layer's least; and the way
    /// through all blocks, each layer at the least that any graph of it can take.
    ///
    /// # Errors
    /// As [`Planner::candidates`].
    pub fn bound(&mut self, policy: &dyn Policy, model: &ModelCosts) -> Result<Bound> {
        let mut way = 0.0;
        let mut busy = [0.0f64; 3];
        for (i, block) in model.blocks.iter().enumerate() {
            busy[LaneKind::Compute as usize] += block.dense[0] + block.dense[1];
            way += block.dense[0] + block.dense[1];
            let Some(moe) = &block.moe else { continue };
            for pass in [Pass::Forward, Pass::Backward] {
                let (mut least_way, mut least_busy) = (f64::MAX, [f64::MAX; 3]);
                for degree in policy.degrees(moe) {
                    self.graph.clear();
                    let part = LayerPass { block: i, pass, degree, after: None, slices: &[] };
                    policy.layer(&mut self.graph, moe, &part)?;
                    let graph = &self.graph;
                    least_way = least_way.min(self.simulator.bound(graph, |op| model.seconds(op)).seconds());
                    for lane in LANES {
                        let sum = graph.on_lane(lane).iter().map(|&id| model.seconds(graph.op(id))).sum();
                        least_busy[lane as usize] = least_busy[lane as usize].min(sum);
                    }
                }
                way += least_way;
                busy.iter_mut().zip(least_busy).for_each(|(busy, least)| *busy += least);
            }
        }
        let mut all = Pending::new(model);
        model.gradients().for_each(|(_, _, bytes)| all.complete(bytes));
        busy.iter_mut().zip(all.seconds(policy)).for_each(|(busy, reduce)| *busy += reduce);
        let lane = LANES.into_iter().max_by(|&a, &b| busy[a as usize].total_cmp(&busy[b as usize]));
        let lane = lane.unwrap_or(LaneKind::Compute);
        Ok(Bound { busiest: busy[lane as usize], lane, critical_path: way })
    }
}

/// What there is to choose from in each block, forward and backward; blocks with equal layers share it.
struct Choices {
    layers: Vec<[Vec<Candidate>; 2]>,
    of_block: Vec<Option<usize>>,
}

impl Choices {
    fn new(planner: &mut Planner, policy: &dyn Policy, model: &ModelCosts) -> Result<Self> {
        let mut lanes: Vec<LaneKind> =
            model.reduce.iter().flatten().map(|&(lane, _)| policy.reduce_lane(lane)).collect();
        lanes.sort_by_key(|&lane| lane as usize);
        lanes.dedup();
        let mut choices = Choices { layers: Vec::new(), of_block: Vec::new() };
        let mut known: Vec<&LayerCosts> = Vec::new();
        for block in &model.blocks {
            let Some(costs) = &block.moe else {
                choices.of_block.push(None);
                continue;
            };
            let found = known.iter().position(|&other| other == costs);
            choices.of_block.push(Some(found.unwrap_or(known.len())));
            if found.is_none() {
                known.push(costs);
                choices.layers.push([
                    planner.candidates(policy, costs, Pass::Forward, &[])?,
                    planner.candidates(policy, costs, Pass::Backward, &lanes)?,
                ]);
            }
        }
        Ok(choices)
    }

    /// A plan in which a second of idle time that gradients fill is worth `price` seconds.
    fn plan(&self, policy: &dyn Policy, model: &ModelCosts, price: f64) -> Plan {
        let blocks = model.blocks.len();
        let windows = Windows { moe: vec![Vec::new(); blocks], dense: vec![Vec::new(); blocks], after: Vec::new() };
        let mut plan = Plan { policy: policy.name().to_owned(), degrees: vec![None; blocks], windows, seconds: 0.0 };
        let mut pending = Pending::new(model);
        for (i, block) in model.blocks.iter().enumerate().rev() {
            if let Some(layer) = self.of_block[i] {
                let [forward, backward] = &self.layers[layer];
                let wanted = pending.seconds(policy);
                let worth = |c: &Candidate| {
                    let filled: f64 = c.idle().iter().zip(wanted).map(|(idle, wanted)| idle.min(wanted)).sum();
                    c.seconds - price * filled
                };
                let (f, b) = if policy.same_both_ways() {
                    let same = first_least(forward.iter().zip(backward).map(|(f, b)| f.seconds + worth(b)));
                    (same, same)
                } else {
                    (first_least(forward.iter().map(|c| c.seconds)), first_least(backward.iter().map(worth)))
                };
                plan.degrees[i] = Some([forward[f].degree, backward[b].degree]);
                plan.windows.moe[i] = match policy.gradients() {
                    Gradients::After | Gradients::WithDense => Vec::new(),
                    Gradients::Pieces(size) => pending.pieces(policy, backward[b].idle(), size),
                    Gradients::Fitted => pending.fitted(policy, backward[b].idle()),
                };
            }
            pending.complete(block.moe_gradients);
            // Nothing is exchanged meanwhile: the lanes are free for as long as it takes.
            let idle = [block.dense[1]; 3];
            plan.windows.dense[i] = match policy.gradients() {
                Gradients::After => Vec::new(),
                Gradients::WithDense => pending.all(),
                Gradients::Pieces(size) => pending.pieces(policy, idle, size),
                Gradients::Fitted => pending.fitted(policy, idle),
            };
            pending.complete(block.dense_gradients);
        }
        plan.windows.after = match policy.gradients() {
            Gradients::Pieces(size) => pending.all_in_pieces(size),
            _ => pending.all(),
        };
        plan
    }
}

/// The place of the least value; of equal ones, of the first.
fn first_least(values: impl Iterator<Item = f64>) -> usize {
    let mut least = (0, f64::MAX);
    for (i, value) in values.enumerate() {
        if value < least.1 - ROUNDING * least.1.abs() {
            least = (i, value);
        }
    }
    least.0
}
