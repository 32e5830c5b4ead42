//! fsmoe: an engine that trains sparse Mixture-of-Experts models.

pub mod device;
