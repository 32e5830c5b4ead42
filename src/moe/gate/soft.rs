//! The SoftMoE gate.

use super::super::{Assignment, Gate, GateContext, MoeConfig, Routing, RoutingGrad, Saved, saved};
use super::{entropy, group_tokens, linear, linear_backward, softmax};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::Lane;
use crate::error::{Result, config_err};
use crate::tensor::{DType, Tensor};

/// Nothing is chosen and nothing dropped (Puigcerver et al. 2024): with logits x·Φᵀ of every token for every slot, a
/// slot is the mix of its group's tokens by the softmax over tokens, a token's output the mix of all slots by the softmax
/// over slots.
pub struct SoftGate {
    /// Φ: (E·S, M); slot s of expert e is row e·S + s.
    weight: Parameter,
    experts: usize,
    /// S: slots per expert and group, which is the capacity.
    slots: usize,
}

struct State {
    /// (G, E·S, T/G) acc: the dispatch matrix by slot, each row a softmax over the group's tokens.
    by_slot: Tensor,
}

impl SoftGate {
    /// A random `weight`.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let shape = [config.experts * config.soft_slots, config.hidden];
        let weight = init.normal("weight", shape, config.init_std, ReduceGroup::Replicated)?;
        Ok(SoftGate { weight, experts: config.experts, slots: config.soft_slots })
    }
}

/// (T, N) as a new (G, N, T/G): a group's tokens come last, so that row operations run over them.
fn by_slot(lane: &Lane, t: &Tensor, groups: usize) -> Result<Tensor> {
    lane.contiguous(&t.reshape([groups, t.dim(0) / groups, t.dim(1)])?.t()?)
}

/// The inverse of [`by_slot`].
fn by_token(lane: &Lane, t: &Tensor) -> Result<Tensor> {
    lane.contiguous(&t.t()?)?.reshape([t.dim(0) * t.dim(2), t.dim(1)])
}

impl Gate for SoftGate {
    fn name(&self) -> &str {
        "soft"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.weight.clone()]
    }

    fn sees_other_tokens(&self) -> bool {
        true
    }

    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)> {
        let lane = cx.lane;
        group_tokens(cx, x)?;
        let logits = linear(lane, x, &self.weight)?;
        let combine = softmax(lane, &logits)?;
        let by_slot = softmax(lane, &by_slot(lane, &logits, cx.groups)?)?;
        let routing = Routing {
            tokens: x.dim(0),
            experts: self.experts,
            groups: cx.groups,
            capacity: self.slots,
            entropy: entropy(lane, &combine)?,
            assignment: Assignment::Dense { dispatch: by_token(lane, &by_slot)?, combine },
            balance_loss: None,
            z_loss: None,
            loads: lane.full([cx.groups, self.experts], DType::I32, self.slots as f64)?,
        };
        Ok((routing, Box::new(State { by_slot })))
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
        let State { by_slot: dispatch } = saved(state)?;
        let (Assignment::Dense { combine, .. }, Some(d_dispatch)) = (&routing.assignment, &grad.dispatch) else {
            config_err!("the backward of the soft gate needs its own routing and the dispatch matrix's gradient");
        };
        let d_logits = lane.empty_like(combine)?;
        lane.softmax_backward(combine, &grad.combine, &d_logits)?;
        let d_by_slot = lane.empty_like(dispatch)?;
        lane.softmax_backward(dispatch, &by_slot(lane, d_dispatch, cx.groups)?, &d_by_slot)?;
        lane.axpby(1.0, &by_token(lane, &d_by_slot)?, 1.0, &d_logits)?;
        linear_backward(lane, x, &self.weight, &d_logits, dx)
    }
}
