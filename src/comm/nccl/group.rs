//! One rank's end of a group over NCCL.

use super::library::{Library, NO_COLOR, SUCCESS, Status, config, cudaStream_t, data_type, ncclComm_t, ncclRedOp_t};
use super::watch::{Handle, Watch, What};
use crate::comm::{Communicator, check, describe, describe_group, or_abort};
use crate::device::cuda::Cuda;
use crate::device::{Lane, LaneKind};
use crate::error::{Error, Result, config_err, shape_err};
use crate::tensor::{DType, Tensor};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What all groups of a world have in common.
pub(super) struct World {
    pub(super) library: &'static Library,
    pub(super) watch: Arc<Watch>,
    /// For what is no lane's: on the GPU that all groups are of.
    pub(super) lane: Lane,
    /// The most CTAs that a collective takes; none: as many as NCCL likes.
    pub(super) ctas: Option<u32>,
}

/// One rank's end of a group.
pub(super) struct Group {
    world: Arc<World>,
    label: String,
    /// World ranks.
    ranks: Vec<usize>,
    /// This rank's position among them.
    rank: usize,
    /// None for a group of one, which has nobody to talk to.
    handle: Option<Arc<Handle>>,
    name: Arc<str>,
    issued: AtomicU64,
}

impl Group {
    pub(super) fn new(
        world: Arc<World>,
        label: String,
        ranks: Vec<usize>,
        rank: usize,
        handle: Option<Arc<Handle>>,
    ) -> Self {
        let name = describe_group(&label, &ranks).into();
        Group { world, label, ranks, rank, handle, name, issued: AtomicU64::new(0) }
    }

    /// A lane's GPU, which has to be the group's, where all `tensors` lie.
    fn cuda<'a>(&self, op: &str, lane: &'a Lane, tensors: &[&Tensor]) -> Result<&'a Cuda> {
        let here = self.world.lane.place();
        match lane.as_cuda() {
            Some(cuda) if lane.place() == here => {
                if let Some(t) = tensors.iter().find(|t| t.place() != here) {
                    shape_err!("{op} {}: {t:?} is not on {here}, which the group is of", describe(self));
                }
                Ok(cuda)
            }
            _ => config_err!("{op} {} on {lane:?}: the group is of {here}", describe(self)),
        }
    }

    fn failed(&self, op: &str, status: Status) -> Error {
        let why = self.world.library.explain(status);
        let culprit = self.world.watch.culprit().map_or_else(String::new, |reason| format!("; {reason}"));
        Error::Comm(format!("{op} {}: NCCL: {why}{culprit}", describe(self)))
    }

    /// Issues a collective on the lane's stream.
    fn issue(
        &self,
        op: &'static str,
        lane: &Lane,
        tensors: &[&Tensor],
        call: impl FnOnce(&Library, ncclComm_t, cudaStream_t) -> Status,
    ) -> Result<()> {
        let cuda = or_abort(self, self.cuda(op, lane, tensors))?;
        let (world, watch) = (&self.world, &self.world.watch);
        watch.check()?;
        let Some(handle) = &self.handle else {
            config_err!("{op} {}: a group of one has no peers", describe(self));
        };
        let what = What { op, number: self.issued.fetch_add(1, Ordering::Relaxed), group: self.name.clone() };
        let started = watch.mark(cuda)?;
        let stream: cudaStream_t = cuda.stream().cu_stream().cast();
        let status = watch.during(
            || what.to_string(),
            || {
                let status = call(world.library, handle.raw(), stream);
                watch.settle(handle.raw(), status)
            },
        );
        or_abort(self, status.map_err(|status| self.failed(op, status)))?;
        watch.pend(handle, what, started, watch.mark(cuda)?);
        Ok(())
    }

    /// A group of one: what it would receive from itself.
    fn alone(&self, op: &str, lane: &Lane, from: &Tensor, to: &Tensor) -> Result<()> {
        self.cuda(op, lane, &[from, to])?;
        self.world.watch.check()?;
        lane.copy_many(&[(from.clone(), to.clone())])
    }

    /// The numbers that every rank gives, in rank order. A collective on no lane.
    fn exchange(&self, numbers: [i32; 2]) -> Result<Vec<i32>> {
        let lane = &self.world.lane;
        if self.handle.is_none() {
            return Ok(numbers.to_vec());
        }
        let mine = lane.to_device(&Tensor::from_slice(&numbers, [2])?)?;
        let all = lane.empty([2 * self.size()], DType::I32)?;
        self.all_gather(lane, &mine, &all)?;
        let all = lane.to_host(&all)?;
        self.world.watch.check()?;
        all.to_vec()
    }
}

/// Calls `each` between the beginning and the end of an NCCL group; the first status that is no success.
fn grouped(library: &Library, calls: impl IntoIterator<Item = impl FnOnce() -> Status>) -> Status {
    // SAFETY: it takes nothing, and what it begins is ended below.
    let begun = unsafe { (library.group_start)() };
    if begun != SUCCESS {
        return begun;
    }
    let status = calls.into_iter().map(|call| call()).find(|status| *status != SUCCESS);
    // SAFETY: a group has begun.
    let ended = unsafe { (library.group_end)() };
    status.unwrap_or(ended)
}

fn pointer(t: &Tensor) -> *const c_void {
    t.ptr().cast_const().cast()
}

impl Communicator for Group {
    fn label(&self) -> &str {
        &self.label
    }

    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn all_to_all_ragged(&self, lane: &Lane, sends: &[Tensor], recvs: &[Tensor]) -> Result<()> {
        let op = "all-to-all";
        or_abort(self, check::per_rank(op, self, sends, recvs))?;
        let own = (sends[self.rank].elements(), recvs[self.rank].elements());
        if own.0 != own.1 {
            let sizes = format!("{} elements to itself and receives {}", own.0, own.1);
            or_abort(self, Err(Error::Shape(format!("{op} {}: it sends {sizes}", describe(self)))))?;
        }
        if self.handle.is_none() {
            return self.alone(op, lane, &sends[0], &recvs[0]);
        }
        let tensors: Vec<&Tensor> = sends.iter().chain(recvs).collect();
        if tensors.iter().all(|t| t.elements() == 0) {
            return self.world.watch.check();
        }
        let dtype = data_type(sends[0].dtype());
        self.issue(op, lane, &tensors, |library, comm, stream| {
            let calls = (0..self.size()).flat_map(|peer| [(peer, true), (peer, false)]).filter_map(|(peer, out)| {
                let t = if out { &sends[peer] } else { &recvs[peer] };
                // What has no elements is neither sent nor received: both sides know.
                (t.elements() > 0).then_some(move || {
                    let (n, peer) = (t.elements(), peer as c_int);
                    // SAFETY: the tensor holds n elements on the communicator's GPU; its memory is used by this lane's
                    // stream in order.
                    unsafe {
                        match out {
                            true => (library.send)(pointer(t), n, dtype, peer, comm, stream),
                            false => (library.recv)(t.ptr().cast(), n, dtype, peer, comm, stream),
                        }
                    }
                })
            });
            grouped(library, calls)
        })
    }

    fn all_gather(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        let op = "all-gather";
        or_abort(self, check::blocks_of(op, self, recv, send))?;
        if self.handle.is_none() {
            return self.alone(op, lane, send, recv);
        }
        let (n, dtype) = (send.elements(), data_type(send.dtype()));
        self.issue(op, lane, &[send, recv], |library, comm, stream| {
            // SAFETY: send holds n elements on the communicator's GPU, recv as many for each rank.
            unsafe { (library.all_gather)(pointer(send), recv.ptr().cast(), n, dtype, comm, stream) }
        })
    }

    fn reduce_scatter(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        let op = "reduce-scatter";
        or_abort(self, check::blocks_of(op, self, send, recv).and_then(|()| check::floats(op, self, send)))?;
        if self.handle.is_none() {
            return self.alone(op, lane, send, recv);
        }
        let (n, dtype, sum) = (recv.elements(), data_type(send.dtype()), ncclRedOp_t::ncclSum);
        self.issue(op, lane, &[send, recv], |library, comm, stream| {
            // SAFETY: recv holds n elements on the communicator's GPU, send as many for each rank.
            unsafe { (library.reduce_scatter)(pointer(send), recv.ptr().cast(), n, dtype, sum, comm, stream) }
        })
    }

    fn all_reduce(&self, lane: &Lane, data: &Tensor) -> Result<()> {
        let op = "all-reduce";
        or_abort(self, check::contiguous(op, self, data).and_then(|()| check::floats(op, self, data)))?;
        if self.handle.is_none() {
            return self.cuda(op, lane, &[data]).and_then(|_| self.world.watch.check());
        }
        let (n, dtype, sum) = (data.elements(), data_type(data.dtype()), ncclRedOp_t::ncclSum);
        self.issue(op, lane, &[data], |library, comm, stream| {
            // SAFETY: data holds n elements on the communicator's GPU; NCCL sums in place.
            unsafe { (library.all_reduce)(pointer(data), data.ptr().cast(), n, dtype, sum, comm, stream) }
        })
    }

    fn broadcast(&self, lane: &Lane, data: &Tensor, root: usize) -> Result<()> {
        let op = "broadcast";
        or_abort(self, check::contiguous(op, self, data).and_then(|()| check::root(op, self, root)))?;
        if self.handle.is_none() {
            return self.cuda(op, lane, &[data]).and_then(|_| self.world.watch.check());
        }
        let (n, dtype) = (data.elements(), data_type(data.dtype()));
        self.issue(op, lane, &[data], |library, comm, stream| {
            // SAFETY: data holds n elements on the communicator's GPU; NCCL works in place.
            unsafe { (library.broadcast)(pointer(data), data.ptr().cast(), n, dtype, root as c_int, comm, stream) }
        })
    }

    fn barrier(&self, lane: &Lane) -> Result<()> {
        let op = "barrier";
        if self.handle.is_some() {
            let word = lane.zeros([1], DType::F32)?;
            let (dtype, sum) = (data_type(DType::F32), ncclRedOp_t::ncclSum);
            self.issue(op, lane, &[&word], |library, comm, stream| {
                // SAFETY: one element on the communicator's GPU; NCCL sums in place.
                unsafe { (library.all_reduce)(pointer(&word), word.ptr().cast(), 1, dtype, sum, comm, stream) }
            })?;
        }
        lane.synchronize()?;
        // An aborted collective ends as well.
        self.world.watch.check()
    }

    fn split(&self, label: &str, color: usize, key: usize) -> Result<Arc<dyn Communicator>> {
        let number = |n: usize| match i32::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => or_abort(self, Err(Error::Config(format!("split {}: {n} is too large", describe(self))))),
        };
        let (mine, order) = (number(color)?, number(key)?);
        let all = self.exchange([mine, order])?;
        let mut members: Vec<(i32, usize)> = all
            .chunks_exact(2)
            .enumerate()
            .filter_map(|(rank, pair)| (pair[0] == mine).then_some((pair[1], rank)))
            .collect();
        members.sort_unstable();
        let ranks: Vec<usize> = members.iter().map(|&(_, rank)| self.ranks[rank]).collect();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank).unwrap_or(0);
        let handle = match &self.handle {
            None => None,
            Some(handle) => {
                let (library, watch) = (self.world.library, &self.world.watch);
                let mut new: ncclComm_t = std::ptr::null_mut();
                let mut config = config(self.world.ctas);
                let color = if ranks.len() == 1 { NO_COLOR } else { mine };
                let status = watch.during(
                    || format!("split into {} of {}", describe_group(label, &ranks), self.name),
                    || {
                        // SAFETY: the communicator is valid; NCCL copies the configuration and writes the new one.
                        let status =
                            unsafe { (library.split)(handle.raw(), color, order, &raw mut new, &raw mut config) };
                        watch.settle(handle.raw(), status).and_then(|()| watch.settle(new, SUCCESS))
                    },
                );
                or_abort(self, status.map_err(|status| self.failed("split", status)))?;
                (ranks.len() > 1).then(|| Handle::new(watch, new, true))
            }
        };
        Ok(Arc::new(Group::new(self.world.clone(), label.to_owned(), ranks, rank, handle)))
    }

    fn abort(&self, reason: &str) {
        self.world.watch.fail(&format!("rank {} aborted: {reason}", self.ranks[self.rank]));
    }
}

/// The compute lane beside which nothing of a world's own is issued.
pub(super) fn own_lane(cuda: &Cuda) -> Result<Lane> {
    Ok(Lane::new(Arc::new(cuda.fork()?), LaneKind::Compute))
}
