//! The sigmoid gate.

use super::super::{Gate, GateContext, MoeConfig, Routing, RoutingGrad, Saved, saved};
use super::token_choice::{Choice, TokenChoice};
use super::{linear, linear_backward};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::{ExpertGroups, Lane};
use crate::error::{Error, Result, config_err};
use crate::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

/// The sigmoid gate's options, DeepSeek-V3's (DeepSeek-AI 2024); the default is the plain gate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SigmoidOptions {
    /// Node-limited selection: a token takes experts only from its best groups of experts.
    pub groups: Option<ExpertGroups>,
    /// What the weights are multiplied by.
    pub routed_scale: f64,
    /// γ: after each step every expert's selection bias moves by this much against its load. 0: no bias.
    pub bias_rate: f64,
}

impl Default for SigmoidOptions {
    fn default() -> Self {
        SigmoidOptions { groups: None, routed_scale: 1.0, bias_rate: 0.0 }
    }
}

impl SigmoidOptions {
    /// Checks the options for E experts of which a token takes k.
    pub(in super::super) fn validate(&self, experts: usize, top_k: usize) -> Result<()> {
        if !(self.routed_scale.is_finite() && self.routed_scale > 0.0) {
            config_err!("sigmoid.routed_scale = {}: it is a finite number above 0", self.routed_scale);
        }
        let Some(ExpertGroups { groups, kept }) = self.groups else { return Ok(()) };
        if groups == 0 || !experts.is_multiple_of(groups) {
            config_err!("sigmoid.groups: {groups} groups of {experts} experts: the groups divide the experts");
        }
        if kept == 0 || kept > groups || kept * (experts / groups) < top_k {
            config_err!(
                "sigmoid.groups: {kept} of {groups} groups kept, of {} experts each: between 1 and {groups}, and together \
                 at least top_k = {top_k} experts",
                experts / groups
            );
        }
        Ok(())
    }
}

/// An independent score s = sigmoid(x·wᵀ) per expert (BASE: Lewis et al. 2021; StableMoE: Dai et al. 2022), with
/// DeepSeek-V3's options: selection by s + bias inside the best groups, weights from s alone. Balance loss and entropy
/// are of s normalised to sum one.
pub struct SigmoidGate {
    /// (E, M).
    weight: Parameter,
    choice: TokenChoice,
    bias: Option<Bias>,
}

/// A selection bias that follows the loads.
struct Bias {
    name: String,
    /// (E) acc.
    value: Tensor,
    /// γ.
    rate: f64,
    /// The loads (G, E) of every training forward since the last step.
    loads: Mutex<Vec<Tensor>>,
}

impl SigmoidGate {
    /// A random `weight` and, with a bias rate, the buffer `bias` of zeros.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let SigmoidOptions { groups, routed_scale, bias_rate } = config.sigmoid;
        let bias = if bias_rate > 0.0 {
            let value = init.lane().zeros([config.experts], init.dtype().accumulate())?;
            Some(Bias { name: init.name("bias"), value, rate: bias_rate, loads: Mutex::default() })
        } else {
            None
        };
        let shape = [config.experts, config.hidden];
        Ok(SigmoidGate {
            weight: init.normal("weight", shape, config.init_std, ReduceGroup::Replicated)?,
            choice: TokenChoice::sigmoid(config, groups, routed_scale),
            bias,
        })
    }
}

impl Bias {
    fn add(&self, cx: &GateContext<'_>, loads: &Tensor) -> Result<()> {
        let mut all = loads.clone();
        if let Some(ranks) = cx.ranks {
            all = cx.lane.empty([ranks.size() * loads.dim(0), loads.dim(1)], DType::I32)?;
            ranks.all_gather(cx.lane, loads, &all)?;
        }
        self.loads.lock().map_err(poisoned)?.push(all);
        Ok(())
    }

    /// One update from all loads since the last, micro-batches counting as groups.
    fn update(&self, lane: &Lane) -> Result<()> {
        let parts = std::mem::take(&mut *self.loads.lock().map_err(poisoned)?);
        let groups: usize = parts.iter().map(|loads| loads.dim(0)).sum();
        if groups == 0 {
            return Ok(());
        }
        let all = lane.empty([groups, self.value.dim(0)], DType::I32)?;
        let mut first = 0;
        for loads in &parts {
            lane.copy(loads, &all.narrow(0, first, loads.dim(0))?)?;
            first += loads.dim(0);
        }
        lane.update_bias(&self.value, &all, self.rate)
    }
}

fn poisoned<T>(_: T) -> Error {
    Error::Config("the sigmoid gate's loads were left half written by a thread that panicked".into())
}

impl Gate for SigmoidGate {
    fn name(&self) -> &str {
        "sigmoid"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.weight.clone()]
    }

    fn buffers(&self) -> Vec<(String, Tensor)> {
        self.bias.iter().map(|bias| (bias.name.clone(), bias.value.clone())).collect()
    }

    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)> {
        let lane = cx.lane;
        let logits = linear(lane, x, &self.weight)?;
        let bias = self.bias.as_ref().map(|bias| &bias.value);
        let (routing, choice) = self.choice.route(cx, logits, bias)?;
        if let Some(bias) = &self.bias
            && cx.step.train
        {
            bias.add(cx, &routing.loads)?;
        }
        Ok((routing, Box::new(choice)))
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
        let choice: &Choice = saved(state)?;
        let d_logits = self.choice.backward(lane, routing, choice, grad, x.dtype())?;
        linear_backward(lane, x, &self.weight, &d_logits, dx)
    }

    fn after_step(&self, lane: &Lane) -> Result<()> {
        self.bias.as_ref().map_or(Ok(()), |bias| bias.update(lane))
    }
}
