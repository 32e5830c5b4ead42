//! The graph of a layer in chunks, in FSMoE's order.

use super::{Exchange, LayerCosts, LayerOp, MAX_CHUNKS, Pass, Slice, Stage};
use crate::device::LaneKind;
use crate::engine::{TaskGraph, TaskId};
use crate::error::{Result, config_err};
use serde::{Deserialize, Serialize};

/// How a layer's pass is cut and ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Degree {
    /// r: in how many chunks.
    pub r: usize,
    /// d: how many all-gathers are issued before the first reduce-scatter, at most r.
    pub d: usize,
}

impl Degree {
    /// `r` chunks, all of whose all-gathers come first: the paper's order.
    pub fn all_first(r: usize) -> Self {
        Degree { r, d: r }
    }
}

/// A slice of gradients to be reduced in some pass.
#[derive(Clone, Copy, Debug)]
pub struct SliceTask {
    /// Which.
    pub slice: Slice,
    /// Where.
    pub lane: LaneKind,
}

/// What a policy is to add to a graph: one pass through one block's MoE layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerPass<'a> {
    /// Which block, from 0.
    pub block: usize,
    /// Forward or backward.
    pub pass: Pass,
    /// How it is cut.
    pub degree: Degree,
    /// What gives the layer its input; none if it is there.
    pub after: Option<TaskId>,
    /// The slices of gradients to be reduced meanwhile: complete when the pass begins.
    pub slices: &'a [SliceTask],
}

/// Adds a pass in chunks. Chunk i's way is D_i → AG_i → E_i → RS_i → C_i; backward, W_i follows E_i and nothing waits for
/// it. The lanes' orders:
///
/// - InterNode D_1 … D_r, the slices of gradients, C_1 … C_r;
/// - Compute E_1, (W_1,) E_2, …;
/// - IntraNode AG_1 … AG_d, RS_1, AG_{d+1}, RS_2, ….
///
/// Phases of an all-to-all within nodes fall in with IntraNode's order: before the exchange between nodes they are issued
/// with it; after it, with AG_i, and at the way back one chunk late, so that RS_{i+1} does not wait behind them. Where all
/// of D, AG, RS and C share one lane, its order is D_1, AG_1, …, D_d, AG_d, RS_1, C_1, D_{d+1}, AG_{d+1}, RS_2, …. Slices on
/// lanes other than the all-to-all's come last on theirs.
///
/// # Errors
/// If the degree is not one that the layer can be cut in.
pub fn pipeline(graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
    let Degree { r, d } = pass.degree;
    if r == 0 || r > costs.max_chunks.min(MAX_CHUNKS) || d == 0 || d > r {
        let most = costs.max_chunks.min(MAX_CHUNKS);
        config_err!("{r} chunks, {d} ahead: this layer takes 1 to {most} chunks, and 1 to as many ahead");
    }
    let esp = costs.all_gather.map(|e| e.lane);
    let one_lane = !costs.dispatch.is_empty() && costs.dispatch.iter().all(|e| Some(e.lane) == esp);
    let before = if one_lane { 0 } else { through_inter(&costs.dispatch) };
    let back = through_inter(&costs.combine);
    let exchange_lane = costs.dispatch.get(before.saturating_sub(1)).map(|e| e.lane);
    let in_window = |lane: LaneKind| Some(lane) == exchange_lane;

    let mut way = Way { graph, pass, ends: [pass.after; MAX_CHUNKS] };
    for i in 0..r {
        way.dispatch(i, &costs.dispatch, 0..before)?;
    }
    if !one_lane {
        way.slices(in_window)?;
    }
    let gather = |i: usize, way: &mut Way<'_>| {
        way.dispatch(i, &costs.dispatch, before..costs.dispatch.len())?;
        if let Some(all_gather) = costs.all_gather {
            way.stage(i, Stage::AllGather, all_gather.lane)?;
        }
        // With one lane the last D comes only now.
        if one_lane && i + 1 == r { way.slices(in_window) } else { Ok(()) }
    };
    for i in 0..d {
        gather(i, &mut way)?;
    }
    for i in 0..r {
        let expert = way.stage(i, Stage::Expert, LaneKind::Compute)?;
        if pass.pass == Pass::Backward {
            way.beside(i, Stage::WeightGrad, LaneKind::Compute, expert)?;
        }
        if let Some(reduce_scatter) = costs.reduce_scatter {
            way.stage(i, Stage::ReduceScatter, reduce_scatter.lane)?;
        }
        way.combine(i, &costs.combine, 0..back)?;
        if i > 0 {
            way.combine(i - 1, &costs.combine, back..costs.combine.len())?;
        }
        if i + d < r {
            gather(i + d, &mut way)?;
        }
    }
    way.combine(r - 1, &costs.combine, back..costs.combine.len())?;
    way.slices(|lane| !in_window(lane))
}

/// How many phases there are up to the one between nodes; all, if there is none.
fn through_inter(phases: &[Exchange]) -> usize {
    phases.iter().rposition(|e| e.lane == LaneKind::InterNode).map_or(phases.len(), |i| i + 1)
}

/// The chunks' ways through the layer as they grow.
struct Way<'a> {
    graph: &'a mut TaskGraph<LayerOp>,
    pass: &'a LayerPass<'a>,
    /// Where each chunk has got to.
    ends: [Option<TaskId>; MAX_CHUNKS],
}

impl Way<'_> {
    /// A chunk's next stage.
    fn stage(&mut self, i: usize, stage: Stage, lane: LaneKind) -> Result<TaskId> {
        let op = self.op(i, stage);
        let id = self.graph.add(lane, op, self.ends[i])?;
        self.ends[i] = Some(id);
        Ok(id)
    }

    /// A stage that a chunk's way does not lead through.
    fn beside(&mut self, i: usize, stage: Stage, lane: LaneKind, after: TaskId) -> Result<TaskId> {
        self.graph.add(lane, self.op(i, stage), [after])
    }

    fn op(&self, chunk: usize, stage: Stage) -> LayerOp {
        let LayerPass { block, pass, degree, .. } = *self.pass;
        LayerOp::Chunk { block, pass, stage, chunk, of: degree.r }
    }

    fn dispatch(&mut self, i: usize, phases: &[Exchange], which: std::ops::Range<usize>) -> Result<()> {
        which.into_iter().try_for_each(|p| self.stage(i, Stage::Dispatch(p as u8), phases[p].lane).map(|_| ()))
    }

    fn combine(&mut self, i: usize, phases: &[Exchange], which: std::ops::Range<usize>) -> Result<()> {
        which.into_iter().try_for_each(|p| self.stage(i, Stage::Combine(p as u8), phases[p].lane).map(|_| ()))
    }

    /// The slices on some of the lanes.
    fn slices(&mut self, which: impl Fn(LaneKind) -> bool) -> Result<()> {
        for s in self.pass.slices.iter().filter(|s| which(s.lane)) {
            self.graph.add(s.lane, LayerOp::Reduce(s.slice), self.pass.after)?;
        }
        Ok(())
    }
}
