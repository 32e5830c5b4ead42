//! Medians and spreads.

use serde::{Deserialize, Serialize};

/// Times of one piece of work, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median.
    pub median_ms: f64,
    /// The tenth percentile.
    pub p10_ms: f64,
    /// The ninetieth percentile.
    pub p90_ms: f64,
    /// How many times it was measured.
    pub repeats: usize,
}

impl Spread {
    /// Of at least one time.
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Spread {
            median_ms: quantile(&times, 0.5),
            p10_ms: quantile(&times, 0.1),
            p90_ms: quantile(&times, 0.9),
            repeats: times.len(),
        }
    }
}

/// The q-quantile of sorted numbers, between two of them where it falls there; NaN of none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q * last as f64;
    let (below, above) = (sorted[at as usize], sorted[(at as usize + 1).min(last)]);
    below + (above - below) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_fall_on_and_between_times() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 5.0, 4.0]);
        assert_eq!((spread.median_ms, spread.repeats), (3.0, 5));
        assert!((spread.p10_ms - 1.4).abs() < 1e-12 && (spread.p90_ms - 4.6).abs() < 1e-12, "{spread:?}");
        assert_eq!(Spread::of(vec![7.0]), Spread { median_ms: 7.0, p10_ms: 7.0, p90_ms: 7.0, repeats: 1 });
        assert_eq!(Spread::of(vec![1.0, 2.0]).median_ms, 1.5);
    }
}
