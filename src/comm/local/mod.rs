//! Ranks as threads of one process, on the CPU.
//!
//! A collective is two meetings of the group's threads: at the first each shows the others what it sends, then takes what
//! is its own, and at the second all have taken it. Threads wait on condition variables, outside of rayon's pool.

mod meeting;

use super::{Communicator, blocks, check, describe, sum_in_order};
use crate::device::Lane;
use crate::error::{Error, Result, config_err};
use crate::tensor::Tensor;
use meeting::{Brought, Call, Failure, Group, World};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// One rank's end of a group of threads. When a rank has left the group, what others have pending there ends with an
/// error.
struct Local {
    group: Arc<Group>,
    rank: usize,
}

/// The communicators of a new world of `ranks` ranks, one for each, in order. A collective that a rank does not come to
/// within `timeout` ends with an error; so does one whose group a rank has left by dropping its communicator.
///
/// # Errors
/// If `ranks` is 0.
pub fn world(ranks: usize, timeout: Duration) -> Result<Vec<Arc<dyn Communicator>>> {
    if ranks == 0 {
        config_err!("a world of 0 ranks: it has at least 1");
    }
    let group = Group::new("world".to_owned(), (0..ranks).collect(), &World::new(timeout, true));
    Ok((0..ranks).map(|rank| Arc::new(Local { group: group.clone(), rank }) as Arc<dyn Communicator>).collect())
}

/// Runs `f` once per rank, each in a thread of its own, and returns what they returned, in order. When one fails or
/// panics, what the others have pending ends with an error that names it.
///
/// # Errors
/// As [`world`]; the error of the rank that failed first, a panic included.
pub fn run<T: Send>(
    ranks: usize,
    timeout: Duration,
    f: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if ranks == 0 {
        config_err!("a world of 0 ranks: it has at least 1");
    }
    let world = World::new(timeout, false);
    let group = Group::new("world".to_owned(), (0..ranks).collect(), &world);
    let results: Vec<Result<T>> = std::thread::scope(|scope| {
        let start = |rank: usize| {
            let (comm, world, f) = (Arc::new(Local { group: group.clone(), rank }), world.clone(), &f);
            let body = move || {
                let result = catch_unwind(AssertUnwindSafe(|| f(comm)))
                    .unwrap_or_else(|panic| Err(Error::Comm(format!("rank {rank} panicked: {}", text(&*panic)))));
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
            Ok(thread) => thread.join().unwrap_or_else(|panic| Err(Error::Comm(text(&*panic)))),
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
fn text(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}

impl Local {
    fn meet(&self, brought: Brought) -> Result<Arc<Vec<Brought>>> {
        self.group.meet(self.rank, brought)
    }

    /// A collective: shows `brought` to the others, takes what is this rank's own, and waits until all have.
    fn collective(&self, brought: Brought, take: impl FnOnce(&[Brought]) -> Result<()>) -> Result<()> {
        let done = Brought::new(Call::new(brought.call.op));
        let all = self.meet(brought)?;
        self.checked(take(&all))?;
        self.meet(done).map(|_| ())
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
        self.collective(brought, |all| {
            all.iter().zip(recvs).try_for_each(|(from, recv)| copy(lane, &from.sends[self.rank], recv))
        })
    }

    fn all_gather(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        self.checked(check::blocks_of("all-gather", self, recv, send))?;
        let brought = Brought { sends: vec![send.clone()], ..Brought::new(Call::of("all-gather", send)) };
        self.collective(brought, |all| {
            let recvs = blocks(recv, self.size())?;
            all.iter().zip(recvs).try_for_each(|(from, recv)| copy(lane, &from.sends[0], &recv))
        })
    }

    fn reduce_scatter(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        let op = "reduce-scatter";
        self.checked(check::blocks_of(op, self, send, recv).and_then(|()| check::floats(op, self, send)))?;
        let brought = Brought { sends: blocks(send, self.size())?, ..Brought::new(Call::of(op, recv)) };
        self.collective(brought, |all| {
            let parts: Vec<Tensor> = all.iter().map(|from| from.sends[self.rank].clone()).collect();
            sum_in_order(lane, &parts, recv)
        })
    }

    fn all_reduce(&self, lane: &Lane, data: &Tensor) -> Result<()> {
        let op = "all-reduce";
        self.checked(check::contiguous(op, self, data).and_then(|()| check::floats(op, self, data)))?;
        if self.size() == 1 {
            return Ok(());
        }
        let brought = Brought { sends: vec![data.reshape([data.elements()])?], ..Brought::new(Call::of(op, data)) };
        let done = Brought::new(Call::new(op));
        let all = self.meet(brought)?;
        // Every rank sums a slice, in place: that slice of its own data is read by no other rank.
        let slice = |of: usize, t: &Tensor| {
            let bound = |i: usize| data.elements() * i / self.size();
            t.narrow(0, bound(of), bound(of + 1) - bound(of))
        };
        let sum = || {
            let parts = all.iter().map(|from| slice(self.rank, &from.sends[0])).collect::<Result<Vec<_>>>()?;
            sum_in_order(lane, &parts, &parts[self.rank])
        };
        self.checked(sum())?;
        self.meet(done.clone())?;
        let take = |of: usize| copy(lane, &slice(of, &all[of].sends[0])?, &slice(of, &all[self.rank].sends[0])?);
        self.checked((0..self.size()).filter(|&of| of != self.rank).try_for_each(take))?;
        self.meet(done).map(|_| ())
    }

    fn broadcast(&self, lane: &Lane, data: &Tensor, root: usize) -> Result<()> {
        let op = "broadcast";
        self.checked(check::contiguous(op, self, data).and_then(|()| check::root(op, self, root)))?;
        let call = Call { root: Some(root), ..Call::of(op, data) };
        let brought = Brought { sends: vec![data.reshape([data.elements()])?], ..Brought::new(call) };
        self.collective(brought, |all| match root == self.rank {
            true => Ok(()),
            false => copy(lane, &all[root].sends[0], data),
        })
    }

    fn barrier(&self, _lane: &Lane) -> Result<()> {
        // What was issued on a CPU lane has run.
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
            (Some(group), Some(rank)) => Ok(Arc::new(Local { group: group.clone(), rank })),
            _ => Err(Error::Comm(format!("split {}: no group of color {color} came of it", describe(self)))),
        }
    }

    fn abort(&self, reason: &str) {
        let rank = self.group.ranks[self.rank];
        self.group.world.fail(Failure { rank: Some(rank), reason: format!("rank {rank} aborted: {reason}") });
    }
}

/// `to = from`, of as many elements.
fn copy(lane: &Lane, from: &Tensor, to: &Tensor) -> Result<()> {
    match to.elements() {
        0 => Ok(()),
        n => lane.copy(&from.reshape([n])?, &to.reshape([n])?),
    }
}

#[cfg(test)]
mod tests;
