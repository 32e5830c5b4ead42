//! fsmoe: an engine that trains sparse Mixture-of-Experts models.

pub mod autograd;
pub mod device;
mod error;
pub mod fsio;
pub mod model;
pub mod moe;
mod named;
pub mod report;
pub mod rng;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
