//! How the ranks of a world are divided: nodes, and the groups of data, model, expert and expert-sharding parallelism.

use crate::device::LaneKind;
use crate::error::{Result, config_err};
use crate::named::named;
use serde::{Deserialize, Serialize};

/// The sizes of a world and of its groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sizes {
    /// P, ranks in the world.
    pub ranks: usize,
    /// Nodes; node n has ranks n·P/nodes and following.
    pub nodes: usize,
    /// N_DP: copies of the dense part, each on data of its own. N_DP·N_MP = P.
    pub dp: usize,
    /// N_MP: ranks that share one copy of the dense part.
    pub mp: usize,
    /// N_EP: ranks that the experts are divided among. N_EP·N_ESP divides P; what is left are replicas.
    pub ep: usize,
    /// N_ESP: ranks that each expert's inner width is divided among.
    pub esp: usize,
}

impl Sizes {
    /// `ranks` on `nodes`, in groups of these sizes; N_DP is what is left.
    pub fn new(ranks: usize, nodes: usize, mp: usize, ep: usize, esp: usize) -> Self {
        Sizes { ranks, nodes, dp: ranks.checked_div(mp).unwrap_or(0), mp, ep, esp }
    }
}

/// A division of the world into groups; every rank is in one group of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// All ranks: what reduces the gradients of routers and whatever else every rank holds (DP × MP).
    World,
    /// The ranks that hold the same shard of the dense part: what reduces its gradients.
    Data,
    /// The ranks that hold one copy of the dense part together: consecutive ones.
    Model,
    /// The ranks that hold all experts together: what dispatch and combine run over.
    Expert,
    /// The ranks that hold the shards of one set of experts: consecutive ones.
    Shard,
    /// The ranks that hold the same shard of the same experts: what reduces their gradients.
    Replica,
}
named!(GroupKind, "group", {
    World => "world", Data => "dp", Model => "mp", Expert => "ep", Shard => "esp", Replica => "replicas",
});

/// A group as nodes × members of each: member `a·per_node + l` is the l-th of the group's a-th node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeShape {
    /// Nodes that the group spans.
    pub nodes: usize,
    /// The group's members in each.
    pub per_node: usize,
}

/// Nodes × ranks and their groups. In the usual layout MP and ESP groups lie in a node and DP and EP groups cross nodes,
/// but any sizes that divide the ranks are legal.
///
/// With b = N_EP·N_ESP: rank r is member r mod N_MP of its MP group, r / N_MP of its DP group, r mod N_ESP of its ESP
/// group, (r mod b) / N_ESP of its EP group, and r / b of its replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    sizes: Sizes,
}

impl Topology {
    /// Checks `sizes` against each other.
    ///
    /// # Errors
    /// Names the first size that breaks a rule, and the rule.
    pub fn new(sizes: Sizes) -> Result<Self> {
        let Sizes { ranks, nodes, dp, mp, ep, esp } = sizes;
        // dp last: where nobody gave it, it comes of mp.
        let named = [("ranks", ranks), ("nodes", nodes), ("mp", mp), ("ep", ep), ("esp", esp), ("dp", dp)];
        for (name, value) in named {
            if value == 0 {
                config_err!("{name} = 0: it is at least 1");
            }
            if !ranks.is_multiple_of(value) {
                config_err!("{name} = {value} with {ranks} ranks: it divides the ranks");
            }
        }
        if dp.checked_mul(mp) != Some(ranks) {
            config_err!("dp = {dp} and mp = {mp} with {ranks} ranks: dp times mp is the number of ranks");
        }
        match ep.checked_mul(esp) {
            Some(block) if ranks.is_multiple_of(block) => Ok(Topology { sizes }),
            _ => config_err!("ep = {ep} and esp = {esp} with {ranks} ranks: ep times esp divides the ranks"),
        }
    }

    /// A world of one rank.
    pub fn single() -> Self {
        Topology { sizes: Sizes { ranks: 1, nodes: 1, dp: 1, mp: 1, ep: 1, esp: 1 } }
    }

    /// The sizes.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// P.
    pub fn ranks(&self) -> usize {
        self.sizes.ranks
    }

    /// The node that `rank` is on.
    pub fn node(&self, rank: usize) -> usize {
        rank / (self.sizes.ranks / self.sizes.nodes)
    }

    /// Members of each group of this kind.
    pub fn size(&self, kind: GroupKind) -> usize {
        let Sizes { ranks, dp, mp, ep, esp, .. } = self.sizes;
        match kind {
            GroupKind::World => ranks,
            GroupKind::Data => dp,
            GroupKind::Model => mp,
            GroupKind::Expert => ep,
            GroupKind::Shard => esp,
            GroupKind::Replica => ranks / (ep * esp),
        }
    }

    /// The world ranks of `rank`'s group of this kind, ascending.
    pub fn members(&self, kind: GroupKind, rank: usize) -> Vec<usize> {
        let Sizes { mp, ep, esp, .. } = self.sizes;
        let block = ep * esp;
        let (first, step) = match kind {
            GroupKind::World => (0, 1),
            GroupKind::Data => (rank % mp, mp),
            GroupKind::Model => (rank - rank % mp, 1),
            GroupKind::Expert => (rank - rank % block + rank % esp, esp),
            GroupKind::Shard => (rank - rank % esp, 1),
            GroupKind::Replica => (rank % block, block),
        };
        (0..self.size(kind)).map(|i| first + i * step).collect()
    }

    /// `rank`'s position in its group of this kind.
    pub fn position(&self, kind: GroupKind, rank: usize) -> usize {
        let Sizes { mp, ep, esp, .. } = self.sizes;
        match kind {
            GroupKind::World => rank,
            GroupKind::Data => rank / mp,
            GroupKind::Model => rank % mp,
            GroupKind::Expert => rank % (ep * esp) / esp,
            GroupKind::Shard => rank % esp,
            GroupKind::Replica => rank / (ep * esp),
        }
    }

    /// The lane that collectives of groups of this kind run on: [`LaneKind::InterNode`] if any of these groups crosses
    /// nodes, so that every rank runs the same graph.
    pub fn lane(&self, kind: GroupKind) -> LaneKind {
        let crosses = |rank| {
            let members = self.members(kind, rank);
            members.iter().any(|&m| self.node(m) != self.node(members[0]))
        };
        if (0..self.sizes.ranks).any(crosses) { LaneKind::InterNode } else { LaneKind::IntraNode }
    }

    /// How the groups of this kind lie on nodes, if every one of them spans as many nodes with as many members on each.
    pub fn node_shape(&self, kind: GroupKind) -> Option<NodeShape> {
        let shape = |rank| {
            let nodes: Vec<usize> = self.members(kind, rank).iter().map(|&m| self.node(m)).collect();
            let runs: Vec<usize> = nodes.chunk_by(|a, b| a == b).map(<[usize]>::len).collect();
            let even = runs.iter().all(|&n| n == runs[0]);
            even.then_some(NodeShape { nodes: runs.len(), per_node: runs[0] })
        };
        let first = shape(0);
        if (0..self.sizes.ranks).all(|rank| shape(rank) == first) { first } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_usual_layout() {
        let t = Topology::new(Sizes::new(8, 2, 4, 2, 4)).unwrap();
        assert_eq!(t.members(GroupKind::Model, 5), [4, 5, 6, 7]);
        assert_eq!(t.members(GroupKind::Data, 5), [1, 5]);
        assert_eq!(t.members(GroupKind::Shard, 5), [4, 5, 6, 7]);
        assert_eq!(t.members(GroupKind::Expert, 5), [1, 5]);
        assert_eq!(t.members(GroupKind::Replica, 5), [5]);
        let lanes = GroupKind::ALL.iter().map(|&kind| t.lane(kind)).collect::<Vec<_>>();
        let (inter, intra) = (LaneKind::InterNode, LaneKind::IntraNode);
        assert_eq!(lanes, [inter, inter, intra, inter, intra, intra]);
        assert_eq!(t.node_shape(GroupKind::Expert), Some(NodeShape { nodes: 2, per_node: 1 }));
        assert_eq!(t.node_shape(GroupKind::World), Some(NodeShape { nodes: 2, per_node: 4 }));
    }

    #[test]
    fn groups_that_lie_unevenly_on_nodes_have_no_shape_and_one_lane() {
        // EP groups 0 2 4 and 1 3 5 on nodes 0 1 2 and 3 4 5; ESP groups 0 1, 2 3, 4 5, of which one crosses.
        let t = Topology::new(Sizes::new(6, 2, 1, 3, 2)).unwrap();
        assert_eq!(t.node_shape(GroupKind::Expert), None);
        assert_eq!(t.node_shape(GroupKind::Shard), None);
        assert_eq!(t.lane(GroupKind::Shard), LaneKind::InterNode);
    }

    #[test]
    fn sizes_that_break_a_rule_are_named() {
        let ok = Sizes::new(8, 2, 4, 2, 4);
        let cases: [(Sizes, &[&str]); 8] = [
            (Sizes::new(32, 4, 5, 4, 8), &["mp = 5", "32 ranks", "divides"]),
            (Sizes::new(32, 4, 0, 4, 8), &["mp = 0", "at least 1"]),
            (Sizes { nodes: 0, ..ok }, &["nodes = 0", "at least 1"]),
            (Sizes { nodes: 3, ..ok }, &["nodes = 3", "8 ranks", "divides"]),
            (Sizes { mp: 3, ..ok }, &["mp = 3", "8 ranks", "divides"]),
            (Sizes { mp: 2, ..ok }, &["dp = 2", "mp = 2", "8 ranks"]),
            (Sizes { ep: 4, ..ok }, &["ep = 4", "esp = 4", "8 ranks"]),
            (Sizes { ranks: 0, ..ok }, &["ranks = 0"]),
        ];
        for (sizes, parts) in cases {
            let message = Topology::new(sizes).unwrap_err().to_string();
            assert!(parts.iter().all(|p| message.contains(p)), "{message:?} does not name {parts:?}");
        }
        Topology::new(ok).unwrap();
    }

    proptest! {
        #[test]
        fn groups_of_a_kind_partition_the_world(p in 1usize..=48, a in 0usize..99, b in 0usize..99, c in 0usize..99, d in 0usize..99) {
            let divisor = |n: usize, pick: usize| {
                let all: Vec<usize> = (1..=n).filter(|i| n.is_multiple_of(*i)).collect();
                all[pick % all.len()]
            };
            let ep = divisor(p, c);
            let t = Topology::new(Sizes::new(p, divisor(p, a), divisor(p, b), ep, divisor(p / ep, d))).unwrap();
            for &kind in GroupKind::ALL {
                for rank in 0..p {
                    let members = t.members(kind, rank);
                    prop_assert_eq!(members.len(), t.size(kind));
                    prop_assert!(members.is_sorted() && members.iter().all(|&m| m < p));
                    prop_assert_eq!(members[t.position(kind, rank)], rank);
                    for &m in &members {
                        prop_assert_eq!(&t.members(kind, m), &members);
                    }
                    if let Some(NodeShape { nodes, per_node }) = t.node_shape(kind) {
                        prop_assert_eq!(nodes * per_node, members.len());
                        prop_assert!((0..members.len()).all(|i| t.node(members[i]) == t.node(members[i / per_node * per_node])));
                        prop_assert_eq!(nodes > 1, t.lane(kind) == LaneKind::InterNode);
                    }
                }
            }
            // The same experts and shard: neither the EP nor the ESP position differs.
            for rank in 0..p {
                for m in t.members(GroupKind::Replica, rank) {
                    for kind in [GroupKind::Expert, GroupKind::Shard] {
                        prop_assert_eq!(t.position(kind, m), t.position(kind, rank));
                    }
                }
            }
        }
    }
}
