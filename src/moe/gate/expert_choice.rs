//! The expert-choice gate.

use super::super::{Assignment, Capacity, Gate, GateContext, MoeConfig, Routing, RoutingGrad, Saved, saved};
use super::{ZLoss, entropy, group_tokens, linear, linear_backward, softmax};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::error::{Result, config_err};
use crate::tensor::{DType, Tensor};

/// Each expert takes the C tokens of a group that are most likely to be its own (Zhou et al. 2022): p is the softmax
/// over experts, C = min(ceil(f·k·T/E), T), a choice's weight its p. Loads are equal by construction.
pub struct ExpertChoiceGate {
    /// (E, M).
    weight: Parameter,
    /// k: experts per token on average, at f = 1.
    top_k: usize,
}

struct State {
    logits: Tensor,
    probs: Tensor,
    lse: Tensor,
}

impl ExpertChoiceGate {
    /// A random `weight`.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let shape = [config.experts, config.hidden];
        let weight = init.normal("weight", shape, config.init_std, ReduceGroup::Replicated)?;
        Ok(ExpertChoiceGate { weight, top_k: config.top_k })
    }
}

impl Gate for ExpertChoiceGate {
    fn name(&self) -> &str {
        "expert-choice"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.weight.clone()]
    }

    fn sees_other_tokens(&self) -> bool {
        true
    }

    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)> {
        let lane = cx.lane;
        let (groups, experts) = (cx.groups, self.weight.value().dim(0));
        let group_tokens = group_tokens(cx, x)?;
        let Some(capacity) = cx.capacity.rows(self.top_k, group_tokens, experts) else {
            config_err!("capacity factor {} with the expert-choice gate: give a number", Capacity::Dropless);
        };
        let logits = linear(lane, x, &self.weight)?;
        let probs = softmax(lane, &logits)?;
        let tokens = lane.empty([experts, groups * capacity], DType::I32)?;
        let weights = lane.empty([experts, groups * capacity], probs.dtype())?;
        lane.expert_choice(&probs, groups, capacity, &tokens, &weights)?;
        let z = ZLoss::new(lane, &logits)?;
        let routing = Routing {
            tokens: x.dim(0),
            experts,
            groups,
            capacity,
            assignment: Assignment::ExpertChoice { tokens, weights },
            balance_loss: None,
            z_loss: Some(z.loss),
            loads: lane.full([groups, experts], DType::I32, capacity as f64)?,
            entropy: entropy(lane, &probs)?,
        };
        Ok((routing, Box::new(State { logits, probs, lse: z.lse })))
    }

    fn backward(
        &self,
        cx: &GateContext<'_>,
        x: &Tensor,
        routing: &Routing,
        state: &Saved,
        grad: &RoutingGrad,
        dx: &Tensor,
    ) -> Result<()> {
        let lane = cx.lane;
        let State { logits, probs, lse } = saved(state)?;
        let Assignment::ExpertChoice { tokens, .. } = &routing.assignment else {
            config_err!("the backward of an expert choice was given another gate's routing");
        };
        let d_probs = lane.zeros(*probs.shape(), probs.dtype())?;
        lane.expert_choice_backward(tokens, &grad.combine, &d_probs)?;
        let d_logits = lane.empty_like(probs)?;
        lane.softmax_backward(probs, &d_probs, &d_logits)?;
        lane.z_loss_backward(logits, lse, &grad.z, &d_logits)?;
        linear_backward(lane, x, &self.weight, &d_logits, dx)
    }
}
