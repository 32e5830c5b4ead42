//! The ranks of a run: how many, in which groups, and how they talk.

use super::config::Settings;
use crate::comm::{AllToAllKind, Sizes, Topology};
use crate::error::{Result, config_err};
use crate::model::ModelConfig;
use crate::named::named;
use crate::schedule::policy;
use std::time::Duration;

/// How ranks talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommKind {
    /// Ranks are threads of one process.
    Local,
    /// Ranks are processes, started by a launcher, each with a GPU.
    Nccl,
}
named!(CommKind, "comm", { Local => "local", Nccl => "nccl" });

impl CommKind {
    /// Refuses what only ranks that are processes take, where they are threads.
    ///
    /// # Errors
    /// Names the first flag that is given with [`CommKind::Local`].
    pub fn takes(self, comm_ctas: Option<u32>, rendezvous: Option<&str>, share_gpu: bool) -> Result<()> {
        let ctas = comm_ctas.map(|n| format!("--comm-ctas {n}"));
        let given = ctas.or_else(|| rendezvous.map(|address| format!("--rendezvous {address}")));
        match (self, given.or_else(|| share_gpu.then(|| "--share-gpu".to_owned()))) {
            (CommKind::Local, Some(flag)) => {
                config_err!("{flag} with --comm local: only ranks that are processes take it, those of --comm nccl")
            }
            _ => Ok(()),
        }
    }
}

/// What is done with measured costs, and with the plans made of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheUse {
    /// They are read where they are kept, and kept.
    #[default]
    Use,
    /// They are made anew, and kept.
    Renew,
    /// They are made anew.
    Off,
}

/// The ranks of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct WorldConfig {
    /// How many, in which groups.
    pub sizes: Sizes,
    /// How they talk.
    pub comm: CommKind,
    /// How long a rank waits for the others.
    pub timeout: Duration,
    /// How rows travel to their experts.
    pub all_to_all: AllToAllKind,
    /// The policy's name.
    pub schedule: String,
    /// The profile that plans are priced by; none: one of these ranks.
    pub profile: Option<String>,
    /// What of it is kept from run to run.
    pub cache: CacheUse,
    /// Whether ranks that are processes share the GPUs of their host.
    pub share_gpu: bool,
    /// The most CTAs that a collective of NCCL takes of a GPU; none: as many as NCCL likes.
    pub comm_ctas: Option<u32>,
    /// How many hosts ranks that are processes are on, where their launcher says.
    pub hosts: Option<usize>,
}

impl Default for WorldConfig {
    /// One rank.
    fn default() -> Self {
        WorldConfig {
            sizes: Topology::single().sizes(),
            comm: CommKind::Local,
            timeout: Duration::from_secs(600),
            all_to_all: AllToAllKind::Direct,
            schedule: "fsmoe".to_owned(),
            profile: None,
            cache: CacheUse::default(),
            share_gpu: false,
            comm_ctas: None,
            hosts: None,
        }
    }
}

impl WorldConfig {
    /// The world that `settings` mean. Without a size for it, experts are divided among as many ranks as can be.
    ///
    /// # Errors
    /// Names the first size that breaks a rule, or does not fit the model.
    pub(super) fn of(settings: &Settings, model: &ModelConfig) -> Result<Self> {
        let d = WorldConfig::default();
        let (ranks, comm) = (settings.ranks.unwrap_or(1), settings.comm.unwrap_or(d.comm));
        let share_gpu = settings.share_gpu.unwrap_or(d.share_gpu);
        comm.takes(settings.comm_ctas, settings.rendezvous.as_deref(), share_gpu)?;
        let (mp, esp) = (settings.mp.unwrap_or(1), settings.esp.unwrap_or(1));
        let experts = model.moe.experts;
        let fits = |ep: &usize| ranks.is_multiple_of(ep * esp) && experts.is_multiple_of(*ep);
        let ep = settings.ep.unwrap_or_else(|| (1..=ranks).rev().find(fits).unwrap_or(1));
        let dp = settings.dp.unwrap_or((ranks / mp.max(1)).max(1));
        let sizes = Sizes { ranks, nodes: settings.nodes.unwrap_or(1), dp, mp, ep, esp };
        Topology::new(sizes)?;
        if !experts.is_multiple_of(ep) {
            config_err!("--ep {ep} with {experts} experts: each rank of an EP group has as many");
        }
        if !model.ffn.is_multiple_of(esp) {
            config_err!(
                "--esp {esp} with an inner width of {}: each rank of an ESP group has as much of it",
                model.ffn
            );
        }
        model.check_mp(mp)?;
        let timeout = match settings.comm_timeout {
            Some(0) => config_err!("--comm-timeout 0: it is at least 1 second"),
            Some(seconds) => Duration::from_secs(seconds),
            None => d.timeout,
        };
        let schedule = settings.schedule.clone().unwrap_or(d.schedule);
        policy::by_name(&schedule)?;
        Ok(WorldConfig {
            sizes,
            comm,
            timeout,
            all_to_all: settings.a2a.unwrap_or(d.all_to_all),
            schedule,
            profile: settings.profile.clone(),
            cache: match (settings.no_cache, settings.reprofile) {
                (Some(true), _) => CacheUse::Off,
                (_, Some(true)) => CacheUse::Renew,
                _ => CacheUse::Use,
            },
            share_gpu,
            comm_ctas: settings.comm_ctas,
            hosts: d.hosts,
        })
    }
}
