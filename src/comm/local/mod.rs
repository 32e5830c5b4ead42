//! Ranks as threads of one process: on the CPU, or sharing a GPU as a virtual cluster.
//!
//! A collective is two meetings of the group's threads: at the first each shows the others what it sends, then takes what
//! is its own, and at the second all have taken it. Threads wait on condition variables, outside of rayon's pool.
//!
//! On a GPU threads meet when they issue, and bring events: a rank's lane waits for those of the others before it reads
//! their memory, and before it goes on for their having read its own. Inside a node data moves by a kernel of as many
//! blocks as the lane's [share](crate::device::cuda::Share) has multiprocessors, as NCCL's over NVLink; between nodes,
//! through pinned host memory by the copy engines.

mod meeting;
mod staging;

use super::{Communicator, blocks, check, describe};
use crate::device::Lane;
use crate::device::cuda::Share;
use crate::error::{Error, Result, config_err};
use crate::tensor::Tensor;
pub(crate) use meeting::waited;
use meeting::{Brought, Call, Failure, Group, World};
use staging::Staging;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// One rank's end of a group of threads. When a rank has left the group, what others have pending there ends with an
/// error.
struct Local {
    group: Arc<Group>,
    rank: usize,
    /// Of a collective's first and of its second phase: the first's may still be read when the second begins.
    staging: [Staging; 2],
}

/// How the ranks of a process live together.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// P.
    pub ranks: usize,
    /// Nodes; node n has ranks n·P/nodes and following. It matters to ranks that share a GPU alone.
    pub nodes: usize,
    /// A collective that a rank does not come to for so long ends with an error.
    pub timeout: Duration,
    /// How long a rank that waits for others keeps looking before it sleeps: worth it where every rank has a core of its
    /// own.
    pub spin: Duration,
}

impl Cluster {
    /// Of `ranks` ranks on one node, which sleep when they wait.
    pub fn new(ranks: usize, timeout: Duration) -> Self {
        Cluster { ranks, nodes: 1, timeout, spin: Duration::ZERO }
    }

    /// [`Cluster::new`] for ranks of `lane`'s device: where it is a GPU, ranks keep looking for each other, because a
    /// thread that sleeps takes longer to wake than what it waits for takes.
    pub fn on(lane: &Lane, ranks: usize, timeout: Duration) -> Self {
        let spin = if lane.as_cuda().is_some() { Duration::from_millis(1) } else { Duration::ZERO };
        Cluster { spin, ..Cluster::new(ranks, timeout) }
    }

    fn world(&self, leave_on_drop: bool) -> Result<Arc<World>> {
        let Cluster { ranks, nodes, timeout, spin } = *self;
        if ranks == 0 {
            config_err!("a world of 0 ranks: it has at least 1");
        }
        if nodes == 0 || !ranks.is_multiple_of(nodes) {
            config_err!("{ranks} ranks on {nodes} nodes: nodes have as many ranks each");
        }
        Ok(World::new(timeout, leave_on_drop, ranks / nodes, spin))
    }
}

/// What each of `ranks` ranks that share `lane`'s GPU takes of it for what it computes: an equal part of the
/// multiprocessors, so that all compute at once, with some left to collectives. All of it where `lane` is no GPU's.
pub fn share(lane: &Lane, ranks: usize) -> Share {
    let part = |all: u32| (all.saturating_sub(FOR_COMM) / ranks.max(1) as u32).max(2) / 2 * 2;
    let all = lane.as_cuda().filter(|_| ranks > 1).map(|cuda| cuda.multiprocessors());
    Share { multiprocessors: all.map(part), urgent: false }
}

/// The multiprocessors that are left to collectives.
const FOR_COMM: u32 = 20;

/// The communicators of a new world of `ranks` ranks, one for each, in order. A collective that a rank does not come to
/// within `timeout` ends with an error; so does one whose group a rank has left by dropping its communicator.
///
/// # Errors
/// If `ranks` is 0.
pub fn world(ranks: usize, timeout: Duration) -> Result<Vec<Arc<dyn Communicator>>> {
    let world = Cluster::new(ranks, timeout).world(true)?;
    let group = Group::new("world".to_owned(), (0..ranks).collect(), &world);
    Ok((0..ranks).map(|rank| Arc::new(Local::new(group.clone(), rank)) as Arc<dyn Communicator>).collect())
}

/// [`run_on`] a [`Cluster::new`].
///
/// # Errors
/// As [`run_on`].
pub fn run<T: Send>(
    ranks: usize,
    timeout: Duration,
    f: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    run_on(&Cluster::new(ranks, timeout), f)
}

/// Runs `f` once per rank, each in a thread of its own, and returns what they returned, in order. When one fails or
/// panics, what the others have pending ends with an error that names it.
///
/// # Errors
/// If there are no ranks, or nodes do not divide them; the error of the rank that failed first, a panic included.
pub fn run_on<T: Send>(cluster: &Cluster, f: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync) -> Result<Vec<T>> {
    let (ranks, world) = (cluster.ranks, cluster.world(false)?);
    let group = Group::new("world".to_owned(), (0..ranks).collect(), &world);
    let results: Vec<Result<T>> = std::thread::scope(|scope| {
        let start = |rank: usize| {
            let (comm, world, f) = (Arc::new(Local::new(group.clone(), rank)), world.clone(), &f);
            let body = move || {
                let result = catch_unwind(AssertUnwindSafe(|| f(comm)))
                    .unwrap_or_else(|panic| Err(Error::Comm(format!("rank {rank} panicked: {}", said(&*panic)))));
                match &result {
                    Ok(_) => world.leave(rank),
                    Err(e) => world.fail(Failure { rank: Some(rank), reason: format!("rank {rank} failed: {e}") }),
                }
                result
            };
            std::thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, body)
        };
        let threads: Vec<_> = (0..ranks).map(start).collect();
        let join = |(rank, thread): (usize, std::io::Result<std::thread::ScopedJoinHandle<'_, Result<T>>>)| match thread
        {
            Ok(thread) => thread.join().unwrap_or_else(|panic| Err(Error::Comm(said(&*panic)))),
            Err(e) => {
                let reason = format!("no thread for rank {rank}: {e}");
                world.fail(Failure { rank: Some(rank), reason: reason.clone() });
                Err(Error::Comm(reason))
            }
        };
        // The threads that could not be started first: the others wait for them.
        let (mut started, failed): (Vec<_>, Vec<_>) = threads.into_iter().enumerate().partition(|(_, t)| t.is_ok());
        started.splice(0..0, failed);
        let mut results: Vec<(usize, Result<T>)> = started.into_iter().map(|(r, t)| (r, join((r, t)))).collect();
        results.sort_by_key(|(rank, _)| *rank);
        results.into_iter().map(|(_, result)| result).collect()
    });
    let first = world.failure().and_then(|failure| failure.rank);
    let mut all = Vec::with_capacity(ranks);
    let mut error = None;
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(value) => all.push(value),
            Err(e) if error.is_none() || first == Some(rank) => error = Some(e),
            Err(_) => {}
        }
    }
    error.map_or(Ok(all), Err)
}

/// What a panic said.
pub(super) fn said(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}

impl Local {
    fn new(group: Arc<Group>, rank: usize) -> Self {
        Local { group, rank, staging: Default::default() }
    }

    fn meet(&self, brought: Brought) -> Result<Arc<Vec<Brought>>> {
        self.group.meet(self.rank, brought)
    }

    /// Shows `brought` to the others, and waits for what they bring. Of what is sent, `which` says what ranks of other
    /// nodes ask for.
    fn show(
        &self,
        lane: &Lane,
        brought: Brought,
        phase: usize,
        which: impl Fn(usize) -> bool,
    ) -> Result<Arc<Vec<Brought>>> {
        let all = self.meet(self.checked(self.ready(lane, brought, phase, which))?)?;
        // What this rank has put on its own lane is before what follows anyhow.
        let others = all.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        self.checked(others.filter_map(|(_, b)| b.mark.as_ref()).try_for_each(|mark| lane.wait(mark)))?;
        Ok(all)
    }

    /// On a GPU: with an event behind it, and with what other nodes ask for on its way to the host.
    fn ready(&self, lane: &Lane, mut brought: Brought, phase: usize, which: impl Fn(usize) -> bool) -> Result<Brought> {
        if let Some(cuda) = lane.as_cuda() {
            if (0..brought.sends.len()).any(&which) {
                brought.staged = Some(self.staging[phase].stage(lane, cuda, &brought.sends, which)?);
            }
            brought.mark = Some(lane.record(false)?);
        }
        Ok(brought)
    }

    /// Whether member `i` of the group is on another node, and this is a GPU's.
    fn remote(&self, lane: &Lane, i: usize) -> bool {
        let node = |i: usize| self.group.ranks[i] / self.group.world.per_node;
        lane.as_cuda().is_some() && node(i) != node(self.rank)
    }

    /// Whether any member is.
    fn any_remote(&self, lane: &Lane) -> bool {
        (0..self.size()).any(|i| self.remote(lane, i))
    }

    /// For every (from, i, to): `to` = what member `from` sends as number i.
    fn take(&self, lane: &Lane, all: &[Brought], wanted: &[(usize, usize, Tensor)]) -> Result<()> {
        let mut near = Vec::with_capacity(wanted.len());
        for (from, i, to) in wanted {
            match (lane.as_cuda(), &all[*from].staged) {
                (Some(cuda), Some(staged)) if self.remote(lane, *from) => staged.fetch(cuda, *i, to)?,
                _ => near.push((all[*from].sends[*i].clone(), to.clone())),
            }
        }
        lane.copy_many(&near)
    }

    /// Number `i` of what every member sends, where this rank can read it.
    fn parts(&self, lane: &Lane, all: &[Brought], i: usize) -> Result<Vec<Tensor>> {
        let part = |(from, brought): (usize, &Brought)| {
            let part = &brought.sends[i];
            if !self.remote(lane, from) {
                return Ok(part.clone());
            }
            let here = lane.empty_like(part)?;
            self.take(lane, all, &[(from, i, here.clone())])?;
            Ok(here)
        };
        all.iter().enumerate().map(part).collect()
    }

    /// A collective: shows `brought` to the others, takes what is this rank's own, and waits until all have.
    fn collective(
        &self,
        lane: &Lane,
        brought: Brought,
        phase: usize,
        which: impl Fn(usize) -> bool,
        take: impl FnOnce(&[Brought]) -> Result<()>,
    ) -> Result<()> {
        let done = Brought::new(Call::new(brought.call.op));
        let all = self.show(lane, brought, phase, which)?;
        self.checked(take(&all))?;
        self.show(lane, done, phase, |_| false).map(|_| ())
    }

    /// A failure of this rank is everyone's: they would wait for it.
    fn checked<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result {
            let rank = self.group.ranks[self.rank];
            self.group.world.fail(Failure { rank: Some(rank), reason: format!("rank {rank} failed: {e}") });
        }
        result
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if self.group.world.leave_on_drop {
            self.group.leave(self.rank);
        }
    }
}

impl Communicator for Local {
    fn label(&self) -> &str {
        &self.group.label
    }

    fn ranks(&self) -> &[usize] {
        &self.group.ranks
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn all_to_all_ragged(&self, lane: &Lane, sends: &[Tensor], recvs: &[Tensor]) -> Result<()> {
        self.checked(check::per_rank("all-to-all", self, sends, recvs))?;
        let call = Call { dtype: Some(sends[0].dtype()), ..Call::new("all-to-all") };
        let expects = recvs.iter().map(Tensor::elements).collect();
        let brought = Brought { sends: sends.to_vec(), expects, ..Brought::new(call) };
        self.collective(
            lane,
            brought,
            0,
            |to| self.remote(lane, to),
            |all| {
                let wanted: Vec<_> = recvs.iter().enumerate().map(|(from, t)| (from, self.rank, t.clone())).collect();
                self.take(lane, all, &wanted)
            },
        )
    }

    fn all_gather(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        self.checked(check::blocks_of("all-gather", self, recv, send))?;
        let brought = Brought { sends: vec![send.clone()], ..Brought::new(Call::of("all-gather", send)) };
        self.collective(
            lane,
            brought,
            0,
            |_| self.any_remote(lane),
            |all| {
                let blocks = blocks(recv, self.size())?;
                let wanted: Vec<_> = blocks.into_iter().enumerate().map(|(from, to)| (from, 0, to)).collect();
                self.take(lane, all, &wanted)
            },
        )
    }

    fn reduce_scatter(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        let op = "reduce-scatter";
        self.checked(check::blocks_of(op, self, send, recv).and_then(|()| check::floats(op, self, send)))?;
        let brought = Brought { sends: blocks(send, self.size())?, ..Brought::new(Call::of(op, recv)) };
        self.collective(
            lane,
            brought,
            0,
            |to| self.remote(lane, to),
            |all| lane.sum_parts(&self.parts(lane, all, self.rank)?, recv),
        )
    }

    fn all_reduce(&self, lane: &Lane, data: &Tensor) -> Result<()> {
        let op = "all-reduce";
        self.checked(check::contiguous(op, self, data).and_then(|()| check::floats(op, self, data)))?;
        if self.size() == 1 {
            return Ok(());
        }
        // Every rank sums a slice, in place: that slice of its own data is read by no other rank.
        let flat = data.reshape([data.elements()])?;
        let bound = |i: usize| data.elements() * i / self.size();
        let slices: Vec<Tensor> =
            (0..self.size()).map(|i| flat.narrow(0, bound(i), bound(i + 1) - bound(i))).collect::<Result<_>>()?;
        let own = &slices[self.rank];
        let brought = Brought { sends: slices.clone(), ..Brought::new(Call::of(op, data)) };
        let all = self.show(lane, brought, 0, |to| self.remote(lane, to))?;
        self.checked(self.parts(lane, &all, self.rank).and_then(|parts| lane.sum_parts(&parts, own)))?;
        let brought = Brought { sends: vec![own.clone()], ..Brought::new(Call::new(op)) };
        self.collective(
            lane,
            brought,
            1,
            |_| self.any_remote(lane),
            |all| {
                let others = (0..self.size()).filter(|&from| from != self.rank);
                let wanted: Vec<_> = others.map(|from| (from, 0, slices[from].clone())).collect();
                self.take(lane, all, &wanted)
            },
        )
    }

    fn broadcast(&self, lane: &Lane, data: &Tensor, root: usize) -> Result<()> {
        let op = "broadcast";
        self.checked(check::contiguous(op, self, data).and_then(|()| check::root(op, self, root)))?;
        let call = Call { root: Some(root), ..Call::of(op, data) };
        let brought = Brought { sends: vec![data.reshape([data.elements()])?], ..Brought::new(call) };
        self.collective(
            lane,
            brought,
            0,
            |_| root == self.rank && self.any_remote(lane),
            |all| match root == self.rank {
                true => Ok(()),
                false => self.take(lane, all, &[(root, 0, data.clone())]),
            },
        )
    }

    fn barrier(&self, lane: &Lane) -> Result<()> {
        self.checked(lane.synchronize())?;
        self.meet(Brought::new(Call::new("barrier"))).map(|_| ())
    }

    fn split(&self, label: &str, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let call = Call::new("split");
        let all = self.meet(Brought { split: Some((color, key)), ..Brought::new(call.clone()) })?;
        let mut members: Vec<(usize, usize)> = Vec::new();
        for (rank, brought) in all.iter().enumerate() {
            match brought.split {
                Some((c, key)) if c == color => members.push((key, rank)),
                _ => {}
            }
        }
        members.sort_unstable();
        // The first member makes the group for all.
        let first = members[0].1;
        let group = (first == self.rank).then(|| {
            let ranks = members.iter().map(|&(_, rank)| self.group.ranks[rank]).collect();
            Group::new(label.to_owned(), ranks, &self.group.world)
        });
        let all = self.meet(Brought { group, ..Brought::new(call) })?;
        match (&all[first].group, members.iter().position(|&(_, rank)| rank == self.rank)) {
            (Some(group), Some(rank)) => Ok(Arc::new(Local::new(group.clone(), rank))),
            _ => Err(Error::Comm(format!("split {}: no group of color {color} came of it", describe(self)))),
        }
    }

    fn abort(&self, reason: &str) {
        let rank = self.group.ranks[self.rank];
        self.group.world.fail(Failure { rank: Some(rank), reason: format!("rank {rank} aborted: {reason}") });
    }
}

#[cfg(test)]
mod tests;
