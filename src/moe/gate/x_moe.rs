//! The X-MoE gate.

use super::super::{Gate, GateContext, MoeConfig, Routing, RoutingGrad, Saved, saved};
use super::token_choice::{Choice, TokenChoice};
use super::{linear, linear_backward};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::Lane;
use crate::error::Result;
use crate::tensor::Tensor;

/// The temperature at the start: the scale's inverse.
const TEMPERATURE: f64 = 0.07;
/// The largest scale.
const MAX_SCALE: f64 = 100.0;
/// A vector shorter than this is divided by this instead of its norm.
const NORM_EPS: f64 = 1e-12;

/// Routing on the hypersphere (Chi et al. 2022): logits are the cosines between a projection of the token to d
/// dimensions and a learned embedding of each expert, times a learned scale of at most 100; then as the top-k gate.
pub struct XMoeGate {
    /// (d, M).
    projection: Parameter,
    /// (E, d).
    embeddings: Parameter,
    /// (1): the scale's logarithm.
    log_scale: Parameter,
    choice: TokenChoice,
}

/// Rows of length one, and what their backward needs.
struct Normalised {
    rows: Tensor,
    norm: Tensor,
}

struct State {
    /// (T, d) acc.
    tokens: Normalised,
    /// (E, d) acc.
    experts: Normalised,
    /// (T, E) acc.
    cosines: Tensor,
    /// (1) acc.
    scale: Tensor,
    choice: Choice,
}

impl XMoeGate {
    /// Random `projection` and `embeddings`, `log_scale` = ln(1/0.07).
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let (d, std, group) = (config.x_moe_dim, config.init_std, ReduceGroup::Replicated);
        Ok(XMoeGate {
            projection: init.normal("projection", [d, config.hidden], std, group)?,
            embeddings: init.normal("embeddings", [config.experts, d], std, group)?,
            log_scale: init.constant("log_scale", [1], -TEMPERATURE.ln())?,
            choice: TokenChoice::softmax(config),
        })
    }
}

impl Normalised {
    fn new(lane: &Lane, x: &Tensor) -> Result<Self> {
        let (rows, norm) = (lane.empty_like(x)?, lane.empty([x.dim(0)], x.dtype())?);
        lane.normalise_l2(x, NORM_EPS, &rows, &norm)?;
        Ok(Normalised { rows, norm })
    }

    fn backward(&self, lane: &Lane, d_rows: &Tensor) -> Result<Tensor> {
        let dx = lane.empty_like(d_rows)?;
        lane.normalise_l2_backward(&self.rows, &self.norm, NORM_EPS, d_rows, &dx)?;
        Ok(dx)
    }
}

/// `a · scale[0]`, a: (T, E), scale: (1).
fn scaled(lane: &Lane, a: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let out = lane.empty_like(a)?;
    // As a column, every row of a is multiplied by the one element of scale.
    lane.mul(&a.reshape([a.elements(), 1])?, scale, &out.reshape([a.elements(), 1])?)?;
    Ok(out)
}

impl Gate for XMoeGate {
    fn name(&self) -> &str {
        "x-moe"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.projection.clone(), self.embeddings.clone(), self.log_scale.clone()]
    }

    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)> {
        let lane = cx.lane;
        let acc = x.dtype().accumulate();
        let tokens = Normalised::new(lane, &linear(lane, x, &self.projection)?)?;
        let experts = Normalised::new(lane, &lane.cast(self.embeddings.value(), acc)?)?;
        let cosines = lane.empty([x.dim(0), experts.rows.dim(0)], acc)?;
        lane.gemm(1.0, &tokens.rows, &experts.rows.t()?, 0.0, &cosines)?;
        let scale = lane.empty([1], acc)?;
        lane.clamped_exp(&lane.cast(self.log_scale.value(), acc)?, MAX_SCALE, &scale)?;
        let (routing, choice) = self.choice.route(cx, scaled(lane, &cosines, &scale)?, None)?;
        Ok((routing, Box::new(State { tokens, experts, cosines, scale, choice })))
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
        let State { tokens, experts, cosines, scale, choice } = saved(state)?;
        let d_logits = self.choice.backward(lane, routing, choice, grad, scale.dtype())?;

        let d_scale = lane.zeros([1], scale.dtype())?;
        lane.dot(&d_logits, cosines, &d_scale)?;
        let d_log_scale = lane.empty_like(&d_scale)?;
        lane.clamped_exp_backward(scale, MAX_SCALE, &d_scale, &d_log_scale)?;
        lane.axpby(1.0, &d_log_scale, 1.0, self.log_scale.grad())?;

        let d_cosines = scaled(lane, &d_logits, scale)?;
        let d_experts = lane.empty_like(&experts.rows)?;
        lane.gemm(1.0, &d_cosines.t()?, &tokens.rows, 0.0, &d_experts)?;
        lane.axpby(1.0, &experts.backward(lane, &d_experts)?, 1.0, self.embeddings.grad())?;

        let d_tokens = lane.empty_like(&tokens.rows)?;
        lane.gemm(1.0, &d_cosines, &experts.rows, 0.0, &d_tokens)?;
        linear_backward(lane, x, &self.projection, &tokens.backward(lane, &d_tokens)?, dx)
    }
}
