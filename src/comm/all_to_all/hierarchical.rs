//! All-to-alls that send fewer, larger messages between nodes, for groups of several nodes with several ranks on each;
//! other groups have no two levels, and both algorithms are then [`Direct`].
//!
//! Below, rank (a, l) is the l-th of the group's a-th node.

use super::{AllToAll, Arranger, Counts, Direct, GroupComms, Levels, exchange};
use crate::device::{Lane, LaneKind};
use crate::error::Result;
use crate::tensor::Tensor;

/// Hetu's (Nie et al. 2022): the ranks of a node give their rows to the first of them, these leaders exchange them, and
/// each hands the rows of its node out. Between two nodes goes one message.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hierarchical1d;

/// Tutel's and DeepSpeed's (Hwang et al. 2023, Rajbhandari et al. 2022): an all-to-all inside the node brings rows to the
/// rank whose place on the node is their destination's, then one among the ranks of equal place brings them to its node.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hierarchical2d;

/// Where one rank stands in a group of two levels.
struct Place<'a> {
    levels: &'a Levels,
    counts: &'a Counts,
    arranger: &'a Arranger,
    nodes: usize,
    per_node: usize,
    /// Its node in the group.
    node: usize,
    /// Its place on the node.
    local: usize,
}

impl<'a> Place<'a> {
    fn new(comms: &'a GroupComms, levels: &'a Levels, counts: &'a Counts) -> Self {
        let (nodes, per_node) = (levels.shape.nodes, levels.shape.per_node);
        let rank = comms.group().rank();
        let (node, local, arranger) = (rank / per_node, rank % per_node, comms.arranger());
        Place { levels, counts, arranger, nodes, per_node, node, local }
    }

    /// The rank's number in the group.
    fn rank(&self, node: usize, local: usize) -> usize {
        node * self.per_node + local
    }

    /// The rows of all pairs of a source among `from` and a destination among `to`, each of (node, local).
    fn sum(&self, from: &[(usize, usize)], to: &[(usize, usize)]) -> usize {
        let rows =
            |&(a, l): &(usize, usize), &(b, k): &(usize, usize)| self.counts.rows(self.rank(a, l), self.rank(b, k));
        from.iter().map(|f| to.iter().map(|t| rows(f, t)).sum::<usize>()).sum()
    }

    /// The ranks of a node.
    fn of_node(&self, node: usize) -> Vec<(usize, usize)> {
        (0..self.per_node).map(|l| (node, l)).collect()
    }

    /// The ranks in a place, over all nodes.
    fn in_place(&self, local: usize) -> Vec<(usize, usize)> {
        (0..self.nodes).map(|a| (a, local)).collect()
    }

    fn all(&self) -> Vec<(usize, usize)> {
        (0..self.nodes).flat_map(|a| self.of_node(a)).collect()
    }

    /// Rows in the order of `have`, pairs of (source, destination), in the order of `want`.
    fn arrange(&self, lane: &Lane, t: &Tensor, have: &[Pair], want: &[Pair]) -> Result<Tensor> {
        let number = |&((a, l), (b, k)): &Pair| (self.rank(a, l), self.rank(b, k));
        let ranges = self.counts.ranges(have.iter().map(number));
        let mut at: Vec<(Pair, std::ops::Range<usize>)> = have.iter().copied().zip(ranges).collect();
        at.sort_unstable_by_key(|(pair, _)| *pair);
        let find = |pair: &Pair| at.binary_search_by_key(pair, |(p, _)| *p).map_or(0..0, |i| at[i].1.clone());
        self.arranger.arrange(lane, t, &want.iter().map(find).collect::<Vec<_>>())
    }
}

type Member = (usize, usize);
type Pair = (Member, Member);

/// All pairs, sources outermost.
fn pairs(from: &[Member], to: &[Member]) -> Vec<Pair> {
    from.iter().flat_map(|&f| to.iter().map(move |&t| (f, t))).collect()
}

impl AllToAll for Hierarchical1d {
    fn name(&self) -> &str {
        "1dh"
    }

    fn phases(&self, comms: &GroupComms) -> Vec<LaneKind> {
        match comms.levels() {
            None => Direct.phases(comms),
            Some(_) => vec![LaneKind::IntraNode, LaneKind::InterNode, LaneKind::IntraNode],
        }
    }

    fn run(&self, phase: usize, comms: &GroupComms, lane: &Lane, counts: &Counts, input: &Tensor) -> Result<Tensor> {
        match comms.levels() {
            None => Direct.run(phase, comms, lane, counts, input),
            Some(levels) => self.phase(phase, &Place::new(comms, levels, counts), lane, input, None),
        }
    }

    fn run_into(
        &self,
        phase: usize,
        comms: &GroupComms,
        lane: &Lane,
        counts: &Counts,
        input: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let Some(levels) = comms.levels() else { return Direct.run_into(phase, comms, lane, counts, input, out) };
        let p = Place::new(comms, levels, counts);
        let t = self.phase(phase, &p, lane, input, Some(out))?;
        p.arranger.place(lane, &t, out)
    }
}

impl Hierarchical1d {
    /// A phase, whose result is in `out` if there is one and it is received from others.
    fn phase(&self, phase: usize, p: &Place<'_>, lane: &Lane, input: &Tensor, out: Option<&Tensor>) -> Result<Tensor> {
        let (leader, here, all) = (p.local == 0, p.of_node(p.node), p.all());
        match phase {
            // Everything to the leader, whose rows then lie by source here, then by destination.
            0 => {
                let mut send = vec![0; p.per_node];
                send[0] = p.sum(&[(p.node, p.local)], &all);
                let from = |&member: &Member| if leader { p.sum(&[member], &all) } else { 0 };
                let recv: Vec<usize> = here.iter().map(from).collect();
                exchange(&*p.levels.intra, lane, input, &send, &recv, out)
            }
            // Between leaders, by destination node; what comes lies by source, then by destination here.
            1 if leader => {
                let want: Vec<Pair> = (0..p.nodes).flat_map(|b| pairs(&here, &p.of_node(b))).collect();
                let rows = p.arrange(lane, input, &pairs(&here, &all), &want)?;
                let send: Vec<usize> = (0..p.nodes).map(|b| p.sum(&here, &p.of_node(b))).collect();
                let recv: Vec<usize> = (0..p.nodes).map(|a| p.sum(&p.of_node(a), &here)).collect();
                exchange(&*p.levels.inter, lane, &rows, &send, &recv, out)
            }
            1 => Ok(input.clone()),
            // From the leader, by destination.
            _ => {
                let rows = match leader {
                    true => {
                        let want: Vec<Pair> = here.iter().flat_map(|&to| pairs(&all, &[to])).collect();
                        p.arrange(lane, input, &pairs(&all, &here), &want)?
                    }
                    false => input.clone(),
                };
                let to = |&member: &Member| if leader { p.sum(&all, &[member]) } else { 0 };
                let send: Vec<usize> = here.iter().map(to).collect();
                let mut recv = vec![0; p.per_node];
                recv[0] = p.sum(&all, &[(p.node, p.local)]);
                exchange(&*p.levels.intra, lane, &rows, &send, &recv, out)
            }
        }
    }
}

impl AllToAll for Hierarchical2d {
    fn name(&self) -> &str {
        "2dh"
    }

    fn phases(&self, comms: &GroupComms) -> Vec<LaneKind> {
        match comms.levels() {
            None => Direct.phases(comms),
            Some(_) => vec![LaneKind::IntraNode, LaneKind::InterNode],
        }
    }

    fn run(&self, phase: usize, comms: &GroupComms, lane: &Lane, counts: &Counts, input: &Tensor) -> Result<Tensor> {
        match comms.levels() {
            None => Direct.run(phase, comms, lane, counts, input),
            Some(levels) => self.phase(phase, &Place::new(comms, levels, counts), lane, input, None),
        }
    }

    fn run_into(
        &self,
        phase: usize,
        comms: &GroupComms,
        lane: &Lane,
        counts: &Counts,
        input: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let Some(levels) = comms.levels() else { return Direct.run_into(phase, comms, lane, counts, input, out) };
        let p = Place::new(comms, levels, counts);
        let t = self.phase(phase, &p, lane, input, Some(out))?;
        p.arranger.place(lane, &t, out)
    }
}

impl Hierarchical2d {
    /// A phase, whose result is in `out` if there is one and it is received from others.
    fn phase(&self, phase: usize, p: &Place<'_>, lane: &Lane, input: &Tensor, out: Option<&Tensor>) -> Result<Tensor> {
        let (me, here, mine) = ([(p.node, p.local)], p.of_node(p.node), p.in_place(p.local));
        if phase == 0 {
            // To the rank here in the destination's place; what comes lies by source here, then by destination node.
            let want: Vec<Pair> = (0..p.per_node).flat_map(|k| pairs(&me, &p.in_place(k))).collect();
            let rows = p.arrange(lane, input, &pairs(&me, &p.all()), &want)?;
            let send: Vec<usize> = (0..p.per_node).map(|k| p.sum(&me, &p.in_place(k))).collect();
            let recv: Vec<usize> = here.iter().map(|&from| p.sum(&[from], &mine)).collect();
            return exchange(&*p.levels.intra, lane, &rows, &send, &recv, out);
        }
        // The layout transform, then to the destination's node; what comes lies by source.
        let want: Vec<Pair> = mine.iter().flat_map(|&to| pairs(&here, &[to])).collect();
        let rows = p.arrange(lane, input, &pairs(&here, &mine), &want)?;
        let send: Vec<usize> = mine.iter().map(|&to| p.sum(&here, &[to])).collect();
        let recv: Vec<usize> = (0..p.nodes).map(|a| p.sum(&p.of_node(a), &me)).collect();
        exchange(&*p.levels.inter, lane, &rows, &send, &recv, out)
    }
}
