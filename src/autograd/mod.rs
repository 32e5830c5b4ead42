//! Reverse-mode gradients: a tape over [`crate::device::Kernels`], and the differentiable operations.

mod ops;
mod param;
mod tape;

pub use param::{Init, Parameter, ReduceGroup};
pub use tape::{Grads, InputGrads, Tape, Var};
