//! Ranks as processes, each with a GPU, over NCCL.
//!
//! Launchers start the processes ([`Launch`]), which meet ([`Rendezvous`]) and make a communicator; groups are split off it,
//! one communicator each. A collective is put on its lane's stream. One host thread of a process issues all of them, in an
//! order that is the same on all ranks of a group.
//!
//! What differs from the rules of [`Communicator`]: all-reduce and reduce-scatter sum in NCCL's order, and round 16-bit data
//! as often as NCCL does. Every rank gets the same bits, and so does every run of the same world on the same machines. Ragged
//! reduce-scatters sum in rank order. NCCL does not compare what ranks call: ranks that call different things, or with
//! different sizes, wait for each other until the watchdog ends them.
//!
//! Nothing hangs: a watchdog sees a collective that waits too long, an error that NCCL reports, a rank that fails and one
//! whose process has gone; it says which collective of which group this rank waited in, aborts the communicators and ends the
//! process with status 1, all within the time that ranks wait for each other.

mod group;
mod library;
mod watch;

use super::Communicator;
use super::launch::Launch;
use super::local::said;
use super::rendezvous::Rendezvous;
use crate::device::{Lane, cuda};
use crate::error::{Error, Result, config_err};
use group::{Group, World, own_lane};
use library::{Library, SUCCESS, config, ncclComm_t, ncclUniqueId};
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use watch::{Handle, Watch};

/// How the processes of a run live together.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a rank waits for the others.
    pub timeout: Duration,
    /// HOST:PORT of rank 0 where ranks meet; none: where the launcher says.
    pub rendezvous: Option<String>,
    /// Ranks of a host share its GPUs, for testing: they talk over the host's own network.
    pub share_gpu: bool,
    /// The most CTAs that a collective takes of a GPU; none: as many as NCCL likes.
    pub ctas: Option<u32>,
    /// What has to be the same on all ranks, by name.
    pub agree: Vec<(String, String)>,
}

impl Options {
    /// Ranks wait for so long; everything else is left to the launcher and to NCCL.
    pub fn new(timeout: Duration) -> Self {
        Options { timeout, rendezvous: None, share_gpu: false, ctas: None, agree: Vec::new() }
    }
}

/// The number of the GPU that a process takes: that of its number on its host.
///
/// # Errors
/// If there is no such GPU, unless GPUs are shared; if there is none at all.
pub fn gpu(launch: &Launch, share: bool) -> Result<usize> {
    match (launch.local_rank, cuda::count()?) {
        (_, 0) => Err(Error::Device("ranks that are processes take a GPU each, and the driver sees none".into())),
        (rank, gpus) if rank < gpus => Ok(rank),
        (rank, gpus) if share => Ok(rank % gpus),
        (rank, gpus) => {
            let ranks = launch.local_world.map_or_else(|| format!("{} or more", rank + 1), |n| n.to_string());
            config_err!(
                "{ranks} ranks on a host where rank {} sees {gpus} GPU{}: each takes that of its number on the host, so \
                 each has to see all (srun --gpu-bind=none); or --share-gpu, for testing",
                launch.rank,
                if gpus == 1 { "" } else { "s" }
            )
        }
    }
}

/// Meets the other processes of a run, and calls `f` with this rank's end of the world and its compute lane. When `f` fails
/// or panics, every other rank's process ends. What `f` was given is of no use after it.
///
/// A rank that waits too long, or hears that another has failed, ends its process as the [module](self) says; so does one
/// whose `f` has failed, if the process goes on for longer than the rest of the timeout.
///
/// With [`Options::share_gpu`] this sets environment variables of NCCL: no other thread may read the environment meanwhile.
///
/// # Errors
/// If ranks do not meet, there is no NCCL, or no GPU for this process; that of `f`.
pub fn run<T>(
    launch: &Launch,
    options: &Options,
    f: impl FnOnce(Arc<dyn Communicator>, &Lane) -> Result<T>,
) -> Result<T> {
    let Options { timeout, share_gpu, ctas, .. } = *options;
    if let Some(n @ (0 | 65..)) = ctas {
        config_err!("{n} CTAs for a collective: NCCL takes 1 to 64");
    }
    let Some(address) = options.rendezvous.as_ref().or(launch.address.as_ref()) else {
        config_err!(
            "{launch}: it does not say where ranks meet: --rendezvous HOST:PORT, a free port on the host of rank 0"
        );
    };
    let library = Library::get()?;
    let ordinal = gpu(launch, share_gpu)?;
    if share_gpu {
        pretend_hosts(launch);
    }
    let rendezvous = Rendezvous {
        address: address.clone(),
        rank: launch.rank,
        world: launch.world,
        job: launch.job.clone(),
        timeout,
        agree: options.agree.clone(),
    };
    let (id, control) = rendezvous.meet(|| unique_id(library))?;
    let watch = Watch::start(library, launch.rank, timeout, control.clone())?;
    let body = || {
        let lane = Lane::cuda(ordinal)?;
        let world = world(library, &watch, &lane, launch, ctas, &id)?;
        let result = f(world.clone(), &lane);
        if matches!(result, Ok(_) | Err(Error::Interrupted)) {
            // Nobody takes a communicator down that others still use.
            world.barrier(&lane)?;
        }
        result
    };
    let result = catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|panic| Err(Error::Panicked(format!("rank {}: {}", launch.rank, said(&*panic)))));
    match &result {
        Ok(_) | Err(Error::Interrupted) => {
            watch.over();
            control.leave();
        }
        Err(e) => {
            watch.fail(&format!("rank {} failed: {e}", launch.rank));
            watch.wait_for_end();
        }
    }
    result
}

/// Has NCCL take this process for a host of its own: it refuses two ranks of one host on one GPU.
fn pretend_hosts(launch: &Launch) {
    let host = format!("fsmoe-{}-{}", launch.job, launch.rank);
    for (name, value) in [("NCCL_HOSTID", host.as_str()), ("NCCL_SOCKET_IFNAME", "lo")] {
        if std::env::var_os(name).is_none() {
            // SAFETY: `run` says that no other thread reads the environment meanwhile.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

fn unique_id(library: &Library) -> Result<Vec<u8>> {
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: it writes the id.
    let status = unsafe { (library.get_unique_id)(&raw mut id) };
    if status != SUCCESS {
        return Err(Error::Comm(format!("an id for NCCL's world: {}", library.explain(status))));
    }
    Ok(id.internal.iter().map(|c| *c as u8).collect())
}

/// All ranks, once they have met.
fn world(
    library: &'static Library,
    watch: &Arc<Watch>,
    lane: &Lane,
    launch: &Launch,
    ctas: Option<u32>,
    id: &[u8],
) -> Result<Arc<dyn Communicator>> {
    let Some(cuda) = lane.as_cuda() else { config_err!("NCCL on {lane:?}: it takes a GPU") };
    cuda.bind()?;
    let handle = match launch.world {
        1 => None,
        ranks => {
            let mut unique = ncclUniqueId { internal: [0; 128] };
            for (to, from) in unique.internal.iter_mut().zip(id) {
                *to = *from as c_char;
            }
            let (mut raw, mut config): (ncclComm_t, _) = (std::ptr::null_mut(), config(ctas));
            let init = || {
                // SAFETY: NCCL copies id and configuration and writes the communicator, of this thread's current GPU.
                let status = unsafe {
                    (library.init_rank)(&raw mut raw, ranks as c_int, unique, launch.rank as c_int, &raw mut config)
                };
                watch.settle(raw, status)
            };
            let made = watch.during(|| format!("the beginning of a world of {ranks} ranks"), init);
            made.map_err(|status| {
                let why = library.explain(status);
                Error::Comm(format!("rank {} of {ranks} joining NCCL's world: {why}", launch.rank))
            })?;
            Some(Handle::new(watch, raw, true))
        }
    };
    let world = Arc::new(World { library, watch: watch.clone(), lane: own_lane(cuda)?, ctas });
    let ranks = (0..launch.world).collect();
    Ok(Arc::new(Group::new(world, "world".to_owned(), ranks, launch.rank, handle)))
}

/// A group over somebody else's communicator, whose ranks count as the world's, on `lane`'s GPU. It is never destroyed or
/// aborted here, and nobody watches over it: what does not come is waited for. Groups that are split off are ours.
///
/// # Safety
/// `comm` is a valid `ncclComm_t`, which stays so as long as the group and what was split off it, and which nobody else uses
/// meanwhile.
///
/// # Errors
/// If there is no NCCL, or the communicator is of another GPU.
pub unsafe fn borrow(comm: *mut c_void, lane: &Lane, label: &str) -> Result<Arc<dyn Communicator>> {
    let library = Library::get()?;
    let Some(cuda) = lane.as_cuda() else { config_err!("an NCCL communicator on {lane:?}: it takes a GPU") };
    let raw: ncclComm_t = comm.cast();
    let ask = |what: &str, f: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int| {
        let mut n: c_int = 0;
        // SAFETY: the caller says that the communicator is valid; the call writes one int.
        match unsafe { f(raw, &raw mut n) } {
            SUCCESS => Ok(usize::try_from(n).unwrap_or(0)),
            status => Err(Error::Comm(format!("asking a communicator for its {what}: {}", library.explain(status)))),
        }
    };
    let (ranks, rank) = (ask("number of ranks", library.count)?, ask("rank", library.user_rank)?);
    let device = ask("GPU", library.device)?;
    if device != cuda.ordinal() {
        config_err!("a communicator of GPU {device} with {lane:?}: both are of one GPU");
    }
    let watch = Watch::idle(library, rank);
    let handle = Handle::new(&watch, raw, false);
    let world = Arc::new(World { library, watch, lane: own_lane(cuda)?, ctas: None });
    Ok(Arc::new(Group::new(world, label.to_owned(), (0..ranks).collect(), rank, Some(handle))))
}
