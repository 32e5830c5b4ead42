//! What the ranks of a world cost: every collective that their groups use, and the experts, measured while all ranks run.

use super::Parallel;
use crate::autograd::Init;
use crate::comm::{Communicator, GroupKind, Levels, Topology, largest};
use crate::device::{Lane, LaneKind, Mark};
use crate::engine::{LANES, Slowdown, lane_name};
use crate::error::{Result, config_err};
use crate::moe::expert::ExpertKind;
use crate::moe::{MoeConfig, RowSplit, Rows, expert};
use crate::rng::{Counter, Purpose};
use crate::schedule::{
    BlockShape, Collective, CollectiveCosts, ComputeCosts, Cost, GradGroup, LayerShape, MAX_CHUNKS, Profile,
};
use crate::tensor::{DType, Tensor};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Type of what is sent and multiplied.
    pub dtype: DType,
    /// The MoE layer, the whole of it.
    pub layer: MoeConfig,
    /// Rows that a rank's experts take in a pass.
    pub rows: usize,
    /// Rows of the dense products.
    pub dense_rows: usize,
    /// The most that a collective is given.
    pub bytes: usize,
    /// How long to measure.
    pub budget: Duration,
}

impl Subject {
    /// What a step of a model has that is made of `blocks`, with MoE layers like `layer`: sizes up to those of the first one
    /// of them.
    ///
    /// # Errors
    /// If the layers do not fit the world.
    pub fn of(
        layer: MoeConfig,
        blocks: &[BlockShape],
        topology: &Topology,
        dtype: DType,
        budget: Duration,
    ) -> Result<Self> {
        let moe = blocks.iter().find_map(|block| block.moe);
        moe.as_ref().map_or(Ok(()), |moe| moe.fits(topology))?;
        let (tokens, per_token) =
            moe.map_or((1, 1.0), |LayerShape { tokens, rows_per_token, .. }| (tokens, rows_per_token));
        let rows = ((tokens as f64 * per_token) as usize).max(1) * topology.sizes().esp;
        let bytes = (rows * layer.hidden * dtype.size()).clamp(BYTES.0, BYTES.1);
        Ok(Subject { dtype, layer, rows, dense_rows: tokens, bytes, budget })
    }
}

/// What one thing was measured to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// What: `inter-node all-to-all`, `expert product`.
    pub name: String,
    /// What n is in t(n): bytes or FLOPs.
    pub unit: &'static str,
    /// (n, seconds): the median time.
    pub points: Vec<(f64, f64)>,
    /// The line through them.
    pub cost: Cost,
}

impl Measurement {
    /// How far the point that is farthest from the line is from it, as a part of what the line says.
    pub fn deviation(&self) -> f64 {
        let off = |&(n, seconds): &(f64, f64)| (seconds / self.cost.seconds(n) - 1.0).abs();
        self.points.iter().map(off).fold(0.0, f64::max)
    }
}

/// All costs of a world.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// As plans take them.
    pub profile: Profile,
    /// Each with what it was fitted to.
    pub costs: Vec<Measurement>,
    /// How many times things were measured: the fewest and the most.
    pub repeats: (usize, usize),
}

/// What is being measured at one of its sizes.
struct Work {
    of: usize,
    /// Which of [`LADDER`].
    ladder: usize,
    n: f64,
    lane: LaneKind,
    /// Calls of `run` that are timed together.
    calls: usize,
    /// What n counts of that: the time is one's.
    parts: f64,
    run: Call,
}

type Call = Box<dyn Fn(&Lane) -> Result<()>>;

#[derive(Clone, Copy)]
enum What {
    Collective(Collective, LaneKind),
    Product,
    Expert,
}

impl What {
    fn name(self) -> (String, &'static str) {
        match self {
            What::Collective(kind, lane) => (format!("{} {kind}", lane_name(lane)), "bytes"),
            What::Product => ("dense product".to_owned(), "FLOPs"),
            What::Expert => ("expert product".to_owned(), "FLOPs"),
        }
    }
}

/// The number of the way in which costs are measured here. Costs that are kept from run to run are those of one way: whoever
/// changes what is timed, or how, raises it.
pub(crate) const METHOD: u32 = 2;

/// Parts of the most that is measured, in sixteenths but for the first: even steps for β, a small one for α.
const LADDER: [usize; 6] = [1, 2, 4, 8, 12, MAX_CHUNKS];
/// The most that a collective is given is between these: below them its start is all that there is to see, and above them
/// what it takes is in proportion.
const BYTES: (usize, usize) = (64 << 10, 128 << 20);
/// … where lanes are threads.
const BYTES_OF_THREADS: usize = 32 << 20;
/// Fewer times have no median worth telling, more add nothing.
const REPEATS: (usize, usize) = (5, 200);
/// So many calls in a row for one time: ranks do not leave a barrier at the same moment. Collectives on streams are timed one
/// by one, behind a small one that the ranks leave together: what a schedule waits for is one, and in a row one rank's data
/// would leave while another's arrives.
const IN_A_ROW: usize = 4;

/// What ranks that are threads count their time from.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Measures the costs of `parallel`'s world on all its ranks at once: what is measured takes turns, what takes less time more
/// often. A time is the slowest rank's on the device's own clock; of ranks that are threads, and may have to wait for a core,
/// from when the first begins until the last has ended. The profile is the same on every rank. A collective.
///
/// # Errors
/// If the layer does not fit the world, the device has no memory left, or a rank fails or never comes.
pub fn measure(parallel: &Parallel, subject: &Subject) -> Result<Measured> {
    let (compute, world) = (parallel.lane(LaneKind::Compute), parallel.groups().world());
    let (whats, works) = works(parallel, subject)?;
    let clock = (!parallel.issues()).then(|| Mark::at(*BEGIN));
    // The largest of each, over ranks, add up to the time.
    let run = |work: &Work| -> Result<[f64; 2]> {
        let lane = parallel.lane(work.lane);
        world.barrier(compute)?;
        leave_together(parallel, &works, work)?;
        let start = lane.record(true)?;
        for _ in 0..work.calls {
            (work.run)(lane)?;
        }
        let end = lane.record(true)?;
        let seconds = start.seconds_to(&end)?;
        let begin = clock.as_ref().map_or(Ok(0.0), |clock| clock.seconds_to(&start))?;
        Ok([-begin, begin + seconds])
    };
    // The first runs take memory and choose algorithms.
    works.iter().try_for_each(|work| run(work).map(drop))?;
    let wall = |work| {
        let begun = Instant::now();
        run(work).map(|_| begun.elapsed().as_secs_f64())
    };
    let walls = largest(&**world, compute, &works.iter().map(wall).collect::<Result<Vec<_>>>()?)?;
    let share = subject.budget.as_secs_f64() / works.len() as f64;
    let repeats: Vec<usize> =
        walls.iter().map(|wall| ((share / wall.max(1e-9)) as usize).clamp(REPEATS.0, REPEATS.1)).collect();
    let (fewest, rounds) = (repeats.iter().copied().min().unwrap_or(0), repeats.iter().copied().max().unwrap_or(0));
    let mut marks = vec![Vec::new(); works.len()];
    for round in 0..rounds {
        for ((work, marks), repeats) in works.iter().zip(&mut marks).zip(&repeats) {
            // Spread evenly over the rounds.
            if (round + 1) * repeats / rounds > round * repeats / rounds {
                marks.extend(run(work)?);
            }
        }
    }
    let all = largest(&**world, compute, &marks.concat())?;
    let mut all = all.chunks_exact(2).map(|mark| mark[0] + mark[1]);
    let mut medians = Vec::with_capacity(works.len());
    for (work, &repeats) in works.iter().zip(&repeats) {
        let mut times: Vec<f64> = all.by_ref().take(repeats).collect();
        times.sort_by(f64::total_cmp);
        medians.push(f64::midpoint(times[(repeats - 1) / 2], times[repeats / 2]) / work.parts);
    }

    let mut costs = Vec::with_capacity(whats.len());
    for (i, what) in whats.iter().enumerate() {
        let of = works.iter().enumerate().filter(|(_, work)| work.of == i);
        let points: Vec<(f64, f64)> = of.map(|(w, work)| (work.n, medians[w])).collect();
        let (name, unit) = what.name();
        costs.push(Measurement { name, unit, cost: Cost::fit(&points)?, points });
    }
    let profile = Profile {
        slowdown: if parallel.issues() { Some(slowdown(parallel, &works, &medians, subject.budget)?) } else { None },
        ..profile(parallel, subject, &whats, &costs, (fewest, rounds))?
    };
    Ok(Measured { profile, costs, repeats: (fewest, rounds) })
}

/// Which of its sizes a piece of work has while it is seen what lanes lose to each other: a chunk's.
const CHUNK: usize = LADDER[3];
/// How often that is measured, at least and at most.
const TURNS: (usize, usize) = (3, 15);

/// How often what takes `turn` seconds is measured in `share` seconds: an odd number of times, of which one is the median.
fn turns(share: f64, turn: f64) -> usize {
    (((share / turn.max(1e-9)) as usize).clamp(TURNS.0, TURNS.1) - 1) | 1
}

/// Before a collective on a stream is timed: a small one of its kind, which all ranks leave at the same moment.
fn leave_together(parallel: &Parallel, works: &[Work], work: &Work) -> Result<()> {
    if !parallel.issues() || work.lane == LaneKind::Compute {
        return Ok(());
    }
    let small = works.iter().find(|small| small.of == work.of);
    small.map_or(Ok(()), |small| (small.run)(parallel.lane(work.lane)))
}

/// What the lanes lose to each other where they are streams: the time of a few pieces of work on one of them while another
/// has enough to do beside it, over the time by themselves, less one; each pair of lanes has an equal part of the budget. A
/// collective.
fn slowdown(parallel: &Parallel, works: &[Work], medians: &[f64], budget: Duration) -> Result<Slowdown> {
    const PIECES: usize = 3;
    const PAIRS: f64 = (LANES.len() * (LANES.len() - 1)) as f64;
    let (compute, world) = (parallel.lane(LaneKind::Compute), parallel.groups().world());
    // The expert's products are the last on Compute; of the collectives of a lane the first is what a layer has most of.
    let chunks = || works.iter().zip(medians).filter(|(work, _)| work.ladder == CHUNK);
    let on = |lane: LaneKind| match lane {
        LaneKind::Compute => chunks().rfind(|(work, _)| work.lane == lane),
        _ => chunks().find(|(work, _)| work.lane == lane),
    };
    let once = |work: &Work| (0..work.calls).try_for_each(|_| (work.run)(parallel.lane(work.lane)));
    let seconds = |work: &Work, beside: Option<(&Work, usize)>| -> Result<f64> {
        world.barrier(compute)?;
        // It is at work before and while what is timed is.
        let mut ahead = beside.map_or(0, |(_, pieces)| pieces);
        let each = ahead.div_ceil(PIECES);
        let lane = parallel.lane(work.lane);
        leave_together(parallel, works, work)?;
        let start = lane.record(true)?;
        for _ in 0..PIECES {
            if let Some((other, _)) = beside {
                (0..each.min(ahead)).try_for_each(|_| once(other))?;
                ahead -= each.min(ahead);
            }
            once(work)?;
        }
        let end = lane.record(true)?;
        LANES.iter().try_for_each(|&kind| parallel.lane(kind).synchronize())?;
        start.seconds_to(&end)
    };
    let mut slowdown = Slowdown::default();
    for slow in LANES {
        for beside in LANES.into_iter().filter(|&beside| beside != slow) {
            let (Some((work, own)), Some((other, each))) = (on(slow), on(beside)) else { continue };
            // Twice what it takes by itself.
            let time = |work: &Work, median: &f64| median * work.parts;
            let (alone, one) = (PIECES as f64 * time(work, own), time(other, each));
            let pieces = ((2.0 * alone / one.max(1e-9)).ceil() as usize).clamp(1, 64);
            // Medians are the same on all ranks, and so is this.
            let turns = turns(budget.as_secs_f64() / PAIRS, alone + alone.max(pieces as f64 * one));
            let mut times = Vec::with_capacity(2 * turns);
            for _ in 0..turns {
                times.push(seconds(work, None)?);
                times.push(seconds(work, Some((other, pieces)))?);
            }
            let times = largest(&**world, compute, &times)?;
            let mut ratios: Vec<f64> = times.chunks_exact(2).map(|pair| pair[1] / pair[0].max(1e-9) - 1.0).collect();
            ratios.sort_by(f64::total_cmp);
            slowdown[slow as usize][beside as usize] = ratios[turns / 2].max(0.0);
        }
    }
    Ok(slowdown)
}

fn profile(
    parallel: &Parallel,
    subject: &Subject,
    whats: &[What],
    costs: &[Measurement],
    (fewest, most): (usize, usize),
) -> Result<Profile> {
    let (mut lanes, mut gemm, mut expert) = ([CollectiveCosts::default(); 2], None, None);
    for (what, Measurement { cost, .. }) in whats.iter().zip(costs) {
        match *what {
            What::Product => gemm = Some(*cost),
            What::Expert => expert = Some(*cost),
            What::Collective(kind, lane) => {
                let costs = &mut lanes[usize::from(lane == LaneKind::InterNode)];
                let place = match kind {
                    Collective::AllToAll => &mut costs.all_to_all,
                    Collective::AllGather => &mut costs.all_gather,
                    Collective::ReduceScatter => &mut costs.reduce_scatter,
                    Collective::AllReduce => &mut costs.all_reduce,
                };
                *place = Some(*cost);
            }
        }
    }
    let Some(gemm) = gemm else { config_err!("a profile without a matrix product") };
    let sizes = parallel.groups().topology().sizes();
    let device = parallel.lane(LaneKind::Compute).name()?;
    let source = format!(
        "measured {fewest} to {most} times on {device}: {} ranks on {} nodes, dp {}, mp {}, ep {}, esp {}, {}",
        sizes.ranks, sizes.nodes, sizes.dp, sizes.mp, sizes.ep, sizes.esp, subject.dtype
    );
    Ok(Profile {
        name: "measured".to_owned(),
        source,
        element_bytes: subject.dtype.size(),
        slowdown: None,
        compute: ComputeCosts { gemm, expert },
        intra_node: lanes[0],
        inter_node: lanes[1],
    })
}

/// The groups whose collectives are measured, each kind of collective once on each lane: where several groups have it there,
/// the one that moves most.
fn groups(parallel: &Parallel) -> Vec<(Collective, LaneKind, Arc<dyn Communicator>)> {
    let groups = parallel.groups();
    let of = |kind: GroupKind| (groups.lane(kind), groups.get(kind).clone());
    let mut all = Vec::new();
    let phases = parallel.all_to_all().phases(groups.expert());
    match groups.expert().levels() {
        Some(Levels { intra, inter, .. }) if phases.len() > 1 => {
            all.push((Collective::AllToAll, LaneKind::InterNode, inter.clone()));
            all.push((Collective::AllToAll, LaneKind::IntraNode, intra.clone()));
            all.push((Collective::AllGather, LaneKind::IntraNode, intra.clone()));
        }
        _ => all.push((Collective::AllToAll, of(GroupKind::Expert).0, of(GroupKind::Expert).1)),
    }
    for kind in [GroupKind::Shard, GroupKind::Model] {
        all.push((Collective::AllGather, of(kind).0, of(kind).1));
    }
    all.push((Collective::ReduceScatter, of(GroupKind::Shard).0, of(GroupKind::Shard).1));
    for kind in GradGroup::ALL.map(GradGroup::kind).into_iter().chain([GroupKind::Model]) {
        all.push((Collective::AllReduce, of(kind).0, of(kind).1));
    }
    let mut chosen: Vec<(Collective, LaneKind, Arc<dyn Communicator>)> = Vec::new();
    for (kind, lane, comm) in all {
        if comm.size() > 1 && !chosen.iter().any(|c| (c.0, c.1) == (kind, lane)) {
            chosen.push((kind, lane, comm));
        }
    }
    chosen
}

fn works(parallel: &Parallel, subject: &Subject) -> Result<(Vec<What>, Vec<Work>)> {
    let (mut whats, mut works) = (Vec::new(), Vec::new());
    let compute = parallel.lane(LaneKind::Compute);
    let size = subject.dtype.size();
    for (kind, lane, comm) in groups(parallel) {
        let of = whats.len();
        whats.push(What::Collective(kind, lane));
        let ranks = comm.size();
        // Blocks of 256 bytes, as many for each rank.
        let unit = ranks * (256 / size);
        for (i, part) in LADDER.into_iter().enumerate() {
            let most = if parallel.issues() { subject.bytes } else { subject.bytes.min(BYTES_OF_THREADS) } / size;
            let elements = if i == 0 { most / 64 } else { most * part / MAX_CHUNKS };
            let elements = elements.div_ceil(unit).max(1 + i) * unit;
            let whole = compute.zeros([elements], subject.dtype)?;
            let other = match kind {
                Collective::AllToAll => compute.zeros([elements], subject.dtype)?,
                Collective::AllReduce => whole.clone(),
                _ => compute.zeros([elements / ranks], subject.dtype)?,
            };
            let comm = comm.clone();
            let run = move |lane: &Lane| match kind {
                Collective::AllToAll => comm.all_to_all(lane, &whole, &other),
                Collective::AllGather => comm.all_gather(lane, &other, &whole),
                Collective::ReduceScatter => comm.reduce_scatter(lane, &whole, &other),
                Collective::AllReduce => comm.all_reduce(lane, &whole),
            };
            let n = (elements * size) as f64;
            let calls = if parallel.issues() { 1 } else { IN_A_ROW };
            works.push(Work { of, ladder: part, n, lane, calls, parts: calls as f64, run: Box::new(run) });
        }
    }
    let of = whats.len();
    whats.push(What::Product);
    let m = subject.layer.hidden;
    for part in LADDER {
        let rows = (subject.dense_rows * part / MAX_CHUNKS).max(part);
        let random = |seed, dims: [usize; 2]| normal(compute, seed, dims, subject.dtype);
        let (a, b) = (random(1, [rows, m])?, random(2, [m, m])?);
        let c = compute.empty([rows, m], subject.dtype)?;
        let n = 2.0 * rows as f64 * (m * m) as f64;
        let run = move |lane: &Lane| lane.gemm(1.0, &a, &b, 0.0, &c);
        works.push(Work {
            of,
            ladder: part,
            n,
            lane: LaneKind::Compute,
            calls: IN_A_ROW,
            parts: IN_A_ROW as f64,
            run: Box::new(run),
        });
    }
    experts(parallel, subject, whats.len(), &mut works)?;
    whats.push(What::Expert);
    compute.synchronize()?;
    Ok((whats, works))
}

/// The experts as the layer runs them: where lanes are threads piece by piece, on a GPU a chunk at a time.
fn experts(parallel: &Parallel, subject: &Subject, of: usize, works: &mut Vec<Work>) -> Result<()> {
    let (lane, sizes) = (parallel.lane(LaneKind::Compute), parallel.groups().topology().sizes());
    let whole = &subject.layer;
    let part = MoeConfig { experts: whole.experts / sizes.ep, ffn: whole.ffn / sizes.esp, ..whole.clone() };
    if !whole.experts.is_multiple_of(sizes.ep) || !whole.ffn.is_multiple_of(sizes.esp) {
        config_err!(
            "{} experts of width {} with ep = {}, esp = {}: each rank has as many, and as much of each",
            whole.experts,
            whole.ffn,
            sizes.ep,
            sizes.esp
        );
    }
    let init = Init::new(lane, subject.dtype, 1).child("measured");
    let gemms = if part.expert == ExpertKind::Gpt { 2.0 } else { 3.0 };
    let expert: Arc<dyn crate::moe::Expert> = Arc::from(expert::build(&init, &part)?);
    let each = (subject.rows / MAX_CHUNKS / part.experts).max(1);
    for pieces in LADDER {
        let (calls, each) = if parallel.issues() { (1, each * pieces) } else { (pieces, each) };
        let rows = each * part.experts;
        let data = normal(lane, 3, [rows, part.hidden], subject.dtype)?;
        let d = normal(lane, 4, [rows, part.hidden], subject.dtype)?;
        let rows = Rows { data, split: RowSplit::Even { experts: part.experts, each } };
        let n = 2.0 * (calls * each * part.experts) as f64 * (part.hidden * part.ffn) as f64;
        let expert = expert.clone();
        let run = move |lane: &Lane| -> Result<()> {
            let (_, saved) = expert.forward(lane, &rows)?;
            let (_, left) = expert.backward_data(lane, &rows, &saved, &d)?;
            expert.backward_weights(lane, &rows, &saved, &d, &left)
        };
        // Forward, data gradient and weight gradient have as many products each.
        works.push(Work {
            of,
            ladder: pieces,
            n,
            lane: LaneKind::Compute,
            calls,
            parts: 3.0 * gemms,
            run: Box::new(run),
        });
    }
    Ok(())
}

fn normal(lane: &Lane, seed: u64, dims: [usize; 2], dtype: DType) -> Result<Tensor> {
    let t = lane.empty(dims, dtype)?;
    lane.normal(Counter { seed, purpose: Purpose::Test, step: 0 }, 0, &t)?;
    Ok(t)
}

#[cfg(test)]
mod tests;
