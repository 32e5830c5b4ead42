//! The way of a layer's rows: to the experts, through them and back, in chunks, as a graph says.
//!
//! Collectives and products want rows in different orders. What is read and written for that alone in a pass, in multiples
//! of the R rows that a rank sends, with one piece per chunk ([`Arranger::rows_moved`] counts it):
//!
//! | | times | where |
//! |---|---|---|
//! | a chunk, out of [expert][piece] | 1 | r > 1 |
//! | [source][expert] to [expert][source], after the dispatch and before the combine | 2 | N_EP > 1, several experts to a rank; among ESP ranks only with a hook there |
//! | what the ESP group has to [expert][source], and back | 2·N_ESP | N_ESP > 1 |
//! | the node's part of an all-to-all of two levels, there and back | 4 | 2DH |
//! | a chunk, to where it ends | 1 | r > 1, N_EP = N_ESP = 1; all-to-alls without a [`run_into`](crate::comm::AllToAll::run_into) |
//! | chunks, into [expert][piece] | 1 | r > 1 |
//!
//! The collectives write what comes back where it ends. Several pieces to a chunk are put together again after the experts,
//! and after a hook: once more for each.

use super::cut::{Cut, Segment};
use super::gradients::GradientBuffers;
use super::parallel::Parallel;
use crate::comm::{Arranger, GroupKind};
use crate::device::{Lane, LaneKind};
use crate::engine::{TaskGraph, Timeline};
use crate::error::{Error, Result, config_err, shape_err};
use crate::schedule::{LayerOp, Stage};
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// What happens to a piece of rows on its way. Forward they are tokens, backward gradients.
pub(super) trait Steps: Sync {
    /// When it has come to the rank of its experts.
    fn arrive(&self, lane: &Lane, piece: usize, rows: Tensor) -> Result<Tensor>;
    /// Through the experts.
    fn compute(&self, lane: &Lane, piece: usize, rows: Tensor) -> Result<Tensor>;
    /// Once more, for what nothing waits for.
    fn finish(&self, lane: &Lane, piece: usize) -> Result<()>;
    /// Before it travels back.
    fn leave(&self, lane: &Lane, piece: usize, rows: Tensor) -> Result<Tensor>;
    /// Whether anything happens when it comes, and before it leaves.
    fn happens(&self) -> [bool; 2];
}

/// One pass through a layer.
pub(super) struct Journey<'a> {
    parallel: &'a Parallel,
    cut: &'a Cut,
    steps: &'a dyn Steps,
    gradients: Option<&'a GradientBuffers>,
    /// (R, M): where it begins, as the order laid the rows out.
    rows: &'a Tensor,
    /// (R, M): where it ends, chunk after chunk; none where its only chunk never leaves the rank: that is where it ends.
    back: Option<Tensor>,
    /// Where each chunk has got to.
    chunks: Vec<Mutex<Option<Tensor>>>,
    /// What one lane has left for another, until both are done with it: when the graph has been joined.
    kept: Mutex<Vec<Tensor>>,
}

/// The rows (R, M) that have been through the experts, in the order of `rows`, and when which task ran; `ended` is called
/// when the graph has been.
pub(super) fn journey(
    parallel: &Parallel,
    cut: &Cut,
    graph: &TaskGraph<LayerOp>,
    steps: &dyn Steps,
    gradients: Option<&GradientBuffers>,
    rows: &Tensor,
    ended: impl FnOnce() -> Result<()>,
) -> Result<(Tensor, Option<Timeline>)> {
    let lane = parallel.lane(LaneKind::Compute);
    // The graph says it, not the plan: a policy may cut otherwise than it is asked to.
    let of = |id| match graph.op(id) {
        LayerOp::Chunk { of, .. } => Some(*of),
        _ => None,
    };
    let r = match graph.ids().find_map(of) {
        Some(r) if (1..=cut.most_chunks()).contains(&r) => r,
        r => config_err!("a graph of {} chunks for rows in {} parts: 1 to as many", r.unwrap_or(0), cut.most_chunks()),
    };
    let topology = parallel.groups().topology();
    let stays = [GroupKind::Expert, GroupKind::Shard].into_iter().all(|kind| topology.size(kind) == 1);
    let back = if r == 1 && stays { None } else { Some(lane.empty_like(rows)?) };
    let chunks = (0..r).map(|_| Mutex::default()).collect();
    let way = Journey { parallel, cut, steps, gradients, rows, back, chunks, kept: Mutex::default() };
    let timeline = parallel.run(graph, |id, op| way.task(parallel.lane(graph.lane(id)), op))?;
    ended()?;
    let Some(back) = &way.back else { return Ok((way.take(0)?, timeline)) };
    let mut have: Vec<Segment> = Vec::new();
    for chunk in 0..r {
        have.extend(cut.sent(cut.chunk(chunk, r)?));
    }
    Ok((cut.arrange(way.arranger(), lane, back, &have, &cut.ordered())?, timeline))
}

impl Journey<'_> {
    fn task(&self, lane: &Lane, op: &LayerOp) -> Result<()> {
        let LayerOp::Chunk { stage, chunk, of, .. } = *op else {
            return match (op, self.gradients) {
                (LayerOp::Reduce(slice), Some(gradients)) => gradients.reduce(lane, *slice),
                _ => config_err!("{op} in the graph of a layer: it has chunks, and slices of gradients it was given"),
            };
        };
        if of != self.chunks.len() {
            config_err!("{op}: a chunk of {of} in a pass of {}", self.chunks.len());
        }
        let pieces = self.cut.chunk(chunk, of)?;
        let topology = self.parallel.groups().topology();
        let (travels, sharded) = (topology.size(GroupKind::Expert) > 1, topology.size(GroupKind::Shard) > 1);
        let phases = if travels { self.parallel.all_to_all().phases(self.parallel.groups().expert()).len() } else { 0 };
        match stage {
            Stage::Dispatch(phase) => {
                if phase == 0 {
                    self.put(chunk, self.start(lane, &pieces)?)?;
                }
                let t = self.exchange(lane, usize::from(phase), &pieces, false, self.take(chunk)?)?;
                let last = usize::from(phase) + 1 == phases;
                self.put(chunk, if last { self.arrive(lane, &pieces, t)? } else { t })
            }
            Stage::AllGather => {
                let t = self.arrived(lane, chunk, &pieces, travels)?;
                self.put(chunk, self.gather(lane, &pieces, t)?)
            }
            Stage::Expert => {
                let t = if sharded { self.take(chunk)? } else { self.arrived(lane, chunk, &pieces, travels)? };
                let t = self.piecewise(&pieces, self.cut.computed(pieces.clone()), &t, lane, |piece, t| {
                    self.steps.compute(lane, piece, t)
                })?;
                let t = if sharded { t } else { self.leave(lane, &pieces, t)? };
                if sharded || travels { self.put(chunk, t) } else { self.end(lane, chunk, &pieces, t) }
            }
            Stage::WeightGrad => pieces.into_iter().try_for_each(|piece| self.steps.finish(lane, piece)),
            Stage::ReduceScatter => {
                let t = self.take(chunk)?;
                let mine = if travels || self.stops()[1] { None } else { self.place(&pieces)? };
                let t = self.scatter(lane, &pieces, t, mine)?;
                let t = self.leave(lane, &pieces, t)?;
                if travels { self.put(chunk, t) } else { self.end(lane, chunk, &pieces, t) }
            }
            Stage::Combine(phase) => {
                let (phase, t) = (usize::from(phase), self.take(chunk)?);
                let place = if phase + 1 == phases { self.place(&pieces)? } else { None };
                let Some(place) = place else {
                    return self.put(chunk, self.exchange(lane, phase, &pieces, true, t)?);
                };
                let (counts, group) = (self.cut.counts(pieces.clone(), true)?, self.parallel.groups().expert());
                self.parallel.all_to_all().run_into(phase, group, lane, &counts, &t, &place)
            }
        }
    }

    fn arranger(&self) -> &Arranger {
        self.parallel.groups().expert().arranger()
    }

    fn put(&self, chunk: usize, t: Tensor) -> Result<()> {
        if self.parallel.issues() {
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(t.clone());
        }
        *self.chunks[chunk].lock().unwrap_or_else(PoisonError::into_inner) = Some(t);
        Ok(())
    }

    fn take(&self, chunk: usize) -> Result<Tensor> {
        let held = self.chunks[chunk].lock().unwrap_or_else(PoisonError::into_inner).take();
        held.ok_or_else(|| {
            Error::Config(format!("chunk {} is not there: a stage before this one is missing", chunk + 1))
        })
    }

    /// A chunk's rows as they are sent.
    fn start(&self, lane: &Lane, pieces: &Range<usize>) -> Result<Tensor> {
        self.cut.arrange(self.arranger(), lane, self.rows, &self.cut.ordered(), &self.cut.sent(pieces.clone()))
    }

    fn exchange(&self, lane: &Lane, phase: usize, pieces: &Range<usize>, back: bool, t: Tensor) -> Result<Tensor> {
        let counts = self.cut.counts(pieces.clone(), back)?;
        self.parallel.all_to_all().run(phase, self.parallel.groups().expert(), lane, &counts, &t)
    }

    /// A chunk at the rank of its experts; where rows do not travel, they are there from the start.
    fn arrived(&self, lane: &Lane, chunk: usize, pieces: &Range<usize>, travels: bool) -> Result<Tensor> {
        match travels {
            true => self.take(chunk),
            false => self.arrive(lane, pieces, self.start(lane, pieces)?),
        }
    }

    /// Whether rows lie piece by piece where an ESP group has them, on the way there and on the way back. Where nothing
    /// happens to a piece there, they lie as the all-to-all has them, and are only then put in order.
    fn stops(&self) -> [bool; 2] {
        let sharded = self.parallel.groups().topology().size(GroupKind::Shard) > 1;
        self.steps.happens().map(|happens| happens || !sharded)
    }

    /// From the order in which rows are received to that in which they are computed.
    fn arrive(&self, lane: &Lane, pieces: &Range<usize>, t: Tensor) -> Result<Tensor> {
        if !self.stops()[0] {
            return Ok(t);
        }
        let layout = self.cut.arrived(pieces.clone());
        let t = self.cut.arrange(self.arranger(), lane, &t, &self.cut.received(pieces.clone()), &layout)?;
        self.piecewise(pieces, layout, &t, lane, |piece, t| self.steps.arrive(lane, piece, t))
    }

    /// And back.
    fn leave(&self, lane: &Lane, pieces: &Range<usize>, t: Tensor) -> Result<Tensor> {
        if !self.stops()[1] {
            return Ok(t);
        }
        let layout = self.cut.arrived(pieces.clone());
        let t = self.piecewise(pieces, layout.clone(), &t, lane, |piece, t| self.steps.leave(lane, piece, t))?;
        self.cut.arrange(self.arranger(), lane, &t, &layout, &self.cut.received(pieces.clone()))
    }

    /// `f` on every piece of rows that lie piece by piece: `t` itself where `f` gives back what it is given.
    fn piecewise(
        &self,
        pieces: &Range<usize>,
        layout: Vec<Segment>,
        t: &Tensor,
        lane: &Lane,
        mut f: impl FnMut(usize, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let each = layout.len() / pieces.len();
        let (mut at, mut same, mut parts) = (0, true, Vec::with_capacity(pieces.len()));
        for (piece, segments) in pieces.clone().zip(layout.chunks(each)) {
            let rows = self.cut.total(segments);
            if rows > 0 {
                let part = t.narrow(0, at, rows)?;
                let result = f(piece, part.clone())?;
                if result.shape() != part.shape() {
                    shape_err!("piece {piece}: rows of shape {} became {}: shapes stay", part.shape(), result.shape());
                }
                same &= result.ptr() == part.ptr();
                parts.push((at, result));
            }
            at += rows;
        }
        if same {
            return Ok(t.clone());
        }
        if let [(_, whole)] = &parts[..]
            && whole.shape() == t.shape()
        {
            return Ok(whole.clone());
        }
        let out = lane.empty_like(t)?;
        for (at, part) in parts {
            self.arranger().place(lane, &part, &out.narrow(0, at, part.dim(0))?)?;
        }
        Ok(out)
    }

    /// The rows of every member of the ESP group, as the experts take them.
    fn gather(&self, lane: &Lane, pieces: &Range<usize>, t: Tensor) -> Result<Tensor> {
        let group = self.parallel.groups().get(GroupKind::Shard);
        let layout = self.cut.gathered(pieces.clone(), self.stops()[0]);
        let all = lane.empty([self.cut.total(&layout), t.dim(1)], t.dtype())?;
        if self.cut.is_even() {
            group.all_gather(lane, &t, &all)?;
        } else {
            group.all_gather_ragged(lane, &t, &self.by_member(pieces, &all)?)?;
        }
        self.cut.arrange(self.arranger(), lane, &all, &layout, &self.cut.computed(pieces.clone()))
    }

    /// The sum of all members' parts of the results, each member getting those of its own rows: in `mine`, if it is there.
    fn scatter(&self, lane: &Lane, pieces: &Range<usize>, t: Tensor, mine: Option<Tensor>) -> Result<Tensor> {
        let group = self.parallel.groups().get(GroupKind::Shard);
        let layout = self.cut.gathered(pieces.clone(), self.stops()[1]);
        let all = self.cut.arrange(self.arranger(), lane, &t, &self.cut.computed(pieces.clone()), &layout)?;
        let mine = match mine {
            Some(mine) => mine,
            None => lane.empty([self.cut.members(pieces.clone())[group.rank()], t.dim(1)], t.dtype())?,
        };
        if self.cut.is_even() {
            group.reduce_scatter(lane, &all, &mine)?;
        } else {
            group.reduce_scatter_ragged(lane, &self.by_member(pieces, &all)?, &mine)?;
        }
        Ok(mine)
    }

    /// Rows of all members of the ESP group, one after the other, cut into each member's.
    fn by_member(&self, pieces: &Range<usize>, all: &Tensor) -> Result<Vec<Tensor>> {
        let mut at = 0;
        let part = |rows| {
            at += rows;
            all.narrow(0, at - rows, rows)
        };
        self.cut.members(pieces.clone()).into_iter().map(part).collect()
    }

    /// Where a chunk's rows end, if that is not where they are.
    fn place(&self, pieces: &Range<usize>) -> Result<Option<Tensor>> {
        let Some(back) = &self.back else { return Ok(None) };
        let rows = |pieces: Range<usize>| self.cut.total(&self.cut.sent(pieces));
        back.narrow(0, rows(0..pieces.start), rows(pieces.clone())).map(Some)
    }

    /// A chunk's rows there.
    fn end(&self, lane: &Lane, chunk: usize, pieces: &Range<usize>, t: Tensor) -> Result<()> {
        match self.place(pieces)? {
            Some(place) => self.arranger().place(lane, &t, &place),
            None => self.put(chunk, lane.contiguous(&t)?),
        }
    }
}
