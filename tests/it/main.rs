//! Integration tests.

#![allow(clippy::unwrap_used)] // A test that cannot go on fails.

mod gradients;
mod moe;
mod support;
