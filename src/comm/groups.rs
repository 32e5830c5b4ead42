//! The communicators of one rank of a topology.

use super::{Communicator, GroupComms, GroupKind, Topology};
use crate::device::LaneKind;
use crate::error::{Result, config_err};
use std::sync::Arc;

/// One rank's communicators: one for each kind of group, to be used on that kind's [`Topology::lane`], and the world's own
/// for the compute lane.
#[derive(Clone)]
pub struct Groups {
    topology: Topology,
    world: Arc<dyn Communicator>,
    /// In the order of [`GroupKind::ALL`].
    comms: Vec<Arc<dyn Communicator>>,
    expert: GroupComms,
}

impl Groups {
    /// Splits `world` as `topology` says. A collective: every rank of the world calls it with the same topology.
    ///
    /// # Errors
    /// If `world` has another number of ranks than the topology, or a rank fails or never comes.
    pub fn new(world: Arc<dyn Communicator>, topology: Topology) -> Result<Self> {
        if world.size() != topology.ranks() {
            config_err!("a topology of {} ranks on a world of {}: both have as many", topology.ranks(), world.size());
        }
        let rank = world.rank();
        let split = |kind: &GroupKind| world.split(kind.name(), topology.members(*kind, rank)[0], rank);
        let comms = GroupKind::ALL.iter().map(split).collect::<Result<Vec<_>>>()?;
        let kind = GroupKind::Expert;
        let expert = GroupComms::new(comms[kind as usize].clone(), topology.lane(kind), topology.node_shape(kind))?;
        Ok(Groups { topology, world, comms, expert })
    }

    /// The topology.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// This rank's number in the world.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// All ranks, for collectives that are issued on the compute lane.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// This rank's group of this kind, for collectives on [`Groups::lane`].
    pub fn get(&self, kind: GroupKind) -> &Arc<dyn Communicator> {
        &self.comms[kind as usize]
    }

    /// The lane of this kind's collectives.
    pub fn lane(&self, kind: GroupKind) -> LaneKind {
        self.topology.lane(kind)
    }

    /// This rank's EP group, as all-to-all algorithms take it.
    pub fn expert(&self) -> &GroupComms {
        &self.expert
    }
}
