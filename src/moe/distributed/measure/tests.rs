use super::*;
use crate::comm::{AllToAllKind, Sizes, local};
use crate::model::ModelConfig;
use crate::schedule::ModelCosts;
use std::collections::BTreeSet;

const TIMEOUT: Duration = Duration::from_secs(60);

fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|i| n.is_multiple_of(*i)).collect()
}

/// Every legal world of `ranks` ranks.
fn worlds(ranks: usize) -> Vec<Topology> {
    let mut all = Vec::new();
    for nodes in divisors(ranks) {
        for mp in divisors(ranks) {
            for ep in divisors(ranks) {
                for esp in divisors(ranks / ep) {
                    all.push(Topology::new(Sizes::new(ranks, nodes, mp, ep, esp)).unwrap());
                }
            }
        }
    }
    all
}

/// As small as they come on this many ranks; with routers' and norms' gradients, experts' and dense ones.
fn model(ranks: usize) -> ModelConfig {
    let d = ModelConfig::default();
    let moe = MoeConfig { experts: 2 * ranks, ..d.moe.clone() };
    ModelConfig { hidden: 2 * ranks, ffn: ranks, heads: ranks, kv_heads: ranks, layers: 2, moe, ..d }
}

/// What is measured on the ranks of `topology`, the same on all of them.
fn measured(topology: Topology, all_to_all: AllToAllKind, blocks: &[BlockShape]) -> Measured {
    let layer = model(topology.ranks()).moe_layer();
    let subject = Subject::of(layer, blocks, &topology, DType::F32, Duration::ZERO).unwrap();
    let subject = Subject { rows: MAX_CHUNKS, dense_rows: 1, bytes: 1, ..subject };
    let sizes = topology.sizes();
    let mut all = local::run(sizes.ranks, TIMEOUT, |world| {
        measure(&*Parallel::new(&Lane::cpu(), world, topology, all_to_all.build())?, &subject)
    })
    .unwrap();
    assert!(all.iter().all(|m| *m == all[0]), "{sizes:?} {all_to_all}");
    all.swap_remove(0)
}

/// In each legal world of up to eight ranks, under each all-to-all, plans find the costs of every collective that they ask
/// for; nothing is measured for groups of one. Worlds that ask for the same costs of the same groups are measured once.
#[test]
fn every_cost_that_a_plan_asks_for_is_measured() {
    let mut seen = BTreeSet::new();
    for topology in [1, 2, 4, 6, 8].into_iter().flat_map(worlds) {
        for &all_to_all in AllToAllKind::ALL {
            let config = model(topology.ranks());
            let blocks = config.workload(1, 8 * topology.ranks(), &topology, all_to_all).unwrap();
            // Lanes and sizes of groups, and the level of its all-to-all: all that what is measured depends on.
            let groups: Vec<(usize, LaneKind)> =
                GroupKind::ALL.iter().map(|&kind| (topology.size(kind).min(2), topology.lane(kind))).collect();
            let levels =
                topology.node_shape(GroupKind::Expert).map(|shape| (shape.nodes.min(2), shape.per_node.min(2)));
            // Without levels every all-to-all is the direct one, as smaller worlds show.
            let kind = (topology.ranks() <= 2 || levels == Some((2, 2))).then_some(all_to_all);
            if !seen.insert(format!("{groups:?} {levels:?} {kind:?}")) {
                continue;
            }
            let Measured { profile, costs, repeats } = measured(topology, all_to_all, &blocks);
            let what = format!("{:?} {all_to_all}", topology.sizes());
            ModelCosts::new(&blocks, &topology, &profile).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(repeats, (REPEATS.0, REPEATS.0), "{what}");
            let alone = costs.iter().all(|m| m.unit == "FLOPs");
            assert_eq!(alone, topology.ranks() == 1, "{what}");
            assert!(costs.iter().all(|m| m.points.len() == LADDER.len() && m.cost.r2.is_some()), "{what}: {costs:?}");
            assert_eq!(Profile::from_toml(&profile.to_toml().unwrap()).unwrap(), profile, "{what}");
        }
    }
    assert!(seen.len() > 100, "{} worlds", seen.len());
}

#[test]
fn turns_follow_the_budget_and_have_a_median() {
    // Seconds that there are, seconds of a turn, turns.
    for (share, turn, expected) in [
        (0.0, 1.0, 3),
        (0.1, 1.0, 3),
        (4.9, 1.0, 3),
        (5.0, 1.0, 5),
        (10.5, 1.0, 9),
        (14.0, 1.0, 13),
        (1e9, 1.0, 15),
        (1.0, 0.0, 15),
    ] {
        assert_eq!(turns(share, turn), expected, "{share} s, {turn} s each");
    }
}

#[test]
fn a_layer_that_does_not_fit_is_refused() {
    let topology = Topology::new(Sizes::new(2, 1, 1, 2, 1)).unwrap();
    let (even, odd) = (model(2), MoeConfig { experts: 3, ..model(2).moe_layer() });
    let blocks = even.workload(1, 8, &topology, AllToAllKind::Direct).unwrap();
    let subject = Subject::of(odd, &blocks, &topology, DType::F32, Duration::ZERO).unwrap();
    let error = local::run(2, TIMEOUT, |world| {
        measure(&*Parallel::new(&Lane::cpu(), world, topology, AllToAllKind::Direct.build())?, &subject)
    })
    .unwrap_err()
    .to_string();
    assert!(error.contains("3 experts") && error.contains("ep = 2"), "{error}");
    let three = ModelConfig { moe: MoeConfig { experts: 3, ..even.moe.clone() }, ..even };
    let blocks = three.workload(1, 8, &topology, AllToAllKind::Direct).unwrap();
    let error = Subject::of(three.moe_layer(), &blocks, &topology, DType::F32, Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("3 experts with ep = 2"), "{error}");
}
