//! All-to-alls beside the expert stage.

use super::{Gradients, Policy, fused_expert};
use crate::engine::TaskGraph;
use crate::error::Result;
use crate::schedule::{Degree, LayerCosts, LayerOp, LayerPass};

/// Tutel's (Hwang et al. 2023): all-to-alls overlap the expert stage, which is all-gather, matrix products and
/// reduce-scatter as one; the best of 1, 2, 4 and 8 chunks, the same both ways; gradients after the backward.
#[derive(Clone, Copy, Debug)]
pub struct Tutel;

impl Tutel {
    /// Its degrees. The expert stage is one, so a chunk's is over before the next one's begins: d = 1.
    pub(super) fn degrees(costs: &LayerCosts, all: impl IntoIterator<Item = usize>) -> Vec<Degree> {
        all.into_iter().filter(|&r| r <= costs.max_chunks).map(|r| Degree { r, d: 1 }).collect()
    }
}

impl Policy for Tutel {
    fn name(&self) -> &str {
        "tutel"
    }

    fn degrees(&self, costs: &LayerCosts) -> Vec<Degree> {
        Tutel::degrees(costs, [1, 2, 4, 8])
    }

    fn same_both_ways(&self) -> bool {
        true
    }

    fn gradients(&self) -> Gradients {
        Gradients::After
    }

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        fused_expert(graph, costs, pass)
    }
}
