//! Router loads: which expert takes how much.
//!
//! The gate itself decides, in the timed work. A wanted assignment is planted in its input: router row e gets 1 added at
//! column e, and a token gets [`BOOST`] added in the columns of its experts, far above what the other logits come to.

use crate::device::Lane;
use crate::error::{Error, Result, config_err};
use crate::tensor::{DType, Tensor};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What is added to a token's logits for its experts.
const BOOST: f64 = 4.0;

/// How a benchmark's tokens fall to experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// As a random router has random tokens: near even.
    Uniform,
    /// An expert's load is as 1/rank, an expert taking a token at most once; ranks lie scattered over the experts.
    Zipf,
    /// Recorded loads or assignments, from a JSON file: `{"loads": [tokens of each expert]}`, scaled to the benchmark's
    /// T·k, or `{"assignment": [[the k experts of a token], …]}`, repeated or cut to T tokens.
    Replayed(PathBuf),
}

impl FromStr for Load {
    type Err = std::convert::Infallible;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "uniform" => Load::Uniform,
            "zipf" => Load::Zipf,
            path => Load::Replayed(path.into()),
        })
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Load::Uniform => f.pad("uniform"),
            Load::Zipf => f.pad("zipf"),
            Load::Replayed(path) => f.pad(&path.display().to_string()),
        }
    }
}

/// A recording of a router.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recording {
    loads: Option<Vec<f64>>,
    assignment: Option<Vec<Vec<i32>>>,
}

impl Load {
    /// The experts of every token, (T, k) row-major; none where the router is left alone.
    ///
    /// # Errors
    /// If a file cannot be read, or does not fit T, k and E.
    pub(super) fn assignment(&self, tokens: usize, k: usize, experts: usize) -> Result<Option<Vec<i32>>> {
        match self {
            Load::Uniform => Ok(None),
            Load::Zipf => {
                let weights = zipf(experts);
                Ok(Some(deal(&apportion(&weights, tokens * k, tokens), tokens, k)))
            }
            Load::Replayed(path) => replayed(path, tokens, k, experts).map(Some),
        }
    }
}

fn replayed(path: &Path, tokens: usize, k: usize, experts: usize) -> Result<Vec<i32>> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            config_err!(
                "load {}: it is uniform, zipf, or a recording's file, and there is no such file",
                path.display()
            )
        }
        text => text.map_err(|e| Error::io(path, e))?,
    };
    let bad = |what: String| Error::Config(format!("{}: {what}", path.display()));
    let recording: Recording = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    match recording {
        Recording { loads: Some(loads), assignment: None } => {
            if loads.len() != experts {
                return Err(bad(format!("loads of {} experts, the layer has {experts}", loads.len())));
            }
            if !loads.iter().all(|l| l.is_finite() && *l >= 0.0) || loads.iter().filter(|l| **l > 0.0).count() < k {
                return Err(bad(format!(
                    "loads: finite numbers, at least 0, and above 0 for at least k = {k} experts"
                )));
            }
            Ok(deal(&apportion(&loads, tokens * k, tokens), tokens, k))
        }
        Recording { loads: None, assignment: Some(rows) } if !rows.is_empty() => {
            for (token, row) in rows.iter().enumerate() {
                let distinct = row.iter().enumerate().all(|(j, e)| !row[..j].contains(e));
                if row.len() != k || !distinct || !row.iter().all(|e| (0..experts as i32).contains(e)) {
                    return Err(bad(format!(
                        "assignment of token {token}: {row:?}, it is k = {k} different experts of 0..{experts}"
                    )));
                }
            }
            Ok(rows.iter().cycle().take(tokens).flatten().copied().collect())
        }
        _ => Err(bad("a recording has either \"loads\" or \"assignment\"".into())),
    }
}

/// 1/rank for every expert, the ranks in the order of a multiplicative hash.
fn zipf(experts: usize) -> Vec<f64> {
    let mut by_rank: Vec<usize> = (0..experts).collect();
    by_rank.sort_by_key(|&e| (e as u32).wrapping_mul(2_654_435_761));
    let mut weights = vec![0.0; experts];
    for (rank, e) in by_rank.into_iter().enumerate() {
        weights[e] = 1.0 / (rank + 1) as f64;
    }
    weights
}

/// `total` in parts as `weights`, none above `cap`: what a capped expert cannot take falls to the others in their
/// proportion; what rounding down leaves, to the largest fractions.
fn apportion(weights: &[f64], total: usize, cap: usize) -> Vec<usize> {
    let mut loads = vec![0; weights.len()];
    let mut free: Vec<usize> = (0..weights.len()).filter(|&e| weights[e] > 0.0).collect();
    let mut left = total;
    let scale = loop {
        let scale = left as f64 / free.iter().map(|&e| weights[e]).sum::<f64>().max(f64::MIN_POSITIVE);
        let over: Vec<usize> = free.iter().copied().filter(|&e| weights[e] * scale > cap as f64).collect();
        if over.is_empty() {
            break scale;
        }
        for e in over {
            loads[e] = cap;
            left -= cap.min(left);
            free.retain(|&f| f != e);
        }
    };
    for &e in &free {
        loads[e] = ((weights[e] * scale) as usize).min(cap);
        left -= loads[e].min(left);
    }
    free.sort_by(|&a, &b| (weights[b] * scale).fract().total_cmp(&(weights[a] * scale).fract()).then(a.cmp(&b)));
    for e in free.iter().copied().cycle().take(free.len() * 2) {
        if left > 0 && loads[e] < cap {
            loads[e] += 1;
            left -= 1;
        }
    }
    loads
}

/// (T, k) experts with exactly these loads, of which none is above T and which sum to T·k: dealt round the tokens expert
/// by expert, so that no token gets one twice, and the tokens then scattered.
fn deal(loads: &[usize], tokens: usize, k: usize) -> Vec<i32> {
    let mut scattered: Vec<usize> = (0..tokens).collect();
    scattered.sort_by_key(|&t| (t as u32).wrapping_mul(2_654_435_761));
    let mut assignment = vec![0; tokens * k];
    let experts = loads.iter().enumerate().flat_map(|(e, &load)| std::iter::repeat_n(e as i32, load));
    for (n, e) in experts.take(tokens * k).enumerate() {
        assignment[scattered[n % tokens] * k + n / tokens] = e;
    }
    assignment
}

/// Adds 1 at column e of router row e; weight: (E, M).
pub(super) fn plant_in_router(lane: &Lane, weight: &Tensor) -> Result<()> {
    let (experts, width) = (weight.dim(0), weight.dim(1));
    if experts > width {
        config_err!("a load other than uniform with E = {experts} experts of width M = {width}: it needs E up to M");
    }
    let index: Vec<i32> = (0..experts as i32).collect();
    let index = lane.to_device(&Tensor::from_slice(&index, [experts, 1])?)?;
    lane.scatter_cols(&lane.full([experts, 1], weight.dtype(), 1.0)?, &index, weight)
}

/// Adds what makes the router choose `assignment`: (T, k), to x: (T, M).
pub(super) fn plant_in_tokens(lane: &Lane, assignment: &[i32], k: usize, x: &Tensor) -> Result<()> {
    let index = lane.to_device(&Tensor::from_slice(assignment, [x.dim(0), k])?)?;
    lane.scatter_cols(&lane.full([x.dim(0), k], DType::F32, BOOST)?, &index, x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(assignment: &[i32], experts: usize) -> Vec<usize> {
        (0..experts).map(|e| assignment.iter().filter(|a| **a == e as i32).count()).collect()
    }

    #[test]
    fn zipf_loads_are_as_one_over_rank_and_sum_up() {
        let loads = apportion(&zipf(8), 2 * 8192, 8192);
        assert_eq!(loads.iter().sum::<usize>(), 2 * 8192);
        let mut sorted = loads.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        assert!((sorted[0] as f64 / sorted[3] as f64 - 4.0).abs() < 0.01, "{sorted:?}");
        assert_ne!(sorted, loads, "ranks lie scattered");

        // The first of 128 experts would take more tokens than there are.
        let loads = apportion(&zipf(128), 8 * 4096, 4096);
        assert_eq!((loads.iter().sum::<usize>(), loads.iter().max()), (8 * 4096, Some(&4096)));
        assert_eq!(apportion(&zipf(2), 2 * 100, 100), [100, 100]);
    }

    #[test]
    fn dealing_gives_the_loads_and_no_expert_twice() {
        for (tokens, k, experts) in [(64, 2, 8), (50, 8, 128), (7, 1, 3), (9, 3, 3)] {
            let loads = apportion(&zipf(experts), tokens * k, tokens);
            let assignment = deal(&loads, tokens, k);
            assert_eq!(counted(&assignment, experts), loads);
            for row in assignment.chunks(k) {
                assert!(row.iter().enumerate().all(|(j, e)| !row[..j].contains(e)), "{row:?}");
            }
        }
    }

    #[test]
    fn recordings_are_scaled_repeated_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("load.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().parse::<Load>().unwrap().assignment(6, 2, 3)
        };
        let assignment = read(r#"{"loads": [1, 2, 1]}"#).unwrap().unwrap();
        assert_eq!(counted(&assignment, 3), [3, 6, 3]);
        assert_eq!(read(r#"{"assignment": [[0, 1], [2, 0]]}"#).unwrap().unwrap(), [0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0]);
        for (text, part) in [
            (r#"{"loads": [1, 2]}"#, "loads of 2 experts, the layer has 3"),
            (r#"{"loads": [1, 0, 0]}"#, "at least k = 2"),
            (r#"{"assignment": [[0, 0]]}"#, "token 0: [0, 0]"),
            (r#"{"assignment": [[0, 3]]}"#, "different experts of 0..3"),
            (r#"{}"#, "either \"loads\" or \"assignment\""),
            (r#"{"speed": 1}"#, "unknown field"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(part) && message.contains("load.json"), "{message}");
        }
    }
}
