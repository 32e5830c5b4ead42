//! Gates: which expert takes which token, with which weight.
//!
//! Logits, probabilities and losses have the accumulation type: f64 for f64 tokens, else f32.

mod expert_choice;
mod sigmoid;
mod soft;
mod token_choice;
mod top_k;
mod x_moe;

pub use expert_choice::ExpertChoiceGate;
pub use sigmoid::{SigmoidGate, SigmoidOptions};
pub use soft::SoftGate;
pub use top_k::TopKGate;
pub use x_moe::XMoeGate;

use super::{Gate, GateContext, MoeConfig};
use crate::autograd::{Init, Parameter};
use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::named::named;
use crate::tensor::Tensor;

/// The gates of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateKind {
    /// Softmax over experts, the k most probable (Shazeer et al. 2017, GShard, Switch).
    TopK,
    /// Independent sigmoid scores (BASE, StableMoE), with DeepSeek-V3's options.
    Sigmoid,
    /// Cosine similarity in a low dimension (Chi et al. 2022).
    XMoe,
    /// Experts choose tokens (Zhou et al. 2022).
    ExpertChoice,
    /// Slots are mixes of all tokens (Puigcerver et al. 2024).
    Soft,
}
named!(GateKind, "gate", {
    TopK => "top-k", Sigmoid => "sigmoid", XMoe => "x-moe", ExpertChoice => "expert-choice", Soft => "soft",
});

/// The gate that `config` asks for, its parameters named under `init`'s prefix.
///
/// # Errors
/// If the device has no memory left.
pub fn build(init: &Init, config: &MoeConfig) -> Result<Box<dyn Gate>> {
    Ok(match config.gate {
        GateKind::TopK => Box::new(TopKGate::new(init, config)?),
        GateKind::Sigmoid => Box::new(SigmoidGate::new(init, config)?),
        GateKind::XMoe => Box::new(XMoeGate::new(init, config)?),
        GateKind::ExpertChoice => Box::new(ExpertChoiceGate::new(init, config)?),
        GateKind::Soft => Box::new(SoftGate::new(init, config)?),
    })
}

/// T/G, after checking that x: (T, M) can be routed in G groups.
fn group_tokens(cx: &GateContext<'_>, x: &Tensor) -> Result<usize> {
    let tokens = x.dim(0);
    if x.rank() != 2 || tokens == 0 || cx.groups == 0 || !tokens.is_multiple_of(cx.groups) {
        shape_err!(
            "a gate routes x of shape (T, M), T above 0 and a multiple of the {} routing groups, not {}",
            cx.groups,
            x.shape()
        );
    }
    Ok(tokens / cx.groups)
}

/// `x·wᵀ` as acc; x: (T, M), w: (N, M).
fn linear(lane: &Lane, x: &Tensor, w: &Parameter) -> Result<Tensor> {
    let y = lane.empty([x.dim(0), w.value().dim(0)], x.dtype().accumulate())?;
    lane.gemm(1.0, x, &w.value().t()?, 0.0, &y)?;
    Ok(y)
}

/// The backward of [`linear`]: `dx += dy·w` and w's gradient `+= dyᵀ·x`. A 16-bit gate takes dy rounded to its type: a
/// matrix product has one operand type.
fn linear_backward(lane: &Lane, x: &Tensor, w: &Parameter, dy: &Tensor, dx: &Tensor) -> Result<()> {
    let dy = if dy.dtype() == x.dtype() { dy.clone() } else { lane.cast(dy, x.dtype())? };
    lane.gemm(1.0, &dy, w.value(), 1.0, dx)?;
    let (dw, beta) = w.grad_to_write();
    lane.gemm(1.0, &dy.t()?, x, beta, dw)
}

/// The softmax over experts: (T, E) acc.
fn softmax(lane: &Lane, logits: &Tensor) -> Result<Tensor> {
    let probs = lane.empty_like(logits)?;
    lane.softmax(logits, &probs)?;
    Ok(probs)
}

/// The z-loss of logits: (T, E), and its state.
struct ZLoss {
    /// (1) acc.
    loss: Tensor,
    /// (T) acc.
    lse: Tensor,
}

impl ZLoss {
    fn new(lane: &Lane, logits: &Tensor) -> Result<Self> {
        let (loss, lse) = (lane.empty([1], logits.dtype())?, lane.empty([logits.dim(0)], logits.dtype())?);
        lane.z_loss(logits, &lse, &loss)?;
        Ok(ZLoss { loss, lse })
    }
}

/// The mean entropy of rows: (1) acc.
fn entropy(lane: &Lane, probs: &Tensor) -> Result<Tensor> {
    let out = lane.empty([1], probs.dtype())?;
    lane.mean_entropy(probs, &out)?;
    Ok(out)
}
