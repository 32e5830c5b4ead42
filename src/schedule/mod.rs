//! Pure planning, without tensors: what tasks cost, which order they run in, and which of the possible orders is fastest.
//!
//! 1. A [`Profile`] has the measured α and β of every collective and of matrix products ([`Cost::fit`] finds them).
//! 2. [`BlockShape`]s and a [`Topology`](crate::comm::Topology) give volumes, and with a profile [`ModelCosts`]: what every task takes.
//! 3. A [`Policy`] adds the tasks of a pass through an MoE layer to a graph of [`LayerOp`]s; [`pipeline`] is FSMoE's order.
//! 4. The [`Planner`] tries what a policy may choose on the [simulator](crate::engine::Simulator), on the very graphs that
//!    will be executed, and lays slices of the gradients' all-reduce into the time that the lanes have left.
//! 5. A [`Plan`] gives the graph of a whole step ([`step_graph`]).
//!
//! All times are seconds.

mod cost;
mod op;
mod pipeline;
mod plan;
pub mod policy;
mod profile;
mod share;
mod step;
mod workload;

pub use cost::Cost;
pub use op::{GradGroup, LayerOp, Pass, Slice, Stage};
pub use pipeline::{Degree, LayerPass, SliceTask, pipeline};
pub use plan::{Candidate, Plan, Planner};
pub use policy::{Gradients, Policy};
pub use profile::{Collective, CollectiveCosts, ComputeCosts, Profile};
pub use step::{Windows, layer_graph, step_graph};
pub use workload::{BlockCosts, BlockShape, Exchange, LayerCosts, LayerShape, MAX_CHUNKS, ModelCosts, Work};

#[cfg(test)]
mod tests;
