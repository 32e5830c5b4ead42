//! What collectives among ranks of one device are made of.

use super::{MathKernels, MemoryKernels};
use crate::device::cuda::Cuda;
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;

/// What collectives among ranks of one device are made of. The methods' own bodies are the specification.
pub trait CommKernels: MemoryKernels + MathKernels {
    /// `to = from` for every pair, contiguous and of one dtype and as many elements each; no output shares memory with
    /// another tensor.
    fn copy_many(&self, pairs: &[(Tensor, Tensor)]) -> Result<()> {
        for (from, to) in pairs.iter().filter(|(_, to)| to.elements() > 0) {
            let n = to.elements();
            self.copy(&from.reshape([n])?, &to.reshape([n])?)?;
        }
        Ok(())
    }

    /// `out` = the sum of `parts`, added in their order in acc and rounded once; all contiguous and of one dtype and as many
    /// elements. `out` may be one of them.
    fn sum_parts(&self, parts: &[Tensor], out: &Tensor) -> Result<()> {
        if out.elements() == 0 {
            return Ok(());
        }
        let sum = self.alloc(*out.shape(), out.dtype().accumulate())?;
        for (i, part) in parts.iter().enumerate() {
            let beta = if i == 0 { 0.0 } else { 1.0 };
            self.axpby(1.0, &part.reshape(*out.shape())?, beta, &sum)?;
        }
        self.copy(&sum, out)
    }

    /// This backend as a GPU's, whose operations may run after their call returns; none: they have run by then.
    fn as_cuda(&self) -> Option<&Cuda> {
        None
    }
}

/// Fails unless both of every pair are contiguous, of one dtype and as many elements.
pub(in crate::device) fn check_pairs(pairs: &[(Tensor, Tensor)]) -> Result<()> {
    for (from, to) in pairs {
        if from.dtype() != to.dtype() || from.elements() != to.elements() {
            shape_err!("copy_many: from {from:?} to {to:?}: both have one dtype and as many elements");
        }
        if !from.is_contiguous() || !to.is_contiguous() || from.overlaps(to) {
            shape_err!("copy_many: from {from:?} to {to:?}: both are contiguous, and share no memory");
        }
    }
    Ok(())
}

/// Fails unless there are parts, all as `out` is.
pub(in crate::device) fn check_parts(parts: &[Tensor], out: &Tensor) -> Result<()> {
    if parts.is_empty() {
        shape_err!("sum_parts to {out:?}: there is at least one part");
    }
    let like_out = |t: &Tensor| t.dtype() == out.dtype() && t.elements() == out.elements() && t.is_contiguous();
    if let Some(t) = parts.iter().chain([out]).find(|t| !like_out(t)) {
        shape_err!("sum_parts: {t:?} to {out:?}: all are contiguous, of one dtype and as many elements");
    }
    Ok(())
}
