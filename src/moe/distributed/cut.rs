//! How rows are cut into pieces, and in which order the pieces lie at every stage of their way.

use crate::comm::{Arranger, Counts};
use crate::device::Lane;
use crate::error::{Result, config_err, shape_err};
use crate::moe::RowSplit;
use crate::schedule::MAX_CHUNKS;
use crate::tensor::Tensor;
use std::ops::Range;

/// The rows of all sources of a block of N_EP × N_ESP ranks, cut into pieces.
///
/// Each source's rows for each expert are cut once, into pieces whose sizes differ by at most one row; a chunk is a run of
/// pieces. What is computed, is computed piece by piece, so it does not depend on how many chunks there are.
pub(super) struct Cut {
    /// (N_EP, N_ESP).
    groups: (usize, usize),
    /// This rank's position in its EP and in its ESP group.
    me: (usize, usize),
    /// Rows by source, N_ESP·ep + esp, then by expert.
    rows: Vec<Vec<usize>>,
    /// Whether all of these are the same.
    even: bool,
    /// The most chunks: each source's rows for each expert are cut at multiples of one in so many.
    units: usize,
    /// Where pieces begin and end, in these units.
    bounds: Vec<usize>,
}

/// One piece of what one source has for one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Segment {
    source: usize,
    expert: usize,
    piece: usize,
}

impl Cut {
    /// Of as many rows from every source for every expert: the padded layout.
    pub(super) fn even(groups: (usize, usize), me: (usize, usize), experts: usize, rows: usize) -> Cut {
        let rows_by = vec![vec![rows; experts]; groups.0 * groups.1];
        let units = rows.clamp(1, MAX_CHUNKS);
        Cut { groups, me, rows: rows_by, even: true, units, bounds: (0..=units).collect() }
    }

    /// Of `rows[source][expert]`. The number of pieces does not depend on them: every rank runs the same graph.
    ///
    /// # Errors
    /// If there is not a row of counts per source.
    pub(super) fn ragged(groups: (usize, usize), me: (usize, usize), rows: Vec<Vec<usize>>) -> Result<Cut> {
        if rows.len() != groups.0 * groups.1 {
            shape_err!("row counts of {} sources: there are {} times {}", rows.len(), groups.0, groups.1);
        }
        Ok(Cut { groups, me, rows, even: false, units: MAX_CHUNKS, bounds: (0..=MAX_CHUNKS).collect() })
    }

    /// The same with no more pieces than passes in these numbers of chunks need. What is computed then depends on them, as
    /// far as a product's own tiling does, and is computed in fewer, larger products.
    pub(super) fn coarse(mut self, degrees: [usize; 2]) -> Cut {
        let units = self.units;
        let ends = degrees.into_iter().map(|r| r.clamp(1, units)).flat_map(|r| (0..=r).map(move |i| units * i / r));
        self.bounds = ends.collect();
        self.bounds.sort_unstable();
        self.bounds.dedup();
        self
    }

    /// Whether there are as many rows from every source for every expert.
    pub(super) fn is_even(&self) -> bool {
        self.even
    }

    /// In how many pieces rows are cut.
    pub(super) fn pieces(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The most chunks.
    pub(super) fn most_chunks(&self) -> usize {
        self.units
    }

    /// The pieces of chunk `chunk` of `of`.
    ///
    /// # Errors
    /// If pieces do not begin and end where the chunk does.
    pub(super) fn chunk(&self, chunk: usize, of: usize) -> Result<Range<usize>> {
        let piece = |chunk: usize| self.bounds.binary_search(&(self.units * chunk / of));
        match (piece(chunk), piece(chunk + 1)) {
            (Ok(begin), Ok(end)) => Ok(begin..end),
            _ => config_err!(
                "chunk {chunk} of {of} of rows that are cut in pieces at {:?} of {}",
                self.bounds,
                self.units
            ),
        }
    }

    fn source(&self, ep: usize, esp: usize) -> usize {
        ep * self.groups.1 + esp
    }

    fn here(&self) -> usize {
        self.source(self.me.0, self.me.1)
    }

    /// The experts of a member of the EP group.
    fn experts(&self, ep: usize) -> Range<usize> {
        let each = self.rows[0].len() / self.groups.0;
        ep * each..(ep + 1) * each
    }

    fn len(&self, segment: Segment) -> usize {
        let rows = self.rows[segment.source][segment.expert];
        let before = |piece: usize| rows * self.bounds[piece] / self.units;
        before(segment.piece + 1) - before(segment.piece)
    }

    /// The rows of a layout.
    pub(super) fn total(&self, layout: &[Segment]) -> usize {
        layout.iter().map(|&s| self.len(s)).sum()
    }

    /// What this rank has for all experts, as the order laid it out: [expert][piece].
    pub(super) fn ordered(&self) -> Vec<Segment> {
        self.sent(0..self.pieces())
    }

    /// Some pieces of it, as the all-to-all takes them: [expert][piece], which is by destination.
    pub(super) fn sent(&self, pieces: Range<usize>) -> Vec<Segment> {
        let source = self.here();
        let of = |expert| pieces.clone().map(move |piece| Segment { source, expert, piece });
        (0..self.rows[0].len()).flat_map(of).collect()
    }

    /// As they come out of it: [source][expert][piece].
    pub(super) fn received(&self, pieces: Range<usize>) -> Vec<Segment> {
        self.received_by(pieces, self.me.1)
    }

    fn received_by(&self, pieces: Range<usize>, esp: usize) -> Vec<Segment> {
        let mut all = Vec::new();
        for ep in 0..self.groups.0 {
            for expert in self.experts(self.me.0) {
                let source = self.source(ep, esp);
                all.extend(pieces.clone().map(|piece| Segment { source, expert, piece }));
            }
        }
        all
    }

    /// Of the same rows, piece by piece: [piece][expert][source].
    pub(super) fn arrived(&self, pieces: Range<usize>) -> Vec<Segment> {
        self.piecewise(pieces, self.me.1..self.me.1 + 1)
    }

    /// As the ESP group has what its members received, one member after another, each member's rows as they came out of
    /// the all-to-all or `piecewise`.
    pub(super) fn gathered(&self, pieces: Range<usize>, piecewise: bool) -> Vec<Segment> {
        let of = |esp| match piecewise {
            true => self.piecewise(pieces.clone(), esp..esp + 1),
            false => self.received_by(pieces.clone(), esp),
        };
        (0..self.groups.1).flat_map(of).collect()
    }

    /// How many of these rows are each member's.
    pub(super) fn members(&self, pieces: Range<usize>) -> Vec<usize> {
        (0..self.groups.1).map(|esp| self.total(&self.received_by(pieces.clone(), esp))).collect()
    }

    /// As the experts take them: [piece][expert][source].
    pub(super) fn computed(&self, pieces: Range<usize>) -> Vec<Segment> {
        self.piecewise(pieces, 0..self.groups.1)
    }

    fn piecewise(&self, pieces: Range<usize>, members: Range<usize>) -> Vec<Segment> {
        let mut all = Vec::new();
        for piece in pieces {
            for expert in self.experts(self.me.0) {
                for ep in 0..self.groups.0 {
                    let segment = |esp| Segment { source: self.source(ep, esp), expert, piece };
                    all.extend(members.clone().map(segment));
                }
            }
        }
        all
    }

    /// How the rows of one piece are divided among this rank's experts.
    pub(super) fn split(&self, piece: usize) -> RowSplit {
        let experts = self.experts(self.me.0);
        let sources = self.groups.0 * self.groups.1;
        if self.even {
            let each = sources * self.len(Segment { source: 0, expert: 0, piece });
            return RowSplit::Even { experts: experts.len(), each };
        }
        let mut offsets = vec![0];
        for expert in experts {
            let rows: usize = (0..sources).map(|source| self.len(Segment { source, expert, piece })).sum();
            offsets.push(offsets[offsets.len() - 1] + rows);
        }
        RowSplit::Ragged(offsets)
    }

    /// How many rows the members of this rank's EP group send each other in these pieces, to the experts or back.
    ///
    /// # Errors
    /// None that a cut can have.
    pub(super) fn counts(&self, pieces: Range<usize>, back: bool) -> Result<Counts> {
        let rows = |from: usize, to: usize| {
            let (home, experts) = if back { (to, from) } else { (from, to) };
            let source = self.source(home, self.me.1);
            let of = |expert| pieces.clone().map(move |piece| Segment { source, expert, piece });
            self.experts(experts).flat_map(of).map(|s| self.len(s)).sum()
        };
        let ranks = self.groups.0;
        match self.even {
            true => Ok(Counts::even(ranks, rows(0, 0))),
            false => Counts::ragged((0..ranks).map(|from| (0..ranks).map(|to| rows(from, to)).collect()).collect()),
        }
    }

    /// Rows that lie as `have` says in the order of `want`.
    ///
    /// # Errors
    /// If the rows are not what `have` says, or the device has no memory left.
    pub(super) fn arrange(
        &self,
        arranger: &Arranger,
        lane: &Lane,
        t: &Tensor,
        have: &[Segment],
        want: &[Segment],
    ) -> Result<Tensor> {
        let mut end = 0;
        let mut places: Vec<(Segment, Range<usize>)> = Vec::with_capacity(have.len());
        for &segment in have {
            places.push((segment, end..end + self.len(segment)));
            end += self.len(segment);
        }
        if t.dim(0) != end {
            shape_err!("rows of shape {} where {end} rows are on their way", t.shape());
        }
        places.sort_unstable_by_key(|place| place.0);
        let find = |segment: &Segment| {
            let at = places.binary_search_by_key(segment, |place| place.0);
            at.map_or(0..0, |at| places[at].1.clone())
        };
        arranger.arrange(lane, t, &want.iter().map(find).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_are_runs_of_pieces_and_pieces_differ_by_a_row(rows in 0usize..70, of in 1usize..=16) {
            let cut = Cut::even((1, 1), (0, 0), 1, rows);
            let sizes: Vec<usize> = (0..cut.pieces()).map(|p| cut.total(&cut.sent(p..p + 1))).collect();
            prop_assert_eq!(sizes.iter().sum::<usize>(), rows);
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            let of = of.min(cut.pieces());
            let chunks: Vec<Range<usize>> = (0..of).map(|i| cut.chunk(i, of).unwrap()).collect();
            prop_assert!(chunks.iter().all(|c| !c.is_empty()));
            prop_assert!(chunks.windows(2).all(|c| c[0].end == c[1].start));
            prop_assert_eq!((chunks[0].start, chunks[of - 1].end), (0, cut.pieces()));
        }

        #[test]
        fn coarse_pieces_serve_both_passes(rows in 0usize..70, forward in 1usize..=16, backward in 1usize..=16) {
            let fine = Cut::even((1, 1), (0, 0), 1, rows);
            let degrees = [forward, backward].map(|r| r.min(fine.most_chunks()));
            let coarse = Cut::even((1, 1), (0, 0), 1, rows).coarse(degrees);
            prop_assert!(coarse.pieces() < degrees[0] + degrees[1]);
            prop_assert_eq!(coarse.total(&coarse.ordered()), rows);
            for of in degrees {
                for i in 0..of {
                    let rows = |cut: &Cut| cut.total(&cut.sent(cut.chunk(i, of).unwrap()));
                    prop_assert_eq!(rows(&coarse), rows(&fine));
                }
            }
            if degrees[0] == degrees[1] {
                prop_assert_eq!(coarse.pieces(), degrees[0]);
            }
        }

        #[test]
        fn every_layout_holds_the_same_rows(ep in 1usize..4, esp in 1usize..4, each in 1usize..3, seed in 0usize..99, me in 0usize..9) {
            let me = (me % ep, me % esp);
            let rows = (0..ep * esp).map(|s| (0..ep * each).map(|e| (seed + 7 * s + 5 * e) % 23).collect()).collect();
            let cut = Cut::ragged((ep, esp), me, rows).unwrap();
            let pieces = 3..11;
            let sorted = |mut layout: Vec<Segment>| { layout.sort_unstable(); layout };
            let received = sorted(cut.received(pieces.clone()));
            prop_assert_eq!(&received, &sorted(cut.arrived(pieces.clone())));
            for piecewise in [false, true] {
                let gathered = cut.gathered(pieces.clone(), piecewise);
                let own = if piecewise { cut.arrived(pieces.clone()) } else { cut.received(pieces.clone()) };
                prop_assert!(gathered.chunks(own.len()).nth(me.1).is_some_and(|mine| mine == own));
                prop_assert_eq!(cut.members(pieces.clone())[me.1], cut.total(&own));
                prop_assert_eq!(sorted(gathered), sorted(cut.computed(pieces.clone())));
            }
            let counts = cut.counts(pieces.clone(), false).unwrap();
            let back = cut.counts(pieces.clone(), true).unwrap();
            let sum = |f: &dyn Fn(usize) -> usize| (0..ep).map(f).sum::<usize>();
            prop_assert_eq!(sum(&|from| counts.rows(from, me.0)), cut.total(&received));
            prop_assert_eq!(sum(&|to| counts.rows(me.0, to)), cut.total(&cut.sent(pieces.clone())));
            for (a, b) in (0..ep).flat_map(|a| (0..ep).map(move |b| (a, b))) {
                prop_assert_eq!(counts.rows(a, b), back.rows(b, a));
            }
            for piece in pieces {
                let total = cut.total(&cut.computed(piece..piece + 1));
                prop_assert_eq!(cut.split(piece).range(each - 1).unwrap().end, total);
            }
        }
    }
}
