//! One all-to-all among all.

use super::{AllToAll, Counts, GroupComms, exchange};
use crate::device::{Lane, LaneKind};
use crate::error::Result;
use crate::tensor::Tensor;

/// Every rank sends to every other: one all-to-all of the group (NCCL's).
#[derive(Clone, Copy, Debug, Default)]
pub struct Direct;

impl AllToAll for Direct {
    fn name(&self) -> &str {
        "direct"
    }

    fn phases(&self, comms: &GroupComms) -> Vec<LaneKind> {
        vec![comms.lane()]
    }

    fn run(&self, _phase: usize, comms: &GroupComms, lane: &Lane, counts: &Counts, input: &Tensor) -> Result<Tensor> {
        all_to_all(comms, lane, counts, input, None)
    }

    fn run_into(
        &self,
        _phase: usize,
        comms: &GroupComms,
        lane: &Lane,
        counts: &Counts,
        input: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        all_to_all(comms, lane, counts, input, Some(out)).map(drop)
    }
}

fn all_to_all(
    comms: &GroupComms,
    lane: &Lane,
    counts: &Counts,
    input: &Tensor,
    out: Option<&Tensor>,
) -> Result<Tensor> {
    let (group, ranks) = (comms.group(), counts.ranks());
    let me = group.rank();
    let send: Vec<usize> = (0..ranks).map(|to| counts.rows(me, to)).collect();
    let recv: Vec<usize> = (0..ranks).map(|from| counts.rows(from, me)).collect();
    exchange(&**group, lane, input, &send, &recv, out)
}
