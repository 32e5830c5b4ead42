//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::tensor::Tensor;

impl ModelKernels for Cpu {
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        eps: f64,
        y: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
    ) -> Result<()> { todo!() }
    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
        d_bias: &Tensor,
    ) -> Result<()> { todo!() }
    fn rms_norm(&self, x: &Tensor, gain: &Tensor, eps: f64, y: &Tensor, rstd: &Tensor) -> Result<()> { todo!() }
    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
    ) -> Result<()> { todo!() }
    fn rope(&self, x: &Tensor, rope: Rope, inverse: bool, y: &Tensor) -> Result<()> { todo!() }
    fn attention(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
    ) -> Result<()> { todo!() }
    fn attention_backward(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        d_out: &Tensor,
        dq: &Tensor,
        dk: &Tensor,
        dv: &Tensor,
    ) -> Result<()> { todo!() }
    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, loss: &Tensor, lse: &Tensor) -> Result<()> { todo!() }
    fn cross_entropy_backward(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        lse: &Tensor,
        d_loss: &Tensor,
        d_logits: &Tensor,
    ) -> Result<()> { todo!() }
}
