//! The measured costs of a machine, and their file.

use super::Cost;
use crate::device::LaneKind;
use crate::engine::{Slowdown, lane_name};
use crate::error::{Error, Result, config_err};
use crate::fsio::atomic_write;
use crate::named::named;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What the ranks of a group do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Collective {
    /// Priced by the bytes a rank sends, its own part included.
    AllToAll,
    /// Priced by the bytes of the output.
    AllGather,
    /// Priced by the bytes of the input.
    ReduceScatter,
    /// Priced by the bytes of the buffer.
    AllReduce,
}

named!(Collective, "collective", {
    AllToAll => "all-to-all",
    AllGather => "all-gather",
    ReduceScatter => "reduce-scatter",
    AllReduce => "all-reduce",
});

/// The costs of a machine: TOML with a table for each, in seconds, per byte and per FLOP.
///
/// ```
/// let profile = fsmoe::schedule::Profile::published()?;
/// assert_eq!(profile.name, "fsmoe-paper");
/// assert!(profile.to_toml()?.contains("[inter-node.all-to-all]"));
/// # Ok::<(), fsmoe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Profile {
    /// What it is called.
    pub name: String,
    /// Where it was measured.
    pub source: String,
    /// Bytes of an element of activations and gradients.
    #[serde(rename = "element_bytes")]
    pub element_bytes: usize,
    /// Where it was measured, what the lanes of a rank lose to each other: rows are the lane that is slowed down, in the order
    /// of compute, intra-node and inter-node, columns the one that is busy beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowdown: Option<Slowdown>,
    /// What a rank computes.
    pub compute: ComputeCosts,
    /// Collectives of groups within a node.
    #[serde(default)]
    pub intra_node: CollectiveCosts,
    /// Collectives of groups that cross nodes.
    #[serde(default)]
    pub inter_node: CollectiveCosts,
}

/// What a rank computes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ComputeCosts {
    /// A matrix product, by its FLOPs.
    pub gemm: Cost,
    /// One of an expert's products, where it was measured apart: by its FLOPs, with what goes with it (its activation, for
    /// one), the mean of the forward, the data gradient and the weight gradient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<Cost>,
}

/// A cost for every collective that was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CollectiveCosts {
    /// See [`Collective::AllToAll`].
    pub all_to_all: Option<Cost>,
    /// See [`Collective::AllGather`].
    pub all_gather: Option<Cost>,
    /// See [`Collective::ReduceScatter`].
    pub reduce_scatter: Option<Cost>,
    /// See [`Collective::AllReduce`].
    pub all_reduce: Option<Cost>,
}

impl CollectiveCosts {
    /// The cost of one, where it was measured.
    pub fn get(&self, collective: Collective) -> Option<Cost> {
        match collective {
            Collective::AllToAll => self.all_to_all,
            Collective::AllGather => self.all_gather,
            Collective::ReduceScatter => self.reduce_scatter,
            Collective::AllReduce => self.all_reduce,
        }
    }
}

const PUBLISHED: &str = include_str!("../../profiles/fsmoe-paper.toml");

impl Profile {
    /// The costs that FSMoE's authors publish (`profiles/fsmoe-paper.toml`).
    ///
    /// # Errors
    /// None: it is part of this library, and tested.
    pub fn published() -> Result<Self> {
        Self::from_toml(PUBLISHED)
    }

    /// The profile of a name that is built in (`fsmoe-paper`), or of a file.
    ///
    /// # Errors
    /// If the file cannot be read, or is no profile.
    pub fn find(name: &str) -> Result<Self> {
        if name == "fsmoe-paper" { Self::published() } else { Self::load(Path::new(name)) }
    }

    /// All its costs, by name: `dense product`, `inter-node all-to-all`.
    pub fn costs(&self) -> Vec<(String, Cost)> {
        let ComputeCosts { gemm, expert } = self.compute;
        let mut all = vec![("dense product".to_owned(), gemm)];
        all.extend(expert.map(|cost| ("expert product".to_owned(), cost)));
        for (lane, costs) in [(LaneKind::IntraNode, &self.intra_node), (LaneKind::InterNode, &self.inter_node)] {
            let named = |&kind: &Collective| Some((format!("{} {kind}", lane_name(lane)), costs.get(kind)?));
            all.extend(Collective::ALL.iter().filter_map(named));
        }
        all
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// If the file cannot be read, a value is missing, unknown or breaks a rule.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::from_toml(&text).map_err(|e| Error::Config(format!("{}: {e}", path.display())))
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// If it breaks a rule, or the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.validate()?;
        let text = self.to_toml()?;
        atomic_write(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))
    }

    /// Reads the text of a profile.
    ///
    /// # Errors
    /// If it is no TOML, a value is missing, unknown or breaks a rule.
    pub fn from_toml(text: &str) -> Result<Self> {
        let profile: Profile = toml::from_str(text).map_err(|e| Error::Config(format!("no profile: {e}")))?;
        profile.validate()?;
        Ok(profile)
    }

    /// Its text.
    ///
    /// # Errors
    /// If it cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Config(format!("a profile as TOML: {e}")))
    }

    fn validate(&self) -> Result<()> {
        if !(1..=8).contains(&self.element_bytes) {
            config_err!("element_bytes = {}: it is 1 to 8", self.element_bytes);
        }
        if let Some(s) = self.slowdown.iter().flatten().flatten().find(|s| !(s.is_finite() && **s >= 0.0)) {
            config_err!("slowdown = {s}: it is finite and at least 0");
        }
        self.compute.gemm.validate("compute.gemm")?;
        self.compute.expert.map_or(Ok(()), |cost| cost.validate("compute.expert"))?;
        for (lane, costs) in [("intra-node", &self.intra_node), ("inter-node", &self.inter_node)] {
            for &kind in Collective::ALL {
                costs.get(kind).map_or(Ok(()), |cost| cost.validate(&format!("{lane}.{kind}")))?;
            }
        }
        Ok(())
    }

    /// The cost of a collective of a group whose lane is `lane`.
    ///
    /// # Errors
    /// If it was not measured.
    pub fn collective(&self, collective: Collective, lane: LaneKind) -> Result<Cost> {
        let costs = if lane == LaneKind::InterNode { &self.inter_node } else { &self.intra_node };
        match costs.get(collective) {
            Some(cost) => Ok(cost),
            None => {
                let lane = lane_name(lane);
                config_err!(
                    "profile {} has no {lane} {collective}, which a group of this world needs: choose groups that do \
                     without it, or a profile with a table [{lane}.{collective}]",
                    self.name
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_costs_are_the_published_numbers() {
        let p = Profile::published().unwrap();
        // As published: milliseconds, per element and per multiply-add.
        let all = [
            (p.inter_node.all_to_all.unwrap(), 0.23515350484, 1.8543323833e-6),
            (p.intra_node.all_gather.unwrap(), 0.0549, 6.72388e-7),
            (p.compute.gemm, 0.591943532, 5.6847387697e-11),
            (p.intra_node.reduce_scatter.unwrap(), 0.0688, 6.70433e-7),
            (p.inter_node.all_reduce.unwrap(), 0.34099276392, 3.4950701465e-6),
        ];
        for (cost, alpha, beta) in all {
            assert!((cost.alpha * 1e3 / alpha - 1.0).abs() < 1e-14, "{alpha}");
            assert!((cost.beta * 2.0 * 1e3 / beta - 1.0).abs() < 1e-14, "{beta}");
        }
        assert_eq!(p.element_bytes, 2);
    }

    #[test]
    fn written_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine.toml");
        let mut profile = Profile::published().unwrap();
        profile.compute.gemm.r2 = Some(0.998);
        profile.slowdown = Some([[0.0, 0.25, 0.5], [0.0; 3], [1.5, 0.0, 0.0]]);
        profile.save(&path).unwrap();
        assert_eq!(Profile::load(&path).unwrap(), profile);
        assert_eq!(Profile::find(path.to_str().unwrap()).unwrap(), profile);
        profile.inter_node.all_to_all.as_mut().unwrap().beta = f64::INFINITY;
        let error = profile.save(&path).unwrap_err().to_string();
        assert!(error.contains("inter-node.all-to-all: beta = inf"), "{error}");
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let with = |from: &str, to: &str| {
            assert!(PUBLISHED.contains(from));
            Profile::from_toml(&PUBLISHED.replace(from, to)).unwrap_err().to_string()
        };
        for (from, to, part) in [
            ("alpha = 5.49e-5", "alpha = -5.49e-5", "intra-node.all-gather: alpha = -0.0000549"),
            ("alpha = 5.49e-5", "alpha = 5.49e-5\nr2 = 1.5", "intra-node.all-gather: r2 = 1.5"),
            ("alpha = 5.49e-5", "gamma = 1.0", "gamma"),
            ("[compute.gemm]", "[compute.gemv]", "gemv"),
            ("element_bytes = 2", "element_bytes = 0", "element_bytes = 0"),
            (
                "element_bytes = 2",
                "element_bytes = 2\nslowdown = [[0.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]",
                "slowdown = -1: it is finite and at least 0",
            ),
            ("beta = 3.36194e-10", "", "beta"),
        ] {
            let error = with(from, to);
            assert!(error.contains(part), "{error}");
        }
        let published = Profile::published().unwrap();
        let error = published.collective(Collective::AllToAll, LaneKind::IntraNode).unwrap_err().to_string();
        assert!(error.contains("[intra-node.all-to-all]"), "{error}");
        let error = Profile::find("/nowhere/p.toml").unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/p.toml: "), "{error}");
    }
}
