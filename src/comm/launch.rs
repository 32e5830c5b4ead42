//! How a launcher has started this process among others: torchrun, mpirun or srun say so by environment variables.

use crate::error::{Result, config_err};
use std::env;
use std::fmt;

/// The port that ranks meet on where nothing else is said.
const PORT: u16 = 29_600;

/// This process's place among the processes of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started it, as messages have it.
    pub by: &'static str,
    /// This process's rank.
    pub rank: usize,
    /// P, the number of processes.
    pub world: usize,
    /// This process's number on its host.
    pub local_rank: usize,
    /// How many there are on its host, if the launcher says.
    pub local_world: Option<usize>,
    /// Where ranks meet, if the launcher says or all are on one host: a host and a port of our own.
    pub address: Option<String>,
    /// What tells this run from others on the same hosts; empty if the launcher does not say.
    pub job: String,
}

/// The variables in which a launcher says rank, ranks, rank on the host and ranks on the host; then those that name the job.
struct Names {
    by: &'static str,
    rank: &'static str,
    /// The first that is set.
    world: &'static [&'static str],
    local_rank: &'static str,
    local_world: &'static str,
    job: &'static [&'static str],
}

/// In the order in which they are asked: an mpirun inside of srun says more than srun.
const LAUNCHERS: [Names; 4] = [
    Names {
        by: "torchrun",
        rank: "RANK",
        world: &["WORLD_SIZE"],
        local_rank: "LOCAL_RANK",
        local_world: "LOCAL_WORLD_SIZE",
        job: &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"],
    },
    Names {
        by: "Open MPI's mpirun",
        rank: "OMPI_COMM_WORLD_RANK",
        world: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
    },
    Names {
        by: "MPICH's mpirun",
        rank: "PMI_RANK",
        world: &["PMI_SIZE"],
        local_rank: "MPI_LOCALRANKID",
        local_world: "MPI_LOCALNRANKS",
        job: &[],
    },
    Names {
        by: "srun",
        rank: "SLURM_PROCID",
        world: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        local_world: "",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
    },
];

impl Launch {
    /// As this process's environment says; none if no launcher has started it.
    ///
    /// # Errors
    /// If a variable is missing beside others of its launcher, or has a value that none of a rank's can be.
    pub fn from_env() -> Result<Option<Self>> {
        Self::of(|name| env::var(name).ok())
    }

    /// As `get` gives variables.
    ///
    /// # Errors
    /// As [`Launch::from_env`].
    pub fn of(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let Some(names) = LAUNCHERS.iter().find(|names| get(names.rank).is_some()) else { return Ok(None) };
        let number = |name: &str| match get(name).map(|value| (value.trim().parse::<usize>(), value)) {
            Some((Ok(n), _)) => Ok(Some(n)),
            Some((Err(_), value)) => config_err!("{name}={value:?}, as {} sets it: it is a number", names.by),
            None => Ok(None),
        };
        let world = names.world.iter().map(|name| number(name)).find(|n| !matches!(n, Ok(None))).unwrap_or(Ok(None))?;
        let (Some(rank), Some(world)) = (number(names.rank)?, world) else {
            config_err!("{} is set and {} is not: {} sets both", names.rank, names.world[0], names.by);
        };
        if rank >= world {
            config_err!("{}={rank} with {}={world}: ranks count from 0", names.rank, names.world[0]);
        }
        let local_world = number(names.local_world)?;
        let Some(local_rank) = number(names.local_rank)?.or((world == 1).then_some(0)) else {
            config_err!("{} is set and {} is not: it says which GPU is this rank's", names.rank, names.local_rank);
        };
        let job: Vec<String> = names.job.iter().filter_map(|name| get(name)).collect();
        let job = job.join(".");
        let address = address(&get, world, local_world, &job)?;
        Ok(Some(Launch { by: names.by, rank, world, local_rank, local_world, address, job }))
    }

    /// The number of hosts, if the launcher says how many ranks each has.
    pub fn nodes(&self) -> Option<usize> {
        self.local_world.filter(|&n| n > 0 && self.world.is_multiple_of(n)).map(|n| self.world / n)
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}, started by {}", self.rank, self.world, self.by)
    }
}

/// Where ranks meet: beside the launcher's own port or NCCL's, or on the host that all are on.
fn address(
    get: &impl Fn(&str) -> Option<String>,
    world: usize,
    local_world: Option<usize>,
    job: &str,
) -> Result<Option<String>> {
    // A port that others of the same host are not likely to have.
    let own = PORT + (job.bytes().fold(0u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b))) % 1000) as u16;
    let after = |name: &str, port: &str| match port.parse::<u16>() {
        Ok(port) if port < u16::MAX => Ok(port + 1),
        _ => config_err!("{name}: {port:?} is no port with one after it, which ranks meet on"),
    };
    if let Some(id) = get("NCCL_COMM_ID") {
        let Some((host, port)) = id.rsplit_once(':') else {
            config_err!("NCCL_COMM_ID={id:?}: it is HOST:PORT");
        };
        return Ok(Some(format!("{host}:{}", after("NCCL_COMM_ID", port)?)));
    }
    if let Some(host) = get("MASTER_ADDR") {
        let port = get("MASTER_PORT").map_or(Ok(own), |port| after("MASTER_PORT", &port))?;
        return Ok(Some(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }));
    }
    if local_world == Some(world) || world == 1 || get("SLURM_NNODES").as_deref() == Some("1") {
        return Ok(Some(format!("127.0.0.1:{own}")));
    }
    let nodes = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"));
    Ok(nodes.and_then(|list| first_host(&list)).map(|host| format!("{host}:{own}")))
}

/// The first host of a Slurm list: `gpu[03-05,9],login` begins with `gpu03`.
fn first_host(list: &str) -> Option<String> {
    let bracket = list.find('[').filter(|&b| list.find(',').is_none_or(|comma| b < comma));
    let host = match bracket {
        None => list.split(',').next()?.to_owned(),
        Some(at) => {
            let (inside, rest) = list[at + 1..].split_once(']')?;
            let number = inside.split([',', '-']).next()?;
            format!("{}{number}{}", &list[..at], rest.split(',').next()?)
        }
    };
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::of(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(of(&[("PATH", "/bin")]).unwrap(), None);
        let torchrun = [
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "head"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "abc"),
            // Torchrun inside of srun.
            ("SLURM_PROCID", "0"),
        ];
        let launch = of(&torchrun).unwrap().unwrap();
        assert_eq!((launch.rank, launch.world, launch.local_rank, launch.local_world), (5, 8, 1, Some(4)));
        assert_eq!((launch.address.as_deref(), launch.job.as_str()), (Some("head:29501"), "abc"));
        assert_eq!((launch.nodes(), launch.to_string().as_str()), (Some(2), "rank 5 of 8, started by torchrun"));

        let mpirun = |local: &'static str| {
            of(&[
                ("OMPI_COMM_WORLD_RANK", "3"),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", local),
                ("PMIX_NAMESPACE", "job-17"),
            ])
            .unwrap()
            .unwrap()
        };
        assert_eq!((mpirun("4").rank, mpirun("4").local_rank, mpirun("2").nodes()), (3, 1, Some(2)));
        assert!(mpirun("4").address.unwrap().starts_with("127.0.0.1:"), "all are on this host");
        assert_eq!(mpirun("2").address, None);

        let mpich = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];
        let launch = of(&mpich).unwrap().unwrap();
        assert_eq!((launch.rank, launch.world, launch.job.as_str()), (0, 2, ""));
        assert_eq!(launch.address.as_deref(), Some("127.0.0.1:29600"));

        let srun = [
            ("SLURM_PROCID", "9"),
            ("SLURM_NTASKS", "99"),
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NNODES", "2"),
            ("SLURM_STEP_NODELIST", "gpu[03-04]"),
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "0"),
        ];
        let launch = of(&srun).unwrap().unwrap();
        assert_eq!((launch.rank, launch.world, launch.local_rank, launch.job.as_str()), (9, 16, 1, "7.0"));
        assert!(launch.address.as_ref().unwrap().starts_with("gpu03:"), "{launch:?}");
    }

    #[test]
    fn jobs_of_one_host_meet_on_ports_of_their_own() {
        let port = |job| {
            let variables = [
                ("OMPI_COMM_WORLD_RANK", "0"),
                ("OMPI_COMM_WORLD_SIZE", "2"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
                ("PMIX_NAMESPACE", job),
            ];
            of(&variables).unwrap().unwrap().address.unwrap()
        };
        assert_eq!(port("prterun-host-1@1"), port("prterun-host-1@1"));
        assert_ne!(port("prterun-host-1@1"), port("prterun-host-2@1"));
    }

    #[test]
    fn where_ranks_meet() {
        let with = |more: &[(&'static str, &'static str)]| {
            let base = [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")];
            of(&[&base, more].concat()).unwrap().unwrap().address
        };
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[("MASTER_ADDR", "::1"), ("MASTER_PORT", "8")]).as_deref(), Some("[::1]:9"));
        assert_eq!(with(&[("NCCL_COMM_ID", "a:70"), ("MASTER_ADDR", "b")]).as_deref(), Some("a:71"));
        for (list, first) in
            [("n1", "n1"), ("n1,n2", "n1"), ("n[07,9-12]", "n07"), ("r[1-2]-ib,x", "r1-ib"), ("a,n[1-2]", "a")]
        {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        assert_eq!((first_host(""), first_host("n[1")), (None, None));
    }

    #[test]
    fn what_a_launcher_cannot_mean_is_named() {
        for (variables, parts) in [
            (&[("RANK", "1")][..], ["RANK is set", "WORLD_SIZE is not"]),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], ["RANK=\"x\"", "torchrun"]),
            (&[("RANK", "-1"), ("WORLD_SIZE", "2")], ["RANK=\"-1\"", "number"]),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], ["RANK=2", "count from 0"]),
            (&[("RANK", "1"), ("WORLD_SIZE", "2")], ["LOCAL_RANK is not", "GPU"]),
            (&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "")], ["SLURM_NTASKS=\"\"", "srun"]),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "65535")],
                ["MASTER_PORT", "65535"],
            ),
            (&[("RANK", "0"), ("WORLD_SIZE", "1"), ("NCCL_COMM_ID", "a")], ["NCCL_COMM_ID=\"a\"", "HOST:PORT"]),
        ] {
            let message = of(variables).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message:?} does not name {parts:?}");
        }
    }
}
