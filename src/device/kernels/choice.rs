//! Tokens choose experts: the whole way from logits to a routing as one operation, and its backward; here as compositions
//! of the smaller ones, which say what they mean.

use super::{ExpertGroups, GateKernels};
use crate::device::check::{expect, matrix};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Keeps sums of scores off zero, where all of them underflow (DeepSeek-V3 has the same).
pub const SUM_EPS: f64 = 1e-20;

/// What a token's score of an expert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// The softmax of its logits over the experts.
    Softmax,
    /// The sigmoid of the expert's logit.
    Sigmoid,
}

/// How tokens choose experts by their logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChoiceRule {
    /// Scores from logits.
    pub score: Score,
    /// Node-limited selection.
    pub expert_groups: Option<ExpertGroups>,
    /// A token's k weights are `scale` times their share in the sum of its k scores, not `scale` times the scores.
    pub normalise: bool,
    /// What weights are multiplied by.
    pub scale: f64,
    /// The balance loss counts first choices only, not all k.
    pub balance_first_only: bool,
}

/// What [`GateKernels::choose_experts`] writes. T tokens in G routing groups, E experts, k choices per token.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// (T, k) i32, best first.
    pub experts: &'a Tensor,
    /// (T, k) acc.
    pub weights: &'a Tensor,
    /// (T) acc: the score of a token's first choice. With it, slots go to tokens by descending best score instead of in
    /// token order (batch-prioritised routing).
    pub best: Option<&'a Tensor>,
    /// Slots, where the capacity is known before the loads.
    pub slots: Option<Slots<'a>>,
    /// (G, E) i32: choices per group and expert, before drops.
    pub loads: &'a Tensor,
    /// (1) acc: the balance loss of the probabilities, which are the softmax, or sigmoids over their sum.
    pub balance_loss: &'a Tensor,
    /// (E) acc: the balance loss's fractions of choices, for the backward.
    pub fraction: &'a Tensor,
    /// (1) acc: the z-loss of the logits.
    pub z_loss: Option<&'a Tensor>,
    /// (1) acc: the mean entropy of the probabilities.
    pub entropy: &'a Tensor,
}

/// Slots to assign.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    /// Choices that an expert takes from one routing group.
    pub capacity: usize,
    /// (T, k) i32: as [`GateKernels::assign_slots`] writes them.
    pub slots: &'a Tensor,
}

/// What [`GateKernels::choose_experts_backward`] needs besides the logits.
#[derive(Clone, Copy, Debug)]
pub struct ChosenGrad<'a> {
    /// (T, k) i32: the forward's.
    pub experts: &'a Tensor,
    /// (T, k) acc: the forward's.
    pub weights: &'a Tensor,
    /// (E) acc: the forward's.
    pub fraction: &'a Tensor,
    /// (T, k) acc: the gradient of the weights.
    pub d_weights: &'a Tensor,
    /// (1) acc: that of the balance loss.
    pub d_balance: &'a Tensor,
    /// (1) acc: that of the z-loss, if there is one.
    pub d_z: Option<&'a Tensor>,
}

impl ChoiceRule {
    /// Whether the order of logits decides: then they are compared themselves, for the scores that two of them give may
    /// round to one.
    pub(in crate::device) fn by_logit(&self, bias: Option<&Tensor>) -> bool {
        bias.is_none() && self.expert_groups.is_none_or(|groups| groups.kept == groups.groups)
    }

    /// Checks the shapes of the forward; returns (T, E, k, G).
    pub(in crate::device) fn check(
        op: &str,
        logits: &Tensor,
        bias: Option<&Tensor>,
        out: &Chosen<'_>,
    ) -> Result<[usize; 4]> {
        let (tokens, experts) = matrix(op, "logits", logits)?;
        let (_, k) = matrix(op, "experts", out.experts)?;
        let (groups, _) = matrix(op, "loads", out.loads)?;
        let acc = logits.dtype();
        expect(op, "experts", out.experts, &[tokens, k], DType::I32)?;
        expect(op, "loads", out.loads, &[groups, experts], DType::I32)?;
        expect(op, "weights", out.weights, &[tokens, k], acc)?;
        expect(op, "balance_loss", out.balance_loss, &[1], acc)?;
        expect(op, "fraction", out.fraction, &[experts], acc)?;
        expect(op, "entropy", out.entropy, &[1], acc)?;
        for (what, t, shape) in [("bias", bias, [experts]), ("best", out.best, [tokens]), ("z_loss", out.z_loss, [1])] {
            t.map_or(Ok(()), |t| expect(op, what, t, &shape, acc))?;
        }
        if let Some(slots) = out.slots {
            expect(op, "slots", slots.slots, &[tokens, k], DType::I32)?;
        }
        if groups == 0 || tokens == 0 || !tokens.is_multiple_of(groups) {
            shape_err!("{op}: {tokens} tokens in {groups} groups: every group takes as many, at least one");
        }
        Ok([tokens, experts, k, groups])
    }

    /// Checks the shapes of the backward; returns (T, E, k).
    pub(in crate::device) fn check_backward(
        op: &str,
        logits: &Tensor,
        given: &ChosenGrad<'_>,
        d_logits: &Tensor,
    ) -> Result<[usize; 3]> {
        let (tokens, experts) = matrix(op, "logits", logits)?;
        let (_, k) = matrix(op, "experts", given.experts)?;
        let acc = logits.dtype();
        expect(op, "experts", given.experts, &[tokens, k], DType::I32)?;
        expect(op, "weights", given.weights, &[tokens, k], acc)?;
        expect(op, "fraction", given.fraction, &[experts], acc)?;
        expect(op, "d_weights", given.d_weights, &[tokens, k], acc)?;
        expect(op, "d_balance", given.d_balance, &[1], acc)?;
        given.d_z.map_or(Ok(()), |d_z| expect(op, "d_z", d_z, &[1], acc))?;
        expect(op, "d_logits", d_logits, &[tokens, experts], d_logits.dtype())?;
        Ok([tokens, experts, k])
    }
}

/// Scores and probabilities: (T, E) acc.
struct Scores {
    scores: Tensor,
    probs: Tensor,
}

impl Scores {
    fn new<K: GateKernels + ?Sized>(k: &K, score: Score, logits: &Tensor) -> Result<Self> {
        let scores = k.alloc(*logits.shape(), logits.dtype())?;
        let probs = match score {
            Score::Softmax => {
                k.softmax(logits, &scores)?;
                scores.clone()
            }
            Score::Sigmoid => {
                k.sigmoid(logits, &scores)?;
                let probs = k.alloc(*logits.shape(), logits.dtype())?;
                k.normalise_sum(&scores, 1.0, SUM_EPS, &probs)?;
                probs
            }
        };
        Ok(Scores { scores, probs })
    }
}

/// [`GateKernels::choose_experts`] in parts.
pub(super) fn forward<K: GateKernels + ?Sized>(
    k: &K,
    rule: &ChoiceRule,
    logits: &Tensor,
    bias: Option<&Tensor>,
    out: &Chosen<'_>,
) -> Result<()> {
    const OP: &str = "choose_experts";
    let [tokens, num_experts, _, groups] = ChoiceRule::check(OP, logits, bias, out)?;
    let acc = logits.dtype();
    let Scores { scores, probs } = Scores::new(k, rule.score, logits)?;
    if rule.by_logit(bias) {
        k.top_k(logits, None, None, out.experts)?;
    } else {
        k.top_k(&scores, bias, rule.expert_groups, out.experts)?;
    }
    let chosen = k.alloc(*out.weights.shape(), acc)?;
    k.gather_cols(&scores, out.experts, &chosen)?;
    if rule.normalise {
        k.normalise_sum(&chosen, rule.scale, SUM_EPS, out.weights)?;
    } else {
        k.axpby(rule.scale, &chosen, 0.0, out.weights)?;
    }
    if let Some(best) = out.best {
        k.copy(&chosen.narrow(1, 0, 1)?, &best.reshape([tokens, 1])?)?;
    }
    k.count_experts(out.experts, out.loads)?;
    if let Some(Slots { capacity, slots }) = out.slots {
        k.assign_slots(out.experts, out.best, num_experts, groups, capacity, slots)?;
    }
    k.balance_loss(&probs, out.experts, rule.balance_first_only, out.balance_loss, out.fraction)?;
    if let Some(z_loss) = out.z_loss {
        k.z_loss(logits, &k.alloc([tokens].into(), acc)?, z_loss)?;
    }
    k.mean_entropy(&probs, out.entropy)
}

/// [`GateKernels::choose_experts_backward`] in parts.
pub(super) fn backward<K: GateKernels + ?Sized>(
    k: &K,
    rule: &ChoiceRule,
    logits: &Tensor,
    given: &ChosenGrad<'_>,
    d_logits: &Tensor,
) -> Result<()> {
    ChoiceRule::check_backward("choose_experts_backward", logits, given, d_logits)?;
    let acc = logits.dtype();
    let like = |t: &Tensor| k.alloc(*t.shape(), acc);
    let zeros = || {
        let zeros = like(logits)?;
        k.fill(&zeros, 0.0)?;
        Ok::<_, crate::Error>(zeros)
    };
    let Scores { scores, probs } = Scores::new(k, rule.score, logits)?;
    let (chosen, d_chosen) = (like(given.weights)?, like(given.weights)?);
    k.gather_cols(&scores, given.experts, &chosen)?;
    if rule.normalise {
        k.normalise_sum_backward(&chosen, given.weights, rule.scale, SUM_EPS, given.d_weights, &d_chosen)?;
    } else {
        k.axpby(rule.scale, given.d_weights, 0.0, &d_chosen)?;
    }
    let d_probs = zeros()?;
    let d = if d_logits.dtype() == acc { d_logits.clone() } else { like(logits)? };
    match rule.score {
        Score::Softmax => {
            k.scatter_cols(&d_chosen, given.experts, &d_probs)?;
            k.balance_loss_backward(given.fraction, given.d_balance, &d_probs)?;
            k.softmax_backward(&probs, &d_probs, &d)?;
        }
        Score::Sigmoid => {
            let (d_scores, through_sum) = (zeros()?, like(logits)?);
            k.scatter_cols(&d_chosen, given.experts, &d_scores)?;
            k.balance_loss_backward(given.fraction, given.d_balance, &d_probs)?;
            k.normalise_sum_backward(&scores, &probs, 1.0, SUM_EPS, &d_probs, &through_sum)?;
            k.axpby(1.0, &through_sum, 1.0, &d_scores)?;
            k.sigmoid_backward(&scores, &d_scores, &d)?;
        }
    }
    if let Some(d_z) = given.d_z {
        let (lse, loss) = (k.alloc([logits.dim(0)].into(), acc)?, k.alloc([1].into(), acc)?);
        k.z_loss(logits, &lse, &loss)?;
        k.z_loss_backward(logits, &lse, d_z, &d)?;
    }
    if d_logits.dtype() == acc { Ok(()) } else { k.copy(&d, d_logits) }
}
