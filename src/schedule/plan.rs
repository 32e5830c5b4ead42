//! The planner: exact search on the simulator.

use super::share::{Choice, choices, share};
use super::step::Pending;
use super::{
    BlockCosts, Degree, GradGroup, Gradients, LayerCosts, LayerOp, LayerPass, ModelCosts, Pass, Policy, Slice,
    SliceTask, Windows, policy, step_graph,
};
use crate::device::LaneKind;
use crate::engine::{Bound, LANES, Price, Simulator, TaskGraph};
use crate::error::{Result, config_err};
use serde::{Deserialize, Serialize};

/// A plan for a step: how every MoE layer is cut, and where gradients are reduced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// max(`seconds`, `around` + x), or about max(`seconds` + `lost`·x, `around` + x) where lanes slow each other down.
    pub around: [f64; 3],
    /// By lane: what a second of a slice on it costs the pass that it is hidden in; 0 where lanes do not slow each other
    /// down.
    pub lost: [f64; 3],
}

impl Plan {
    /// How layers are cut in a pass: as most are; of equally common ways the first.
    pub fn commonest(&self, pass: Pass) -> Option<Degree> {
        let degrees: Vec<Degree> = self.degrees.iter().flatten().map(|d| d[pass as usize]).collect();
        let count = |d: &Degree| degrees.iter().filter(|other| *other == d).count();
        degrees.iter().rev().max_by_key(|d| count(d)).copied()
    }
}

impl Candidate {
    /// By lane: the longest slice that the pass is not longer for, but for what its lanes lose to it.
    pub fn idle(&self) -> [f64; 3] {
        idle(self.seconds, self.around, self.lost)
    }
}

/// By lane: until which length of a slice `seconds` + `lost`·x is what counts, not `around` + x; none where hiding costs more
/// than it hides.
pub(super) fn idle(seconds: f64, around: [f64; 3], lost: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|lane| match lost[lane] < 1.0 {
        true => ((seconds - around[lane]) / (1.0 - lost[lane])).max(0.0),
        false => 0.0,
    })
}

/// Less than this part of a time is rounding: equally fast, and the first is taken.
pub(super) const ROUNDING: f64 = 1e-12;

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
        let slices: Vec<SliceTask> = lanes.iter().map(|&lane| SliceTask { slice: slice(lane), lane }).collect();
        let mut candidates = Vec::new();
        let slows = self.simulator.slows();
        for degree in policy.degrees(costs) {
            self.graph.clear();
            let part = LayerPass { block: 0, pass, degree, after: None, slices: &slices };
            policy.layer(&mut self.graph, costs, &part)?;
            let cost = |op: &LayerOp, tried: Option<LaneKind>, x: f64| match *op {
                LayerOp::Reduce(s) if Some(s) == tried.map(slice) => x.into(),
                LayerOp::Chunk { stage, .. } => Price { seconds: stage_seconds(costs, op), like: costs.lane(stage) },
                _ => stage_seconds(costs, op).into(),
            };
            let seconds = self.simulator.makespan(&self.graph, |op| cost(op, None, 0.0));
            let (mut around, mut lost) = ([seconds; 3], [0.0; 3]);
            for &lane in lanes {
                // As long as the pass, the slice is on the longest way through the graph; the rest of the way is what
                // does not depend on its length.
                let mut with = |x: f64| self.simulator.makespan(&self.graph, |op| cost(op, Some(lane), x));
                around[lane as usize] = with(seconds) - seconds;
                let hidden = seconds - around[lane as usize];
                if slows && hidden > ROUNDING * seconds {
                    lost[lane as usize] = ((with(hidden) - seconds) / hidden).max(0.0);
                }
            }
            candidates.push(Candidate { degree, seconds, around, lost });
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
        let alone = std::mem::replace(&mut self.simulator, model.simulator());
        let plan = self.plan_on_lanes(policy, model);
        self.simulator = alone;
        plan
    }

    fn plan_on_lanes(&mut self, policy: &dyn Policy, model: &ModelCosts) -> Result<Plan> {
        let choices = Choices::new(self, policy, model)?;
        let mut plans = Vec::new();
        if policy.gradients() == Gradients::Fitted {
            plans = choices.shared(policy, model);
            if self.simulator.slows() {
                // What is fitted is then fitted by estimates: where others have gradients may be better.
                let others = policy::all().into_iter().map(|other| other.gradients());
                plans.extend(others.filter(|g| *g != Gradients::Fitted).map(|g| choices.plan(policy, model, g)));
            }
        } else {
            plans.push(choices.plan(policy, model, policy.gradients()));
        }
        let mut best: Option<Plan> = None;
        for mut plan in plans {
            let graph = step_graph(policy, model, &plan)?;
            plan.seconds = self.simulator.makespan(&graph, |op| model.price(op));
            if best.as_ref().is_none_or(|best| plan.seconds < best.seconds * (1.0 - ROUNDING)) {
                best = Some(plan);
            }
        }
        best.map_or_else(|| config_err!("no plan"), Ok)
    }

    /// What no plan of a policy can beat. The way through all blocks, each layer at the least that any graph of it can take;
    /// and what a lane has to do, at each layer's least, after any point of that way: its tasks from there on and the
    /// gradients that are not complete before.
    ///
    /// # Errors
    /// As [`Planner::candidates`].
    pub fn bound(&mut self, policy: &dyn Policy, model: &ModelCosts) -> Result<Bound> {
        let mut least: Vec<[Least; 2]> = Vec::new();
        for (i, block) in model.blocks.iter().enumerate() {
            let none = Least { way: 0.0, busy: [0.0; 3] };
            let mut passes = [none, none];
            if let Some(moe) = &block.moe {
                for pass in [Pass::Forward, Pass::Backward] {
                    passes[pass as usize] = match known(&model.blocks[..i], moe) {
                        Some(same) => least[same][pass as usize],
                        None => self.least(policy, moe, pass)?,
                    };
                }
            }
            least.push(passes);
        }
        // The step's parts in order: what each adds to the way and the lanes, and the gradients complete after it.
        let mut parts = Vec::new();
        let dense = |block: usize, pass: Pass| {
            let seconds = model.blocks[block].dense[pass as usize];
            Least { way: seconds, busy: [seconds, 0.0, 0.0] }
        };
        for (i, passes) in least.iter().enumerate() {
            parts.push((dense(i, Pass::Forward), [0; 3]));
            parts.push((passes[Pass::Forward as usize], [0; 3]));
        }
        for (i, passes) in least.iter().enumerate().rev() {
            parts.push((passes[Pass::Backward as usize], model.blocks[i].moe_gradients));
            parts.push((dense(i, Pass::Backward), model.blocks[i].dense_gradients));
        }
        let critical_path: f64 = parts.iter().map(|(part, _)| part.way).sum();
        let mut bound = Bound { busiest: 0.0, lane: LaneKind::Compute, critical_path };
        let (mut way, mut busy, mut late) = (critical_path, [0.0; 3], Pending::new(model));
        for (part, gradients) in parts.iter().rev() {
            // What this part completes cannot be reduced before its end, and what the lanes do later not either.
            late.complete(*gradients);
            let reduce = late.seconds(policy);
            for lane in LANES {
                let ends = way + busy[lane as usize] + reduce[lane as usize];
                if reduce[lane as usize] > 0.0 && ends > bound.busiest {
                    bound = Bound { busiest: ends, lane, critical_path };
                }
            }
            way -= part.way;
            busy.iter_mut().zip(part.busy).for_each(|(busy, part)| *busy += part);
        }
        let reduce = late.seconds(policy);
        for lane in LANES {
            let all = busy[lane as usize] + reduce[lane as usize];
            if all > bound.busiest {
                bound = Bound { busiest: all, lane, critical_path };
            }
        }
        Ok(bound)
    }

    /// The least that a pass through a layer, and each lane in it, can take.
    fn least(&mut self, policy: &dyn Policy, costs: &LayerCosts, pass: Pass) -> Result<Least> {
        let mut least = Least { way: f64::MAX, busy: [f64::MAX; 3] };
        for degree in policy.degrees(costs) {
            self.graph.clear();
            let part = LayerPass { block: 0, pass, degree, after: None, slices: &[] };
            policy.layer(&mut self.graph, costs, &part)?;
            let (graph, cost) = (&self.graph, |op: &LayerOp| stage_seconds(costs, op));
            least.way = least.way.min(self.simulator.bound(graph, cost).seconds());
            for lane in LANES {
                let sum = graph.on_lane(lane).iter().map(|&id| cost(graph.op(id))).sum();
                least.busy[lane as usize] = least.busy[lane as usize].min(sum);
            }
        }
        Ok(least)
    }
}

/// The least that a part of a step adds to the way through it, and to what each lane has to do: seconds.
#[derive(Clone, Copy)]
struct Least {
    way: f64,
    busy: [f64; 3],
}

/// A block before with the same layer.
fn known(blocks: &[BlockCosts], costs: &LayerCosts) -> Option<usize> {
    blocks.iter().position(|block| block.moe.as_ref() == Some(costs))
}

/// What a task of a layer costs; slices of gradients, nothing.
fn stage_seconds(costs: &LayerCosts, op: &LayerOp) -> f64 {
    match *op {
        LayerOp::Chunk { stage, of, .. } => costs.seconds(stage, of),
        LayerOp::Reduce(_) | LayerOp::Dense { .. } => 0.0,
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
        for (i, block) in model.blocks.iter().enumerate() {
            let mut layer = None;
            if let Some(costs) = &block.moe {
                layer = match known(&model.blocks[..i], costs) {
                    Some(same) => choices.of_block[same],
                    None => {
                        choices.layers.push([
                            planner.candidates(policy, costs, Pass::Forward, &[])?,
                            planner.candidates(policy, costs, Pass::Backward, &lanes)?,
                        ]);
                        Some(choices.layers.len() - 1)
                    }
                };
            }
            choices.of_block.push(layer);
        }
        Ok(choices)
    }

    /// The best plans in which gradients are fitted into the time that is left.
    fn shared(&self, policy: &dyn Policy, model: &ModelCosts) -> Vec<Plan> {
        let layers: Vec<Vec<Choice>> = self.layers.iter().map(|layer| choices(policy, layer)).collect();
        let of_block: Vec<Option<&[Choice]>> =
            self.of_block.iter().map(|layer| layer.map(|layer| &layers[layer][..])).collect();
        share(policy, model, &of_block)
    }

    /// The plan in which every layer is the fastest it can be, and gradients are reduced where they always are: after the
    /// backward, if they are to be fitted.
    fn plan(&self, policy: &dyn Policy, model: &ModelCosts, gradients: Gradients) -> Plan {
        let blocks = model.blocks.len();
        let windows = Windows { moe: vec![Vec::new(); blocks], dense: vec![Vec::new(); blocks], after: Vec::new() };
        let mut plan = Plan { policy: policy.name().to_owned(), degrees: vec![None; blocks], windows, seconds: 0.0 };
        let mut pending = Pending::new(model);
        for (i, block) in model.blocks.iter().enumerate().rev() {
            if let Some(layer) = self.of_block[i] {
                let [forward, backward] = &self.layers[layer];
                let (f, b) = if policy.same_both_ways() {
                    let same = first_least(forward.iter().zip(backward).map(|(f, b)| f.seconds + b.seconds));
                    (same, same)
                } else {
                    let least = |all: &[Candidate]| first_least(all.iter().map(|c| c.seconds));
                    (least(forward), least(backward))
                };
                plan.degrees[i] = Some([forward[f].degree, backward[b].degree]);
                plan.windows.moe[i] = match gradients {
                    Gradients::Pieces(size) => pending.pieces(policy, backward[b].idle(), size),
                    _ => Vec::new(),
                };
            }
            pending.complete(block.moe_gradients);
            // Nothing is exchanged meanwhile: the lanes are free for as long as it takes.
            let idle = [block.dense[1]; 3];
            plan.windows.dense[i] = match gradients {
                Gradients::WithDense => pending.all(),
                Gradients::Pieces(size) => pending.pieces(policy, idle, size),
                _ => Vec::new(),
            };
            pending.complete(block.dense_gradients);
        }
        plan.windows.after = match gradients {
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
