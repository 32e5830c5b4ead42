//! What a gate decides: which rows every expert takes, with which weights.

use crate::device::Lane;
use crate::error::{Result, config_err};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How many rows an expert takes from one routing group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Capacity {
    /// C = ceil(f·k·T/E), T the group's tokens; what exceeds it is dropped.
    Factor(f64),
    /// `*`: nothing is dropped; C is the largest load over experts and groups (read from the device once per layer) where
    /// rows are padded to it, else a bound on it.
    Dropless,
}

impl Capacity {
    /// Rows per expert and group for a capacity factor, at least 1, at most the group's tokens (an expert takes a token
    /// once); none for `*`.
    pub fn rows(self, k: usize, group_tokens: usize, experts: usize) -> Option<usize> {
        match self {
            Capacity::Dropless => None,
            Capacity::Factor(f) => {
                let rows = (f * k as f64 * group_tokens as f64 / experts as f64).ceil() as usize;
                Some(rows.clamp(1, group_tokens.max(1)))
            }
        }
    }
}

impl FromStr for Capacity {
    type Err = crate::Error;
    fn from_str(s: &str) -> Result<Self> {
        match s.parse::<f64>() {
            _ if s == "*" => Ok(Capacity::Dropless),
            Ok(f) if f.is_finite() && f > 0.0 => Ok(Capacity::Factor(f)),
            _ => config_err!("capacity factor {s:?}: it is a number above 0, or * to drop nothing"),
        }
    }
}

/// A capacity as configuration files have it: `1.25` or `"*"`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Factor(f64),
    Text(String),
}

impl TryFrom<Written> for Capacity {
    type Error = crate::Error;
    fn try_from(written: Written) -> Result<Self> {
        match written {
            Written::Factor(f) => f.to_string().parse(),
            Written::Text(s) => s.parse(),
        }
    }
}

impl From<Capacity> for Written {
    fn from(capacity: Capacity) -> Written {
        match capacity {
            Capacity::Factor(f) => Written::Factor(f),
            Capacity::Dropless => Written::Text("*".to_owned()),
        }
    }
}

impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Capacity::Factor(v) => write!(f, "{v}"),
            Capacity::Dropless => f.write_str("*"),
        }
    }
}

/// Who takes which token. T tokens, E experts, k choices per token, G routing groups of T/G consecutive tokens,
/// capacity C per group.
#[derive(Clone, Debug)]
pub enum Assignment {
    /// Tokens choose experts.
    TokenChoice {
        /// (T, k) i32: the experts of every token, best first.
        experts: Tensor,
        /// (T, k) i32: the choice's slot in 0..C within its expert and group; −1: dropped.
        slots: Tensor,
        /// (T, k) acc: the combine weights, as they were before drops.
        weights: Tensor,
    },
    /// Experts choose tokens; a token may have any number of experts.
    ExpertChoice {
        /// (E, G·C) i32: the token (0..T) in every slot; group g's slots are g·C..(g+1)·C.
        tokens: Tensor,
        /// (E, G·C) acc: the combine weight of every slot.
        weights: Tensor,
    },
    /// Every slot a mix of its group's tokens, every token a mix of all its group's slots (SoftMoE).
    Dense {
        /// (T, E·C) acc: column s of group g's tokens sums to one over them.
        dispatch: Tensor,
        /// (T, E·C) acc: each row sums to one.
        combine: Tensor,
    },
}

/// A gate's decision for T tokens.
#[derive(Clone, Debug)]
pub struct Routing {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// G, the routing groups.
    pub groups: usize,
    /// C, rows per expert and group.
    pub capacity: usize,
    /// Who takes which token.
    pub assignment: Assignment,
    /// Load-balance loss, (1) acc, before its weight; none where the gate has none.
    pub balance_loss: Option<Tensor>,
    /// z-loss, (1) acc, before its weight; none where the gate has none.
    pub z_loss: Option<Tensor>,
    /// (G, E) i32: choices per group and expert, before drops. For a dense routing, C each.
    pub loads: Tensor,
    /// (1) acc: mean entropy of the tokens' probabilities, in nats.
    pub entropy: Tensor,
}

/// The gradient of the loss with respect to a [`Routing`].
#[derive(Clone, Debug)]
pub struct RoutingGrad {
    /// Of the weights of a token or expert choice, or of the combine matrix; same shape.
    pub combine: Tensor,
    /// Of the dispatch matrix; dense routings only.
    pub dispatch: Option<Tensor>,
    /// Of the balance loss, (1) acc.
    pub balance: Tensor,
    /// Of the z-loss, (1) acc.
    pub z: Tensor,
}

/// A routing's statistics, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingStats {
    /// Choices per expert, before drops, over all groups.
    pub loads: Vec<u64>,
    /// Choices in all: T·k.
    pub choices: u64,
    /// Choices that found no slot.
    pub dropped: u64,
    /// Mean entropy of the tokens' probabilities, nats.
    pub entropy: f64,
    /// Balance loss before its weight.
    pub balance_loss: f64,
    /// z-loss before its weight.
    pub z_loss: f64,
}

impl Routing {
    /// Rows of the padded layout: E·G·C.
    pub fn padded_rows(&self) -> usize {
        self.experts * self.groups * self.capacity
    }

    /// Reads the statistics to the host; waits for what has been issued on `lane`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn stats(&self, lane: &Lane) -> Result<RoutingStats> {
        let tally = self.tally();
        let loads: Vec<i32> = lane.to_host(&tally.loads)?.to_vec()?;
        let floats = tally.floats.iter().map(|t| t.as_ref().map_or(Ok(0.0), |t| lane.scalar(t)));
        Ok(tally.stats(&loads, &floats.collect::<Result<Vec<_>>>()?))
    }

    /// What the statistics are made from, still on the device; the routing itself may go.
    pub fn tally(&self) -> RoutingTally {
        RoutingTally {
            experts: self.experts,
            capacity: self.capacity,
            drops: matches!(self.assignment, Assignment::TokenChoice { .. }),
            loads: self.loads.clone(),
            floats: [Some(self.entropy.clone()), self.balance_loss.clone(), self.z_loss.clone()],
        }
    }
}

/// What a routing's statistics are made from, so that those of a step's layers can be read at once.
#[derive(Clone, Debug)]
pub struct RoutingTally {
    experts: usize,
    capacity: usize,
    drops: bool,
    /// (G, E) i32: [`Routing::loads`].
    pub loads: Tensor,
    /// (1) acc each: entropy, balance loss and z-loss, those there are.
    pub floats: [Option<Tensor>; 3],
}

impl RoutingTally {
    /// The statistics, given what [`RoutingTally::loads`] and [`RoutingTally::floats`] hold, 0 for one there is not.
    pub fn stats(&self, loads: &[i32], floats: &[f64]) -> RoutingStats {
        let mut stats = RoutingStats {
            loads: vec![0; self.experts],
            entropy: floats[0],
            balance_loss: floats[1],
            z_loss: floats[2],
            ..RoutingStats::default()
        };
        for (i, load) in loads.iter().map(|&l| l as u64).enumerate() {
            stats.loads[i % self.experts] += load;
            stats.choices += load;
            if self.drops {
                stats.dropped += load.saturating_sub(self.capacity as u64);
            }
        }
        stats
    }
}

impl RoutingStats {
    /// Adds another routing's counts; entropy and losses become means weighted by choices.
    pub fn merge(&mut self, other: &RoutingStats) {
        self.loads.resize(self.loads.len().max(other.loads.len()), 0);
        for (a, b) in self.loads.iter_mut().zip(&other.loads) {
            *a += b;
        }
        let (a, b) = (self.choices as f64, other.choices as f64);
        let mean = |x: f64, y: f64| if a + b > 0.0 { (a * x + b * y) / (a + b) } else { 0.0 };
        self.entropy = mean(self.entropy, other.entropy);
        self.balance_loss = mean(self.balance_loss, other.balance_loss);
        self.z_loss = mean(self.z_loss, other.z_loss);
        self.choices += other.choices;
        self.dropped += other.dropped;
    }

    /// Dropped choices over all choices.
    pub fn dropped_fraction(&self) -> f64 {
        if self.choices == 0 { 0.0 } else { self.dropped as f64 / self.choices as f64 }
    }
}
