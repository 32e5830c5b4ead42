//! Integration tests.

#![allow(clippy::unwrap_used)] // A test that cannot go on fails.

mod bench;
mod checkpoint;
mod cli;
mod cuda;
mod golden_gates;
mod golden_models;
mod gradients;
mod model;
mod moe;
mod plan;
mod profile;
mod properties;
mod ranks;
mod schedule;
mod support;
mod train;
