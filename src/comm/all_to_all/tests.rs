use super::*;
use crate::comm::{Groups, Sizes, Topology, local};
use crate::device::MemoryKernels;
use crate::device::cpu::Cpu;
use crate::rng::{Counter, Purpose};
use crate::tensor::DType;
use proptest::prelude::*;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(20);

fn lane(kind: LaneKind) -> Lane {
    Lane::new(Arc::new(Cpu), kind)
}

fn rows(rank: usize, n: usize, width: usize, dtype: DType) -> Tensor {
    let t = Tensor::host([n, width], dtype);
    Cpu.normal(Counter { seed: 9, purpose: Purpose::Test, step: rank as u64 }, 0, &t).unwrap();
    t
}

/// The elements as f64, which holds every value of a float type.
fn wide(t: &Tensor) -> Vec<f64> {
    lane(LaneKind::Compute).cast(t, DType::F64).unwrap().to_vec().unwrap()
}

/// An algorithm of which only the required methods are there.
struct Unsaid(Box<dyn AllToAll>);

impl AllToAll for Unsaid {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn phases(&self, comms: &GroupComms) -> Vec<LaneKind> {
        self.0.phases(comms)
    }

    fn run(&self, phase: usize, comms: &GroupComms, lane: &Lane, counts: &Counts, input: &Tensor) -> Result<Tensor> {
        self.0.run(phase, comms, lane, counts, input)
    }
}

#[test]
fn names_are_read_back() {
    for &kind in AllToAllKind::ALL {
        assert_eq!(kind.build().name(), kind.name());
        assert_eq!(kind.name().parse::<AllToAllKind>().unwrap(), kind);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_algorithm_equals_direct_to_the_bit(
        nodes in 1usize..=4,
        per_node in 1usize..=4,
        width in 1usize..5,
        even in prop::bool::ANY,
        seed in 0usize..1000,
        dtype in prop::sample::select(vec![DType::F64, DType::F32, DType::BF16, DType::F16]),
    ) {
        let p = nodes * per_node;
        let counts = match even {
            true => Counts::even(p, seed % 4),
            false => Counts::ragged((0..p).map(|i| (0..p).map(|j| (seed + 5 * i + 3 * j + i * j) % 4).collect()).collect()).unwrap(),
        };
        local::run(p, TIMEOUT, |comm| {
            let me = comm.rank();
            let group = GroupComms::new(comm, LaneKind::InterNode, Some(NodeShape { nodes, per_node }))?;
            let sent = counts.ranges((0..p).map(|to| (me, to))).last().map_or(0, |r| r.end);
            let mine = rows(me, sent, width, dtype);
            let mut want = Vec::new();
            for from in 0..p {
                let ranges = counts.ranges((0..p).map(|to| (from, to)));
                let all = rows(from, ranges[p - 1].end, width, dtype);
                want.extend(wide(&all.narrow(0, ranges[me].start, ranges[me].len())?));
            }
            for &kind in AllToAllKind::ALL {
                let algorithm = kind.build();
                let phases = algorithm.phases(&group).len();
                assert_eq!(phases, match kind {
                    _ if nodes == 1 || per_node == 1 => 1,
                    AllToAllKind::Direct => 1,
                    AllToAllKind::Hierarchical1d => 3,
                    AllToAllKind::Hierarchical2d => 2,
                });
                let got = all_phases(&*algorithm, &group, lane, &counts, &mine)?;
                assert_eq!(got.shape().dims(), [want.len() / width, width], "{kind}");
                assert!(wide(&got) == want, "{kind}: other rows");
                // Into the middle of something larger, and by an algorithm that does not say how.
                for algorithm in [kind.build(), Box::new(Unsaid(kind.build()))] {
                    let (around, rows) = (rows(99, want.len() / width + 4, width, dtype), want.len() / width);
                    let outside = |t: &Tensor| [wide(t)[..3 * width].to_vec(), wide(t)[3 * width + want.len()..].to_vec()];
                    let (before, out) = (outside(&around), around.narrow(0, 3, rows)?);
                    let mut t = mine.clone();
                    for phase in 0..phases - 1 {
                        t = algorithm.run(phase, &group, &lane(LaneKind::Compute), &counts, &t)?;
                    }
                    algorithm.run_into(phases - 1, &group, &lane(LaneKind::Compute), &counts, &t, &out)?;
                    assert!(wide(&out) == want && outside(&around) == before, "{kind}: other rows in their place");
                }
            }
            Ok(())
        }).unwrap();
    }

    #[test]
    fn every_group_of_a_topology_talks(p in 1usize..=16, picks in prop::array::uniform4(0usize..99)) {
        let divisor = |n: usize, pick: usize| {
            let all: Vec<usize> = (1..=n).filter(|i| n.is_multiple_of(*i)).collect();
            all[pick % all.len()]
        };
        let (mp, ep) = (divisor(p, picks[0]), divisor(p, picks[1]));
        let sizes = Sizes { ranks: p, nodes: divisor(p, picks[2]), dp: p / mp, mp, ep, esp: divisor(p / ep, picks[3]) };
        let topology = Topology::new(sizes).unwrap();
        local::run(p, TIMEOUT, |comm| {
            let groups = Groups::new(comm, topology)?;
            for &kind in crate::comm::GroupKind::ALL {
                let group = groups.get(kind);
                assert_eq!(group.ranks(), topology.members(kind, groups.rank()));
                let sum = Tensor::from_slice(&[groups.rank() as f64], [1])?;
                group.all_reduce(&lane(groups.lane(kind)), &sum)?;
                assert_eq!(sum.to_vec::<f64>()?[0], group.ranks().iter().sum::<usize>() as f64);
            }
            let counts = Counts::even(sizes.ep, 2);
            let mine = rows(groups.rank(), 2 * sizes.ep, 3, DType::F32);
            let direct = all_phases(&Direct, groups.expert(), lane, &counts, &mine)?;
            for &kind in AllToAllKind::ALL {
                assert!(wide(&all_phases(&*kind.build(), groups.expert(), lane, &counts, &mine)?) == wide(&direct));
            }
            Ok(())
        }).unwrap();
    }
}

#[test]
fn wrong_rows_and_shapes_are_errors_on_all_ranks() {
    let result = local::run(2, TIMEOUT, |comm| {
        let group = GroupComms::new(comm, LaneKind::IntraNode, None)?;
        let mine = rows(0, 2 + group.group().rank(), 1, DType::F32);
        all_phases(&Direct, &group, lane, &Counts::even(2, 1), &mine)
    });
    let message = result.unwrap_err().to_string();
    assert!(message.contains("rows of shape (3, 1), and 2 rows to send"), "{message}");
    let result = local::run(2, TIMEOUT, |comm| {
        let group = GroupComms::new(comm, LaneKind::IntraNode, None)?;
        let (mine, out) = (rows(0, 2, 1, DType::F32), rows(0, 2 + group.group().rank(), 1, DType::F32));
        Direct.run_into(0, &group, &lane(LaneKind::IntraNode), &Counts::even(2, 1), &mine, &out)
    });
    let message = result.unwrap_err().to_string();
    assert!(message.contains("f32 (2, 1) into f32 (3, 1)"), "{message}");
    let world = local::world(2, TIMEOUT).unwrap().remove(0);
    let shape = NodeShape { nodes: 3, per_node: 2 };
    let message = GroupComms::new(world, LaneKind::InterNode, Some(shape)).err().unwrap().to_string();
    assert!(message.contains("3 nodes of 2 ranks for a group of 2"), "{message}");
    assert!(Counts::ragged(vec![vec![1, 2], vec![1]]).is_err());
}
