//! Every policy's schedule of the same training step, run on the ranks of a world and held against its prediction.
//!
//! A step is a stack of blocks, attention and an MoE layer each: forward, backward, and the sums of gradients over the
//! data-parallel groups; no optimizer. Policies take turns; a time is the slowest rank's, from when all
//! begin. The first step of each is checked against the first policy's: the same gradients, on the CPU to the bit.

use super::Spread;
use crate::autograd::{Init, Tape};
use crate::comm::{AllToAllKind, GroupKind, Sizes, largest};
use crate::device::{Lane, LaneKind};
use crate::engine::{LANES, Timeline};
use crate::error::{Error, Result, config_err};
use crate::model::{Arch, ModelConfig, Transformer};
use crate::moe::distributed::{Measured, Parallel, Subject, measure};
use crate::moe::expert::ExpertKind;
use crate::moe::order::OrderKind;
use crate::moe::{Capacity, MoeConfig, StepContext};
use crate::rng::{Counter, Purpose};
use crate::schedule::{
    BlockCosts, GradGroup, LayerOp, MAX_CHUNKS, ModelCosts, Pass, Plan, Planner, Policy, Profile, step_graph,
};
use crate::tensor::{DType, Tensor};
use crate::train::{Ranks, StepPlan, block_shapes};
use serde::Serialize;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// A stack of blocks, and the groups that it is made for.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Its name.
    pub name: String,
    /// The blocks.
    pub model: ModelConfig,
    /// Sequences for each model-parallel group.
    pub batch: usize,
    /// L.
    pub seq: usize,
    /// The most ranks that share an expert: fewer where a node has fewer.
    esp: usize,
}

/// Name, what the model is made of (M, heads, H, E, k, V), the experts' kind, B and L for a model-parallel group, N_ESP at most.
type Named = (&'static str, [usize; 6], ExpertKind, [usize; 2], usize);

/// The first three are made for emulation on FSMoE's published costs, and bound there by what their name says. The others
/// are about blocks: where they are really run, what comes after them is small.
const NAMED: [Named; 6] = [
    ("inter-bound", [2048, 16, 8192, 8, 2, 4096], ExpertKind::Gpt, [2, 2048], 2),
    ("intra-bound", [2048, 16, 8192, 8, 2, 4096], ExpertKind::Gpt, [2, 2048], usize::MAX),
    ("expert-bound", [2048, 16, 28_672, 8, 2, 4096], ExpertKind::Mixtral, [2, 2048], 2),
    ("gpt2-xl", [1600, 25, 6400, 8, 2, 256], ExpertKind::Gpt, [4, 1024], usize::MAX),
    ("mixtral-8x7b", [4096, 32, 14_336, 8, 2, 256], ExpertKind::Mixtral, [3, 2048], usize::MAX),
    ("tiny", [128, 4, 256, 8, 2, 256], ExpertKind::Mixtral, [4, 64], usize::MAX),
];

/// Blocks of a stack, where nothing else is asked for.
pub const BLOCKS: usize = 4;

impl FromStr for Shape {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let Some(&(_, [hidden, heads, ffn, experts, top_k, vocab], expert, [batch, seq], esp)) =
            NAMED.iter().find(|named| named.0 == name)
        else {
            config_err!("unknown shape {name:?}: it is one of {}", NAMED.map(|named| named.0).join(", "));
        };
        let moe = MoeConfig {
            experts,
            top_k,
            expert,
            capacity: Capacity::Factor(1.2),
            order: OrderKind::Tutel,
            ..MoeConfig::default()
        };
        let model = ModelConfig {
            arch: if expert == ExpertKind::Gpt { Arch::Gpt2 } else { Arch::Mixtral },
            vocab,
            max_seq: seq,
            layers: BLOCKS,
            hidden,
            heads,
            kv_heads: heads,
            ffn,
            moe,
            ..ModelConfig::default()
        };
        Ok(Shape { name: name.to_owned(), model, batch, seq, esp })
    }
}

impl Shape {
    /// The shapes that are run where none is named: emulated, on a GPU, or on the processor.
    ///
    /// # Errors
    /// None: they have names.
    pub fn defaults(emulated: bool, cpu: bool) -> Result<Vec<Shape>> {
        let chosen = if emulated {
            0..3
        } else if cpu {
            5..6
        } else {
            3..5
        };
        NAMED[chosen].iter().map(|named| named.0.parse()).collect()
    }

    /// The groups of a world that it is made for: heads are divided among the ranks of a node where they can be; experts
    /// are sharded over as many of them, at most, as its name says, and spread over the others.
    pub fn sizes(&self, ranks: usize, nodes: usize) -> Sizes {
        let node = ranks.checked_div(nodes).unwrap_or(1).max(1);
        let most = |limit: usize, whole: usize| {
            (1..=limit.min(node)).rev().find(|n| node.is_multiple_of(*n) && whole.is_multiple_of(*n)).unwrap_or(1)
        };
        let (mp, esp) = (most(node, self.model.heads), most(self.esp, self.model.ffn));
        let spread = ranks / esp;
        let ep = (1..=spread).rev().find(|n| spread.is_multiple_of(*n) && self.model.moe.experts.is_multiple_of(*n));
        Sizes::new(ranks, nodes, mp, ep.unwrap_or(1), esp)
    }

    /// A small stack of as many blocks, experts and routing choices, for what emulation really computes: 16 tokens on each
    /// rank, and a capacity that gives every chunk rows of its own all the same.
    fn image(&self, mp: usize, esp: usize) -> Shape {
        const TOKENS: usize = 16;
        let rows = TOKENS * self.model.moe.top_k;
        let capacity = Capacity::Factor((MAX_CHUNKS * self.model.moe.experts) as f64 / rows as f64);
        let model = ModelConfig {
            // A multiple of 2 to each head, for rotary positions.
            hidden: 8 * mp,
            heads: mp,
            kv_heads: mp,
            ffn: 8 * mp * esp,
            max_seq: TOKENS,
            vocab: 32,
            moe: MoeConfig { capacity, ..self.model.moe.clone() },
            ..self.model.clone()
        };
        Shape { name: self.name.clone(), model, batch: mp, seq: TOKENS, esp: self.esp }
    }
}

/// What is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Type of parameters and tokens.
    pub dtype: DType,
    /// Emulated costs; none: the ranks' own, which are measured first.
    pub emulate: Option<Profile>,
    /// How rows travel to their experts: as the ranks have it.
    pub all_to_all: AllToAllKind,
    /// Steps of each policy that are timed.
    pub steps: usize,
    /// How long costs are measured.
    pub measure: Duration,
    /// Whether timelines are taken, of one more step of each policy.
    pub trace: bool,
}

/// A policy's step.
#[derive(Clone, Debug, Serialize)]
pub struct ScheduleRow {
    /// Always "schedule".
    pub bench: &'static str,
    /// The shape's name.
    pub shape: String,
    /// The policy's.
    pub policy: String,
    /// The device's, or whose costs are emulated.
    pub device: String,
    /// The world.
    pub world: Sizes,
    /// How rows travel.
    pub all_to_all: String,
    /// The median over steps of the slowest rank's time.
    pub measured_ms: f64,
    /// The tenth percentile.
    pub p10_ms: f64,
    /// The ninetieth.
    pub p90_ms: f64,
    /// Steps that were timed.
    pub steps: usize,
    /// What the planner's simulation says.
    pub predicted_ms: f64,
    /// Measured over predicted, less one, in percent.
    pub error_percent: f64,
    /// r, as most layers have it.
    pub r_forward: usize,
    /// r backward.
    pub r_backward: usize,
    /// d, the look-ahead of the all-gathers.
    pub d_forward: usize,
    /// d backward.
    pub d_backward: usize,
    /// DeepSpeed's measured time over this one; none where it was not run.
    pub speedup_over_deepspeed: Option<f64>,
    /// Of emulated tasks, on all ranks, those whose work alone took longer than their cost, in percent; none where nothing is
    /// emulated.
    pub overran_percent: Option<f64>,
    /// Whether an emulation shows the machine that it stands for, and not this one: fewer than 1 % did, and the step took less
    /// than 10 % longer than predicted, as threads that wait for a core do not overrun.
    pub valid: bool,
}

/// What a shape came to on one rank; rows are the same on each.
pub struct Outcome {
    /// A row for each policy.
    pub rows: Vec<ScheduleRow>,
    /// By policy: this rank's step as it ran, and as it was simulated.
    pub timelines: Vec<(String, Timeline, Timeline)>,
    /// The costs of the ranks, where they were measured.
    pub measured: Option<Measured>,
    /// What each policy's gradients differ by from the first's, over the largest: 0 on the CPU.
    pub difference: f64,
}

/// On the GPU only what a product's tiling explains may differ between schedules.
const TOLERANCE: f64 = 3e-2;
/// Steps before the timed ones.
const WARM_UP: usize = 1;

/// Runs a shape's step under each of `policies`, which need not be this library's, on this rank; the first is what the others
/// are held against. A collective.
///
/// # Errors
/// If there is no policy, the shape does not fit the world, a policy gives other gradients, the device has no memory left, or a rank fails.
pub fn run(
    parallel: &Arc<Parallel>,
    shape: &Shape,
    settings: &Settings,
    policies: &[Arc<dyn Policy>],
) -> Result<Outcome> {
    let first = policies.first().ok_or_else(|| Error::Config("a benchmark of no policy".into()))?;
    let topology = *parallel.groups().topology();
    let (lane, sizes) = (parallel.lane(LaneKind::Compute), topology.sizes());
    let all_to_all = settings.all_to_all;
    let real = if settings.emulate.is_some() { shape.image(sizes.mp, sizes.esp) } else { shape.clone() };
    let init = Init::new(lane, settings.dtype, 1);
    let model = Transformer::on_ranks(&init, &real.model, parallel)?;
    let blocks = block_shapes(&model, real.batch * real.seq, &topology, all_to_all);

    let mut measured = None;
    let (mut costs, ends) = match &settings.emulate {
        Some(profile) => {
            let nominal = shape.model.workload(shape.batch, shape.seq, &topology, all_to_all)?;
            // A task that is emulated takes what it costs, whatever runs beside it.
            let alone = Profile { slowdown: None, ..profile.clone() };
            let nominal = ModelCosts::new(&nominal, &topology, &alone)?;
            let here = Profile { element_bytes: settings.dtype.size(), ..profile.clone() };
            let ends = ends(&nominal, &ModelCosts::new(&blocks, &topology, &here)?);
            (nominal, Some(ends))
        }
        None => {
            let layer = model.config().moe_layer();
            let subject = Subject::of(layer, &blocks, &topology, settings.dtype, settings.measure)?;
            let found = measure(parallel, &subject)?;
            let costs = ModelCosts::new(&blocks, &topology, &found.profile)?;
            measured = Some(found);
            (costs, None)
        }
    };
    let plan = |policy: &Arc<dyn Policy>, costs: &ModelCosts| {
        Ok::<_, Error>(StepPlan { policy: policy.clone(), plan: Planner::new().plan(&**policy, costs)? })
    };
    let ranks = Ranks::new(lane, parallel, &model, plan(first, &costs)?, ends)?;
    let mut stack = Stack { parallel, lane, shape: &real, model: &model, ranks };
    if settings.emulate.is_some() {
        let costs = costs.clone();
        parallel.emulate(move |op| costs.seconds(op))?;
    } else {
        // What dense parts take, gates and orders included, is seen in steps in which nothing runs beside them.
        stack.release()?;
        stack.step()?;
        costs.blocks = stack.dense_costs(&costs)?;
    }

    let plans = policies.iter().map(|policy| plan(policy, &costs)).collect::<Result<Vec<StepPlan>>>()?;
    let (mut times, mut counts) = (vec![Vec::new(); plans.len()], vec![(0, 0); plans.len()]);
    let (mut reference, mut difference): (Option<Vec<Vec<f64>>>, f64) = (None, 0.0);
    // On a GPU every way of cutting has buffers of sizes of its own: policies take turns in runs of a few steps, and give
    // their memory back.
    let gpu = lane.as_cuda().is_some();
    let rounds = if gpu { settings.steps.min(3) } else { settings.steps };
    for round in 0..rounds {
        let timed = settings.steps * (round + 1) / rounds - settings.steps * round / rounds;
        let warm_up = if gpu || round == 0 { WARM_UP } else { 0 };
        for (i, plan) in plans.iter().enumerate() {
            stack.ranks.set_plan(plan.clone());
            if gpu {
                stack.release()?;
            }
            for step in 0..warm_up + timed {
                let before = parallel.overruns();
                let seconds = stack.step()?;
                if (round, step) == (0, 0) {
                    let gradients = stack.gradients()?;
                    let off = reference.as_ref().map_or(0.0, |first| apart(first, &gradients));
                    let limit = if gpu { TOLERANCE } else { 0.0 };
                    if off > limit {
                        config_err!(
                            "the gradients of {} differ from those of {} by {off:.1e} of the largest: at most {limit:.0e}",
                            plan.plan.policy,
                            plans[0].plan.policy
                        );
                    }
                    difference = difference.max(off);
                    reference.get_or_insert(gradients);
                }
                if step >= warm_up {
                    let after = parallel.overruns();
                    times[i].push(seconds * 1e3);
                    counts[i].0 += after.0 - before.0;
                    counts[i].1 += after.1 - before.1;
                }
            }
        }
    }
    let mut timelines = Vec::new();
    if settings.trace {
        for plan in &plans {
            stack.ranks.set_plan(plan.clone());
            if gpu {
                stack.release()?;
                stack.step()?;
            }
            let graph = step_graph(&*plan.policy, &costs, &plan.plan)?;
            let simulated = costs.simulator().timeline(&graph, |op| costs.price(op));
            timelines.push((plan.plan.policy.clone(), stack.traced()?, simulated));
        }
    }
    let device = match &settings.emulate {
        Some(profile) => format!("emulation of {}", profile.name),
        None => lane.name()?,
    };
    let mut rows = Vec::with_capacity(plans.len());
    for ((plan, times), (tasks, overran)) in plans.iter().zip(times).zip(counts) {
        // The slowest rank's, step by step.
        let times = largest(&**parallel.groups().world(), lane, &times)?;
        let sums = stack.ranks.sums(lane, &[tasks as f64, overran as f64])?;
        let (tasks, overran) = (sums[0], sums[1]);
        let row = Row { shape, device: &device, parallel, plan: &plan.plan, all_to_all };
        rows.push(row.of(Spread::of(times), (tasks > 0.0).then(|| 100.0 * overran / tasks)));
    }
    let deepspeed = rows.iter().find(|row| row.policy == "deepspeed").map(|row| row.measured_ms);
    rows.iter_mut().for_each(|row| row.speedup_over_deepspeed = deepspeed.map(|d| d / row.measured_ms));
    Ok(Outcome { rows, timelines, measured, difference })
}

/// Before ranks are started that emulate: what they really compute is small, and an operation that is shared out to several
/// threads would only keep more of them waiting for the cores. Nothing is changed where operations have run already.
pub fn prepare_emulation() {
    // Who has made the pool before has chosen its size.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(1).build_global();
}

struct Row<'a> {
    shape: &'a Shape,
    device: &'a str,
    parallel: &'a Parallel,
    plan: &'a Plan,
    all_to_all: AllToAllKind,
}

impl Row<'_> {
    fn of(&self, spread: Spread, overran_percent: Option<f64>) -> ScheduleRow {
        let degree = |pass| self.plan.commonest(pass).map_or((0, 0), |degree| (degree.r, degree.d));
        let ((r_forward, d_forward), (r_backward, d_backward)) = (degree(Pass::Forward), degree(Pass::Backward));
        let predicted_ms = self.plan.seconds * 1e3;
        let error_percent = 100.0 * (spread.median_ms / predicted_ms - 1.0);
        ScheduleRow {
            bench: "schedule",
            shape: self.shape.name.clone(),
            policy: self.plan.policy.clone(),
            device: self.device.to_owned(),
            world: self.parallel.groups().topology().sizes(),
            all_to_all: self.all_to_all.to_string(),
            measured_ms: spread.median_ms,
            p10_ms: spread.p10_ms,
            p90_ms: spread.p90_ms,
            steps: spread.repeats,
            predicted_ms,
            error_percent,
            r_forward,
            r_backward,
            d_forward,
            d_backward,
            speedup_over_deepspeed: None,
            overran_percent,
            valid: overran_percent.is_none_or(|percent| percent < 1.0 && error_percent < 10.0),
        }
    }
}

/// At how many bytes of a nominal model's gradients, and of its image's, the same parts end: by group.
fn ends(nominal: &ModelCosts, image: &ModelCosts) -> [Vec<(u64, u64)>; 3] {
    let mut ends: [Vec<(u64, u64)>; 3] = Default::default();
    for ((_, _, there), (_, _, here)) in nominal.gradients().zip(image.gradients()) {
        for group in GradGroup::ALL.map(|group| group as usize) {
            let (a, b) = ends[group].last().copied().unwrap_or((0, 0));
            ends[group].push((a + there[group], b + here[group]));
        }
    }
    ends
}

/// By how much gradients differ, over the largest of the first.
fn apart(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let largest = pairs().map(|(a, _)| a.abs()).fold(0.0, f64::max);
    // What is no number is infinitely far.
    let off = pairs().map(|(a, b)| if (a - b).abs().is_nan() { f64::INFINITY } else { (a - b).abs() });
    off.fold(0.0, f64::max) / largest.max(f64::MIN_POSITIVE)
}

/// A rank's part of a step.
struct Stack<'a> {
    parallel: &'a Arc<Parallel>,
    lane: &'a Lane,
    shape: &'a Shape,
    model: &'a Transformer,
    ranks: Ranks,
}

impl Stack<'_> {
    /// A step; what it took here, in seconds, from when all ranks began.
    fn step(&self) -> Result<f64> {
        self.begin()?;
        let start = self.lane.record(true)?;
        self.work()?;
        let end = self.lane.record(true)?;
        start.seconds_to(&end)
    }

    /// Gives memory that no tensor has back.
    fn release(&self) -> Result<()> {
        for lane in LANES.map(|kind| self.parallel.lane(kind)) {
            lane.synchronize()?;
            lane.as_cuda().inspect(|cuda| cuda.release_unused());
        }
        Ok(())
    }

    fn begin(&self) -> Result<()> {
        self.ranks.zero_grad(self.lane)?;
        self.lane.synchronize()?;
        self.parallel.groups().world().barrier(self.lane)
    }

    /// A step, and when its tasks ran on this rank.
    fn traced(&self) -> Result<Timeline> {
        self.begin()?;
        self.parallel.trace()?;
        self.work()?;
        self.parallel.traced()
    }

    fn work(&self) -> Result<()> {
        let Shape { batch, seq, ref model, .. } = *self.shape;
        let tokens = batch * seq;
        // Each model-parallel group has tokens of its own.
        let group = self.parallel.groups().get(GroupKind::Data).rank() as u64;
        let counter = Counter { seed: 7, purpose: Purpose::Test, step: 0 };
        let id = |i: usize| (counter.uniform(group * tokens as u64 + i as u64) * model.vocab as f64) as i32;
        let ids: Vec<i32> = (0..=tokens).map(|i| id(i).clamp(0, model.vocab as i32 - 1)).collect();
        let upload = |ids: &[i32]| self.lane.to_device(&Tensor::from_slice(ids, [tokens])?);
        let (ids, targets) = (upload(&ids[..tokens])?, upload(&ids[1..])?);
        self.ranks.begin(self.model, true)?;
        let tape = Tape::new(self.lane);
        let step = StepContext { train: true, seed: 1, step: 0, first_token: group * tokens as u64 };
        let (loss, out) = self.model.loss(&tape, &ids, &targets, batch, seq, step)?;
        let one = |like: &Tensor| self.lane.full(*like.shape(), like.dtype(), 1.0);
        self.ranks.turn(self.model)?;
        tape.backward(&[(&loss, one(loss.value())?), (&out.aux_loss, one(out.aux_loss.value())?)])?;
        self.ranks.finish()
    }

    /// The gradients of this rank, by group; of more than a million, as many that lie evenly spread.
    fn gradients(&self) -> Result<Vec<Vec<f64>>> {
        const PARTS: usize = 16;
        const MOST: usize = 1 << 20;
        let host = |t: &Tensor| -> Result<Vec<f64>> {
            Lane::cpu().cast(&self.lane.to_host(&self.lane.contiguous(t)?)?, DType::F64)?.to_vec()
        };
        let flat = GradGroup::ALL.into_iter().filter_map(|group| self.ranks.gradients().flat(group));
        flat.map(|t| match t.elements() {
            ..=MOST => host(t),
            n => {
                let part = |i| host(&t.narrow(0, n / PARTS * i, MOST / PARTS)?);
                Ok((0..PARTS).map(part).collect::<Result<Vec<_>>>()?.concat())
            }
        })
        .collect()
    }

    /// The blocks' costs with those of their dense parts as they are seen: medians over steps, the slowest rank's.
    fn dense_costs(&self, costs: &ModelCosts) -> Result<Vec<BlockCosts>> {
        const STEPS: usize = 5;
        let names =
            |block: usize| [Pass::Forward, Pass::Backward].map(|pass| LayerOp::Dense { block, pass }.to_string());
        let mut seen = vec![[(); 2].map(|()| Vec::new()); costs.blocks.len()];
        for _ in 0..STEPS {
            let timeline = self.traced()?;
            for (block, seen) in seen.iter_mut().enumerate() {
                for (name, seen) in names(block).iter().zip(seen) {
                    let spans = timeline.spans.iter().filter(|span| span.name == *name);
                    seen.push(spans.map(|span| span.end - span.start).sum::<f64>());
                }
            }
        }
        let medians: Vec<f64> = seen.into_iter().flatten().map(|times| Spread::of(times).median_ms).collect();
        let slowest = largest(&**self.parallel.groups().world(), self.lane, &medians)?;
        let with = |(block, dense): (&BlockCosts, &[f64])| BlockCosts { dense: [dense[0], dense[1]], ..block.clone() };
        Ok(costs.blocks.iter().zip(slowest.chunks(2)).map(with).collect())
    }
}
