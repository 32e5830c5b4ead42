//! An MoE layer over the ranks of a world: tokens travel to the ranks of their experts and back, in chunks whose
//! communication and computation run on three lanes at once.
//!
//! Routing and capacity act on each rank's tokens: the layer computes what one rank with as many routing groups would.
//! A [`Policy`] gives the graph of a pass; no policy and no number of chunks changes a bit of what comes out.

mod cut;
mod gradients;
mod journey;
mod measure;
mod parallel;
mod shard;
mod steps;

pub use gradients::GradientBuffers;
pub(crate) use measure::METHOD;
pub use measure::{Measured, Measurement, Subject, measure};
pub use parallel::Parallel;
pub use shard::Sharding;

use super::layer::{hook_backward, hook_forward, no_gradient};
use super::{
    Capacity, Expert, Gate, GateContext, Hooks, MoeConfig, MoeOutput, Order, Routing, RoutingGrad, RowSplit, Rows,
    Saved, StepContext, expert, gate,
};
use crate::autograd::{Init, Parameter, Tape, Var};
use crate::comm::{Communicator, GroupKind, Sizes};
use crate::device::Lane;
use crate::engine::{TaskGraph, Timeline};
use crate::error::{Result, config_err, shape_err};
use crate::schedule::policy::FsMoe;
use crate::schedule::{Degree, LayerOp, LayerPass, Pass, Policy, Slice, SliceTask, layer_graph};
use crate::tensor::{DType, Tensor};
use cut::Cut;
use journey::journey;
use std::sync::{Arc, Mutex, PoisonError};
use steps::{Backward, Forward, Piece};

/// How a layer's passes are cut and ordered.
#[derive(Clone)]
pub struct LayerPlan {
    /// Who orders the tasks.
    pub policy: Arc<dyn Policy>,
    /// The layer's block, as the plan counts them: what tasks are called by.
    pub block: usize,
    /// r and d, forward and backward. A pass that has fewer pieces has as many chunks.
    pub degrees: [Degree; 2],
    /// The slices of gradients that are summed during the backward, complete when it begins.
    pub slices: Vec<Slice>,
    /// The slices that are summed once the backward has ended, while that of the block's dense part is computed;
    /// [`Parallel::settle`] waits for them.
    pub after: Vec<Slice>,
    /// Where these gradients lie; may be none where there are no slices.
    pub gradients: Option<Arc<GradientBuffers>>,
}

impl Default for LayerPlan {
    /// FSMoE's order in one chunk, no gradients.
    fn default() -> Self {
        LayerPlan {
            policy: Arc::new(FsMoe),
            block: 0,
            degrees: [Degree::all_first(1); 2],
            slices: Vec::new(),
            after: Vec::new(),
            gradients: None,
        }
    }
}

impl LayerPlan {
    /// Begins the backward of the block's dense part: with the sums that run beside it.
    ///
    /// # Errors
    /// If the device fails, or a rank does.
    pub(crate) fn begin_dense_backward(&self, parallel: &Parallel) -> Result<()> {
        for slice in self.after.iter() {
            let Some(gradients) = &self.gradients else {
                config_err!("a slice of {} gradients without a buffer of them", slice.group.name());
            };
            let lane = self.policy.reduce_lane(parallel.groups().lane(slice.group.kind()));
            parallel.submit(lane, gradients.clone(), *slice)?;
        }
        parallel.dense(Some(LayerOp::Dense { block: self.block, pass: Pass::Backward }))
    }
}

/// A Mixture-of-Experts layer over the ranks of a world, one rank's part of it. Cloning shares it.
#[derive(Clone)]
pub struct DistributedMoe(Arc<Inner>);

struct Inner {
    config: MoeConfig,
    gate: Box<dyn Gate>,
    order: Box<dyn Order>,
    expert: Box<dyn Expert>,
    hooks: Hooks,
    parallel: Arc<Parallel>,
    shards: Vec<Sharding>,
    plan: Mutex<LayerPlan>,
    /// When the tasks of the last forward and backward ran.
    timelines: Mutex<[Option<Timeline>; 2]>,
}

impl DistributedMoe {
    /// A layer of this crate's modules, without hooks. `config` is of the whole layer: this rank holds its part of the
    /// experts, with the values that a single rank would give them. Names are those of [`MoeLayer`](super::MoeLayer).
    ///
    /// # Errors
    /// If the settings break a rule or do not fit the world, or the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig, parallel: &Arc<Parallel>) -> Result<Self> {
        config.validate()?;
        let Sizes { ep, esp, .. } = parallel.groups().topology().sizes();
        check_division(config, ep, esp)?;
        let init_experts = init.child("experts");
        let whole = expert::build(&init_experts, config)?;
        let part = MoeConfig { experts: config.experts / ep, ffn: config.ffn / esp, ..config.clone() };
        let part = expert::build(&init_experts, &part)?;
        let mut shards = Vec::new();
        for (whole, part) in whole.parameters().iter().zip(part.parameters()) {
            let sharding = Sharding::expert(*whole.value().shape(), *part.value().shape(), ep, esp)?;
            sharding.take(init.lane(), parallel.groups().rank(), whole.value(), part.value())?;
            shards.push(sharding);
        }
        let gate = gate::build(&init.child("gate"), config)?;
        let mut layer =
            Self::with_modules(config.clone(), gate, config.order.build(), part, Hooks::default(), parallel)?;
        if let Some(inner) = Arc::get_mut(&mut layer.0) {
            inner.shards = shards;
        }
        Ok(layer)
    }

    /// A layer of any modules; `expert` is this rank's part: N_EP ranks have E/N_EP experts each, and each rank of an ESP
    /// group computes a part of the sum that is an expert's output. Of `config` it uses `hidden`, `ffn`, `experts`,
    /// `capacity`, `groups` (on each rank) and the losses' weights.
    ///
    /// Hooks before the dispatch and after the combine are given all rows of this rank at once, those after the dispatch
    /// and before the combine a piece of what it received at a time.
    ///
    /// # Errors
    /// If one of those settings breaks a rule, or does not fit the world.
    pub fn with_modules(
        config: MoeConfig,
        gate: Box<dyn Gate>,
        order: Box<dyn Order>,
        expert: Box<dyn Expert>,
        hooks: Hooks,
        parallel: &Arc<Parallel>,
    ) -> Result<Self> {
        if config.groups == 0 || config.hidden == 0 {
            config_err!("groups = {}, hidden = {}: both are at least 1", config.groups, config.hidden);
        }
        let Sizes { ep, esp, .. } = parallel.groups().topology().sizes();
        check_division(&config, ep, esp)?;
        Ok(DistributedMoe(Arc::new(Inner {
            config,
            gate,
            order,
            expert,
            hooks,
            parallel: parallel.clone(),
            shards: Vec::new(),
            plan: Mutex::default(),
            timelines: Mutex::default(),
        })))
    }

    /// The settings, of the whole layer.
    pub fn config(&self) -> &MoeConfig {
        &self.0.config
    }

    /// The rank this is a part on.
    pub fn parallel(&self) -> &Arc<Parallel> {
        &self.0.parallel
    }

    /// The gate's parameters, which every rank holds and whose gradients are summed over all ranks.
    pub fn gate_parameters(&self) -> Vec<Parameter> {
        self.0.gate.parameters()
    }

    /// This rank's part of the experts' parameters, whose gradients are summed over their replicas.
    pub fn expert_parameters(&self) -> Vec<Parameter> {
        self.0.expert.parameters()
    }

    /// The gate's parameters, then the experts'.
    pub fn parameters(&self) -> Vec<Parameter> {
        [self.gate_parameters(), self.expert_parameters()].concat()
    }

    /// How the logical parameter of each of [`DistributedMoe::expert_parameters`] is divided; empty for a layer of modules
    /// from outside, which know that themselves.
    pub fn shards(&self) -> &[Sharding] {
        &self.0.shards
    }

    /// State without gradient that checkpoints keep, by name; the same on every rank.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.0.gate.buffers()
    }

    /// As [`MoeLayer::sees_other_tokens`](super::MoeLayer::sees_other_tokens).
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

    /// How the next passes are cut and ordered: the same on every rank.
    pub fn set_plan(&self, plan: LayerPlan) {
        *self.0.plan.lock().unwrap_or_else(PoisonError::into_inner) = plan;
    }

    /// When the tasks of the last forward and the last backward ran, where lanes are threads; of streams, see
    /// [`Parallel::trace`].
    pub fn timelines(&self) -> [Option<Timeline>; 2] {
        self.0.timelines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs the layer on x: (T, M), the tokens of this rank's MP group, the same on each of its members; as many on every
    /// rank. `step.first_token` is the first of these tokens. A collective, and its backward is another. One node on the
    /// tape, as [`MoeLayer::forward`](super::MoeLayer::forward) is.
    ///
    /// Losses and entropy are those of all ranks' tokens, loads and drops this rank's. Gradients of parameters are this
    /// rank's part of a sum over ranks. That of the auxiliary loss is taken as the gradient of one loss, of which each
    /// rank has a part, whatever the number of ranks.
    ///
    /// # Errors
    /// As [`MoeLayer::forward`](super::MoeLayer::forward); if MP ranks and routing groups do not divide T; if another rank
    /// fails or never comes.
    pub fn forward(&self, tape: &Tape, x: &Var, step: StepContext) -> Result<MoeOutput> {
        let config = &self.0.config;
        let lane = tape.lane();
        let (shape, mp) = (x.value().shape(), self.0.parallel.groups().topology().size(GroupKind::Model));
        if shape.len() != 2 || shape[1] != config.hidden {
            shape_err!("an MoE layer of width {} takes x of shape (T, {0}), not {shape}", config.hidden);
        }
        if shape[0] == 0 || !shape[0].is_multiple_of(mp * config.groups) {
            shape_err!(
                "T = {} tokens for {mp} MP ranks with {} routing groups each: T is above 0 and a multiple of their product",
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

/// Fails unless experts and their width can be divided among so many ranks.
fn check_division(config: &MoeConfig, ep: usize, esp: usize) -> Result<()> {
    if !config.experts.is_multiple_of(ep) {
        config_err!("{} experts with ep = {ep}: each rank of an EP group has as many", config.experts);
    }
    if !config.ffn.is_multiple_of(esp) {
        config_err!("ffn = {} with esp = {esp}: each rank of an ESP group has as much of it", config.ffn);
    }
    Ok(())
}

/// What a forward leaves for the backward.
struct Run {
    step: StepContext,
    routing: Routing,
    /// (T/N_MP, M): what the gate and the order were given.
    x: Tensor,
    cut: Cut,
    pieces: Vec<Mutex<Piece>>,
    /// (R, M): what the order combined.
    out: Tensor,
    gate: Saved,
    order: Saved,
    before_moe_start: Option<Saved>,
    before_dispatch: Option<Saved>,
    after_combine: Option<Saved>,
    before_moe_end: Option<Saved>,
}

impl Inner {
    fn gate_context<'a>(&'a self, lane: &'a Lane, step: StepContext) -> GateContext<'a> {
        let dropless = !step.train && !self.gate.sees_other_tokens();
        let capacity = if dropless { Capacity::Dropless } else { self.config.capacity };
        let world = self.parallel.groups().world();
        let ranks = (world.size() > 1).then_some(&**world as &dyn Communicator);
        GateContext { lane, groups: self.config.groups, capacity, exact_capacity: self.order.pads(), step, ranks }
    }

    /// This rank's part of tokens that the MP group has in common.
    fn own_tokens(&self, lane: &Lane, t: &Tensor) -> Result<Tensor> {
        let group = self.parallel.groups().get(GroupKind::Model);
        let each = t.dim(0) / group.size();
        lane.contiguous(&t.narrow(0, group.rank() * each, each)?)
    }

    /// The tokens of the whole MP group.
    fn all_tokens(&self, lane: &Lane, t: Tensor) -> Result<Tensor> {
        let groups = self.parallel.groups();
        let group = groups.get(GroupKind::Model);
        if group.size() == 1 {
            return Ok(t);
        }
        let all = lane.empty([group.size() * t.dim(0), t.dim(1)], t.dtype())?;
        let t = lane.contiguous(&t)?;
        self.parallel.beside(groups.lane(GroupKind::Model), |lane| group.all_gather(lane, &t, &all))?;
        Ok(all)
    }

    fn forward(&self, lane: &Lane, x: &Tensor, step: StepContext) -> Result<(Tensor, Run)> {
        let hooks = &self.hooks;
        let x = self.own_tokens(lane, x)?;
        let first = self.parallel.groups().get(GroupKind::Model).rank() * x.dim(0);
        let step = StepContext { first_token: step.first_token + first as u64, ..step };

        let (x, before_moe_start) = hook_forward(&hooks.before_moe_start, lane, &x)?;
        let context = self.gate_context(lane, step);
        let (mut routing, gate) = self.gate.forward(&context, &x)?;
        self.agree(&context, &mut routing)?;

        let (Rows { data, split }, order) = self.order.dispatch(lane, &routing, &x)?;
        let (data, before_dispatch) = hook_forward(&hooks.before_dispatch, lane, &data)?;
        let mut cut = self.cut(lane, &split)?;
        if self.parallel.issues() {
            let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
            cut = cut.coarse(plan.degrees.map(|d| d.r));
        }
        let pieces: Vec<Mutex<Piece>> = (0..cut.pieces()).map(|_| Mutex::default()).collect();
        let steps = Forward { expert: &*self.expert, hooks, cut: &cut, pieces: &pieces };
        let out = self.pass(Pass::Forward, &cut, &steps, &data)?;

        let (out, after_combine) = hook_forward(&hooks.after_combine, lane, &out)?;
        let y = self.order.combine(lane, &routing, &order, &out)?;
        let (y, before_moe_end) = hook_forward(&hooks.before_moe_end, lane, &y)?;
        let y = self.all_tokens(lane, y)?;

        let run = Run {
            step,
            routing,
            x,
            cut,
            pieces,
            out,
            gate,
            order,
            before_moe_start,
            before_dispatch,
            after_combine,
            before_moe_end,
        };
        Ok((y, run))
    }

    /// Makes of a rank's routing one of all ranks': where nothing is dropped but experts' rows are padded, rows for the
    /// largest load anywhere; losses and entropy are means over ranks.
    fn agree(&self, cx: &GateContext<'_>, routing: &mut Routing) -> Result<()> {
        let lane = cx.lane;
        let world = self.parallel.groups().world();
        let ranks = world.size();
        if ranks == 1 {
            return Ok(());
        }
        if cx.capacity == Capacity::Dropless && cx.exact_capacity {
            let mine = lane.full([1], DType::I32, routing.capacity as f64)?;
            let all = lane.empty([ranks], DType::I32)?;
            world.all_gather(lane, &mine, &all)?;
            let largest = lane.to_host(&all)?.to_vec::<i32>()?.into_iter().max().unwrap_or(1);
            routing.capacity = largest as usize;
        }
        let mut scalars = vec![&mut routing.entropy];
        scalars.extend(routing.balance_loss.as_mut());
        scalars.extend(routing.z_loss.as_mut());
        let sums = lane.empty([scalars.len()], scalars[0].dtype())?;
        for (i, scalar) in scalars.iter().enumerate() {
            lane.copy(scalar, &sums.narrow(0, i, 1)?)?;
        }
        world.all_reduce(lane, &sums)?;
        for (i, scalar) in scalars.into_iter().enumerate() {
            let mean = lane.empty_like(scalar)?;
            lane.axpby(1.0 / ranks as f64, &sums.narrow(0, i, 1)?, 0.0, &mean)?;
            *scalar = mean;
        }
        Ok(())
    }

    /// How the rows of the ranks that share a set of experts are cut. Ragged ones are told to all ranks, and read once.
    fn cut(&self, lane: &Lane, split: &RowSplit) -> Result<Cut> {
        let (groups, experts) = (self.parallel.groups(), self.config.experts);
        let (topology, rank) = (groups.topology(), groups.rank());
        let Sizes { ep, esp, .. } = topology.sizes();
        let me = (topology.position(GroupKind::Expert, rank), topology.position(GroupKind::Shard, rank));
        if split.experts() != experts {
            config_err!(
                "rows of {} experts from the {} order: there are {experts}",
                split.experts(),
                self.order.name()
            );
        }
        if let RowSplit::Even { each, .. } = split {
            return Ok(Cut::even((ep, esp), me, experts, *each));
        }
        let mine: Vec<i32> = (0..experts).map(|e| split.range(e).map(|r| r.len() as i32)).collect::<Result<_>>()?;
        let mine = lane.to_device(&Tensor::from_slice(&mine, [experts])?)?;
        let all = lane.empty([topology.ranks(), experts], DType::I32)?;
        groups.world().all_gather(lane, &mine, &all)?;
        let all: Vec<i32> = lane.to_host(&all)?.to_vec()?;
        // The ranks that share a set of experts are neighbours.
        let rows = |source: usize| {
            let at = (rank - rank % (ep * esp) + source) * experts;
            all[at..at + experts].iter().map(|&n| n as usize).collect()
        };
        Cut::ragged((ep, esp), me, (0..ep * esp).map(rows).collect())
    }

    /// One pass of rows (R, M) through the graph that the plan gives.
    fn pass(&self, pass: Pass, cut: &Cut, steps: &dyn journey::Steps, rows: &Tensor) -> Result<Tensor> {
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Degree { r, d } = plan.degrees[pass as usize];
        let r = r.min(cut.most_chunks());
        let degree = Degree { r, d: d.min(r) };
        let reduce_lane = |slice: &Slice| plan.policy.reduce_lane(self.parallel.groups().lane(slice.group.kind()));
        let slice = |slice: &Slice| SliceTask { slice: *slice, lane: reduce_lane(slice) };
        let slices: Vec<SliceTask> = match pass {
            Pass::Forward => Vec::new(),
            Pass::Backward => plan.slices.iter().map(slice).collect(),
        };
        let part = LayerPass { block: plan.block, pass, degree, after: None, slices: &slices };
        let graph: TaskGraph<_> = layer_graph(&*plan.policy, &self.parallel.stages(cut.most_chunks()), &part)?;
        self.parallel.dense(None)?;
        let ended = || match pass {
            Pass::Forward => self.parallel.dense(Some(LayerOp::Dense { block: plan.block + 1, pass })),
            Pass::Backward => plan.begin_dense_backward(&self.parallel),
        };
        let (out, timeline) = journey(&self.parallel, cut, &graph, steps, plan.gradients.as_deref(), rows, ended)?;
        self.timelines.lock().unwrap_or_else(PoisonError::into_inner)[pass as usize] = timeline;
        Ok(out)
    }

    /// dx from the gradients of y and of the auxiliary loss, at least one of which is there.
    fn backward(&self, lane: &Lane, run: &Run, dy: Option<&Tensor>, d_aux: Option<&Tensor>) -> Result<Tensor> {
        let dx = lane.empty_like(&run.x)?;
        let (combine, dispatch) = match dy {
            Some(dy) => self.backward_rows(lane, run, &self.own_tokens(lane, dy)?, &dx)?,
            None => {
                lane.fill(&dx, 0.0)?;
                no_gradient(lane, &run.routing.assignment)?
            }
        };
        // Both losses are means over ranks, so this rank's part is as much smaller.
        let ranks = self.parallel.groups().world().size() as f64;
        let d_loss = |weight: f64| match d_aux {
            Some(d) => {
                let scaled = lane.empty_like(d)?;
                lane.axpby(weight / ranks, d, 0.0, &scaled)?;
                Ok(scaled)
            }
            None => lane.zeros([1], run.x.dtype().accumulate()),
        };
        let grad = RoutingGrad {
            combine,
            dispatch,
            balance: d_loss(self.config.balance_weight)?,
            z: d_loss(self.config.z_weight)?,
        };
        self.gate.backward(&self.gate_context(lane, run.step), &run.x, &run.routing, &run.gate, &grad, &dx)?;
        let dx = hook_backward(&self.hooks.before_moe_start, lane, &run.before_moe_start, dx)?;
        self.all_tokens(lane, dx)
    }

    /// As a single rank's layer does it, with the way to the experts and back between.
    fn backward_rows(&self, lane: &Lane, run: &Run, dy: &Tensor, dx: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (hooks, routing) = (&self.hooks, &run.routing);
        let dy = hook_backward(&hooks.before_moe_end, lane, &run.before_moe_end, dy.clone())?;
        let (d_out, d_combine) = self.order.combine_backward(lane, routing, &run.order, &run.out, &dy)?;
        let d_out = hook_backward(&hooks.after_combine, lane, &run.after_combine, d_out)?;

        let steps = Backward { expert: &*self.expert, hooks, pieces: &run.pieces };
        let d_rows = self.pass(Pass::Backward, &run.cut, &steps, &d_out)?;

        let d_rows = hook_backward(&hooks.before_dispatch, lane, &run.before_dispatch, d_rows)?;
        let d_dispatch = self.order.dispatch_backward(lane, routing, &run.order, &run.x, &d_rows, dx)?;
        Ok((d_combine, d_dispatch))
    }
}

#[cfg(test)]
mod tests;
