//! FSMoE's.

use super::{Gradients, Policy, every_degree};
use crate::engine::TaskGraph;
use crate::error::Result;
use crate::schedule::{Degree, LayerCosts, LayerOp, LayerPass, pipeline};

/// FSMoE's (Pan et al. 2025): inter-node communication, intra-node communication and computation side by side, chunks and
/// order searched for forward and backward apart, slices of gradients in the time that is left.
#[derive(Clone, Copy, Debug)]
pub struct FsMoe;

impl Policy for FsMoe {
    fn name(&self) -> &str {
        "fsmoe"
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

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        pipeline(graph, costs, pass)
    }
}
