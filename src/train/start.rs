//! Ranks, started: threads of this process, or this process as one of those that a launcher has started.

use super::world::WorldConfig;
use crate::comm::launch::Launch;
use crate::comm::local::Cluster;
use crate::comm::{Topology, local, nccl};
use crate::device::{DeviceChoice, Lane, LaneKind};
use crate::error::{Error, Result, config_err};
use crate::moe::distributed::Parallel;
use crate::tensor::Place;
use std::env;
use std::sync::Arc;

/// How this process was started, where ranks are processes; `device` is what was asked for.
///
/// # Errors
/// If no launcher has started it, what it says makes no sense, or the CPU was asked for.
pub fn launched(device: Option<DeviceChoice>) -> Result<Launch> {
    if device == Some(DeviceChoice::Cpu) {
        config_err!("--comm nccl with --device cpu: its ranks take a GPU each; --comm local has ranks on the CPU");
    }
    Launch::from_env()?.ok_or_else(|| {
        Error::Config(
            "--comm nccl: no launcher has started this process: it takes torchrun --no-python, mpirun or srun, whose \
             environment says which rank it is"
                .into(),
        )
    })
}

/// Calls `f` on every rank of `world` that this process has, at `place`: on the one that it is, if a launcher has started it,
/// otherwise on all, each in a thread of its own. What they return, in their order.
///
/// Ranks that share a GPU want as many hardware queues as a process can have; unless `CUDA_DEVICE_MAX_CONNECTIONS` says how
/// many, this sets it: no other thread may read the environment meanwhile.
///
/// # Errors
/// If there are not as many ranks as there are processes, or they do not find each other; the first that `f` has.
pub fn on_ranks<T: Send>(
    place: Place,
    world: &WorldConfig,
    processes: Option<(&Launch, nccl::Options)>,
    f: impl Fn(&Arc<Parallel>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let WorldConfig { sizes, timeout, all_to_all, .. } = *world;
    let (topology, ranks) = (Topology::new(sizes)?, sizes.ranks);
    match processes {
        Some((launch, _)) if ranks != launch.world => {
            config_err!("--ranks {ranks} in {launch}: it is as many as the launcher has started")
        }
        Some((launch, options)) => Ok(vec![nccl::run(launch, &options, |world, lane| {
            f(&Parallel::new(lane, world, topology, all_to_all.build())?)
        })?]),
        None => {
            const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
            if place != Place::Cpu && ranks > 1 && env::var_os(QUEUES).is_none() {
                // SAFETY: no other thread reads the environment, as said above.
                unsafe { env::set_var(QUEUES, "32") };
            }
            let lane = Lane::at(place)?;
            let share = local::share(&lane, ranks);
            let cluster = Cluster { nodes: sizes.nodes, ..Cluster::on(&lane, ranks, timeout) };
            local::run_on(&cluster, |world| {
                f(&Parallel::new(&lane.beside(LaneKind::Compute, share)?, world, topology, all_to_all.build())?)
            })
        }
    }
}
