//! The ranks that a command runs on.

use fsmoe::Result;
use fsmoe::comm::launch::Launch;
use fsmoe::comm::{AllToAllKind, Sizes, nccl};
use fsmoe::device::DeviceChoice;
use fsmoe::moe::distributed::Parallel;
use fsmoe::tensor::Place;
use fsmoe::train::{CommKind, WorldConfig, launched, on_ranks};
use std::sync::Arc;
use std::time::Duration;

/// Into which groups ranks are divided.
#[derive(clap::Args)]
pub(crate) struct GroupArgs {
    /// Ranks of a data-parallel group: has to be ranks over mp
    #[arg(long)]
    dp: Option<usize>,
    /// Ranks among which attention heads and dense FFNs are divided
    #[arg(long)]
    mp: Option<usize>,
    /// Ranks of an expert-parallel group
    #[arg(long)]
    ep: Option<usize>,
    /// Ranks that share each expert
    #[arg(long)]
    esp: Option<usize>,
    /// All-to-all: direct, 1dh or 2dh
    #[arg(long, value_name = "KIND", default_value = "direct")]
    pub(crate) a2a: AllToAllKind,
}

impl GroupArgs {
    /// The sizes asked for; where they do not say, those of `usual`, of which the data-parallel groups take what is left.
    pub(crate) fn sizes(&self, ranks: usize, nodes: usize, usual: Sizes) -> Sizes {
        let GroupArgs { dp, mp, ep, esp, .. } = *self;
        let (mp, ep, esp) = (mp.unwrap_or(usual.mp), ep.unwrap_or(usual.ep), esp.unwrap_or(usual.esp));
        let sizes = Sizes::new(ranks, nodes, mp, ep, esp);
        Sizes { dp: dp.unwrap_or(sizes.dp), ..sizes }
    }
}

/// The sizes that a world has where nothing is said: experts and dense parts are shared by the ranks of a node, and experts
/// spread over the nodes.
pub(crate) fn usual_sizes(ranks: usize, nodes: usize) -> Sizes {
    let node = ranks.checked_div(nodes).unwrap_or(1).max(1);
    Sizes::new(ranks, nodes, node, nodes, node)
}

#[derive(clap::Args)]
pub(crate) struct WorldArgs {
    /// Where: cpu, cuda, cuda:N, or auto, which is the CPU
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Ranks (8, or as many as a launcher has started)
    #[arg(long)]
    ranks: Option<usize>,
    /// Nodes, with as many ranks each (2; what a launcher says; 1 where they do not divide the ranks)
    #[arg(long)]
    nodes: Option<usize>,
    #[command(flatten)]
    groups: GroupArgs,
    /// How ranks talk: local, threads of this process, or nccl, processes that torchrun, mpirun or srun has started
    #[arg(long, default_value = "local")]
    comm: CommKind,
    /// Seconds that a rank waits for the others
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    comm_timeout: u64,
    /// HOST:PORT of rank 0 where ranks meet (where the launcher says)
    #[arg(long, value_name = "HOST:PORT")]
    rendezvous: Option<String>,
    /// With nccl: ranks of a host share its GPUs, for testing
    #[arg(long)]
    share_gpu: bool,
    /// With nccl: the most CTAs that a collective takes of a GPU
    #[arg(long, value_name = "N")]
    comm_ctas: Option<u32>,
}

/// Ranks, as asked for.
pub(crate) struct World {
    args: WorldArgs,
    launch: Option<Launch>,
    pub(crate) place: Place,
    /// How many, on how many nodes.
    pub(crate) ranks: usize,
    pub(crate) nodes: usize,
}

impl WorldArgs {
    pub(crate) fn world(self) -> Result<World> {
        self.comm.takes(self.comm_ctas, self.rendezvous.as_deref(), self.share_gpu)?;
        let launch = match self.comm {
            CommKind::Nccl => Some(launched(Some(self.device).filter(|d| *d != DeviceChoice::Auto))?),
            CommKind::Local => None,
        };
        let place = match (&launch, self.device) {
            (Some(launch), _) => Place::Cuda(nccl::gpu(launch, self.share_gpu)?),
            (None, DeviceChoice::Auto) => Place::Cpu,
            (None, device) => device.place(),
        };
        let ranks = self.ranks.or(launch.as_ref().map(|l| l.world)).unwrap_or(8);
        let nodes = self.nodes.or(launch.as_ref().and_then(Launch::nodes));
        let nodes = nodes.unwrap_or(if ranks.is_multiple_of(2) { 2 } else { 1 });
        Ok(World { args: self, launch, place, ranks, nodes })
    }
}

impl World {
    /// Whether this process speaks for all.
    pub(crate) fn leads(&self) -> bool {
        self.first_rank() == 0
    }

    /// Whether this process is one rank of several.
    pub(crate) fn is_process(&self) -> bool {
        self.launch.is_some()
    }

    /// The first of the ranks that this process has.
    pub(crate) fn first_rank(&self) -> usize {
        self.launch.as_ref().map_or(0, |launch| launch.rank)
    }

    /// As [`GroupArgs::sizes`].
    pub(crate) fn sizes(&self, usual: Sizes) -> Sizes {
        self.args.groups.sizes(self.ranks, self.nodes, usual)
    }

    /// How rows travel to their experts.
    pub(crate) fn all_to_all(&self) -> AllToAllKind {
        self.args.groups.a2a
    }

    /// As [`on_ranks`], in groups of these sizes; `agree` is what processes have to have in common besides.
    pub(crate) fn run<T: Send>(
        &self,
        sizes: Sizes,
        agree: Vec<(String, String)>,
        f: impl Fn(&Arc<Parallel>) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let timeout = Duration::from_secs(self.args.comm_timeout);
        let WorldArgs { rendezvous, share_gpu, comm_ctas: ctas, comm, .. } = &self.args;
        let (rendezvous, share_gpu, ctas, comm) = (rendezvous.clone(), *share_gpu, *ctas, *comm);
        let hosts = self.launch.as_ref().and_then(Launch::nodes);
        let all_to_all = self.args.groups.a2a;
        let world = WorldConfig {
            sizes,
            comm,
            timeout,
            all_to_all,
            share_gpu,
            comm_ctas: ctas,
            hosts,
            ..WorldConfig::default()
        };
        let own = [("--sizes", format!("{sizes:?}")), ("--a2a", self.args.groups.a2a.to_string())];
        let agree = own.map(|(name, value)| (name.to_owned(), value)).into_iter().chain(agree).collect();
        let options = nccl::Options { rendezvous, share_gpu, ctas, agree, ..nccl::Options::new(timeout) };
        on_ranks(self.place, &world, self.launch.as_ref().map(|launch| (launch, options)), f)
    }
}
