//! The six hooks of an MoE layer.

use super::Saved;
use crate::device::Lane;
use crate::error::Result;
use crate::tensor::Tensor;

/// A function put between two modules: compression before a dispatch, logging, a residual, … Shapes stay.
pub trait Hook: Send + Sync {
    /// The tensor that goes on in `t`'s place.
    ///
    /// # Errors
    /// Whatever the hook refuses.
    fn forward(&self, lane: &Lane, t: &Tensor) -> Result<(Tensor, Saved)>;

    /// The gradient of `t` from that of the forward's result.
    ///
    /// # Errors
    /// Whatever the hook refuses.
    fn backward(&self, lane: &Lane, saved: &Saved, d: &Tensor) -> Result<Tensor>;
}

/// The hooks of a layer; one that is not set costs nothing.
#[derive(Default)]
pub struct Hooks {
    /// On the layer's input (T, M), before the gate sees it.
    pub before_moe_start: Option<Box<dyn Hook>>,
    /// On the ordered rows (R, M), before they travel to their experts.
    pub before_dispatch: Option<Box<dyn Hook>>,
    /// On the rows (R, M) as the experts receive them.
    pub after_dispatch: Option<Box<dyn Hook>>,
    /// On the experts' outputs (R, M), before they travel back.
    pub before_combine: Option<Box<dyn Hook>>,
    /// On the rows (R, M) as they came back.
    pub after_combine: Option<Box<dyn Hook>>,
    /// On the layer's output (T, M).
    pub before_moe_end: Option<Box<dyn Hook>>,
}
