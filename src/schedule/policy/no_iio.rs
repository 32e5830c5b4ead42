//! FSMoE's, with one lane for all communication.

use super::{Gradients, Policy, every_degree};
use crate::device::LaneKind;
use crate::engine::TaskGraph;
use crate::error::Result;
use crate::schedule::{Degree, LayerCosts, LayerOp, LayerPass, pipeline};

/// FSMoE's without its overlap of inter-node with intra-node communication: both on one lane.
#[derive(Clone, Copy, Debug)]
pub struct NoIio;

impl Policy for NoIio {
    fn name(&self) -> &str {
        "no-iio"
    }

    fn degrees(&self, costs: &LayerCosts) -> Vec<Degree> {
        every_degree(costs)
    }

    fn same_both_ways(&self) -> bool {
        false
    }

    fn gradients(&self) -> Gradients {
        Gradients::Fitted
    }

    fn reduce_lane(&self, _lane: LaneKind) -> LaneKind {
        LaneKind::InterNode
    }

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        let mut one = costs.clone();
        let gathers = one.all_gather.iter_mut().chain(&mut one.reduce_scatter);
        for exchange in one.dispatch.iter_mut().chain(&mut one.combine).chain(gathers) {
            exchange.lane = LaneKind::InterNode;
        }
        pipeline(graph, &one, pass)
    }
}
