//! Activations of the expert FFNs.

use super::RowWeights;
use crate::error::Result;
use crate::tensor::Tensor;

/// Which form of GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gelu {
    /// x·Φ(x) with the error function (Hendrycks and Gimpel 2016).
    Erf,
    /// The tanh approximation, ½x(1 + tanh(√(2/π)(x + 0.044715x³))), as GPT-2 has it.
    Tanh,
}

/// Activations of the expert FFNs.
pub trait ExpertKernels: Send + Sync {
    /// `y = gelu(x)`; same shape and dtype.
    fn gelu(&self, form: Gelu, x: &Tensor, y: &Tensor) -> Result<()>;

    /// `dx = dy·gelu'(x)`. `dx` may be `dy` itself.
    fn gelu_backward(&self, form: Gelu, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()>;

    /// SwiGLU: `y = silu(gate)·up`, silu(v) = v·sigmoid(v) (Shazeer 2020). All (R, H); gate and up may be rows of a
    /// wider buffer (row stride above H, unit stride within a row).
    fn swiglu(&self, gate: &Tensor, up: &Tensor, y: &Tensor) -> Result<()>;

    /// `d_gate = dy·up·silu'(gate)`, `d_up = dy·silu(gate)`. Row strides as in [`ExpertKernels::swiglu`].
    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dy: &Tensor, d_gate: &Tensor, d_up: &Tensor) -> Result<()>;

    /// [`ExpertKernels::gelu_backward`] where the output was multiplied by a weight per row, dy being the gradient of the
    /// product over the weight: with w the row's weight, `dx = w·dy·gelu'(x)`, `act = w·gelu(x)`, and the weights'
    /// gradient is `d_weights[r] = Σ_h dy·gelu(x)`. Without weights, w is 1. x, dy, dx, act: (R, H).
    fn gelu_backward_weighted(
        &self,
        form: Gelu,
        x: &Tensor,
        dy: &Tensor,
        weights: Option<RowWeights<'_>>,
        dx: &Tensor,
        act: &Tensor,
    ) -> Result<()>;

    /// [`ExpertKernels::swiglu_backward`], weighted as in [`ExpertKernels::gelu_backward_weighted`]; contiguous.
    fn swiglu_backward_weighted(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_gate: &Tensor,
        d_up: &Tensor,
        act: &Tensor,
    ) -> Result<()>;
}
