//! The graph of a layer's pass, and of a whole training step.

use super::{GradGroup, LayerCosts, LayerOp, LayerPass, ModelCosts, Pass, Plan, Policy, Slice, SliceTask};
use crate::device::LaneKind;
use crate::engine::{TaskGraph, TaskId};
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
/// Dense parts and MoE layers follow one another; slices wait for what completes them.
///
/// # Errors
/// If the plan is not one of this model: a degree is missing, or a slice is to be reduced before it is complete.
pub fn step_graph(policy: &dyn Policy, model: &ModelCosts, plan: &Plan) -> Result<TaskGraph<LayerOp>> {
    let blocks = model.blocks.len();
    if [plan.degrees.len(), plan.windows.moe.len(), plan.windows.dense.len()] != [blocks; 3] {
        config_err!("a plan for {} blocks, of a model of {blocks}", plan.degrees.len());
    }
    let mut step = Step { graph: TaskGraph::new(), policy, model, plan, last: None, complete: Default::default() };
    for (block, costs) in model.blocks.iter().enumerate() {
        step.dense(block, Pass::Forward)?;
        if let Some(moe) = &costs.moe {
            step.moe(block, moe, Pass::Forward)?;
        }
    }
    for (block, costs) in model.blocks.iter().enumerate().rev() {
        if let Some(moe) = &costs.moe {
            let gradients = step.moe(block, moe, Pass::Backward)?;
            step.complete(costs.moe_gradients, gradients);
        }
        for s in step.slices(&plan.windows.dense[block])? {
            step.graph.add(s.lane, LayerOp::Reduce(s.slice), s.after)?;
        }
        let dense = step.dense(block, Pass::Backward)?;
        step.complete(costs.dense_gradients, dense);
    }
    // "After the backward" is after all of it, also of what is complete long before.
    let last = step.last;
    for s in step.slices(&plan.windows.after)? {
        step.graph.add(s.lane, LayerOp::Reduce(s.slice), last)?;
    }
    Ok(step.graph)
}

struct Step<'a> {
    graph: TaskGraph<LayerOp>,
    policy: &'a dyn Policy,
    model: &'a ModelCosts,
    plan: &'a Plan,
    last: Option<TaskId>,
    /// By group: up to which byte gradients are complete when which task has ended.
    complete: [Vec<(u64, TaskId)>; 3],
}

impl Step<'_> {
    fn dense(&mut self, block: usize, pass: Pass) -> Result<TaskId> {
        let id = self.graph.add(LaneKind::Compute, LayerOp::Dense { block, pass }, self.last)?;
        self.last = Some(id);
        Ok(id)
    }

    /// Returns the task that completes the experts' gradients.
    fn moe(&mut self, block: usize, costs: &LayerCosts, pass: Pass) -> Result<TaskId> {
        let Some(degrees) = self.plan.degrees[block] else {
            config_err!("a plan without a degree for the MoE layer of block {}", block + 1);
        };
        let none = Vec::new();
        let slices = self.slices(if pass == Pass::Backward { &self.plan.windows.moe[block] } else { &none })?;
        let degree = degrees[pass as usize];
        let part = LayerPass { block, pass, degree, after: self.last, slices: &slices };
        let end = self.policy.layer(&mut self.graph, costs, &part)?;
        self.last = Some(end.output);
        Ok(end.gradients)
    }

    fn complete(&mut self, bytes: [u64; 3], by: TaskId) {
        for (complete, bytes) in self.complete.iter_mut().zip(bytes) {
            let before = complete.last().map_or(0, |c| c.0);
            complete.push((before + bytes, by));
        }
    }

    fn slices(&self, slices: &[Slice]) -> Result<Vec<SliceTask>> {
        let task = |slice: &Slice| {
            let group = slice.group as usize;
            let complete = self.complete[group].iter().find(|c| c.0 >= slice.end);
            match (self.model.reduce[group], complete) {
                (Some((lane, _)), Some(&(_, after))) if slice.begin < slice.end => {
                    Ok(SliceTask { slice: *slice, lane: self.policy.reduce_lane(lane), after: Some(after) })
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
