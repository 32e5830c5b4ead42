//! What the tasks of a training step are.

use crate::comm::{GroupKind, Topology};
use crate::device::LaneKind;
use crate::named::named;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Forward or backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Activations.
    Forward,
    /// Gradients.
    Backward,
}

named!(Pass, "pass", { Forward => "forward", Backward => "backward" });

/// One step of a chunk's way through an MoE layer. Backward, the same way is gone by the gradients: those of the outputs
/// are dispatched to the experts, and those of the tokens come back; each collective is then the backward of its opposite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// D: the all-to-all to the experts, or one phase of it, counted from 0.
    Dispatch(u8),
    /// AG: the all-gather in the ESP group.
    AllGather,
    /// E: forward the expert; backward its data gradient.
    Expert,
    /// W: the expert's weight gradient; backward only.
    WeightGrad,
    /// RS: the reduce-scatter in the ESP group.
    ReduceScatter,
    /// C: the all-to-all back, or one phase of it, counted from 0.
    Combine(u8),
}

/// Over which ranks a gradient is summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

    /// The kind of group that its ranks are.
    pub fn kind(self) -> GroupKind {
        match self {
            GradGroup::Dense => GroupKind::Data,
            GradGroup::Expert => GroupKind::Replica,
            GradGroup::Replicated => GroupKind::World,
        }
    }

    /// The lane of its all-reduce; none where only one rank has the gradient.
    pub fn lane(self, topology: &Topology) -> Option<LaneKind> {
        lane(topology, self.kind())
    }
}

/// The lane of a kind's collectives; none for groups of one, which exchange nothing.
pub(super) fn lane(topology: &Topology, kind: GroupKind) -> Option<LaneKind> {
    (topology.size(kind) > 1).then(|| topology.lane(kind))
}

/// A range of one group's gradients, which lie in one buffer in the order in which the backward completes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Slice {
    /// Over which ranks it is summed.
    pub group: GradGroup,
    /// Its first byte.
    pub begin: u64,
    /// The byte after its last.
    pub end: u64,
}

impl Slice {
    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }
}

/// A task of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerOp {
    /// All that a block does apart from its MoE layer's chunks: on Compute, in the order of the computation.
    Dense {
        /// Which block, from 0.
        block: usize,
        /// Forward or backward.
        pass: Pass,
    },
    /// A stage of one chunk of a block's MoE layer.
    Chunk {
        /// Which block, from 0.
        block: usize,
        /// Forward or backward.
        pass: Pass,
        /// Which stage.
        stage: Stage,
        /// Which chunk, from 0.
        chunk: usize,
        /// r, in how many chunks.
        of: usize,
    },
    /// The all-reduce of some gradients.
    Reduce(Slice),
}

/// `D2 L3`: the dispatch of the second chunk in block 3, both counted from 1; a prime marks the backward, a letter the
/// phase of an all-to-all after the first.
impl fmt::Display for LayerOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prime = |pass: &Pass| if *pass == Pass::Backward { "'" } else { "" };
        match self {
            LayerOp::Dense { block, pass } => write!(f, "dense{} L{}", prime(pass), block + 1),
            LayerOp::Chunk { block, pass, stage, chunk, .. } => {
                let (letters, phase) = match stage {
                    Stage::Dispatch(phase) => ("D", *phase),
                    Stage::AllGather => ("AG", 0),
                    Stage::Expert => ("E", 0),
                    Stage::WeightGrad => ("W", 0),
                    Stage::ReduceScatter => ("RS", 0),
                    Stage::Combine(phase) => ("C", *phase),
                };
                write!(f, "{letters}{}{}", prime(pass), chunk + 1)?;
                if phase > 0 {
                    write!(f, "{}", char::from(b'a' + phase))?;
                }
                write!(f, " L{}", block + 1)
            }
            LayerOp::Reduce(slice) => write!(f, "G {} {}..{}", slice.group.name(), slice.begin, slice.end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Sizes;
    use LaneKind::{InterNode, IntraNode};

    #[test]
    fn gradients_are_reduced_on_the_lane_of_their_group() {
        let lanes = |ranks, nodes, mp, ep, esp| {
            let topology = Topology::new(Sizes::new(ranks, nodes, mp, ep, esp)).unwrap();
            GradGroup::ALL.map(|group| group.lane(&topology))
        };
        // FSMoE's testbed, 6 nodes of 8; one node; replicas across nodes, EP inside; one rank.
        assert_eq!(lanes(48, 6, 8, 6, 8), [Some(InterNode), None, Some(InterNode)]);
        assert_eq!(lanes(8, 1, 2, 2, 2), [Some(IntraNode); 3]);
        assert_eq!(lanes(16, 2, 1, 4, 2)[GradGroup::Expert as usize], Some(InterNode));
        assert_eq!(lanes(1, 1, 1, 1, 1), [None; 3]);
    }
}
