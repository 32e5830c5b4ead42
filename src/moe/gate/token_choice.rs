//! What gates share in which tokens choose experts: selection, capacity, slots, weights, losses.

use super::super::{Assignment, GateContext, MoeConfig, Routing, RoutingGrad};
use super::group_tokens;
use crate::comm::Communicator;
use crate::device::{ChoiceRule, Chosen, ChosenGrad, ExpertGroups, Lane, SUM_EPS, Score, Slots};
use crate::error::{Result, config_err};
use crate::tensor::{DType, Tensor};

/// How tokens choose.
pub(super) struct TokenChoice {
    rule: ChoiceRule,
    experts: usize,
    top_k: usize,
    batch_prioritised: bool,
}

/// What the backward of a choice needs besides the routing.
pub(super) struct Choice {
    /// (T, E) acc.
    logits: Tensor,
    /// (E) acc: the balance loss's fractions of choices.
    fraction: Tensor,
}

impl TokenChoice {
    /// A choice by softmax probabilities, as `config` describes it.
    pub(super) fn softmax(config: &MoeConfig) -> Self {
        Self::new(config, Score::Softmax, None, 1.0)
    }

    /// A choice by sigmoids inside the best groups of experts; weights are multiplied by `scale`.
    pub(super) fn sigmoid(config: &MoeConfig, groups: Option<ExpertGroups>, scale: f64) -> Self {
        Self::new(config, Score::Sigmoid, groups, scale)
    }

    fn new(config: &MoeConfig, score: Score, expert_groups: Option<ExpertGroups>, scale: f64) -> Self {
        TokenChoice {
            rule: ChoiceRule {
                score,
                expert_groups,
                normalise: config.normalises_weights(),
                scale,
                balance_first_only: config.balance_first_only,
            },
            experts: config.experts,
            top_k: config.top_k,
            batch_prioritised: config.batch_prioritised,
        }
    }

    /// Every token takes the k experts with the best scores + bias ((E) acc). logits: (T, E) acc. Softmax choices have a
    /// z-loss.
    pub(super) fn route(
        &self,
        cx: &GateContext<'_>,
        logits: Tensor,
        bias: Option<&Tensor>,
    ) -> Result<(Routing, Choice)> {
        let (lane, acc) = (cx.lane, logits.dtype());
        let (tokens, k) = (logits.dim(0), self.top_k);
        let group_tokens = group_tokens(cx, &logits)?;
        let ints = |shape: [usize; 2]| lane.empty(shape, DType::I32);
        let one = || lane.empty([1], acc);
        let (experts, slots, loads) = (ints([tokens, k])?, ints([tokens, k])?, ints([cx.groups, self.experts])?);
        let (weights, fraction) = (lane.empty([tokens, k], acc)?, lane.empty([self.experts], acc)?);
        let (balance_loss, entropy) = (one()?, one()?);
        let z_loss = if self.rule.score == Score::Softmax { Some(one()?) } else { None };
        let best = if self.batch_prioritised { Some(lane.empty([tokens], acc)?) } else { None };

        let known = match cx.capacity.rows(k, group_tokens, self.experts) {
            None if cx.exact_capacity => None,
            // An expert takes a token once, so no load is larger.
            rows => Some(rows.unwrap_or(group_tokens)),
        };
        let chosen = Chosen {
            experts: &experts,
            weights: &weights,
            best: best.as_ref(),
            slots: known.map(|capacity| Slots { capacity, slots: &slots }),
            loads: &loads,
            balance_loss: &balance_loss,
            fraction: &fraction,
            z_loss: z_loss.as_ref(),
            entropy: &entropy,
        };
        lane.choose_experts(&self.rule, &logits, bias, &chosen)?;
        let capacity = match known {
            Some(capacity) => capacity,
            None => {
                let capacity = largest(lane, &loads)?;
                lane.assign_slots(&experts, best.as_ref(), self.experts, cx.groups, capacity, &slots)?;
                capacity
            }
        };
        if let Some(ranks) = cx.ranks {
            balance_of_all(lane, ranks, &self.probabilities(lane, &logits)?, &balance_loss, &fraction)?;
        }
        let routing = Routing {
            tokens,
            experts: self.experts,
            groups: cx.groups,
            capacity,
            assignment: Assignment::TokenChoice { experts, slots, weights },
            balance_loss: Some(balance_loss),
            z_loss,
            loads,
            entropy,
        };
        Ok((routing, Choice { logits, fraction }))
    }

    /// The probabilities, (T, E) acc, that the balance loss is of.
    fn probabilities(&self, lane: &Lane, logits: &Tensor) -> Result<Tensor> {
        let probs = lane.empty_like(logits)?;
        match self.rule.score {
            Score::Softmax => lane.softmax(logits, &probs)?,
            Score::Sigmoid => {
                let scores = lane.empty_like(logits)?;
                lane.sigmoid(logits, &scores)?;
                lane.normalise_sum(&scores, 1.0, SUM_EPS, &probs)?;
            }
        }
        Ok(probs)
    }

    /// The gradient of [`TokenChoice::route`]'s logits, (T, E) of type `dtype`.
    pub(super) fn backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        choice: &Choice,
        grad: &RoutingGrad,
        dtype: DType,
    ) -> Result<Tensor> {
        let Assignment::TokenChoice { experts, weights, .. } = &routing.assignment else {
            config_err!("the backward of a token choice was given another gate's routing");
        };
        let given = ChosenGrad {
            experts,
            weights,
            fraction: &choice.fraction,
            d_weights: &grad.combine,
            d_balance: &grad.balance,
            d_z: routing.z_loss.as_ref().map(|_| &grad.z),
        };
        let d_logits = lane.empty(*choice.logits.shape(), dtype)?;
        lane.choose_experts_backward(&self.rule, &choice.logits, &given, &d_logits)?;
        Ok(d_logits)
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
