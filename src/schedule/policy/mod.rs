//! The schedules that can be compared, one file each.

mod deepspeed;
mod fsmoe;
mod no_iio;
mod pipemoe_lina;
mod tutel;
mod tutel_improved;

pub use deepspeed::DeepSpeed;
pub use fsmoe::FsMoe;
pub use no_iio::NoIio;
pub use pipemoe_lina::PipeMoeLina;
pub use tutel::Tutel;
pub use tutel_improved::TutelImproved;

use super::{Degree, LayerCosts, LayerOp, LayerPass, pipeline};
use crate::device::LaneKind;
use crate::engine::TaskGraph;
use crate::error::{Result, config_err};

/// When a policy reduces gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradients {
    /// After the backward.
    After,
    /// All that is complete when the backward of a block's dense part begins, during it.
    WithDense,
    /// In pieces of so many bytes, one after the other wherever the lane has nothing else to do; a piece that has begun is
    /// finished, whatever waits.
    Pieces(u64),
    /// In slices as long as the time that each window has left, none longer.
    Fitted,
}

/// A schedule for the MoE layers of a model. What it may choose is tried by the [`Planner`](super::Planner).
pub trait Policy: Send + Sync {
    /// Its name, as the command line has it.
    fn name(&self) -> &str;

    /// How a layer may be cut; the first of equally fast ones is taken.
    fn degrees(&self, costs: &LayerCosts) -> Vec<Degree>;

    /// Whether forward and backward are cut alike.
    fn same_both_ways(&self) -> bool;

    /// When gradients are reduced.
    fn gradients(&self) -> Gradients;

    /// Where an all-reduce of gradients runs whose group's lane is `lane`.
    fn reduce_lane(&self, lane: LaneKind) -> LaneKind {
        lane
    }

    /// Adds the tasks of one pass through a layer. Those that wait for no other wait for `pass.after`; what comes after the
    /// pass waits for all of its tasks.
    ///
    /// # Errors
    /// If the layer cannot be cut so.
    fn layer(&self, graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()>;
}

/// The policies of this library, in the order of tables: from no overlap to all of it.
pub fn all() -> Vec<Box<dyn Policy>> {
    vec![
        Box::new(DeepSpeed),
        Box::new(Tutel),
        Box::new(TutelImproved),
        Box::new(PipeMoeLina),
        Box::new(NoIio),
        Box::new(FsMoe),
    ]
}

/// A policy of this library, by name.
///
/// # Errors
/// If there is none of this name; lists those there are.
pub fn by_name(name: &str) -> Result<Box<dyn Policy>> {
    let known = all();
    let names: Vec<String> = known.iter().map(|p| p.name().to_owned()).collect();
    match known.into_iter().find(|p| p.name() == name) {
        Some(policy) => Ok(policy),
        None => config_err!("unknown policy {name:?}: it is one of {}", names.join(", ")),
    }
}

/// Every r that a layer can be cut in, with every d.
fn every_degree(costs: &LayerCosts) -> Vec<Degree> {
    // The paper's order first: of equally fast ones it is the best known.
    (1..=costs.max_chunks).flat_map(|r| (1..=r).rev().map(move |d| Degree { r, d })).collect()
}

/// The all-gather, the expert and the reduce-scatter of a chunk as one on Compute, overlapped by all-to-alls only.
fn fused_expert(graph: &mut TaskGraph<LayerOp>, costs: &LayerCosts, pass: &LayerPass<'_>) -> Result<()> {
    let mut fused = costs.clone();
    for exchange in fused.all_gather.iter_mut().chain(&mut fused.reduce_scatter) {
        exchange.lane = LaneKind::Compute;
    }
    pipeline(graph, &fused, pass)
}
