//! The graph of a layer's pass, and of a whole training step.

use super::{GradGroup, LayerCosts, LayerOp, LayerPass, ModelCosts, Pass, Plan, Policy, Slice, SliceTask};
use crate::device::LaneKind;
use crate::engine::{LANES, TaskGraph, TaskId};
use crate::error::{Result, config_err};
use serde::{Deserialize, Serialize};

/// Where slices of gradients are reduced: in the backward of which block's MoE layer or dense part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Windows {
    /// During the backward of each block's MoE layer.
    pub moe: Vec<Vec<Slice>>,
    /// During the backward of each block's dense part.
    pub dense: Vec<Vec<Slice>>,
    /// After the backward.
    pub after: Vec<Slice>,
}

/// One pass through one layer on its own, its input and the gradients of `pass.slices` being there.
///
/// # Errors
/// If the layer cannot be cut so.
pub fn layer_graph(policy: &dyn Policy, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<TaskGraph<LayerOp>> {
    let mut graph = TaskGraph::new();
    policy.layer(&mut graph, costs, pass)?;
    Ok(graph)
}

/// A whole step: forward through all blocks, backward through all blocks, each slice of gradients where the plan has it.
///
/// Dense parts and passes through MoE layers follow one another: a part begins when every task of the one before it has
/// ended, slices beside a pass included. Those beside a dense part run at the ends of their lanes' queues, from when it
/// begins; those after the backward when all of it has ended.
///
/// # Errors
/// If the plan is not one of this model: a degree is missing, or a slice is to be reduced before it is complete.
pub fn step_graph(policy: &dyn Policy, model: &ModelCosts, plan: &Plan) -> Result<TaskGraph<LayerOp>> {
    let blocks = model.blocks.len();
    if [plan.degrees.len(), plan.windows.moe.len(), plan.windows.dense.len()] != [blocks; 3] {
        config_err!("a plan for {} blocks, of a model of {blocks}", plan.degrees.len());
    }
    let mut step = Step { graph: TaskGraph::new(), policy, model, plan, last: Vec::new(), complete: [0; 3] };
    for (block, costs) in model.blocks.iter().enumerate() {
        step.dense(block, Pass::Forward)?;
        if let Some(moe) = &costs.moe {
            step.moe(block, moe, Pass::Forward)?;
        }
    }
    for (block, costs) in model.blocks.iter().enumerate().rev() {
        if let Some(moe) = &costs.moe {
            step.moe(block, moe, Pass::Backward)?;
            step.complete(costs.moe_gradients);
        }
        let begin = step.last.clone();
        for s in step.slices(&plan.windows.dense[block])? {
            step.graph.add(s.lane, LayerOp::Reduce(s.slice), begin.iter().copied())?;
        }
        step.dense(block, Pass::Backward)?;
        step.complete(costs.dense_gradients);
    }
    let last = step.last.clone();
    for s in step.slices(&plan.windows.after)? {
        step.graph.add(s.lane, LayerOp::Reduce(s.slice), last.iter().copied())?;
    }
    Ok(step.graph)
}

struct Step<'a> {
    graph: TaskGraph<LayerOp>,
    policy: &'a dyn Policy,
    model: &'a ModelCosts,
    plan: &'a Plan,
    /// What the next part waits for: the last task of each lane that the part before it used.
    last: Vec<TaskId>,
    /// By group: the bytes of gradients that are complete.
    complete: [u64; 3],
}

impl Step<'_> {
    fn dense(&mut self, block: usize, pass: Pass) -> Result<()> {
        let id = self.graph.add(LaneKind::Compute, LayerOp::Dense { block, pass }, self.last.iter().copied())?;
        self.last = vec![id];
        Ok(())
    }

    fn moe(&mut self, block: usize, costs: &LayerCosts, pass: Pass) -> Result<()> {
        let Some(degrees) = self.plan.degrees[block] else {
            config_err!("a plan without a degree for the MoE layer of block {}", block + 1);
        };
        let none = Vec::new();
        let slices = self.slices(if pass == Pass::Backward { &self.plan.windows.moe[block] } else { &none })?;
        let degree = degrees[pass as usize];
        // Before it comes a dense part, which is one task.
        let part = LayerPass { block, pass, degree, after: self.last.last().copied(), slices: &slices };
        let first = self.graph.len();
        self.policy.layer(&mut self.graph, costs, &part)?;
        let ends = LANES.map(|lane| self.graph.on_lane(lane).last().copied());
        self.last = ends.into_iter().flatten().filter(|id| id.index() >= first).collect();
        Ok(())
    }

    fn complete(&mut self, bytes: [u64; 3]) {
        self.complete.iter_mut().zip(bytes).for_each(|(complete, bytes)| *complete += bytes);
    }

    fn slices(&self, slices: &[Slice]) -> Result<Vec<SliceTask>> {
        let task = |slice: &Slice| {
            let group = slice.group as usize;
            match self.model.reduce[group] {
                Some((lane, _)) if slice.begin < slice.end && slice.end <= self.complete[group] => {
                    Ok(SliceTask { slice: *slice, lane: self.policy.reduce_lane(lane) })
                }
                _ => {
                    let (Slice { begin, end, .. }, group) = (slice, slice.group.name());
                    config_err!("bytes {begin}..{end} of the {group} gradients are reduced before they are complete")
                }
            }
        };
        slices.iter().map(task).collect()
    }
}

/// Which gradients are complete and not yet reduced, as the backward goes on.
#[derive(Clone, Debug)]
pub(super) struct Pending<'a> {
    model: &'a ModelCosts,
    reduced: [u64; 3],
    complete: [u64; 3],
}

/// Slices begin at multiples of this many bytes, so that they can be read in vectors.
const ALIGN: u64 = 256;

impl<'a> Pending<'a> {
    pub(super) fn new(model: &'a ModelCosts) -> Self {
        Pending { model, reduced: [0; 3], complete: [0; 3] }
    }

    /// Adds what a part of a block's backward completes.
    pub(super) fn complete(&mut self, bytes: [u64; 3]) {
        for group in GradGroup::ALL.map(|g| g as usize) {
            if self.model.reduce[group].is_some() {
                self.complete[group] += bytes[group];
            }
        }
    }

    fn bytes(&self, group: GradGroup) -> u64 {
        self.complete[group as usize] - self.reduced[group as usize]
    }

    fn take(&mut self, group: GradGroup, bytes: u64) -> Slice {
        let begin = self.reduced[group as usize];
        self.reduced[group as usize] += bytes;
        Slice { group, begin, end: begin + bytes }
    }

    /// Whether of no group more is left here.
    pub(super) fn is_at_most(&self, other: &Pending<'_>) -> bool {
        GradGroup::ALL.into_iter().all(|group| self.bytes(group) <= other.bytes(group))
    }

    /// Seconds that all of it takes, by the lane it runs on.
    pub(super) fn seconds(&self, policy: &dyn Policy) -> [f64; 3] {
        let mut seconds = [0.0; 3];
        for group in GradGroup::ALL {
            if let (Some((lane, cost)), bytes @ 1..) = (self.model.reduce[group as usize], self.bytes(group)) {
                seconds[policy.reduce_lane(lane) as usize] += cost.seconds(bytes as f64);
            }
        }
        seconds
    }

    /// Seconds that slices take, by the lane they run on.
    pub(super) fn times(&self, policy: &dyn Policy, slices: &[Slice]) -> [f64; 3] {
        let mut seconds = [0.0; 3];
        for slice in slices {
            if let Some((lane, cost)) = self.model.reduce[slice.group as usize] {
                seconds[policy.reduce_lane(lane) as usize] += cost.seconds(slice.bytes() as f64);
            }
        }
        seconds
    }

    /// Everything.
    pub(super) fn all(&mut self) -> Vec<Slice> {
        let groups = GradGroup::ALL.into_iter().filter(|&g| self.bytes(g) > 0).collect::<Vec<_>>();
        groups.into_iter().map(|g| self.take(g, self.bytes(g))).collect()
    }

    /// Everything, in pieces of at most `size` bytes.
    pub(super) fn all_in_pieces(&mut self, size: u64) -> Vec<Slice> {
        let mut slices = Vec::new();
        for group in GradGroup::ALL {
            while self.bytes(group) > 0 {
                slices.push(self.take(group, self.bytes(group).min(size)));
            }
        }
        slices
    }

    /// Whole pieces of `size` bytes, begun as long as their lane has some of its `idle` seconds left.
    pub(super) fn pieces(&mut self, policy: &dyn Policy, mut idle: [f64; 3], size: u64) -> Vec<Slice> {
        let mut slices = Vec::new();
        for group in GradGroup::ALL {
            let Some((lane, cost)) = self.model.reduce[group as usize] else { continue };
            let idle = &mut idle[policy.reduce_lane(lane) as usize];
            while self.bytes(group) >= size && *idle > 0.0 {
                slices.push(self.take(group, size));
                *idle -= cost.seconds(size as f64);
            }
        }
        slices
    }

    /// As much as fits into each lane's `idle` seconds.
    pub(super) fn fitted(&mut self, policy: &dyn Policy, mut idle: [f64; 3]) -> Vec<Slice> {
        let mut slices = Vec::new();
        for group in GradGroup::ALL {
            let Some((lane, cost)) = self.model.reduce[group as usize] else { continue };
            let idle = &mut idle[policy.reduce_lane(lane) as usize];
            let fits = ((*idle - cost.alpha) / cost.beta).max(0.0) as u64;
            let bytes = if fits >= self.bytes(group) { self.bytes(group) } else { fits / ALIGN * ALIGN };
            if bytes > 0 {
                slices.push(self.take(group, bytes));
                *idle -= cost.seconds(bytes as f64);
            }
        }
        slices
    }
}
