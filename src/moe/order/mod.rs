//! orders.

use super::Order;
use super::named::named;

/// The orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrderKind {
    /// GShard's dense one-hot einsum.
    Gshard,
    /// Tutel's sparse index form.
    Tutel,
    /// Sorted by expert, no padding.
    Ragged,
}
named!(OrderKind, "order", { Gshard => "gshard", Tutel => "tutel", Ragged => "ragged" });

impl OrderKind {
    /// The order.
    pub fn build(self) -> Box<dyn Order> {
        todo!()
    }
}
