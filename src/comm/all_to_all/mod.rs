//! All-to-all algorithms over any communicator, cut into phases so that each phase runs on a lane of its own.

mod direct;
mod hierarchical;

pub use direct::Direct;
pub use hierarchical::{Hierarchical1d, Hierarchical2d};

use super::{Communicator, NodeShape};
use crate::device::{Lane, LaneKind};
use crate::error::{Result, config_err, shape_err};
use crate::named::named;
use crate::tensor::{Shape, Tensor};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// An all-to-all of rows, in phases.
///
/// What goes into the first phase are a rank's rows (R, M), those for rank 0 of the group first, then those for rank 1,
/// and so on; what comes out of the last are the rows it gets, those of rank 0 first. Rows keep their order. Every phase
/// is given what the phase before it returned.
pub trait AllToAll: Send + Sync {
    /// Its name, as the command line has it.
    fn name(&self) -> &str;

    /// The lane of each phase, the same on every rank; at least one.
    fn phases(&self, comms: &GroupComms) -> Vec<LaneKind>;

    /// Runs phase number `phase` on `lane`.
    ///
    /// # Errors
    /// If the input is not what the counts say, or a rank fails or never comes.
    fn run(&self, phase: usize, comms: &GroupComms, lane: &Lane, counts: &Counts, input: &Tensor) -> Result<Tensor>;

    /// [`AllToAll::run`] with its result in `out`, contiguous and of as many rows. An algorithm that does not say how has
    /// it copied there.
    ///
    /// # Errors
    /// As [`AllToAll::run`], and if `out` has another shape than the result.
    fn run_into(
        &self,
        phase: usize,
        comms: &GroupComms,
        lane: &Lane,
        counts: &Counts,
        input: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let t = self.run(phase, comms, lane, counts, input)?;
        comms.arranger().place(lane, &t, out)
    }
}

/// The all-to-alls of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AllToAllKind {
    /// [`Direct`].
    Direct,
    /// [`Hierarchical1d`].
    Hierarchical1d,
    /// [`Hierarchical2d`].
    Hierarchical2d,
}
named!(AllToAllKind, "all-to-all", { Direct => "direct", Hierarchical1d => "1dh", Hierarchical2d => "2dh" });

impl AllToAllKind {
    /// The all-to-all itself.
    pub fn build(self) -> Box<dyn AllToAll> {
        match self {
            AllToAllKind::Direct => Box::new(Direct),
            AllToAllKind::Hierarchical1d => Box::new(Hierarchical1d),
            AllToAllKind::Hierarchical2d => Box::new(Hierarchical2d),
        }
    }
}

/// Runs all phases of an all-to-all, each on the lane that `lane` gives for its kind.
///
/// # Errors
/// As [`AllToAll::run`].
pub fn all_phases(
    algorithm: &dyn AllToAll,
    comms: &GroupComms,
    lane: impl Fn(LaneKind) -> Lane,
    counts: &Counts,
    rows: &Tensor,
) -> Result<Tensor> {
    let phases = algorithm.phases(comms);
    let (mut t, mut before): (Tensor, Option<Lane>) = (rows.clone(), None);
    // What a lane has left is kept until the next has been given its work.
    let mut kept = Vec::with_capacity(phases.len());
    for (i, kind) in phases.into_iter().enumerate() {
        let lane = lane(kind);
        if let Some(before) = &before {
            lane.wait(&before.record(false)?)?;
        }
        let next = algorithm.run(i, comms, &lane, counts, &t)?;
        kept.push(std::mem::replace(&mut t, next));
        before = Some(lane);
    }
    // Whoever comes to lie in the memory of what is let go comes after what has read it.
    if let (Some(last), true) = (&before, kept.len() > 1) {
        last.synchronize()?;
    }
    Ok(t)
}

/// The communicators of a group that an all-to-all runs over.
#[derive(Clone)]
pub struct GroupComms {
    group: Arc<dyn Communicator>,
    lane: LaneKind,
    levels: Option<Levels>,
    arranger: Arc<Arranger>,
}

/// A group on several nodes with several members on each.
#[derive(Clone)]
pub struct Levels {
    /// How the group lies on its nodes.
    pub shape: NodeShape,
    /// The members on this rank's node.
    pub intra: Arc<dyn Communicator>,
    /// The members in this rank's place of every node.
    pub inter: Arc<dyn Communicator>,
}

impl GroupComms {
    /// Of `group`, whose collectives run on `lane`. Where `shape` says that it has several nodes and several members on
    /// each, the group is split into both levels: a collective of the group then.
    ///
    /// # Errors
    /// If the shape is not of so many ranks, or a rank fails or never comes.
    pub fn new(group: Arc<dyn Communicator>, lane: LaneKind, shape: Option<NodeShape>) -> Result<Self> {
        let levels = match shape {
            Some(NodeShape { nodes, per_node }) if nodes * per_node != group.size() => {
                config_err!("{nodes} nodes of {per_node} ranks for a group of {}: both have as many", group.size())
            }
            Some(shape) if shape.nodes > 1 && shape.per_node > 1 => {
                let (rank, label) = (group.rank(), group.label());
                let (node, place) = (rank / shape.per_node, rank % shape.per_node);
                let intra = group.split(&format!("{label} in a node"), node, rank)?;
                let inter = group.split(&format!("{label} across nodes"), place, rank)?;
                Some(Levels { shape, intra, inter })
            }
            _ => None,
        };
        Ok(GroupComms { group, lane, levels, arranger: Arc::default() })
    }

    /// The whole group.
    pub fn group(&self) -> &Arc<dyn Communicator> {
        &self.group
    }

    /// The lane of the whole group's collectives.
    pub fn lane(&self) -> LaneKind {
        self.lane
    }

    /// What puts rows in another order.
    pub fn arranger(&self) -> &Arranger {
        &self.arranger
    }

    /// Its two levels; none where it has one node, one member on each, or lies on its nodes unevenly.
    pub fn levels(&self) -> Option<&Levels> {
        self.levels.as_ref()
    }
}

/// How many rows each rank of a group sends to each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts(Rows);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rows {
    Even {
        ranks: usize,
        rows: usize,
    },
    /// `rows[from][to]`.
    Ragged {
        rows: Arc<Vec<Vec<usize>>>,
    },
}

impl Counts {
    /// `rows` from each of `ranks` ranks to each.
    pub fn even(ranks: usize, rows: usize) -> Self {
        Counts(Rows::Even { ranks, rows })
    }

    /// `rows[from][to]`: every rank knows all of them.
    ///
    /// # Errors
    /// If there is not one count per pair of ranks.
    pub fn ragged(rows: Vec<Vec<usize>>) -> Result<Self> {
        if let Some(row) = rows.iter().find(|row| row.len() != rows.len()) {
            shape_err!("{} counts of a rank of {}: one for each rank", row.len(), rows.len());
        }
        Ok(Counts(Rows::Ragged { rows: Arc::new(rows) }))
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        match &self.0 {
            Rows::Even { ranks, .. } => *ranks,
            Rows::Ragged { rows } => rows.len(),
        }
    }

    /// The rows that `from` sends to `to`.
    pub fn rows(&self, from: usize, to: usize) -> usize {
        match &self.0 {
            Rows::Even { rows, .. } => *rows,
            Rows::Ragged { rows } => rows[from][to],
        }
    }

    /// The rows that each of `pairs` (from, to) sends, as ranges one after another.
    pub fn ranges(&self, pairs: impl IntoIterator<Item = (usize, usize)>) -> Vec<Range<usize>> {
        let mut end = 0;
        let next = |(from, to)| {
            end += self.rows(from, to);
            end - self.rows(from, to)..end
        };
        pairs.into_iter().map(next).collect()
    }
}

/// Up to so many runs of rows are copied one by one; more are gathered by index.
const FEW_RUNS: usize = 4;

/// As many orders of rows are kept before they are forgotten: those of layers without padding differ every time.
const MOST_ORDERS: usize = 1024;

/// Puts rows in another order. Orders come again step after step: on a GPU they are kept there.
#[derive(Default)]
pub struct Arranger {
    orders: Mutex<HashMap<Runs, Tensor>>,
    moved: AtomicU64,
}

/// Runs of rows, one after another, and the lane they are for.
type Runs = (LaneKind, Vec<Range<usize>>);

impl Arranger {
    /// How many rows it has read and written so far.
    pub fn rows_moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// The rows of `t` (R, M) in the order of `ranges`: `t` itself where that is the order they have.
    ///
    /// # Errors
    /// If a range reaches past the rows, or the device has no memory left.
    pub fn arrange(&self, lane: &Lane, t: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for range in ranges.iter().filter(|r| !r.is_empty()) {
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range.clone()),
            }
        }
        let total = runs.iter().map(Range::len).sum();
        if runs.len() <= 1 && total == t.dim(0) {
            return Ok(t.clone());
        }
        self.moved.fetch_add(total as u64, Ordering::Relaxed);
        let out = lane.empty([total, t.dim(1)], t.dtype())?;
        if runs.len() > FEW_RUNS && t.dtype().is_float() {
            lane.gather_rows(t, &self.index(lane, runs)?, &out)?;
            return Ok(out);
        }
        let mut at = 0;
        for run in runs {
            lane.copy(&t.narrow(0, run.start, run.len())?, &out.narrow(0, at, run.len())?)?;
            at += run.len();
        }
        Ok(out)
    }

    /// Copies the rows of `t` to `out`, where they are not there already.
    ///
    /// # Errors
    /// If `out` is of another shape, or the device fails.
    pub fn place(&self, lane: &Lane, t: &Tensor, out: &Tensor) -> Result<()> {
        if t.shape() != out.shape() {
            shape_err!("rows of shape {} in the place of rows of shape {}: both are as many", t.shape(), out.shape());
        }
        if t.dim(0) == 0 || t.ptr() == out.ptr() {
            return Ok(());
        }
        self.moved.fetch_add(t.dim(0) as u64, Ordering::Relaxed);
        lane.copy(t, out)
    }

    /// The rows of these runs, one after another: (R) i32.
    fn index(&self, lane: &Lane, runs: Vec<Range<usize>>) -> Result<Tensor> {
        // Of this lane alone: what another has uploaded may not be there yet.
        let key = (lane.kind(), runs);
        let mut known = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = known.get(&key) {
            return Ok(index.clone());
        }
        let rows: Vec<i32> = key.1.iter().cloned().flatten().map(|row| row as i32).collect();
        let index = lane.to_device(&Tensor::from_slice(&rows, [rows.len()])?)?;
        if lane.as_cuda().is_some() {
            if known.len() >= MOST_ORDERS {
                known.clear();
            }
            known.insert(key, index.clone());
        }
        Ok(index)
    }
}

/// [`Arranger::arrange`] that keeps nothing.
///
/// # Errors
/// As it.
pub fn arrange(lane: &Lane, t: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor> {
    Arranger::default().arrange(lane, t, ranges)
}

/// One all-to-all of `comm`: `rows` (R, M) in blocks of `send` rows, one per rank; returns blocks of `recv` rows, in `out`
/// if there is one.
fn exchange(
    comm: &dyn Communicator,
    lane: &Lane,
    rows: &Tensor,
    send: &[usize],
    recv: &[usize],
    out: Option<&Tensor>,
) -> Result<Tensor> {
    let sent: usize = send.iter().sum();
    if rows.rank() != 2 || rows.dim(0) != sent {
        let e = format!("all-to-all: rows of shape {}, and {sent} rows to send: both are as many", rows.shape());
        comm.abort(&e);
        shape_err!("{e}");
    }
    let shape = [recv.iter().sum(), rows.dim(1)];
    let out = match out {
        Some(out) if out.shape().dims() != shape || out.dtype() != rows.dtype() || !out.is_contiguous() => {
            let (received, dtype) = (Shape::new(&shape), rows.dtype());
            let e = format!("all-to-all: {dtype} {received} into {} {}: both are the same", out.dtype(), out.shape());
            comm.abort(&e);
            shape_err!("{e}");
        }
        Some(out) => out.clone(),
        None => lane.empty(shape, rows.dtype())?,
    };
    let equal = |counts: &[usize]| counts.iter().all(|&n| n == send[0]);
    if equal(send) && equal(recv) {
        comm.all_to_all(lane, rows, &out)?;
    } else {
        comm.all_to_all_ragged(lane, &cut(rows, send)?, &cut(&out, recv)?)?;
    }
    Ok(out)
}

/// `t` (R, M) in blocks of so many rows.
fn cut(t: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
    let mut at = 0;
    let next = |&n: &usize| {
        at += n;
        t.narrow(0, at - n, n)
    };
    counts.iter().map(next).collect()
}

#[cfg(test)]
mod tests;
