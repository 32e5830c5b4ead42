//! What the layers of one rank share: its groups, its lanes, and the all-to-all.

use super::GradientBuffers;
use crate::comm::local::waited;
use crate::comm::{AllToAll, Communicator, GroupKind, Groups, Topology};
use crate::device::cuda::{Cuda, Share, range};
use crate::device::{Lane, LaneKind, Mark};
use crate::engine::{
    Cancel, CpuLanes, LANES, LaneStreams, Pending, Span, TaskGraph, TaskId, Timeline, caught, issue, lane_name,
};
use crate::error::{Error, Result, config_err};
use crate::schedule::{Cost, Exchange, LayerCosts, LayerOp, Slice, Work};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One rank of a world: its groups, its lanes, and how rows travel to their experts.
pub struct Parallel {
    groups: Groups,
    all_to_all: Box<dyn AllToAll>,
    /// In the order of [`LANES`].
    lanes: [Lane; 3],
    /// Where operations run before their call returns: a thread per lane.
    threads: Option<CpuLanes>,
    cancel: Cancel,
    /// Sums of gradients under way.
    pending: Mutex<Vec<Reducing>>,
    trace: Arc<Mutex<Option<Trace>>>,
    /// The dense part of the model that Compute is at.
    dense: Mutex<Option<DensePart>>,
    emulation: Mutex<Option<Arc<Emulation>>>,
}

struct DensePart {
    op: LayerOp,
    start: Mark,
    began: Began,
}

/// Work on this thread that is timed: without what other ranks keep it waiting for.
#[derive(Clone, Copy)]
struct Began {
    at: Instant,
    waited: Duration,
}

impl Began {
    fn now() -> Self {
        Began { at: Instant::now(), waited: waited() }
    }

    fn worked(&self) -> Duration {
        self.at.elapsed().saturating_sub(waited().saturating_sub(self.waited))
    }
}

/// A machine that is not there.
struct Emulation {
    /// What its tasks take, in seconds.
    cost: Box<dyn Fn(&LayerOp) -> f64 + Send + Sync>,
    tasks: AtomicUsize,
    overran: AtomicUsize,
}

impl Emulation {
    fn due(&self, op: &LayerOp) -> Duration {
        Duration::try_from_secs_f64((self.cost)(op)).unwrap_or_default()
    }

    /// Counts a task that has been done: it overran if its own work took longer than its cost.
    fn count(&self, op: &LayerOp, began: Began) {
        self.tasks.fetch_add(1, Ordering::Relaxed);
        self.overran.fetch_add(usize::from(began.worked() > self.due(op)), Ordering::Relaxed);
    }

    /// Counts a task that has been done, and waits until it would have ended.
    fn wait(&self, op: &LayerOp, began: Began, cancel: &Cancel) -> Result<()> {
        self.count(op, began);
        cancel.sleep_until(began.at + self.due(op))
    }
}

/// A sum of gradients under way.
enum Reducing {
    Thread(Pending),
    /// On a stream, up to this point.
    Stream(Mark),
}

/// What has run on this rank's lanes since a point in time.
struct Trace {
    begin: Mark,
    spans: Vec<(String, LaneKind, Mark, Mark)>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is changed in single steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(trace: &Mutex<Option<Trace>>, spans: impl Iterator<Item = (String, LaneKind, Mark, Mark)>) {
    if let Some(trace) = &mut *locked(trace) {
        trace.spans.extend(spans);
    }
}

impl Parallel {
    /// Splits `world` into `topology`'s groups and starts this rank's lanes, of which `lane` is [`LaneKind::Compute`]. A
    /// collective.
    ///
    /// # Errors
    /// If the world is of another size, a rank never comes, or the system has no threads or streams left.
    pub fn new(
        lane: &Lane,
        world: Arc<dyn Communicator>,
        topology: Topology,
        all_to_all: Box<dyn AllToAll>,
    ) -> Result<Arc<Self>> {
        if lane.kind() != LaneKind::Compute {
            config_err!("a rank whose compute lane is {}: it is {}", lane_name(lane.kind()), lane_name(LANES[0]));
        }
        let groups = Groups::new(world, topology)?;
        // Who has a GPU to himself need not leave any of it to other ranks.
        let shared = lane.as_cuda().and_then(|cuda| cuda.share().multiprocessors);
        let share = Share { multiprocessors: shared.map(|_| Cuda::COMM_BLOCKS), urgent: true };
        let [_, intra, inter] = LANES;
        let lanes = [lane.clone(), lane.beside(intra, share)?, lane.beside(inter, share)?];
        let threads = match lane.as_cuda() {
            Some(_) => None,
            None => Some(CpuLanes::new(&format!("rank {}", groups.rank()))?),
        };
        let (cancel, pending, trace) = (Cancel::new(), Mutex::default(), Arc::default());
        let (dense, emulation) = (Mutex::default(), Mutex::default());
        Ok(Arc::new(Parallel { groups, all_to_all, lanes, threads, cancel, pending, trace, dense, emulation }))
    }

    /// This rank's groups.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The all-to-all.
    pub fn all_to_all(&self) -> &dyn AllToAll {
        &*self.all_to_all
    }

    /// The lane of this kind.
    pub fn lane(&self, kind: LaneKind) -> &Lane {
        &self.lanes[kind as usize]
    }

    /// Whether lanes are streams, whose work may run after it has been issued.
    pub(super) fn issues(&self) -> bool {
        self.threads.is_none()
    }

    /// Calls `f` with the lane of this kind, between what Compute has been given before and what it is given next.
    ///
    /// # Errors
    /// That of `f`, or if the device fails.
    pub fn beside<T>(&self, kind: LaneKind, f: impl FnOnce(&Lane) -> Result<T>) -> Result<T> {
        let (compute, lane) = (self.lane(LaneKind::Compute), self.lane(kind));
        if kind == LaneKind::Compute || !self.issues() {
            return f(lane);
        }
        lane.wait(&compute.record(false)?)?;
        let result = f(lane);
        compute.wait(&lane.record(false)?)?;
        result
    }

    /// Sums a slice of gradients at the end of a lane's queue; returns at once.
    ///
    /// # Errors
    /// If the device fails, or a rank does.
    pub(crate) fn submit(&self, kind: LaneKind, gradients: Arc<GradientBuffers>, slice: Slice) -> Result<()> {
        let (lane, world) = (self.lane(kind).clone(), self.groups.world().clone());
        let reduce = move || caught(|| gradients.reduce(&lane, slice)).inspect_err(|e| world.abort(&e.to_string()));
        let reducing = match &self.threads {
            Some(threads) => {
                let (trace, cancel) = (self.trace.clone(), self.cancel.clone());
                let emulation = locked(&self.emulation).clone();
                Reducing::Thread(threads.submit(kind, move || {
                    let (op, began) = (LayerOp::Reduce(slice), Began::now());
                    reduce()?;
                    emulation.map_or(Ok(()), |e| e.wait(&op, began, &cancel))?;
                    let span = (op.to_string(), kind, Mark::at(began.at), Mark::at(Instant::now()));
                    note(&trace, std::iter::once(span));
                    Ok(())
                }))
            }
            None => {
                let lane = self.lane(kind);
                lane.wait(&self.lane(LaneKind::Compute).record(false)?)?;
                self.span(&LayerOp::Reduce(slice).to_string(), kind, reduce)?;
                Reducing::Stream(lane.record(false)?)
            }
        };
        locked(&self.pending).push(reducing);
        Ok(())
    }

    /// Waits for the sums of gradients that are under way: Compute does, where they are on streams.
    ///
    /// # Errors
    /// The first that one of them had.
    pub fn settle(&self) -> Result<()> {
        let pending = std::mem::take(&mut *locked(&self.pending));
        let wait = |reducing| match reducing {
            Reducing::Thread(pending) => Pending::wait(pending),
            Reducing::Stream(mark) => self.lane(LaneKind::Compute).wait(&mark),
        };
        pending.into_iter().map(wait).fold(Ok(()), Result::and)
    }

    /// Runs a graph on this rank's lanes; on streams, puts it there. A task that fails or panics ends every rank's work:
    /// the others wait for it. Returns when which task ran, if it has.
    ///
    /// # Errors
    /// As [`CpuLanes::run`].
    pub(super) fn run(
        &self,
        graph: &TaskGraph<LayerOp>,
        task: impl Fn(TaskId, &LayerOp) -> Result<()> + Sync,
    ) -> Result<Option<Timeline>> {
        // Kept before the others hear of it: what they then make fail here is not why.
        let first: Mutex<Option<Error>> = Mutex::default();
        let one = |id, op: &LayerOp| {
            caught(|| task(id, op)).map_err(|e| {
                let error = Error::Task { task: format!("{op} ({})", lane_name(graph.lane(id))), source: Box::new(e) };
                let message = error.to_string();
                locked(&first).get_or_insert(error);
                self.groups.world().abort(&message);
                Error::Cancelled(message)
            })
        };
        let ended = match &self.threads {
            Some(threads) => {
                let begin = Instant::now();
                let ended = match locked(&self.emulation).clone() {
                    None => threads.run(graph, &self.cancel, one),
                    Some(e) => {
                        let counted = |id, op: &LayerOp| {
                            let began = Began::now();
                            one(id, op).inspect(|()| e.count(op, began))
                        };
                        threads.emulate(graph, &self.cancel, &e.cost, counted)
                    }
                };
                ended.map(|timeline| {
                    let at = |seconds| Mark::at(begin + Duration::from_secs_f64(seconds));
                    let spans = timeline.spans.iter();
                    note(&self.trace, spans.map(|s| (s.name.clone(), s.lane, at(s.start), at(s.end))));
                    Some(timeline)
                })
            }
            None => {
                let timed = locked(&self.trace).is_some();
                let named = |id, op: &LayerOp| {
                    let _range = range(op);
                    one(id, op)
                };
                issue(&mut LaneStreams(&self.lanes), graph, timed, named).map(|issued| {
                    let tasks = graph.ids().map(|id| (graph.op(id).to_string(), graph.lane(id)));
                    let events = tasks.zip(issued.events());
                    note(
                        &self.trace,
                        events.map(|((name, lane), (start, end))| (name, lane, start.clone(), end.clone())),
                    );
                    None
                })
            }
        };
        ended.map_err(|e| locked(&first).take().unwrap_or(e))
    }

    /// Calls `f`, which gives a lane some work, and if a [trace](Parallel::trace) is taken, notes when that ran.
    ///
    /// # Errors
    /// That of `f`, or if the device fails.
    pub fn span<T>(&self, name: &str, kind: LaneKind, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if locked(&self.trace).is_none() {
            return f();
        }
        let start = self.lane(kind).record(true)?;
        let result = f()?;
        let end = self.lane(kind).record(true)?;
        note(&self.trace, std::iter::once((name.to_owned(), kind, start, end)));
        Ok(result)
    }

    /// Compute goes over from one of the model's dense parts, if it is at one, to `next`; none where what follows is a layer's
    /// pass, or nothing. It matters to [traces](Parallel::trace) and to emulation.
    ///
    /// # Errors
    /// If the device fails, or a rank does.
    pub fn dense(&self, next: Option<LayerOp>) -> Result<()> {
        let (emulation, traced) = (locked(&self.emulation).clone(), locked(&self.trace).is_some());
        let mark = || self.lane(LaneKind::Compute).record(true);
        if let Some(DensePart { op, start, began }) = locked(&self.dense).take() {
            emulation.as_ref().map_or(Ok(()), |e| e.wait(&op, began, &self.cancel))?;
            if traced {
                note(&self.trace, std::iter::once((op.to_string(), LaneKind::Compute, start, mark()?)));
            }
        }
        if let (Some(op), true) = (next, traced || emulation.is_some()) {
            *locked(&self.dense) = Some(DensePart { op, start: mark()?, began: Began::now() });
        }
        Ok(())
    }

    /// From now on every task, dense parts included, does its work and then waits until its start plus its `cost` in
    /// seconds: on a machine that is not there. Counts anew.
    ///
    /// # Errors
    /// Where lanes are streams.
    pub fn emulate(&self, cost: impl Fn(&LayerOp) -> f64 + Send + Sync + 'static) -> Result<()> {
        if self.issues() {
            config_err!("emulation on a GPU: ranks emulate on the CPU");
        }
        let (tasks, overran) = (AtomicUsize::new(0), AtomicUsize::new(0));
        *locked(&self.emulation) = Some(Arc::new(Emulation { cost: Box::new(cost), tasks, overran }));
        Ok(())
    }

    /// Of how many tasks that have been emulated how many overran: their work alone, without what they waited for other
    /// ranks, took longer than their cost.
    pub fn overruns(&self) -> (usize, usize) {
        let count = |e: &Arc<Emulation>| (e.tasks.load(Ordering::Relaxed), e.overran.load(Ordering::Relaxed));
        locked(&self.emulation).as_ref().map_or((0, 0), count)
    }

    /// Begins to note what runs on this rank's lanes.
    ///
    /// # Errors
    /// If the device fails.
    pub fn trace(&self) -> Result<()> {
        let begin = self.lane(LaneKind::Compute).record(true)?;
        *locked(&self.trace) = Some(Trace { begin, spans: Vec::new() });
        Ok(())
    }

    /// What has run on this rank's lanes since [`Parallel::trace`], in the order of its issue; waits for it.
    ///
    /// # Errors
    /// If no trace was begun, or the device fails.
    pub fn traced(&self) -> Result<Timeline> {
        let Some(Trace { begin, spans }) = locked(&self.trace).take() else {
            config_err!("the end of a trace that was not begun");
        };
        let span = |(name, lane, start, end): (String, LaneKind, Mark, Mark)| {
            Ok(Span { name, lane, start: begin.seconds_to(&start)?, end: begin.seconds_to(&end)? })
        };
        Ok(Timeline { spans: spans.into_iter().map(span).collect::<Result<_>>()? })
    }

    /// Which stages a layer has here and on which lanes: what a graph is made of. Without prices, as costs of nothing.
    pub(super) fn stages(&self, pieces: usize) -> LayerCosts {
        let work = Work { cost: Cost { alpha: 0.0, beta: 0.0, r2: None }, n: 0.0, times: 0.0 };
        let topology = self.groups.topology();
        let phases = match topology.size(GroupKind::Expert) {
            1 => Vec::new(),
            _ => self.all_to_all.phases(self.groups.expert()),
        };
        let phases: Vec<Exchange> = phases.into_iter().map(|lane| Exchange { lane, work }).collect();
        let lane = topology.lane(GroupKind::Shard);
        let shard = (topology.size(GroupKind::Shard) > 1).then_some(Exchange { lane, work });
        LayerCosts {
            dispatch: phases.clone(),
            all_gather: shard,
            expert: work,
            reduce_scatter: shard,
            combine: phases,
            max_chunks: pieces,
        }
    }
}
