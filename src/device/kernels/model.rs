//! What a transformer needs around its MoE layers.

use crate::error::Result;
use crate::tensor::Tensor;

/// Rotary position embedding (Su et al. 2021) in the half-split form of GPT-NeoX, LLaMA and Mixtral: dimension i of a
/// head pairs with i + D/2 and turns by position·theta^(−2i/D).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies: 10,000, or 1,000,000 for Mixtral.
    pub theta: f64,
    /// The position of the first token of each sequence.
    pub first: usize,
}

/// The sizes of a causal attention: q and out are (B·L, Hq·D), k and v (B·L, Hkv·D); query head h uses key head
/// h / (Hq/Hkv) (grouped-query attention; Hkv = Hq is the plain form).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// B, sequences.
    pub batch: usize,
    /// L, tokens of each.
    pub seq: usize,
    /// Hq.
    pub heads: usize,
    /// Hkv; divides Hq.
    pub kv_heads: usize,
    /// D, a head's width. Scores are scaled by 1/√D.
    pub head_dim: usize,
}

/// What a transformer needs around its MoE layers.
pub trait ModelKernels: Send + Sync {
    /// LayerNorm over the last dimension: `y = (x − mean)·rstd·gain + bias`, rstd = 1/√(var + eps) with the biased
    /// variance. x, y: (R, M); gain, bias: (M); mean, rstd: (R) acc.
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        eps: f64,
        y: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
    ) -> Result<()>;

    /// Writes dx; `d_gain += …`, `d_bias += …`.
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
    ) -> Result<()>;

    /// RMSNorm (Zhang and Sennrich 2019): `y = x·rstd·gain`, rstd = 1/√(mean(x²) + eps). x, y: (R, M), rstd: (R) acc.
    fn rms_norm(&self, x: &Tensor, gain: &Tensor, eps: f64, y: &Tensor, rstd: &Tensor) -> Result<()>;

    /// Writes dx; `d_gain += …`.
    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
    ) -> Result<()>;

    /// Rotates x: (B·L, H·D), given as (B, L, H, D), into y; `inverse` turns back, which is the backward. y may be x.
    fn rope(&self, x: &Tensor, rope: Rope, inverse: bool, y: &Tensor) -> Result<()>;

    /// Causal attention: `out = softmax(q·kᵀ/√D, masked)·v`, `lse`: (B, Hq, L) acc, the log-sum-exp of each row of scores.
    fn attention(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
    ) -> Result<()>;

    /// Writes dq, dk and dv, recomputing the probabilities from `lse`.
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
    ) -> Result<()>;

    /// `loss[n] = lse[n] − logits[n, target[n]]`. logits: (N, V) any float; targets: (N) i32 in 0..V; loss, lse: (N) acc.
    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, loss: &Tensor, lse: &Tensor) -> Result<()>;

    /// `d_logits[n,v] = d_loss[n]·(exp(logits[n,v] − lse[n]) − [v = target[n]])`, d_loss: (N) acc. d_logits may be logits.
    fn cross_entropy_backward(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        lse: &Tensor,
        d_loss: &Tensor,
        d_logits: &Tensor,
    ) -> Result<()>;
}
