//! The top-k softmax gate.

use super::super::{Gate, GateContext, MoeConfig, Routing, RoutingGrad, Saved, saved};
use super::token_choice::{Choice, TokenChoice};
use super::{linear, linear_backward};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::error::Result;
use crate::rng::{Counter, Purpose};
use crate::tensor::Tensor;

/// Softmax over all experts, of which a token takes the k most probable (Shazeer et al. 2017, GShard, Switch, Mixtral).
/// With noise, logits in training are x·Wᵀ + N(0, 1)·softplus(x·Wnᵀ).
pub struct TopKGate {
    /// (E, M).
    weight: Parameter,
    /// (E, M): Wn.
    noise_weight: Option<Parameter>,
    choice: TokenChoice,
}

struct Noise {
    /// (T, E) acc: x·Wnᵀ.
    raw: Tensor,
    /// (T, E) acc: standard normal deviates.
    deviates: Tensor,
}

struct State {
    noise: Option<Noise>,
    choice: Choice,
}

impl TopKGate {
    /// A random `weight`, and `noise_weight` where `config` wants noise.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let matrix =
            |name| init.normal(name, [config.experts, config.hidden], config.init_std, ReduceGroup::Replicated);
        Ok(TopKGate {
            weight: matrix("weight")?,
            noise_weight: if config.gate_noise { Some(matrix("noise_weight")?) } else { None },
            choice: TokenChoice::softmax(config),
        })
    }

    /// Noise for logits (T, E). Deviates are numbered by global token, so they do not depend on how a step is split.
    fn noise(&self, cx: &GateContext<'_>, x: &Tensor, weight: &Parameter) -> Result<Noise> {
        let raw = linear(cx.lane, x, weight)?;
        let deviates = cx.lane.empty_like(&raw)?;
        let rng = Counter { seed: cx.step.seed, purpose: Purpose::GateNoise, step: cx.step.step };
        cx.lane.normal(rng, cx.step.first_token * raw.dim(1) as u64, &deviates)?;
        Ok(Noise { raw, deviates })
    }
}

impl Gate for TopKGate {
    fn name(&self) -> &str {
        "top-k"
    }

    fn parameters(&self) -> Vec<Parameter> {
        std::iter::once(&self.weight).chain(&self.noise_weight).cloned().collect()
    }

    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)> {
        let logits = linear(cx.lane, x, &self.weight)?;
        let noise = match &self.noise_weight {
            Some(weight) if cx.step.train => Some(self.noise(cx, x, weight)?),
            _ => None,
        };
        if let Some(noise) = &noise {
            cx.lane.add_gate_noise(&logits, &noise.raw, &noise.deviates, &logits)?;
        }
        let (routing, choice) = self.choice.route(cx, logits, None)?;
        Ok((routing, Box::new(State { noise, choice })))
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
        let state: &State = saved(state)?;
        // The noise's gradient is made of the logits' in full; a matrix product takes it in x's type.
        let dtype = if state.noise.is_some() { x.dtype().accumulate() } else { x.dtype() };
        let d_logits = self.choice.backward(cx.lane, routing, &state.choice, grad, dtype)?;
        linear_backward(cx.lane, x, &self.weight, &d_logits, dx)?;
        if let (Some(noise), Some(weight)) = (&state.noise, &self.noise_weight) {
            let d_raw = cx.lane.empty_like(&d_logits)?;
            cx.lane.add_gate_noise_backward(&noise.raw, &noise.deviates, &d_logits, &d_raw)?;
            linear_backward(cx.lane, x, weight, &d_raw, dx)?;
        }
        Ok(())
    }
}
