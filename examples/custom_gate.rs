//! A gate of one's own: tokens are hashed to experts, and only the strength of an expert's answer is learned.
//!
//! `cargo run --release --example custom_gate`
//!
//! Which expert a token goes to is a locality-sensitive hash, the largest of E fixed random projections: similar tokens
//! meet the same expert, and nothing has to be balanced (compare the hash layers of Roller et al. 2021). The combine
//! weight is 2·sigmoid(x·v) with a learned v.

mod common;

use fsmoe::Result;
use fsmoe::autograd::{Init, Parameter, ReduceGroup};
use fsmoe::device::Lane;
use fsmoe::moe::{Assignment, Gate, GateContext, Hooks, MoeConfig, MoeLayer, Routing, RoutingGrad, Saved, saved};
use fsmoe::moe::{Capacity, expert};
use fsmoe::tensor::{DType, Tensor};

struct HashGate {
    /// (E, M): the projections. Not a parameter: they stay as they are.
    projections: Tensor,
    /// (1, M): v.
    strength: Parameter,
}

impl HashGate {
    fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let shape = [config.experts, config.hidden];
        Ok(HashGate {
            projections: init.normal("projections", shape, 1.0, ReduceGroup::Replicated)?.value().clone(),
            strength: init.normal("strength", [1, config.hidden], 0.02, ReduceGroup::Replicated)?,
        })
    }
}

impl Gate for HashGate {
    fn name(&self) -> &str {
        "hash"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.strength.clone()]
    }

    // What is frozen belongs in checkpoints all the same.
    fn buffers(&self) -> Vec<(String, Tensor)> {
        vec![("gate.projections".into(), self.projections.clone())]
    }

    fn forward(&self, cx: &GateContext<'_>, x: &Tensor) -> Result<(Routing, Saved)> {
        let lane = cx.lane;
        let (tokens, experts) = (x.dim(0), self.projections.dim(0));
        // Scores and weights are computed in at least f32, whatever the tokens' type.
        let acc = x.dtype().accumulate();

        // One expert per token, k = 1.
        let scores = lane.empty([tokens, experts], acc)?;
        lane.gemm(1.0, x, &self.projections.t()?, 0.0, &scores)?;
        let choices = lane.empty([tokens, 1], DType::I32)?;
        lane.top_k(&scores, None, None, &choices)?;

        // weights = 2·sigmoid(x·v).
        let logits = lane.empty([tokens, 1], acc)?;
        lane.gemm(1.0, x, &self.strength.value().t()?, 0.0, &logits)?;
        let sigmoid = lane.empty_like(&logits)?;
        lane.sigmoid(&logits, &sigmoid)?;
        let weights = lane.empty_like(&sigmoid)?;
        lane.axpby(2.0, &sigmoid, 0.0, &weights)?;

        // Slots, first come, first served. Where nothing may be dropped, an expert has room for all tokens of a group.
        let group_tokens = tokens / cx.groups;
        let capacity = cx.capacity.rows(1, group_tokens, experts).unwrap_or(group_tokens);
        let loads = lane.empty([cx.groups, experts], DType::I32)?;
        lane.count_experts(&choices, &loads)?;
        let slots = lane.empty_like(&choices)?;
        lane.assign_slots(&choices, None, experts, cx.groups, capacity, &slots)?;

        let routing = Routing {
            tokens,
            experts,
            groups: cx.groups,
            capacity,
            assignment: Assignment::TokenChoice { experts: choices, slots, weights },
            balance_loss: None,
            z_loss: None,
            loads,
            entropy: lane.zeros([1], acc)?, // A hash is certain.
        };
        Ok((routing, Box::new(sigmoid)))
    }

    fn backward(
        &self,
        cx: &GateContext<'_>,
        x: &Tensor,
        _routing: &Routing,
        state: &Saved,
        grad: &RoutingGrad,
        dx: &Tensor,
    ) -> Result<()> {
        let lane = cx.lane;
        let sigmoid: &Tensor = saved(state)?;
        let d_sigmoid = lane.empty_like(sigmoid)?;
        lane.axpby(2.0, &grad.combine, 0.0, &d_sigmoid)?;
        let d_logits = lane.empty_like(sigmoid)?;
        lane.sigmoid_backward(sigmoid, &d_sigmoid, &d_logits)?;
        // A matrix product takes operands of one type.
        let d_logits = lane.cast(&d_logits, x.dtype())?;
        // dx holds the part that came through the experts: add to it (beta = 1), and to the parameter's gradient too.
        lane.gemm(1.0, &d_logits, self.strength.value(), 1.0, dx)?;
        lane.gemm(1.0, &d_logits.t()?, x, 1.0, self.strength.grad())
    }
}

fn main() -> Result<()> {
    let init = Init::new(&Lane::cpu(), DType::F32, 1);
    let config = MoeConfig {
        experts: 4,
        top_k: 1,
        hidden: 8,
        ffn: 32,
        capacity: Capacity::Dropless,
        init_std: 0.3,
        ..MoeConfig::default()
    };
    let gate = Box::new(HashGate::new(&init.child("gate"), &config)?);
    let expert = expert::build(&init.child("experts"), &config)?;
    let layer = MoeLayer::with_modules(config.clone(), gate, config.order.build(), expert, Hooks::default())?;
    common::train("hash gate", &layer)
}
