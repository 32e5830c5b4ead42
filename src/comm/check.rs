//! Checks that communicators share: each error names the collective, the group and the value.

use super::{Communicator, describe};
use crate::error::{Result, config_err, shape_err};
use crate::tensor::Tensor;

/// Fails unless `t` is contiguous.
pub(super) fn contiguous<C: Communicator + ?Sized>(op: &str, comm: &C, t: &Tensor) -> Result<()> {
    if !t.is_contiguous() {
        shape_err!(
            "{op} {}: a view of shape {} with strides {:?}: tensors must be contiguous",
            describe(comm),
            t.shape(),
            t.layout().strides()
        );
    }
    Ok(())
}

/// Fails unless `t` is of floats, which alone can be summed.
pub(super) fn floats<C: Communicator + ?Sized>(op: &str, comm: &C, t: &Tensor) -> Result<()> {
    if !t.dtype().is_float() {
        shape_err!("{op} {}: a tensor of {}: only floats are summed", describe(comm), t.dtype());
    }
    Ok(())
}

/// Fails unless input and output are contiguous, of one dtype, and share no memory.
pub(super) fn pair<C: Communicator + ?Sized>(op: &str, comm: &C, send: &Tensor, recv: &Tensor) -> Result<()> {
    contiguous(op, comm, send)?;
    contiguous(op, comm, recv)?;
    if send.dtype() != recv.dtype() {
        shape_err!("{op} {}: from {} to {}: both have one dtype", describe(comm), send.dtype(), recv.dtype());
    }
    if send.overlaps(recv) {
        shape_err!("{op} {}: input {send:?} and output {recv:?} share memory", describe(comm));
    }
    Ok(())
}

/// Fails unless `large` is [`pair`]ed with `small` and has one block of its size per rank.
pub(super) fn blocks_of<C: Communicator + ?Sized>(op: &str, comm: &C, large: &Tensor, small: &Tensor) -> Result<()> {
    pair(op, comm, large, small)?;
    if large.elements() != comm.size() * small.elements() {
        shape_err!(
            "{op} {}: a block of {} elements for each of {} ranks in a tensor of shape {}",
            describe(comm),
            small.elements(),
            comm.size(),
            large.shape()
        );
    }
    Ok(())
}

/// Fails unless both tensors have the same number of elements, in equal blocks.
pub(super) fn same_blocks<C: Communicator + ?Sized>(op: &str, comm: &C, send: &Tensor, recv: &Tensor) -> Result<()> {
    pair(op, comm, send, recv)?;
    if send.elements() != recv.elements() || !send.elements().is_multiple_of(comm.size()) {
        shape_err!(
            "{op} {}: from shape {} to {}: as many elements in both, and a multiple of the {} ranks",
            describe(comm),
            send.shape(),
            recv.shape(),
            comm.size()
        );
    }
    Ok(())
}

/// Fails unless there is a contiguous tensor per rank on both sides, all of one dtype, and no output shares memory with
/// an input.
pub(super) fn per_rank<C: Communicator + ?Sized>(op: &str, comm: &C, sends: &[Tensor], recvs: &[Tensor]) -> Result<()> {
    if sends.len() != comm.size() || recvs.len() != comm.size() {
        shape_err!(
            "{op} {}: {} tensors to send and {} to receive: one of each per rank, {}",
            describe(comm),
            sends.len(),
            recvs.len(),
            comm.size()
        );
    }
    for t in sends.iter().chain(recvs) {
        contiguous(op, comm, t)?;
        if t.dtype() != sends[0].dtype() {
            shape_err!(
                "{op} {}: tensors of {} and {}: all have one dtype",
                describe(comm),
                sends[0].dtype(),
                t.dtype()
            );
        }
    }
    for recv in recvs {
        if let Some(send) = sends.iter().find(|send| send.overlaps(recv)) {
            shape_err!("{op} {}: input {send:?} and output {recv:?} share memory", describe(comm));
        }
    }
    Ok(())
}

/// Fails unless `root` is a rank of the group.
pub(super) fn root<C: Communicator + ?Sized>(op: &str, comm: &C, root: usize) -> Result<()> {
    if root >= comm.size() {
        config_err!("{op} {}: from rank {root} of {}: ranks count from 0", describe(comm), comm.size());
    }
    Ok(())
}
