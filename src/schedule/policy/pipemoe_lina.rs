//! Tutel's overlap, with PipeMoE's chunks and Lina's gradients.

use super::{Gradients, Policy, Tutel, fused_expert};
use crate::engine::TaskGraph;
use crate::error::Result;
use crate::schedule::{Degree, LayerCosts, LayerOp, LayerPass};

/// PipeMoE's choice of the number of chunks (Shi et al. 2023), the same both ways, over [`Tutel`]'s overlap; with Lina's
/// gradients (Li et al. 2023): in pieces of 30 MB, anywhere in the backward.
#[derive(Clone, Copy, Debug)]
pub struct PipeMoeLina;

impl Policy for PipeMoeLina {
    fn name(&self) -> &str {
        "pipemoe-lina"
    }

    fn degrees(&self, costs: &LayerCosts) -> Vec<Degree> {
        Tutel::degrees(costs, 1..=costs.max_chunks)
    }

    fn same_both_ways(&self) -> bool {
        true
    }

    fn gradients(&self) -> Gradients {
        Gradients::Pieces(30_000_000)
    }

    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
        fused_expert(graph, costs, pass)
    }
}
