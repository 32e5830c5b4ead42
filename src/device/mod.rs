//! Devices: where tensors live and operations run.

pub mod cuda;
