//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::tensor::Tensor;

impl OptimKernels for Cpu {
    fn adamw(
        &self,
        settings: AdamW,
        grad_scale: &Tensor,
        weight: &Tensor,
        m: &Tensor,
        v: &Tensor,
        grad: &Tensor,
    ) -> Result<()> { todo!() }
    fn clip_scale(&self, sum: &Tensor, pre_scale: f64, max_norm: f64, norm: &Tensor, scale: &Tensor) -> Result<()> { todo!() }
}
