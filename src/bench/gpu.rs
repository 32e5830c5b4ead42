//! A GPU under test.

use super::Bench;
use crate::device::cuda;
use crate::error::{Error, Result};

/// GPU number `ordinal`.
///
/// # Errors
/// If there is no such GPU, or it cannot be used.
pub(super) fn open(ordinal: usize) -> Result<Bench> {
    let _ = cuda::open(ordinal)?;
    Err(Error::Device("to be merged".into()))
}
