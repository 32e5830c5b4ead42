//! Integration tests.

mod cuda;
