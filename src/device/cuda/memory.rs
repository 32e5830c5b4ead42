//! Allocation, copies and fills.

use super::Cuda;
use crate::device::MemoryKernels;
use crate::error::{Error, Result};
use crate::rng::Counter;
use crate::tensor::{DType, Place, Shape, Tensor};

impl MemoryKernels for Cuda {
    fn place(&self) -> Place {
        Place::Cuda(self.ordinal())
    }

    fn alloc(&self, shape: Shape, dtype: DType) -> Result<Tensor> {
        self.allocate(shape, dtype)
    }

    fn copy(&self, _src: &Tensor, _dst: &Tensor) -> Result<()> {
        Err(Error::Device("copy".into()))
    }

    fn fill(&self, _dst: &Tensor, _value: f64) -> Result<()> {
        Err(Error::Device("fill".into()))
    }

    fn download(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.copy_to_host(src, dst)
    }

    fn upload(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.copy_from_host(src, dst)
    }

    fn normal(&self, _rng: Counter, _first: u64, _out: &Tensor) -> Result<()> {
        Err(Error::Device("normal".into()))
    }
}
