//! An all-to-all of one's own: a ring, in which every rank only ever talks to its neighbours.
//!
//! `cargo run --release --example custom_all_to_all`
//!
//! What a rank has for the others goes around hop by hop: at each, a rank takes out what is its own and passes the rest
//! on. It moves more than the direct all-to-all, but needs no link other than the ring's. Four ranks, threads here, check
//! it against the direct one.

use fsmoe::comm::{AllToAll, Counts, Direct, GroupComms, all_phases, arrange, local};
use fsmoe::device::{Lane, LaneKind};
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Tensor};
use fsmoe::{Error, Result};
use std::ops::Range;
use std::time::Duration;

struct Ring;

impl AllToAll for Ring {
    fn name(&self) -> &str {
        "ring"
    }

    fn phases(&self, comms: &GroupComms) -> Vec<LaneKind> {
        vec![comms.lane()]
    }

    fn run(&self, _phase: usize, comms: &GroupComms, lane: &Lane, counts: &Counts, rows: &Tensor) -> Result<Tensor> {
        let (group, p) = (comms.group(), counts.ranks());
        let (me, width) = (group.rank(), rows.dim(1));
        let nothing = || lane.empty([0, width], rows.dtype());

        // What came from each rank, this one's own rows first; what travels lies by destination, the nearest first.
        let mut arrived = vec![nothing()?; p];
        let blocks = counts.ranges((0..p).map(|to| (me, to)));
        arrived[me] = rows.narrow(0, blocks[me].start, blocks[me].len())?;
        let onward: Vec<Range<usize>> = (1..p).map(|hop| blocks[(me + hop) % p].clone()).collect();
        let mut travelling = arrange(lane, rows, &onward)?;

        for hop in 1..p {
            // What the neighbour passes on started `hop` ranks back and is for this rank and those after it.
            let from = (me + p - hop) % p;
            let parts = counts.ranges((hop..p).map(|h| (from, (from + h) % p)));
            let coming = lane.empty([parts.last().map_or(0, |r| r.end), width], rows.dtype())?;
            let (mut sends, mut recvs) = (vec![nothing()?; p], Vec::new());
            sends[(me + 1) % p] = travelling;
            for rank in 0..p {
                recvs.push(if rank == (me + p - 1) % p { coming.clone() } else { nothing()? });
            }
            group.all_to_all_ragged(lane, &sends, &recvs)?;
            arrived[from] = coming.narrow(0, 0, parts[0].len())?;
            travelling = coming.narrow(0, parts[0].len(), coming.dim(0) - parts[0].len())?;
        }

        let out = lane.empty([arrived.iter().map(|t| t.dim(0)).sum(), width], rows.dtype())?;
        let mut at = 0;
        for part in arrived.iter().filter(|t| t.dim(0) > 0) {
            lane.copy(part, &out.narrow(0, at, part.dim(0))?)?;
            at += part.dim(0);
        }
        Ok(out)
    }
}

fn main() -> Result<()> {
    const RANKS: usize = 4;
    const WIDTH: usize = 8;
    // Rank i sends i + 2j rows to rank j.
    let counts = Counts::ragged((0..RANKS).map(|i| (0..RANKS).map(|j| i + 2 * j).collect()).collect())?;
    let received = local::run(RANKS, Duration::from_secs(10), |comm| {
        let rank = comm.rank();
        let lane = Lane::cpu();
        let comms = GroupComms::new(comm, LaneKind::IntraNode, None)?;
        let sent = counts.ranges((0..RANKS).map(|to| (rank, to))).last().map_or(0, |r| r.end);
        let rows = lane.empty([sent, WIDTH], DType::F32)?;
        lane.normal(Counter { seed: 1, purpose: Purpose::Test, step: rank as u64 }, 0, &rows)?;

        let run = |algorithm: &dyn AllToAll| {
            let out = all_phases(algorithm, &comms, |_| lane.clone(), &counts, &rows)?;
            lane.to_host(&out)?.to_vec::<f32>()
        };
        let (ring, direct) = (run(&Ring)?, run(&Direct)?);
        if ring != direct {
            return Err(Error::Config(format!("rank {rank}: the ring brought other rows than the direct all-to-all")));
        }
        Ok(ring.len() / WIDTH)
    })?;
    println!("ring all-to-all among {RANKS} ranks: {received:?} rows received, the same as by the direct one");
    Ok(())
}
