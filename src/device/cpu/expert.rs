//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::tensor::Tensor;

impl ExpertKernels for Cpu {
    fn gelu(&self, form: Gelu, x: &Tensor, y: &Tensor) -> Result<()> { todo!() }
    fn gelu_backward(&self, form: Gelu, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> { todo!() }
    fn swiglu(&self, gate: &Tensor, up: &Tensor, y: &Tensor) -> Result<()> { todo!() }
    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dy: &Tensor, d_gate: &Tensor, d_up: &Tensor) -> Result<()> { todo!() }
}
