//! The Mixture-of-Experts layer: gate → order → dispatch → expert → combine → i-order, with six hooks.
//!
//! Each module is a trait with a forward and a backward of its own that can be implemented outside this crate. They
//! work on tensors, on a lane; parameters' gradients are added to in place. What a forward keeps for its backward it
//! returns as [`Saved`].

pub mod distributed;
pub mod expert;
pub mod gate;
mod hooks;
mod layer;
pub mod order;
mod routing;

pub use hooks::{Hook, Hooks};
pub use layer::{MoeConfig, MoeLayer, MoeOutput};
pub use routing::{Assignment, Capacity, Routing, RoutingGrad, RoutingStats};

use crate::autograd::Parameter;
use crate::comm::Communicator;
use crate::device::Lane;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::any::Any;

/// What a module's forward keeps for its backward.
pub type Saved = Box<dyn Any + Send + Sync>;

/// The `T` that a module's forward saved.
///
/// # Errors
/// If it saved something else: a backward was given another module's state.
pub fn saved<T: 'static>(saved: &Saved) -> Result<&T> {
    saved
        .downcast_ref::<T>()
        .ok_or_else(|| Error::Config(format!("a backward needs the {} of its own forward", std::any::type_name::<T>())))
}

/// What every module of a step may depend on besides its input.
#[derive(Clone, Copy, Debug)]
pub struct StepContext {
    /// Training (noise on, statistics kept) or evaluation.
    pub train: bool,
    /// The run's seed.
    pub seed: u64,
    /// The step's number.
    pub step: u64,
    /// The global index of this call's first token in the step: noise depends on it, not on ranks or micro-batches.
    pub first_token: u64,
}

/// What a gate is given besides its input.
pub struct GateContext<'a> {
    /// Where to compute.
    pub lane: &'a Lane,
    /// G: routing and capacity act on each of G groups of consecutive tokens apart.
    pub groups: usize,
    /// Rows per expert and group.
    pub capacity: Capacity,
    /// The step.
    pub step: StepContext,
    /// The ranks whose tokens the statistics behind balance loss and selection biases are taken over, each with as many
    /// tokens and groups as this one; none where this rank's are all there are. Their collectives are issued on `lane`.
    pub ranks: Option<&'a dyn Communicator>,
}

/// Decides which expert takes which token.
pub trait Gate: Send + Sync {
    /// Its name, as the command line has it.
    fn name(&self) -> &str;

    /// Its trainable parameters.
    fn parameters(&self) -> Vec<Parameter>;

    /// State without gradient that checkpoints keep (a selection bias), by name.
    fn buffers(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// Whether a token's routing depends on other tokens of the batch, later ones included: then a causal model's loss
    /// is not comparable with other gates'.
    fn sees_other_tokens(&self) -> bool {
        false
    }

    /// Routes x: (T, M). G divides T.
    ///
    /// # Errors
    /// If the shape does not fit the gate, or the device fails.
    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)>;

    /// Adds the gate's part of the input gradient to dx (T, M), and the parameters' gradients to theirs.
    ///
    /// # Errors
    /// If the device fails.
    fn backward(
        &self,
        cx: &GateContext<'_>,
        x: &Tensor,
        routing: &Routing,
        saved: &Saved,
        grad: &RoutingGrad,
        dx: &Tensor,
    ) -> Result<()>;

    /// Called once after each optimizer step (updates of a selection bias).
    ///
    /// # Errors
    /// If the device fails.
    fn after_step(&self, _lane: &Lane) -> Result<()> {
        Ok(())
    }
}

/// Rows sorted by expert: (R, M), expert e's from `start(e)` to `start(e+1)`.
#[derive(Clone, Debug)]
pub struct Rows {
    /// (R, M).
    pub data: Tensor,
    /// Where each expert's rows begin.
    pub split: RowSplit,
}

/// How rows are divided among experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowSplit {
    /// As many for every expert: the padded layout (E, S, M).
    Even {
        /// E.
        experts: usize,
        /// S, rows of each: G·C.
        each: usize,
    },
    /// `offsets[e]..offsets[e+1]`: no padding. E + 1 entries.
    Ragged(Vec<usize>),
}

impl RowSplit {
    /// The number of experts.
    pub fn experts(&self) -> usize {
        match self {
            RowSplit::Even { experts, .. } => *experts,
            RowSplit::Ragged(offsets) => offsets.len().saturating_sub(1),
        }
    }

    /// The rows of expert `e`.
    pub fn range(&self, e: usize) -> std::ops::Range<usize> {
        match self {
            RowSplit::Even { each, .. } => e * each..(e + 1) * each,
            RowSplit::Ragged(offsets) => offsets[e]..offsets[e + 1],
        }
    }
}

/// Lays tokens out as expert rows, (T, M) → (R, M), and brings the rows back (i-order).
pub trait Order: Send + Sync {
    /// Its name, as the command line has it.
    fn name(&self) -> &str;

    /// The expert rows of x: (T, M). An empty slot is a row of zeros.
    ///
    /// # Errors
    /// If this order cannot take such a routing, or the device fails.
    fn dispatch(&self, lane: &Lane, routing: &Routing, x: &Tensor) -> Result<(Rows, Saved)>;

    /// Writes dx: (T, M) from the rows' gradient; for a dense routing, returns the dispatch matrix's gradient as well.
    ///
    /// # Errors
    /// If the device fails.
    fn dispatch_backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        saved: &Saved,
        x: &Tensor,
        d_rows: &Tensor,
        dx: &Tensor,
    ) -> Result<Option<Tensor>>;

    /// y: (T, M), each token the weighted sum of its rows. `saved` is [`Order::dispatch`]'s.
    ///
    /// # Errors
    /// If the device fails.
    fn combine(&self, lane: &Lane, routing: &Routing, saved: &Saved, rows: &Tensor) -> Result<Tensor>;

    /// The rows' gradient (R, M), and that of the weights (or the combine matrix).
    ///
    /// # Errors
    /// If the device fails.
    fn combine_backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        saved: &Saved,
        rows: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)>;
}

/// The experts' computation, all experts at once.
pub trait Expert: Send + Sync {
    /// Its name, as the command line has it.
    fn name(&self) -> &str;

    /// Its trainable parameters.
    fn parameters(&self) -> Vec<Parameter>;

    /// Rows (R, M) through their experts, to (R, M).
    ///
    /// # Errors
    /// If the rows do not fit the experts, or the device fails.
    fn forward(&self, lane: &Lane, rows: &Rows) -> Result<(Tensor, Saved)>;

    /// The rows' gradient (R, M) from the output's, and what [`Expert::backward_weights`] will need.
    ///
    /// # Errors
    /// If the device fails.
    fn backward_data(&self, lane: &Lane, rows: &Rows, saved: &Saved, d_out: &Tensor) -> Result<(Tensor, Saved)>;

    /// Adds to the parameters' gradients. Apart from the data gradient, because communication waits for that one only.
    ///
    /// # Errors
    /// If the device fails.
    fn backward_weights(
        &self,
        lane: &Lane,
        rows: &Rows,
        saved: &Saved,
        d_out: &Tensor,
        saved_backward: &Saved,
    ) -> Result<()>;
}
