//! How many ranks, in how many nodes, in which groups: as much of it as decides what is exchanged where.

use crate::device::LaneKind;
use crate::error::{Result, config_err};
use serde::Serialize;

/// Ranks, nodes and the sizes of their groups. Ranks fill one node after the other. ESP and MP groups are of neighbouring
/// ranks; an EP group has one rank of each of as many neighbouring ESP groups; the data-parallel groups, of dense parts and
/// of experts, take every rank that holds the same shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct World {
    /// P.
    pub ranks: usize,
    /// Nodes, with as many ranks each.
    pub nodes: usize,
    /// N_MP: over how many ranks attention heads and dense FFNs are sharded.
    pub mp: usize,
    /// N_EP: over how many ESP groups the experts are spread.
    pub ep: usize,
    /// N_ESP: over how many ranks each expert is sharded.
    pub esp: usize,
}

/// Over which ranks a gradient is summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GradGroup {
    /// Parameters sharded over MP: the ranks with the same shard.
    Dense,
    /// Experts: their replicas.
    Expert,
    /// Parameters that every rank has: all ranks.
    Replicated,
}

impl GradGroup {
    /// All three.
    pub const ALL: [GradGroup; 3] = [GradGroup::Dense, GradGroup::Expert, GradGroup::Replicated];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            GradGroup::Dense => "dense",
            GradGroup::Expert => "expert",
            GradGroup::Replicated => "replicated",
        }
    }
}

impl World {
    /// One rank.
    pub const ONE: World = World { ranks: 1, nodes: 1, mp: 1, ep: 1, esp: 1 };

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// Names the size that breaks a rule, and the rule.
    pub fn validate(&self) -> Result<()> {
        let World { ranks, nodes, mp, ep, esp } = *self;
        for (name, value) in [("ranks", ranks), ("nodes", nodes), ("mp", mp), ("ep", ep), ("esp", esp)] {
            if value == 0 {
                config_err!("{name} = 0: it is at least 1");
            }
        }
        if !ranks.is_multiple_of(nodes) {
            config_err!("{ranks} ranks on {nodes} nodes: nodes have as many ranks each");
        }
        if !ranks.is_multiple_of(mp) {
            config_err!("mp = {mp} with {ranks} ranks: it divides them");
        }
        if !ranks.is_multiple_of(ep.saturating_mul(esp)) {
            config_err!("ep = {ep} times esp = {esp} with {ranks} ranks: the product divides them");
        }
        Ok(())
    }

    /// The lane of collectives in groups of `size` ranks that are `stride` apart: InterNode if one of them crosses nodes.
    /// None for groups of one, which exchange nothing.
    fn lane(&self, size: usize, stride: usize) -> Option<LaneKind> {
        let node = |rank: usize| rank / (self.ranks / self.nodes);
        let crosses = (0..self.ranks)
            .filter(|rank| (rank / stride).is_multiple_of(size))
            .any(|first| node(first) != node(first + (size - 1) * stride));
        (size > 1).then_some(if crosses { LaneKind::InterNode } else { LaneKind::IntraNode })
    }

    /// The lane of the all-to-all; none without expert parallelism.
    pub fn ep_lane(&self) -> Option<LaneKind> {
        self.lane(self.ep, self.esp)
    }

    /// The lane of the all-gather and the reduce-scatter; none where experts are whole.
    pub fn esp_lane(&self) -> Option<LaneKind> {
        self.lane(self.esp, 1)
    }

    /// The lane of the collectives of model parallelism; none without it.
    pub fn mp_lane(&self) -> Option<LaneKind> {
        self.lane(self.mp, 1)
    }

    /// The lane of a gradient's all-reduce; none where only one rank has the gradient.
    pub fn reduce_lane(&self, group: GradGroup) -> Option<LaneKind> {
        let stride = match group {
            GradGroup::Dense => self.mp,
            GradGroup::Expert => self.ep * self.esp,
            GradGroup::Replicated => 1,
        };
        self.lane(self.ranks / stride, stride)
    }

    /// How many ranks of an EP group share a node, where it crosses nodes.
    pub fn ep_per_node(&self) -> usize {
        (self.ranks / self.nodes / self.esp).clamp(1, self.ep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LaneKind::{InterNode, IntraNode};

    #[test]
    fn lanes_follow_from_what_crosses_nodes() {
        // FSMoE's testbed: 6 nodes of 8.
        let paper = World { ranks: 48, nodes: 6, mp: 8, ep: 6, esp: 8 };
        paper.validate().unwrap();
        assert_eq!(
            (paper.ep_lane(), paper.esp_lane(), paper.mp_lane()),
            (Some(InterNode), Some(IntraNode), Some(IntraNode))
        );
        assert_eq!(GradGroup::ALL.map(|g| paper.reduce_lane(g)), [Some(InterNode), None, Some(InterNode)]);
        assert_eq!(paper.ep_per_node(), 1);

        let node = World { ranks: 8, nodes: 1, mp: 2, ep: 2, esp: 2 };
        assert_eq!((node.ep_lane(), node.esp_lane()), (Some(IntraNode), Some(IntraNode)));
        assert_eq!(GradGroup::ALL.map(|g| node.reduce_lane(g)), [Some(IntraNode); 3]);

        // EP over neighbours, replicas across nodes; and an ESP group as large as two nodes.
        let inside = World { ranks: 16, nodes: 2, mp: 1, ep: 4, esp: 2 };
        assert_eq!((inside.ep_lane(), inside.reduce_lane(GradGroup::Expert)), (Some(IntraNode), Some(InterNode)));
        let wide = World { ranks: 8, nodes: 4, mp: 1, ep: 2, esp: 4 };
        assert_eq!((wide.ep_lane(), wide.esp_lane()), (Some(InterNode), Some(InterNode)));
        // Groups of 3 on nodes of 4: the second crosses, although the first does not.
        let uneven = World { ranks: 12, nodes: 3, mp: 3, ep: 1, esp: 1 };
        assert_eq!((uneven.mp_lane(), uneven.ep_lane()), (Some(InterNode), None));
        let dense = World { ranks: 16, nodes: 2, mp: 1, ep: 8, esp: 2 };
        assert_eq!(dense.ep_per_node(), 4);
        assert_eq!(GradGroup::ALL.map(|g| World::ONE.reduce_lane(g)), [None; 3]);
    }

    #[test]
    fn errors_name_the_rule() {
        let world = World { ranks: 8, nodes: 2, mp: 4, ep: 2, esp: 4 };
        for (world, part) in [
            (World { ranks: 0, ..world }, "ranks = 0"),
            (World { nodes: 3, ..world }, "8 ranks on 3 nodes"),
            (World { mp: 3, ..world }, "mp = 3"),
            (World { ep: 3, ..world }, "ep = 3 times esp = 4"),
        ] {
            let error = world.validate().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
