//! Orders: how a routing's tokens are laid out as expert rows, and how the rows come back.
//!
//! All carry out the same routing with the same result; they differ in memory and time.

mod gshard;
mod index;
mod ragged;
mod tutel;

pub use gshard::GShard;
pub use ragged::Ragged;
pub use tutel::Tutel;

use super::{Assignment, Order, Routing, RowSplit};
use crate::device::Lane;
use crate::error::{Result, config_err, shape_err};
use crate::named::named;
use crate::tensor::Tensor;

/// The orders that this crate brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrderKind {
    /// [`GShard`].
    GShard,
    /// [`Tutel`].
    Tutel,
    /// [`Ragged`].
    Ragged,
}

named!(OrderKind, "order", { GShard => "gshard", Tutel => "tutel", Ragged => "ragged" });

impl OrderKind {
    /// The order itself.
    pub fn build(self) -> Box<dyn Order> {
        match self {
            OrderKind::GShard => Box::new(GShard),
            OrderKind::Tutel => Box::new(Tutel),
            OrderKind::Ragged => Box::new(Ragged),
        }
    }
}

/// Fails unless x is a matrix of the routing's tokens, (T, M).
fn check_tokens(order: &str, routing: &Routing, x: &Tensor) -> Result<()> {
    match *x.shape().dims() {
        [tokens, _] if tokens == routing.tokens => Ok(()),
        _ => shape_err!("{order} order: tokens of shape {}, the routing is of {} tokens", x.shape(), routing.tokens),
    }
}

/// The weights of a token or expert choice.
fn weights<'a>(order: &str, routing: &'a Routing) -> Result<&'a Tensor> {
    match &routing.assignment {
        Assignment::TokenChoice { weights, .. } | Assignment::ExpertChoice { weights, .. } => Ok(weights),
        Assignment::Dense { .. } => refuse_dense(order),
    }
}

fn refuse_dense<T>(order: &str) -> Result<T> {
    config_err!(
        "{order} order: the dense routing of a soft gate (SoftMoE) mixes tokens, this moves whole ones: use gshard"
    )
}

/// The padded layout (E, G·C, M).
fn padded(routing: &Routing) -> RowSplit {
    RowSplit::Even { experts: routing.experts, each: routing.groups * routing.capacity }
}

/// (G, E) i32 on the lane's device: `start(g, e)`.
fn starts(lane: &Lane, routing: &Routing, start: impl Fn(usize, usize) -> usize) -> Result<Tensor> {
    let (groups, experts) = (routing.groups, routing.experts);
    let values: Vec<i32> = (0..groups * experts).map(|i| start(i / experts, i % experts) as i32).collect();
    lane.to_device(&Tensor::from_slice(&values, [groups, experts])?)
}

#[cfg(test)]
mod tests;
