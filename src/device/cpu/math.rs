//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::tensor::Tensor;

impl MathKernels for Cpu {
    fn gemm(&self, alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()> { todo!() }
    fn add(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> { todo!() }
    fn mul(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> { todo!() }
    fn axpby(&self, alpha: f64, x: &Tensor, beta: f64, y: &Tensor) -> Result<()> { todo!() }
    fn sum_rows(&self, x: &Tensor, out: &Tensor) -> Result<()> { todo!() }
    fn softmax(&self, x: &Tensor, y: &Tensor) -> Result<()> { todo!() }
    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> { todo!() }
    fn sigmoid(&self, x: &Tensor, y: &Tensor) -> Result<()> { todo!() }
    fn sigmoid_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> { todo!() }
    fn normalise_sum(&self, x: &Tensor, scale: f64, eps: f64, y: &Tensor) -> Result<()> { todo!() }
    fn normalise_sum_backward(&self, x: &Tensor, y: &Tensor, scale: f64, eps: f64, dy: &Tensor, dx: &Tensor) -> Result<()> { todo!() }
    fn normalise_l2(&self, x: &Tensor, eps: f64, y: &Tensor, norm: &Tensor) -> Result<()> { todo!() }
    fn normalise_l2_backward(&self, y: &Tensor, norm: &Tensor, eps: f64, dy: &Tensor, dx: &Tensor) -> Result<()> { todo!() }
    fn dot(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> { todo!() }
}
