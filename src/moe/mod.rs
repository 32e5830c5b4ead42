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
pub use routing::{Assignment, Capacity, Routing, RoutingGrad, RoutingStats, RoutingTally};

use crate::autograd::Parameter;
use crate::comm::Communicator;
use crate::device::{Lane, RowWeights, Segments};
use crate::error::{Error, Result, config_err};
use crate::tensor::{DType, Tensor};
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
    /// With `*`: whether [`Routing::capacity`] must be the largest load, which takes a read from the device. Otherwise a
    /// bound on it, T/G, may stand in.
    pub exact_capacity: bool,
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
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a layer has one")]
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
    /// As `Ragged` with the offsets on the device: see [`Segments::Device`]. Only experts that are
    /// [`FusedExpert`] are given such rows.
    Blocks {
        /// (E + 1) i32.
        offsets: Tensor,
        /// (E) i32: the rows of each that a token has, where that is known.
        counts: Option<Tensor>,
    },
}

impl RowSplit {
    /// The number of experts.
    pub fn experts(&self) -> usize {
        self.segments().experts()
    }

    /// The rows of expert `e`.
    ///
    /// # Errors
    /// If the offsets are on the device.
    pub fn range(&self, e: usize) -> Result<std::ops::Range<usize>> {
        match self {
            RowSplit::Even { each, .. } => Ok(e * each..(e + 1) * each),
            RowSplit::Ragged(offsets) => Ok(offsets[e]..offsets[e + 1]),
            RowSplit::Blocks { .. } => config_err!("rows of expert {e}: their offsets are on the device"),
        }
    }

    /// The same for the grouped operations of a backend.
    pub fn segments(&self) -> Segments<'_> {
        match self {
            RowSplit::Even { experts, each } => Segments::Even { experts: *experts, each: *each },
            RowSplit::Ragged(offsets) => Segments::Host(offsets),
            RowSplit::Blocks { offsets, counts } => Segments::Device { offsets, counts: counts.as_ref() },
        }
    }
}

/// Lays tokens out as expert rows, (T, M) → (R, M), and brings the rows back (i-order).
pub trait Order: Send + Sync {
    /// Its name, as the command line has it.
    fn name(&self) -> &str;

    /// Whether every expert's rows are padded to the capacity. If not, a capacity that drops nothing need not be exact
    /// (see [`GateContext::exact_capacity`]).
    fn pads(&self) -> bool {
        true
    }

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

    /// This order as one whose combine is a weighted sum of rows, if it is.
    fn sparse(&self) -> Option<&dyn SparseOrder> {
        None
    }
}

/// An order that moves whole rows, so that the combine's backward can be left to the experts: with y the weighted sum of
/// a token's rows, the gradient of a row is its weight times dy, and of a weight, the row's product with dy.
pub trait SparseOrder: Order {
    /// [`Order::dispatch`] to rows that lie as [`RowSplit::Blocks`], segments padded to a multiple of `block`; nothing is
    /// read to the host. None if this order cannot lay out such a routing so.
    ///
    /// # Errors
    /// If the device fails.
    fn dispatch_blocks(
        &self,
        _lane: &Lane,
        _routing: &Routing,
        _x: &Tensor,
        _block: usize,
    ) -> Result<Option<(Rows, Saved)>> {
        Ok(None)
    }

    /// The rows of dy (R, M), without weights, and every row's weight (R) acc, 0 for empty slots.
    ///
    /// # Errors
    /// If the device fails.
    fn gather_grad(&self, lane: &Lane, routing: &Routing, saved: &Saved, dy: &Tensor) -> Result<(Tensor, Tensor)>;

    /// The gradient of the routing's weights from that of the rows' weights (R) acc.
    ///
    /// # Errors
    /// If the device fails.
    fn weights_grad(&self, lane: &Lane, routing: &Routing, saved: &Saved, d_weights: &Tensor) -> Result<Tensor>;
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

    /// These experts as ones that take the combine's part of the backward, if they do.
    fn fused(&self) -> Option<&dyn FusedExpert> {
        None
    }
}

/// Experts whose backward takes the gradient of the weighted sum and the weights apart, and that take rows split as
/// [`RowSplit::Blocks`].
pub trait FusedExpert: Expert {
    /// What [`crate::device::GroupedKernels::row_block`] says for these experts' widths.
    fn row_block(&self, lane: &Lane, dtype: DType) -> Option<usize>;

    /// [`Expert::backward_data`] for `dy`, the rows' gradient before it is multiplied by their weights; writes the
    /// weights' gradient. [`Expert::backward_weights`] is then given the same `dy` and what this returns.
    ///
    /// # Errors
    /// If the device fails.
    fn backward_data_weighted(
        &self,
        lane: &Lane,
        rows: &Rows,
        saved: &Saved,
        dy: &Tensor,
        weights: RowWeights<'_>,
    ) -> Result<(Tensor, Saved)>;
}
