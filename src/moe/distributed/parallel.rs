//! What the layers of one rank share: its groups, its lanes, and the all-to-all.

use super::GradientBuffers;
use crate::comm::{AllToAll, Communicator, GroupKind, Groups, Topology};
use crate::device::{Lane, LaneKind, cpu};
use crate::engine::{Cancel, CpuLanes, LANES, Pending, TaskGraph, TaskId, Timeline, caught, lane_name};
use crate::error::{Error, Result};
use crate::schedule::{Cost, Exchange, GradGroup, LayerCosts, LayerOp, Slice, Work};
use std::sync::{Arc, Mutex, PoisonError};

/// One rank of a world on the CPU: its groups, a thread per lane, and how rows travel to their experts.
pub struct Parallel {
    groups: Groups,
    all_to_all: Box<dyn AllToAll>,
    /// In the order of [`LANES`].
    lanes: [Lane; 3],
    threads: CpuLanes,
    cancel: Cancel,
    /// Sums of gradients under way.
    pending: Mutex<Vec<Pending>>,
}

impl Parallel {
    /// Splits `world` into `topology`'s groups and starts this rank's lanes. A collective.
    ///
    /// # Errors
    /// If the world is of another size, a rank never comes, or the system has no threads left.
    pub fn new(world: Arc<dyn Communicator>, topology: Topology, all_to_all: Box<dyn AllToAll>) -> Result<Arc<Self>> {
        let groups = Groups::new(world, topology)?;
        let threads = CpuLanes::new(&format!("rank {}", groups.rank()))?;
        let lanes = LANES.map(|kind| Lane::new(Arc::new(cpu::Cpu), kind));
        Ok(Arc::new(Parallel { groups, all_to_all, lanes, threads, cancel: Cancel::new(), pending: Mutex::default() }))
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

    /// The kind of group that reduces these gradients.
    pub fn reduces(group: GradGroup) -> GroupKind {
        match group {
            GradGroup::Dense => GroupKind::Data,
            GradGroup::Expert => GroupKind::Replica,
            GradGroup::Replicated => GroupKind::World,
        }
    }

    /// Sums a slice of gradients at the end of a lane's queue; returns at once.
    pub(super) fn submit(&self, kind: LaneKind, gradients: Arc<GradientBuffers>, slice: Slice) {
        let (lane, world) = (self.lane(kind).clone(), self.groups.world().clone());
        let job = self.threads.submit(kind, move || {
            caught(|| gradients.reduce(&lane, slice)).inspect_err(|e| world.abort(&e.to_string()))
        });
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).push(job);
    }

    /// Waits for the sums of gradients that are under way.
    ///
    /// # Errors
    /// The first that one of them had.
    pub fn settle(&self) -> Result<()> {
        let pending = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        pending.into_iter().map(Pending::wait).fold(Ok(()), Result::and)
    }

    /// Runs a graph on this rank's lanes. A task that fails or panics ends every rank's work: the others wait for it.
    ///
    /// # Errors
    /// As [`CpuLanes::run`].
    pub(super) fn run(
        &self,
        graph: &TaskGraph<LayerOp>,
        task: impl Fn(TaskId, &LayerOp) -> Result<()> + Sync,
    ) -> Result<Timeline> {
        // Kept before the others hear of it: what they then make fail here is not why.
        let first: Mutex<Option<Error>> = Mutex::default();
        let ended = self.threads.run(graph, &self.cancel, |id, op| {
            caught(|| task(id, op)).map_err(|e| {
                let error = Error::Task { task: format!("{op} ({})", lane_name(graph.lane(id))), source: Box::new(e) };
                let message = error.to_string();
                first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                self.groups.world().abort(&message);
                Error::Cancelled(message)
            })
        });
        ended.map_err(|e| first.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or(e))
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
