//! What gates are made of: selection, slot assignment, losses. Logits, probabilities and losses are acc tensors.
//!
//! Tokens fall into G routing groups of T/G consecutive tokens; capacity C is each group's own. Everywhere, ties go to
//! the lowest index.

use super::choice::{self, ChoiceRule, Chosen, ChosenGrad};
use super::{MathKernels, MemoryKernels};
use crate::error::Result;
use crate::tensor::Tensor;

/// DeepSeek-V3's node-limited selection: the E experts form `groups` equal groups; a token takes experts only from its
/// `kept` best groups, a group's rank being the sum of its two best biased scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ExpertGroups {
    /// The number of groups; divides E.
    pub groups: usize,
    /// How many of them a token may use.
    pub kept: usize,
}

/// What gates are made of.
pub trait GateKernels: MemoryKernels + MathKernels {
    /// `experts[t]` = the k experts with the largest `scores[t,e] + bias[e]`, descending, ties to the lowest index, inside
    /// the kept groups. scores: (T, E) acc; bias: (E) acc; experts: (T, k) i32.
    fn top_k(
        &self,
        scores: &Tensor,
        bias: Option<&Tensor>,
        groups: Option<ExpertGroups>,
        experts: &Tensor,
    ) -> Result<()>;

    /// `out[t,j] = x[t, index[t,j]]`, 0 where the index is −1. x: (T, N), index: (T, k) i32, out: (T, k) of x's type.
    fn gather_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()>;

    /// `out[t, index[t,j]] += x[t,j]`, nothing where the index is −1. x, index: (T, k), out: (T, N); j ascending. Types of
    /// x and out may differ (both floats).
    fn scatter_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()>;

    /// `loads[g,e]` = the number of choices of group g's tokens that name expert e. experts: (T, k), loads: (G, E) i32.
    fn count_experts(&self, experts: &Tensor, loads: &Tensor) -> Result<()>;

    /// Gives every choice its slot, per routing group: all tokens' first choices in order, then all second choices, …;
    /// `slots[t,j]` counts up from 0 per expert, −1 where it would reach `capacity`. With `priority` (T, acc), a group's
    /// tokens are taken by descending priority instead of token order (batch-prioritised routing, Riquelme et al. 2021).
    /// experts, slots: (T, k) i32; `num_experts` E, `groups` G.
    fn assign_slots(
        &self,
        experts: &Tensor,
        priority: Option<&Tensor>,
        num_experts: usize,
        groups: usize,
        capacity: usize,
        slots: &Tensor,
    ) -> Result<()>;

    /// Expert choice: in every group, each expert's `capacity` tokens with the largest probability, descending.
    /// probs: (T, E) acc; tokens: (E, G·capacity) i32, token numbers in 0..T; weights: (E, G·capacity) acc, the
    /// probabilities. Needs capacity ≤ T/G.
    fn expert_choice(
        &self,
        probs: &Tensor,
        groups: usize,
        capacity: usize,
        tokens: &Tensor,
        weights: &Tensor,
    ) -> Result<()>;

    /// `d_probs[tokens[e,s], e] += d_weights[e,s]`. An expert names a token once, as [`GateKernels::expert_choice`] has it.
    fn expert_choice_backward(&self, tokens: &Tensor, d_weights: &Tensor, d_probs: &Tensor) -> Result<()>;

    /// Load-balance loss `loss[0] = E·Σ_e m_e·c_e`: m_e the mean of `probs[:,e]`, c_e the number of counted choices of e
    /// over T, counting first choices (GShard, Switch) or all k (`first_only` false; Hugging Face's Mixtral). Writes
    /// `fraction[e] = c_e` for the backward. probs: (T, E) acc, experts: (T, k), loss: (1) acc, fraction: (E) acc.
    fn balance_loss(
        &self,
        probs: &Tensor,
        experts: &Tensor,
        first_only: bool,
        loss: &Tensor,
        fraction: &Tensor,
    ) -> Result<()>;

    /// `d_probs[t,e] += d_loss[0]·E·fraction[e]/T`. d_loss: (1) acc.
    fn balance_loss_backward(&self, fraction: &Tensor, d_loss: &Tensor, d_probs: &Tensor) -> Result<()>;

    /// z-loss (Zoph et al. 2022): `loss[0]` = mean over tokens of lse², `lse[t] = log Σ_e exp(logits[t,e])`.
    fn z_loss(&self, logits: &Tensor, lse: &Tensor, loss: &Tensor) -> Result<()>;

    /// `d_logits[t,e] += d_loss[0]·2·lse[t]/T·exp(logits[t,e] − lse[t])`.
    fn z_loss_backward(&self, logits: &Tensor, lse: &Tensor, d_loss: &Tensor, d_logits: &Tensor) -> Result<()>;

    /// `out[0]` = the mean over tokens of the entropy −Σ p·ln p of `probs[t]` normalised to sum one, in nats. probs: (T, E).
    fn mean_entropy(&self, probs: &Tensor, out: &Tensor) -> Result<()>;

    /// Noisy top-k (Shazeer et al. 2017): `out = clean + noise·softplus(raw)`; all (T, E) acc. `out` may be `clean`.
    fn add_gate_noise(&self, clean: &Tensor, raw: &Tensor, noise: &Tensor, out: &Tensor) -> Result<()>;

    /// `d_raw = d_out·noise·sigmoid(raw)`.
    fn add_gate_noise_backward(&self, raw: &Tensor, noise: &Tensor, d_out: &Tensor, d_raw: &Tensor) -> Result<()>;

    /// DeepSeek-V3's bias update: `bias[e] += gamma·sign(mean load − load[e])`, load summed over groups. bias: (E) acc,
    /// loads: (G, E) i32.
    fn update_bias(&self, bias: &Tensor, loads: &Tensor, gamma: f64) -> Result<()>;

    /// `y = min(e^x, max)`: a learned scale kept as its logarithm (X-MoE). x, y: acc, the same shape.
    fn clamped_exp(&self, x: &Tensor, max: f64, y: &Tensor) -> Result<()>;

    /// `dx = dy·y` where y is below `max`, 0 where it is clamped.
    fn clamped_exp_backward(&self, y: &Tensor, max: f64, dy: &Tensor, dx: &Tensor) -> Result<()>;

    /// Tokens choose experts by logits (T, E) acc: scores and the k largest of them, weights, loads, slots, losses and
    /// entropy, all that `out` names. Selection is by score + bias ((E) acc) in the kept groups; by the logits themselves,
    /// which have the scores' order, where there is neither bias nor group. On a GPU E is up to 1,024 and k up to 32.
    fn choose_experts(
        &self,
        rule: &ChoiceRule,
        logits: &Tensor,
        bias: Option<&Tensor>,
        out: &Chosen<'_>,
    ) -> Result<()> {
        choice::forward(self, rule, logits, bias, out)
    }

    /// The gradient of [`GateKernels::choose_experts`]'s logits, through weights and losses. d_logits: (T, E), acc or
    /// another float type, rounded once. The bias has no gradient, and which experts are chosen has none.
    fn choose_experts_backward(
        &self,
        rule: &ChoiceRule,
        logits: &Tensor,
        given: &ChosenGrad<'_>,
        d_logits: &Tensor,
    ) -> Result<()> {
        choice::backward(self, rule, logits, given, d_logits)
    }
}
