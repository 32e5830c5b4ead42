//! No overlap.

use super::{Gradients, Policy};
use crate::device::LaneKind;
use crate::engine::{TaskGraph, TaskId};
use crate::error::Result;
use crate::schedule::{Degree, LayerCosts, LayerOp, LayerPass, Pass, Stage};

/// DeepSpeed-MoE's (Rajbhandari et al. 2022): the layer in one piece, nothing overlaps, gradients after the backward.
#[derive(Clone, Copy, Debug)]
pub struct DeepSpeed;

impl Policy for DeepSpeed {
    fn name(&self) -> &str {
        "deepspeed"
    }

    fn degrees(&self, _costs: &LayerCosts) -> Vec<Degree> {
        vec![Degree::all_first(1)]
    }

    fn same_both_ways(&self) -> bool {
        true
    }

    fn gradients(&self) -> Gradients {
        Gradients::After
    }

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        let LayerPass { block, pass, after, slices, .. } = *pass;
        let mut last = after;
        // Every task waits for the one before it, the weight gradient included.
        let mut add = |lane: LaneKind, stage: Stage| -> Result<TaskId> {
            let id = graph.add(lane, LayerOp::Chunk { block, pass, stage, chunk: 0, of: 1 }, last)?;
            last = Some(id);
            Ok(id)
        };
        for (p, phase) in costs.dispatch.iter().enumerate() {
            add(phase.lane, Stage::Dispatch(p as u8))?;
        }
        if let Some(all_gather) = costs.all_gather {
            add(all_gather.lane, Stage::AllGather)?;
        }
        add(LaneKind::Compute, Stage::Expert)?;
        if pass == Pass::Backward {
            add(LaneKind::Compute, Stage::WeightGrad)?;
        }
        if let Some(reduce_scatter) = costs.reduce_scatter {
            add(reduce_scatter.lane, Stage::ReduceScatter)?;
        }
        for (p, phase) in costs.combine.iter().enumerate() {
            add(phase.lane, Stage::Combine(p as u8))?;
        }
        for s in slices {
            graph.add(s.lane, LayerOp::Reduce(s.slice), last)?;
        }
        Ok(())
    }
}
