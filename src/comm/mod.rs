//! Collectives among ranks: what a communicator offers, how ranks are divided into groups, and all-to-all algorithms.
//!
//! A collective is called by every rank of its group, in the same order on all of them, with the same sizes and dtype.
//! [`local`] has ranks as threads of one process, on the CPU or sharing a GPU; [`nccl`] as processes with a GPU each.

mod all_to_all;
mod check;
mod groups;
pub mod launch;
pub mod local;
pub mod nccl;
pub mod rendezvous;
mod topology;

pub use all_to_all::{
    AllToAll, AllToAllKind, Arranger, Counts, Direct, GroupComms, Hierarchical1d, Hierarchical2d, Levels, all_phases,
    arrange,
};
pub use groups::Groups;
pub use topology::{GroupKind, NodeShape, Sizes, Topology};

use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;
use std::sync::Arc;

/// One rank's end of a group of ranks.
///
/// Rules that hold for every collective:
/// - It is issued on the lane it is given and may return before it has run; a CPU lane runs it before the call returns.
///   A communicator is used on one lane only: two lanes that need the same group take a communicator each.
/// - Tensors are contiguous and lie where the lane computes; an output shares no memory with an input.
/// - Sums run over the group's ranks in ascending order, 16-bit data in f32, rounded once: the same inputs give the same
///   bits, and every rank gets the same ones. ([`nccl`] sums in an order of its own: see there.)
/// - Shapes and dtypes are checked. An error names the collective, the group and the value. After an error the group is
///   of no more use: what its other ranks have pending, or call later, ends with an error too.
pub trait Communicator: Send + Sync {
    /// The group's label, for messages.
    fn label(&self) -> &str;

    /// The world ranks of the group's members, in the group's order.
    fn ranks(&self) -> &[usize];

    /// This rank's position in [`Communicator::ranks`].
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize {
        self.ranks().len()
    }

    /// Sends `sends[i]` to rank i of the group and receives `recvs[i]` from it: one tensor per rank on both sides, of any
    /// sizes, one dtype. What rank i sends to j has as many elements as what j receives from i; none is allowed.
    ///
    /// # Errors
    /// If a tensor breaks a rule of the trait, sizes do not match, or a rank fails or never comes.
    fn all_to_all_ragged(&self, lane: &Lane, sends: &[Tensor], recvs: &[Tensor]) -> Result<()>;

    /// The even form: `send` and `recv` have the same number of elements, in one block per rank; block i of `send` goes to
    /// rank i, and block i of `recv` comes from it.
    ///
    /// # Errors
    /// As [`Communicator::all_to_all_ragged`], and if the blocks are not equal.
    fn all_to_all(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()> {
        or_abort(self, check::same_blocks("all-to-all", self, send, recv))?;
        self.all_to_all_ragged(lane, &blocks(send, self.size())?, &blocks(recv, self.size())?)
    }

    /// `recv` = the `send` of every rank, one after another.
    ///
    /// # Errors
    /// If a tensor breaks a rule of the trait, or a rank fails or never comes.
    fn all_gather(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()>;

    /// [`Communicator::all_gather`] of tensors of different sizes: `recvs[i]` = the `send` of rank i.
    ///
    /// # Errors
    /// As [`Communicator::all_to_all_ragged`].
    fn all_gather_ragged(&self, lane: &Lane, send: &Tensor, recvs: &[Tensor]) -> Result<()> {
        self.all_to_all_ragged(lane, &vec![send.clone(); self.size()], recvs)
    }

    /// `recv` = the sum over ranks of this rank's block of `send`, which has one block per rank, each of `recv`'s size.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`], and for data that is not float.
    fn reduce_scatter(&self, lane: &Lane, send: &Tensor, recv: &Tensor) -> Result<()>;

    /// [`Communicator::reduce_scatter`] of blocks of different sizes: `recv` = the sum over ranks of their
    /// `sends[this rank]`.
    ///
    /// # Errors
    /// As [`Communicator::reduce_scatter`].
    fn reduce_scatter_ragged(&self, lane: &Lane, sends: &[Tensor], recv: &Tensor) -> Result<()> {
        or_abort(self, check::floats("reduce-scatter", self, recv))?;
        let parts = lane.empty([self.size(), recv.elements()], recv.dtype())?;
        let parts: Vec<Tensor> = (0..self.size()).map(|i| parts.index(i)).collect::<Result<_>>()?;
        self.all_to_all_ragged(lane, sends, &parts)?;
        lane.sum_parts(&parts, recv)
    }

    /// `data` = the sum over ranks of their `data`, on all of them.
    ///
    /// # Errors
    /// As [`Communicator::reduce_scatter`].
    fn all_reduce(&self, lane: &Lane, data: &Tensor) -> Result<()>;

    /// `data` = that of rank `root` of the group, on all ranks.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`], and if there is no such rank.
    fn broadcast(&self, lane: &Lane, data: &Tensor, root: usize) -> Result<()>;

    /// Waits until every rank has come here and what it has issued on its lane before has run.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    fn barrier(&self, lane: &Lane) -> Result<()>;

    /// Divides the group: ranks that give the same `color` get a new group of their own, ordered by `key`, then by rank. A
    /// collective of this group; it runs on no lane.
    ///
    /// # Errors
    /// As [`Communicator::barrier`].
    fn split(&self, label: &str, color: usize, key: usize) -> Result<Arc<dyn Communicator>>;

    /// Ends every collective of every group that came of the same world, pending or later, on this rank and, as far as the
    /// transport carries the news, on the others, with an error that gives `reason`.
    fn abort(&self, reason: &str);
}

/// `text` of the first rank, on every rank. A collective on `lane`.
///
/// # Errors
/// As [`Communicator::broadcast`].
pub fn broadcast_text(comm: &dyn Communicator, lane: &Lane, text: &str) -> Result<String> {
    let send = |values: &[i32]| -> Result<Vec<i32>> {
        let data = lane.to_device(&Tensor::from_slice(values, [values.len()])?)?;
        comm.broadcast(lane, &data, 0)?;
        lane.to_host(&data)?.to_vec()
    };
    // A byte in each number: the texts are short.
    let length = send(&[text.len() as i32])?[0] as usize;
    let mut bytes: Vec<i32> = text.bytes().map(i32::from).collect();
    bytes.resize(length.max(1), 0);
    let bytes: Vec<u8> = send(&bytes)?.into_iter().take(length).map(|byte| byte as u8).collect();
    String::from_utf8(bytes).map_err(|e| crate::Error::Comm(format!("a text from the first rank: {e}")))
}

/// The largest over ranks of each of `values`, as many on every rank. A collective on `lane`.
///
/// # Errors
/// As [`Communicator::all_gather`].
pub fn largest(comm: &dyn Communicator, lane: &Lane, values: &[f64]) -> Result<Vec<f64>> {
    // As pairs of 32 bits, which every lane has a type for: they are only moved.
    let halves: Vec<i32> = values.iter().flat_map(|v| [v.to_bits() as i32, (v.to_bits() >> 32) as i32]).collect();
    if halves.is_empty() {
        return Ok(Vec::new());
    }
    let mine = lane.to_device(&Tensor::from_slice(&halves, [halves.len()])?)?;
    let all = lane.empty([comm.size() * halves.len()], mine.dtype())?;
    comm.all_gather(lane, &mine, &all)?;
    let all: Vec<i32> = lane.to_host(&all)?.to_vec()?;
    let value = |pair: &[i32]| f64::from_bits(u64::from(pair[0] as u32) | (u64::from(pair[1] as u32) << 32));
    let mut largest = vec![f64::MIN; values.len()];
    for rank in all.chunks(halves.len()) {
        largest.iter_mut().zip(rank.chunks(2)).for_each(|(most, pair)| *most = most.max(value(pair)));
    }
    Ok(largest)
}

/// A call that this rank cannot make is one that the others would wait for.
fn or_abort<C: Communicator + ?Sized, T>(comm: &C, result: Result<T>) -> Result<T> {
    result.inspect_err(|e| comm.abort(&e.to_string()))
}

/// How messages name a group and the rank that speaks.
pub(crate) fn describe<C: Communicator + ?Sized>(comm: &C) -> String {
    format!("in {} on rank {}", describe_group(comm.label(), comm.ranks()), comm.ranks()[comm.rank()])
}

fn describe_group(label: &str, ranks: &[usize]) -> String {
    format!("group {label} (ranks {})", list(ranks.iter().copied()))
}

fn list(ranks: impl Iterator<Item = usize>) -> String {
    ranks.map(|r| r.to_string()).collect::<Vec<_>>().join(", ")
}

/// A contiguous tensor as `n` equal blocks, each of one dimension.
fn blocks(t: &Tensor, n: usize) -> Result<Vec<Tensor>> {
    if !t.elements().is_multiple_of(n) {
        shape_err!("{n} equal blocks of a tensor of shape {}: they divide its {} elements", t.shape(), t.elements());
    }
    let flat = t.reshape([t.elements()])?;
    let each = t.elements() / n;
    (0..n).map(|i| flat.narrow(0, i * each, each)).collect()
}
