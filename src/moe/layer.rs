//! The layer: its settings, and one tape node that runs the modules and, backward, their gradients in reverse.

use super::Assignment;
use super::expert::{self, ExpertKind};
use super::gate::{self, GateKind, SigmoidOptions};
use super::order::OrderKind;
use super::{
    Capacity, Expert, FusedExpert, Gate, GateContext, Hook, Hooks, Order, Routing, RoutingGrad, Rows, Saved,
    SparseOrder, StepContext,
};
use crate::autograd::{Init, Parameter, Tape, Var};
use crate::device::{Gelu, Lane, RowWeights};
use crate::error::{Result, config_err, shape_err};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A layer's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MoeConfig {
    /// Which gate.
    pub gate: GateKind,
    /// Which order.
    pub order: OrderKind,
    /// Which expert.
    pub expert: ExpertKind,
    /// E, experts.
    pub experts: usize,
    /// k, experts per token; expert choice takes as many on average, SoftMoE has none.
    pub top_k: usize,
    /// M, the tokens' width.
    pub hidden: usize,
    /// H, an expert's inner width.
    pub ffn: usize,
    /// Rows per expert and routing group in training; evaluation drops nothing where tokens choose their experts. SoftMoE's
    /// rows are [`MoeConfig::soft_slots`].
    pub capacity: Capacity,
    /// G, routing groups of consecutive tokens that routing and capacity act on apart.
    pub groups: usize,
    /// Weight of the balance loss. Gates that are balanced by construction (expert choice, SoftMoE) have none.
    pub balance_weight: f64,
    /// The balance loss counts first choices only (GShard, Switch), not all k (Hugging Face's Mixtral).
    pub balance_first_only: bool,
    /// Weight of the z-loss. Gates without a softmax over experts (sigmoid, SoftMoE) have none.
    pub z_weight: f64,
    /// Slots go to tokens by descending best probability, not in token order (Riquelme et al. 2021).
    pub batch_prioritised: bool,
    /// Top-k gate: learned noise on the logits in training (Shazeer et al. 2017).
    pub gate_noise: bool,
    /// Whether a token's k weights are normalised to sum one. By default for k ≥ 2: with k = 1 every weight would be one
    /// and the router would get no gradient.
    pub normalise_weights: Option<bool>,
    /// The sigmoid gate's options.
    pub sigmoid: SigmoidOptions,
    /// d, the width in which the X-MoE gate compares tokens with experts.
    pub x_moe_dim: usize,
    /// SoftMoE: slots per expert and routing group.
    pub soft_slots: usize,
    /// The GPT expert's activation.
    pub gelu: Gelu,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// The backward computes the experts' inner products again rather than keeping them: less memory, a third more work in
    /// the experts' forward.
    pub recompute: bool,
    /// Standard deviation of the experts' output matrix w2, where it differs (GPT-2's residual scaling).
    pub output_std: Option<f64>,
}

impl Default for MoeConfig {
    /// Eight GPT experts of which a token takes two, without drops.
    fn default() -> Self {
        MoeConfig {
            gate: GateKind::TopK,
            order: OrderKind::Tutel,
            expert: ExpertKind::Gpt,
            experts: 8,
            top_k: 2,
            hidden: 64,
            ffn: 256,
            capacity: Capacity::Dropless,
            groups: 1,
            balance_weight: 0.01,
            balance_first_only: false,
            z_weight: 0.0,
            batch_prioritised: false,
            gate_noise: false,
            normalise_weights: None,
            sigmoid: SigmoidOptions::default(),
            x_moe_dim: 32,
            soft_slots: 1,
            gelu: Gelu::Erf,
            init_std: 0.02,
            recompute: false,
            output_std: None,
        }
    }
}

impl MoeConfig {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// Names the first value that breaks a rule, and the rule.
    pub fn validate(&self) -> Result<()> {
        let gate = self.gate;
        for (name, value) in [
            ("experts", self.experts),
            ("top_k", self.top_k),
            ("hidden", self.hidden),
            ("ffn", self.ffn),
            ("groups", self.groups),
            ("x_moe_dim", self.x_moe_dim),
            ("soft_slots", self.soft_slots),
        ] {
            if value == 0 {
                config_err!("{name} = 0: it is at least 1");
            }
        }
        if self.top_k > self.experts {
            config_err!("top_k = {} with {} experts: a token takes each expert at most once", self.top_k, self.experts);
        }
        if let Capacity::Factor(f) = self.capacity
            && !(f.is_finite() && f > 0.0)
        {
            config_err!("capacity factor {f}: it is a number above 0, or * to drop nothing");
        }
        for (name, value) in [
            ("balance_weight", self.balance_weight),
            ("z_weight", self.z_weight),
            ("init_std", self.init_std),
            ("output_std", self.output_std.unwrap_or(0.0)),
            ("sigmoid.bias_rate", self.sigmoid.bias_rate),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                config_err!("{name} = {value}: it is a finite number, at least 0");
            }
        }
        if matches!(gate, GateKind::ExpertChoice | GateKind::Soft) {
            if self.capacity == Capacity::Dropless {
                config_err!(
                    "capacity factor * with the {gate} gate: its experts take a fixed number of rows, so give a number"
                );
            }
            if self.batch_prioritised {
                config_err!(
                    "batch_prioritised with the {gate} gate: only where tokens choose experts do they wait for slots"
                );
            }
        }
        if gate == GateKind::Soft && self.order != OrderKind::GShard {
            config_err!("order {} with the soft gate: its dense routing takes only the gshard order", self.order);
        }
        if self.gate_noise && gate != GateKind::TopK {
            config_err!("gate_noise with the {gate} gate: only the top-k gate has noise");
        }
        if gate == GateKind::Sigmoid {
            self.sigmoid.validate(self.experts, self.top_k)?;
        }
        Ok(())
    }

    /// Whether a token's k weights are normalised to sum one.
    pub fn normalises_weights(&self) -> bool {
        self.normalise_weights.unwrap_or(self.top_k >= 2)
    }
}

/// What a layer gives.
#[derive(Clone, Debug)]
pub struct MoeOutput {
    /// (T, M), of x's type.
    pub y: Var,
    /// (1) acc: balance_weight · balance loss + z_weight · z-loss, to be added to the training loss.
    pub aux_loss: Var,
    /// Who took which token; [`Routing::stats`] reads its statistics.
    pub routing: Routing,
}

/// A Mixture-of-Experts layer. Cloning shares it.
#[derive(Clone)]
pub struct MoeLayer(Arc<Inner>);

struct Inner {
    config: MoeConfig,
    gate: Box<dyn Gate>,
    order: Box<dyn Order>,
    expert: Box<dyn Expert>,
    hooks: Hooks,
}

impl MoeLayer {
    /// A layer of this crate's modules, without hooks. Parameters are named `gate.…` and `experts.…` under `init`'s
    /// prefix.
    ///
    /// # Errors
    /// If the settings break a rule, or the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        config.validate()?;
        let gate = gate::build(&init.child("gate"), config)?;
        let expert = expert::build(&init.child("experts"), config)?;
        Self::with_modules(config.clone(), gate, config.order.build(), expert, Hooks::default())
    }

    /// A layer of any modules. Of `config` it uses `hidden`, `capacity`, `groups` and the losses' weights; the rest is the
    /// modules' own affair.
    ///
    /// # Errors
    /// If one of those settings breaks a rule.
    pub fn with_modules(
        config: MoeConfig,
        gate: Box<dyn Gate>,
        order: Box<dyn Order>,
        expert: Box<dyn Expert>,
        hooks: Hooks,
    ) -> Result<Self> {
        if config.groups == 0 || config.hidden == 0 {
            config_err!("groups = {}, hidden = {}: both are at least 1", config.groups, config.hidden);
        }
        Ok(MoeLayer(Arc::new(Inner { config, gate, order, expert, hooks })))
    }

    /// The settings.
    pub fn config(&self) -> &MoeConfig {
        &self.0.config
    }

    /// The gate's parameters, then the experts'.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut all = self.0.gate.parameters();
        all.extend(self.0.expert.parameters());
        all
    }

    /// State without gradient that checkpoints keep, by name.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.0.gate.buffers()
    }

    /// Whether a token's output depends on other tokens beyond their competition for slots: then a causal model's loss is
    /// not comparable with other gates'.
    pub fn sees_other_tokens(&self) -> bool {
        self.0.gate.sees_other_tokens()
    }

    /// Called once after each optimizer step.
    ///
    /// # Errors
    /// If the device fails.
    pub fn after_step(&self, lane: &Lane) -> Result<()> {
        self.0.gate.after_step(lane)
    }

    /// Runs the layer on x: (T, M). One node on the tape: both outputs' gradients, or either alone, flow to x and to the
    /// parameters.
    ///
    /// # Errors
    /// If T is 0 or G does not divide it, if x has another width than the layer, or a module fails.
    pub fn forward(&self, tape: &Tape, x: &Var, step: StepContext) -> Result<MoeOutput> {
        let config = &self.0.config;
        let lane = tape.lane();
        let shape = x.value().shape();
        if shape.len() != 2 || shape[1] != config.hidden {
            shape_err!("an MoE layer of width {} takes x of shape (T, {0}), not {shape}", config.hidden);
        }
        if shape[0] == 0 || !shape[0].is_multiple_of(config.groups) {
            shape_err!(
                "T = {} tokens in {} routing groups: T is above 0 and a multiple of the groups",
                shape[0],
                config.groups
            );
        }
        let (y, run) = self.0.forward(lane, &lane.contiguous(x.value())?, step)?;
        let aux_loss = lane.zeros([1], y.dtype().accumulate())?;
        for (weight, loss) in
            [(config.balance_weight, &run.routing.balance_loss), (config.z_weight, &run.routing.z_loss)]
        {
            if let Some(loss) = loss {
                lane.axpby(weight, loss, 1.0, &aux_loss)?;
            }
        }
        let routing = run.routing.clone();
        let parameters: Vec<Var> = self.parameters().iter().map(|p| tape.param(p)).collect();
        let inputs: Vec<&Var> = std::iter::once(x).chain(&parameters).collect();
        let layer = self.0.clone();
        let none = vec![None; parameters.len()];
        let mut outputs = tape.record(&inputs, vec![y, aux_loss], move |lane, d| {
            let dx = layer.backward(lane, &run, d[0].as_ref(), d[1].as_ref())?;
            Ok(std::iter::once(Some(dx)).chain(none).collect())
        });
        match (outputs.pop(), outputs.pop()) {
            (Some(aux_loss), Some(y)) => Ok(MoeOutput { y, aux_loss, routing }),
            _ => shape_err!("a tape gave fewer values than were recorded"),
        }
    }
}

/// What a forward leaves for the backward.
struct Run {
    step: StepContext,
    routing: Routing,
    /// (T, M): what the gate and the order were given.
    x: Tensor,
    /// What the experts were given.
    rows: Rows,
    /// (R, M): what the order combined; none where the experts take the combine's part of the backward.
    out: Option<Tensor>,
    gate: Saved,
    order: Saved,
    expert: Saved,
    before_moe_start: Option<Saved>,
    before_dispatch: Option<Saved>,
    after_dispatch: Option<Saved>,
    before_combine: Option<Saved>,
    after_combine: Option<Saved>,
    before_moe_end: Option<Saved>,
}

impl Inner {
    fn gate_context<'a>(&self, lane: &'a Lane, step: StepContext) -> GateContext<'a> {
        // In evaluation tokens do not compete for slots, so that a loss does not depend on what shares a batch. A gate that
        // looks at other tokens in any case has a fixed number of rows.
        let dropless = !step.train && !self.gate.sees_other_tokens();
        let capacity = if dropless { Capacity::Dropless } else { self.config.capacity };
        GateContext { lane, groups: self.config.groups, capacity, exact_capacity: self.order.pads(), step, ranks: None }
    }

    fn forward(&self, lane: &Lane, x: &Tensor, step: StepContext) -> Result<(Tensor, Run)> {
        let hooks = &self.hooks;
        let (x, before_moe_start) = hook_forward(&hooks.before_moe_start, lane, x)?;
        let (routing, gate) = self.gate.forward(&self.gate_context(lane, step), &x)?;

        let (Rows { data, split }, order) = self.dispatch(lane, &routing, &x)?;
        let (data, before_dispatch) = hook_forward(&hooks.before_dispatch, lane, &data)?;
        let (data, after_dispatch) = hook_forward(&hooks.after_dispatch, lane, &data)?;

        let rows = Rows { data, split };
        let (out, expert) = self.expert.forward(lane, &rows)?;

        let (out, before_combine) = hook_forward(&hooks.before_combine, lane, &out)?;
        let (out, after_combine) = hook_forward(&hooks.after_combine, lane, &out)?;
        let y = self.order.combine(lane, &routing, &order, &out)?;
        let (y, before_moe_end) = hook_forward(&hooks.before_moe_end, lane, &y)?;

        let out = self.fused().is_none().then_some(out);
        let run = Run {
            step,
            routing,
            x,
            rows,
            out,
            gate,
            order,
            expert,
            before_moe_start,
            before_dispatch,
            after_dispatch,
            before_combine,
            after_combine,
            before_moe_end,
        };
        Ok((y, run))
    }

    /// Order and experts where the experts take the combine's part of the backward: no hook stands between them then.
    fn fused(&self) -> Option<(&dyn SparseOrder, &dyn FusedExpert)> {
        let Hooks { before_combine, after_combine, .. } = &self.hooks;
        match (before_combine, after_combine, self.order.sparse(), self.expert.fused()) {
            (None, None, Some(order), Some(expert)) => Some((order, expert)),
            _ => None,
        }
    }

    fn dispatch(&self, lane: &Lane, routing: &Routing, x: &Tensor) -> Result<(Rows, Saved)> {
        if let (Some((order, expert)), None, None) =
            (self.fused(), &self.hooks.before_dispatch, &self.hooks.after_dispatch)
            && let Some(block) = expert.row_block(lane, x.dtype())
            && let Some(rows) = order.dispatch_blocks(lane, routing, x, block)?
        {
            return Ok(rows);
        }
        self.order.dispatch(lane, routing, x)
    }

    /// dx from the gradients of y and of the auxiliary loss, at least one of which is there.
    fn backward(&self, lane: &Lane, run: &Run, dy: Option<&Tensor>, d_aux: Option<&Tensor>) -> Result<Tensor> {
        let dx = lane.empty_like(&run.x)?;
        let (combine, dispatch) = match dy {
            Some(dy) => self.backward_rows(lane, run, &lane.contiguous(dy)?, &dx)?,
            None => {
                lane.fill(&dx, 0.0)?;
                no_gradient(lane, &run.routing.assignment)?
            }
        };
        let d_loss = |weight: f64| match d_aux {
            Some(d) => {
                let scaled = lane.empty_like(d)?;
                lane.axpby(weight, d, 0.0, &scaled)?;
                Ok(scaled)
            }
            None => lane.zeros([1], run.x.dtype().accumulate()),
        };
        let balance = d_loss(self.config.balance_weight)?;
        let z = d_loss(self.config.z_weight)?;
        let grad = RoutingGrad { combine, dispatch, balance, z };
        self.gate.backward(&self.gate_context(lane, run.step), &run.x, &run.routing, &run.gate, &grad, &dx)?;
        hook_backward(&self.hooks.before_moe_start, lane, &run.before_moe_start, dx)
    }

    /// From y's gradient back to the tokens': writes dx and returns the gradients of the combine weights (or matrix) and
    /// of the dispatch matrix. The experts' weight gradients come last: nothing waits for them.
    fn backward_rows(&self, lane: &Lane, run: &Run, dy: &Tensor, dx: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (hooks, routing) = (&self.hooks, &run.routing);
        let dy = hook_backward(&hooks.before_moe_end, lane, &run.before_moe_end, dy.clone())?;
        let (d_out, d_rows, d_combine, saved);
        match (self.fused(), &run.out) {
            (Some((order, expert)), _) => {
                let (rows, weights) = order.gather_grad(lane, routing, &run.order, &dy)?;
                let d_weights = lane.empty_like(&weights)?;
                let row_weights = RowWeights { weights: &weights, d_weights: &d_weights };
                (d_rows, saved) = expert.backward_data_weighted(lane, &run.rows, &run.expert, &rows, row_weights)?;
                d_combine = order.weights_grad(lane, routing, &run.order, &d_weights)?;
                d_out = rows;
            }
            (None, Some(out)) => {
                let (d, d_weights) = self.order.combine_backward(lane, routing, &run.order, out, &dy)?;
                let d = hook_backward(&hooks.after_combine, lane, &run.after_combine, d)?;
                d_out = hook_backward(&hooks.before_combine, lane, &run.before_combine, d)?;
                (d_rows, saved) = self.expert.backward_data(lane, &run.rows, &run.expert, &d_out)?;
                d_combine = d_weights;
            }
            (None, None) => config_err!("the backward of a forward that another layer ran"),
        }

        let d_rows = hook_backward(&hooks.after_dispatch, lane, &run.after_dispatch, d_rows)?;
        let d_rows = hook_backward(&hooks.before_dispatch, lane, &run.before_dispatch, d_rows)?;
        let d_dispatch = self.order.dispatch_backward(lane, routing, &run.order, &run.x, &d_rows, dx)?;

        self.expert.backward_weights(lane, &run.rows, &run.expert, &d_out, &saved)?;
        Ok((d_combine, d_dispatch))
    }
}

/// A routing's gradients where y has none.
pub(super) fn no_gradient(lane: &Lane, assignment: &Assignment) -> Result<(Tensor, Option<Tensor>)> {
    let zeros = |t: &Tensor| lane.zeros(*t.shape(), t.dtype());
    Ok(match assignment {
        Assignment::TokenChoice { weights, .. } | Assignment::ExpertChoice { weights, .. } => (zeros(weights)?, None),
        Assignment::Dense { dispatch, combine } => (zeros(combine)?, Some(zeros(dispatch)?)),
    })
}

pub(super) fn hook_forward(hook: &Option<Box<dyn Hook>>, lane: &Lane, t: &Tensor) -> Result<(Tensor, Option<Saved>)> {
    match hook {
        None => Ok((t.clone(), None)),
        Some(hook) => hook.forward(lane, t).map(|(t, saved)| (t, Some(saved))),
    }
}

pub(super) fn hook_backward(
    hook: &Option<Box<dyn Hook>>,
    lane: &Lane,
    saved: &Option<Saved>,
    d: Tensor,
) -> Result<Tensor> {
    match (hook, saved) {
        (Some(hook), Some(saved)) => hook.backward(lane, saved, &d),
        _ => Ok(d),
    }
}
