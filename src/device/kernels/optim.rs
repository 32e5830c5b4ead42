//! The optimizer's arithmetic.

use super::{MathKernels, MemoryKernels};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

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

impl AdamW {
    /// The numbers of [`AdamW::scalars`].
    pub const SCALARS: usize = 8;

    /// What the update is computed with: β₁, 1 − β₁, β₂, 1 − β₂, ε, lr/(1 − β₁ᵗ), 1/√(1 − β₂ᵗ), lr.
    pub fn scalars(&self) -> [f64; Self::SCALARS] {
        // In f64: 1 − β₂ and 1 − β₂ᵗ lose digits in f32.
        let rate = self.lr / (1.0 - self.beta1.powf(self.step as f64));
        let root = (1.0 / (1.0 - self.beta2.powf(self.step as f64))).sqrt();
        [self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps, rate, root, self.lr]
    }
}

/// One tensor of [`OptimKernels::adamw_many`].
#[derive(Clone, Copy, Debug)]
pub struct AdamWItem<'a> {
    /// This tensor's own, in place of [`AdamW::weight_decay`].
    pub weight_decay: f64,
    /// acc.
    pub weight: &'a Tensor,
    /// acc.
    pub m: &'a Tensor,
    /// acc.
    pub v: &'a Tensor,
    /// Any float.
    pub grad: &'a Tensor,
    /// Becomes the new weight, rounded; any float.
    pub copy: Option<&'a Tensor>,
}

/// The optimizer's arithmetic.
pub trait OptimKernels: MathKernels + MemoryKernels {
    /// One AdamW step with `grad_scale[0]·grad` as the gradient (grad_scale: (1) acc, on the device, so that clipping needs
    /// no host read). A scale of 0 leaves everything as it is: [`OptimKernels::clip_scale`] gives it for gradients that are
    /// not finite. weight, m, v: acc; grad: any float; all the same shape.
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

    /// `scalars = settings.scalars()`, (8) acc: what a graph that has [`OptimKernels::adamw_many`] in it is given anew
    /// before each replay.
    fn adamw_scalars(&self, settings: AdamW, scalars: &Tensor) -> Result<()> {
        let values = Tensor::from_slice(&settings.scalars(), [AdamW::SCALARS])?;
        match scalars.dtype() {
            DType::F64 => self.upload(&values, scalars),
            DType::F32 => {
                let narrow = settings.scalars().map(|v| v as f32);
                self.upload(&Tensor::from_slice(&narrow, [AdamW::SCALARS])?, scalars)
            }
            other => shape_err!("adamw_scalars: a tensor of {other} where f32 or f64 is expected"),
        }
    }

    /// [`OptimKernels::adamw`] for every item, then its copy. `scalars` holds what [`OptimKernels::adamw_scalars`] made of
    /// `settings`; a GPU takes the step's numbers from there when the operation runs, so that a captured one goes on with
    /// those of later steps.
    fn adamw_many(
        &self,
        settings: AdamW,
        scalars: &Tensor,
        grad_scale: &Tensor,
        items: &[AdamWItem<'_>],
    ) -> Result<()> {
        let _ = scalars;
        for item in items {
            let settings = AdamW { weight_decay: item.weight_decay, ..settings };
            self.adamw(settings, grad_scale, item.weight, item.m, item.v, item.grad)?;
            if let Some(copy) = item.copy {
                self.copy(item.weight, copy)?;
            }
        }
        Ok(())
    }

    /// `sum[0] += Σ x²` over all elements of all tensors, sum: (1) acc; in a fixed order.
    fn sum_squares_many(&self, tensors: &[&Tensor], sum: &Tensor) -> Result<()> {
        tensors.iter().try_for_each(|t| self.dot(t, t, sum))
    }
}
