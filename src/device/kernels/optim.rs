//! The optimizer's arithmetic.

use crate::error::Result;
use crate::tensor::Tensor;

/// AdamW's settings for one step (Loshchilov and Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: weights lose lr·weight_decay of themselves.
    pub weight_decay: f64,
    /// The step's number, from 1, for bias correction.
    pub step: u64,
}

/// The optimizer's arithmetic.
pub trait OptimKernels: Send + Sync {
    /// One AdamW step with `grad_scale[0]·grad` as the gradient (grad_scale: (1) acc, on the device, so that clipping needs
    /// no host read). weight, m, v: acc; grad: any float; all the same shape.
    fn adamw(
        &self,
        settings: AdamW,
        grad_scale: &Tensor,
        weight: &Tensor,
        m: &Tensor,
        v: &Tensor,
        grad: &Tensor,
    ) -> Result<()>;

    /// `norm[0] = √sum[0]·pre_scale`, `scale[0] = pre_scale·min(1, max_norm/norm[0])`: gradient clipping by global norm
    /// over gradients that are still to be multiplied by `pre_scale`. All (1) acc. A norm that is not finite gives
    /// scale 0.
    fn clip_scale(&self, sum: &Tensor, pre_scale: f64, max_norm: f64, norm: &Tensor, scale: &Tensor) -> Result<()>;
}
