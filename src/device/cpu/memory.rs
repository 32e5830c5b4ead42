//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::rng::Counter;
use crate::tensor::{DType, Place, Shape, Tensor};

impl MemoryKernels for Cpu {
    fn place(&self) -> Place { todo!() }
    fn alloc(&self, shape: Shape, dtype: DType) -> Result<Tensor> { todo!() }
    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> { todo!() }
    fn fill(&self, dst: &Tensor, value: f64) -> Result<()> { todo!() }
    fn download(&self, src: &Tensor, dst: &Tensor) -> Result<()> { todo!() }
    fn upload(&self, src: &Tensor, dst: &Tensor) -> Result<()> { todo!() }
    fn normal(&self, rng: Counter, first: u64, out: &Tensor) -> Result<()> { todo!() }
}
