//! Allocation, copies and fills.

use crate::error::Result;
use crate::rng::Counter;
use crate::tensor::{DType, Place, Shape, Tensor};

/// A device apart from the host, and its memory in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its maker's name for it.
    pub name: String,
    /// All its memory.
    pub total_memory: usize,
    /// What this backend can still have of it: what is free, and what it keeps for reuse.
    pub free_memory: usize,
    /// The most that was in this backend's tensors at one time.
    pub peak_memory: usize,
}

/// Allocation, copies and fills.
pub trait MemoryKernels: Send + Sync {
    /// Where this backend's tensors lie.
    fn place(&self) -> Place;

    /// The device, if it is one apart from the host.
    fn device(&self) -> Result<Option<DeviceInfo>> {
        Ok(None)
    }

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
