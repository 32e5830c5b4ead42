//! Tutel's, with gradients beside dense parts.

use super::{Gradients, Policy, Tutel, fused_expert};
use crate::engine::TaskGraph;
use crate::error::Result;
use crate::schedule::{Degree, LayerCosts, LayerOp, LayerPass};

/// [`Tutel`]'s with the gradients' all-reduce during the backward of dense parts.
#[derive(Clone, Copy, Debug)]
pub struct TutelImproved;

impl Policy for TutelImproved {
    fn name(&self) -> &str {
        "tutel-improved"
    }

    fn degrees(&self, costs: &LayerCosts) -> Vec<Degree> {
        Policy::degrees(&Tutel, costs)
    }

    fn same_both_ways(&self) -> bool {
        true
    }

    fn gradients(&self) -> Gradients {
        Gradients::WithDense
    }

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        fused_expert(graph, costs, pass)
    }
}
