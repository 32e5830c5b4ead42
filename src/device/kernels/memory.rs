//! Allocation, copies and fills.

use crate::error::Result;
use crate::rng::Counter;
use crate::tensor::{DType, Place, Shape, Tensor};

/// Allocation, copies and fills.
pub trait MemoryKernels: Send + Sync {
    /// Where this backend's tensors lie.
    fn place(&self) -> Place;

    /// A new row-major tensor of unspecified content.
    fn alloc(&self, shape: Shape, dtype: DType) -> Result<Tensor>;

    /// `dst = src`, converted to `dst`'s type. Same shape; any layouts (also transposed or narrowed) on either side,
    /// and a stride of 0 on the source's.
    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()>;

    /// `dst = value`, any layout.
    fn fill(&self, dst: &Tensor, value: f64) -> Result<()>;

    /// `dst = src` from this backend's memory to a contiguous host tensor of the same shape and dtype; returns when it
    /// has happened.
    fn download(&self, src: &Tensor, dst: &Tensor) -> Result<()>;

    /// `dst = src` from a contiguous host tensor to this backend's memory, same shape and dtype; `src` may be reused
    /// when it returns.
    fn upload(&self, src: &Tensor, dst: &Tensor) -> Result<()>;

    /// `out[i]` = the standard normal deviate number `first + i` of `rng` (in acc, then rounded).
    fn normal(&self, rng: Counter, first: u64, out: &Tensor) -> Result<()>;
}
