//! What gates share in which tokens choose experts: selection, capacity, slots, weights, losses.

use super::super::{Assignment, GateContext, MoeConfig, Routing, RoutingGrad};
use super::{ZLoss, entropy, group_tokens, softmax};
use crate::comm::Communicator;
use crate::device::{ExpertGroups, Lane};
use crate::error::{Result, config_err};
use crate::tensor::{DType, Tensor};

/// Keeps the sum of chosen scores off zero, where all of them underflow (DeepSeek-V3 has the same).
const SUM_EPS: f64 = 1e-20;

/// How tokens choose.
pub(super) struct TokenChoice {
    experts: usize,
    top_k: usize,
    /// The k weights of a token sum to `scale`, rather than being the scores times `scale`.
    normalise: bool,
    scale: f64,
    batch_prioritised: bool,
    balance_first_only: bool,
}

/// Limits on which experts are chosen; the weights do not know of them.
#[derive(Clone, Copy, Default)]
pub(super) struct Selection<'a> {
    /// (E) acc, added to the scores.
    pub(super) bias: Option<&'a Tensor>,
    pub(super) groups: Option<ExpertGroups>,
}

/// What the backward of a choice needs besides the routing.
pub(super) struct Chosen {
    /// (T, k) acc: the chosen scores.
    scores: Tensor,
    /// (E) acc: the balance loss's fractions of choices.
    fraction: Tensor,
}

impl TokenChoice {
    /// The choice that `config` describes; weights are multiplied by `scale`.
    pub(super) fn new(config: &MoeConfig, scale: f64) -> Self {
        TokenChoice {
            experts: config.experts,
            top_k: config.top_k,
            normalise: config.normalises_weights(),
            scale,
            batch_prioritised: config.batch_prioritised,
            balance_first_only: config.balance_first_only,
        }
    }

    /// Every token takes the k experts with the best `scores`; `probs`, rows that sum to one, are what balance loss and
    /// entropy are of. Both (T, E) acc.
    pub(super) fn route(
        &self,
        cx: &GateContext<'_>,
        scores: &Tensor,
        probs: &Tensor,
        selection: Selection<'_>,
    ) -> Result<(Routing, Chosen)> {
        let (lane, acc) = (cx.lane, scores.dtype());
        let (tokens, k) = (scores.dim(0), self.top_k);
        let group_tokens = group_tokens(cx, scores)?;

        let experts = lane.empty([tokens, k], DType::I32)?;
        lane.top_k(scores, selection.bias, selection.groups, &experts)?;
        let chosen = lane.empty([tokens, k], acc)?;
        lane.gather_cols(scores, &experts, &chosen)?;
        let weights = lane.empty_like(&chosen)?;
        if self.normalise {
            lane.normalise_sum(&chosen, self.scale, SUM_EPS, &weights)?;
        } else {
            lane.axpby(self.scale, &chosen, 0.0, &weights)?;
        }

        let loads = lane.empty([cx.groups, self.experts], DType::I32)?;
        lane.count_experts(&experts, &loads)?;
        let capacity = match cx.capacity.rows(k, group_tokens, self.experts) {
            Some(rows) => rows,
            None => largest(lane, &loads)?,
        };
        let priority = match self.batch_prioritised {
            true => Some(lane.contiguous(&chosen.narrow(1, 0, 1)?)?.reshape([tokens])?),
            false => None,
        };
        let slots = lane.empty_like(&experts)?;
        lane.assign_slots(&experts, priority.as_ref(), self.experts, cx.groups, capacity, &slots)?;

        let (balance, fraction) = (lane.empty([1], acc)?, lane.empty([self.experts], acc)?);
        lane.balance_loss(probs, &experts, self.balance_first_only, &balance, &fraction)?;
        if let Some(ranks) = cx.ranks {
            balance_of_all(lane, ranks, probs, &balance, &fraction)?;
        }
        let routing = Routing {
            tokens,
            experts: self.experts,
            groups: cx.groups,
            capacity,
            assignment: Assignment::TokenChoice { experts, slots, weights },
            balance_loss: Some(balance),
            z_loss: None,
            loads,
            entropy: entropy(lane, probs)?,
        };
        Ok((routing, Chosen { scores: chosen, fraction }))
    }

    /// Adds the gradients of [`TokenChoice::route`]'s scores and probs; the two may be the same tensor.
    pub(super) fn backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        chosen: &Chosen,
        grad: &RoutingGrad,
        d_scores: &Tensor,
        d_probs: &Tensor,
    ) -> Result<()> {
        let Assignment::TokenChoice { experts, weights, .. } = &routing.assignment else {
            config_err!("the backward of a token choice was given another gate's routing");
        };
        let d_chosen = lane.empty_like(&chosen.scores)?;
        if self.normalise {
            lane.normalise_sum_backward(&chosen.scores, weights, self.scale, SUM_EPS, &grad.combine, &d_chosen)?;
        } else {
            lane.axpby(self.scale, &grad.combine, 0.0, &d_chosen)?;
        }
        lane.scatter_cols(&d_chosen, experts, d_scores)?;
        lane.balance_loss_backward(&chosen.fraction, &grad.balance, d_probs)
    }
}

/// Makes the balance loss and the fractions of choices, this rank's own, those of all ranks: both means are over as many
/// tokens on each.
fn balance_of_all(
    lane: &Lane,
    ranks: &dyn Communicator,
    probs: &Tensor,
    balance: &Tensor,
    fraction: &Tensor,
) -> Result<()> {
    let (tokens, experts) = (probs.dim(0), probs.dim(1));
    let means = lane.zeros([2, experts], fraction.dtype())?;
    let (mean, chosen) = (means.index(0)?, means.index(1)?);
    lane.sum_rows(probs, &mean)?;
    lane.axpby(tokens as f64, fraction, 0.0, &chosen)?;
    ranks.all_reduce(lane, &means)?;
    let all = (tokens * ranks.size()) as f64;
    lane.axpby(1.0 / all, &chosen, 0.0, fraction)?;
    lane.fill(balance, 0.0)?;
    lane.dot(&mean, fraction, balance)?;
    // The product of the sums of probabilities and the fractions: E/T of it is the loss.
    let product = lane.cast(balance, balance.dtype())?;
    lane.axpby(experts as f64 / all, &product, 0.0, balance)
}

/// The capacity that drops nothing: the largest load over experts and groups, read from the device.
fn largest(lane: &Lane, loads: &Tensor) -> Result<usize> {
    let loads: Vec<i32> = lane.to_host(loads)?.to_vec()?;
    Ok(loads.into_iter().max().unwrap_or(0).max(1) as usize)
}

/// A token choice on softmax probabilities, with the z-loss.
pub(super) struct SoftmaxChoice(TokenChoice);

/// What the backward of a [`SoftmaxChoice`] needs.
pub(super) struct SoftmaxChosen {
    logits: Tensor,
    probs: Tensor,
    lse: Tensor,
    chosen: Chosen,
}

impl SoftmaxChoice {
    pub(super) fn new(config: &MoeConfig) -> Self {
        SoftmaxChoice(TokenChoice::new(config, 1.0))
    }

    /// Routes by logits: (T, E) acc.
    pub(super) fn route(&self, cx: &GateContext<'_>, logits: Tensor) -> Result<(Routing, SoftmaxChosen)> {
        let probs = softmax(cx.lane, &logits)?;
        let (mut routing, chosen) = self.0.route(cx, &probs, &probs, Selection::default())?;
        let z = ZLoss::new(cx.lane, &logits)?;
        routing.z_loss = Some(z.loss);
        Ok((routing, SoftmaxChosen { logits, probs, lse: z.lse, chosen }))
    }

    /// The gradient of the logits.
    pub(super) fn backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        saved: &SoftmaxChosen,
        grad: &RoutingGrad,
    ) -> Result<Tensor> {
        let d_probs = lane.zeros(*saved.probs.shape(), saved.probs.dtype())?;
        self.0.backward(lane, routing, &saved.chosen, grad, &d_probs, &d_probs)?;
        let d_logits = lane.empty_like(&d_probs)?;
        lane.softmax_backward(&saved.probs, &d_probs, &d_logits)?;
        lane.z_loss_backward(&saved.logits, &saved.lse, &grad.z, &d_logits)?;
        Ok(d_logits)
    }
}
