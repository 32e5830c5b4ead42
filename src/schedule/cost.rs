//! What a task costs: t(n) = α + β·n, and the fit that finds α and β.

use crate::error::{Result, config_err};
use serde::{Deserialize, Serialize};

/// t(n) = α + β·n, in seconds; n are bytes or FLOPs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// α, seconds: what the start alone takes.
    pub alpha: f64,
    /// β, seconds per byte or per FLOP.
    pub beta: f64,
    /// R² of the fit it comes from, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r2: Option<f64>,
}

impl Cost {
    /// A line that explains less than this part of the variance of what was measured is worth a word.
    pub const LEAST_R2: f64 = 0.9;

    /// α + β·n seconds.
    pub fn seconds(&self, n: f64) -> f64 {
        self.alpha + self.beta * n
    }

    /// The line through measured (n, seconds) with the least sum of squared errors, among those with α ≥ 0 and β ≥ 0: a
    /// negative one is noise, and a planner would make use of it.
    ///
    /// # Errors
    /// If there are not at least two different n, or a number is negative or not finite.
    pub fn fit(points: &[(f64, f64)]) -> Result<Cost> {
        for &(n, t) in points {
            if !(n.is_finite() && t.is_finite() && n >= 0.0 && t >= 0.0) {
                config_err!("a fit of ({n}, {t} s): sizes and times are finite and at least 0");
            }
        }
        let count = points.len() as f64;
        let mean_n = points.iter().map(|p| p.0).sum::<f64>() / count;
        let mean_t = points.iter().map(|p| p.1).sum::<f64>() / count;
        let sum = |f: &dyn Fn(f64, f64) -> f64| points.iter().map(|&(n, t)| f(n - mean_n, t - mean_t)).sum::<f64>();
        let (nn, nt, tt) = (sum(&|n, _| n * n), sum(&|n, t| n * t), sum(&|_, t| t * t));
        if points.len() < 2 || nn == 0.0 {
            config_err!("a fit of {} points: it takes at least two different sizes", points.len());
        }
        let mut beta = nt / nn;
        let mut alpha = mean_t - beta * mean_n;
        // Where the best line is outside, the best one inside is on the border that it crossed.
        if beta < 0.0 {
            (alpha, beta) = (mean_t, 0.0);
        } else if alpha < 0.0 {
            let through_zero = |f: fn((f64, f64)) -> f64| points.iter().copied().map(f).sum::<f64>();
            (alpha, beta) = (0.0, through_zero(|(n, t)| n * t) / through_zero(|(n, _)| n * n));
        }
        let errors: f64 = points.iter().map(|&(n, t)| (t - alpha - beta * n).powi(2)).sum();
        let r2 = if tt > 0.0 { 1.0 - errors / tt } else { 1.0 };
        Ok(Cost { alpha, beta, r2: Some(r2) })
    }

    /// Checks the numbers of the cost called `name`.
    pub(super) fn validate(&self, name: &str) -> Result<()> {
        for (what, value) in [("alpha", self.alpha), ("beta", self.beta)] {
            if !(value.is_finite() && value >= 0.0) {
                config_err!("{name}: {what} = {value}: it is finite and at least 0");
            }
        }
        if self.alpha == 0.0 && self.beta == 0.0 {
            config_err!("{name}: alpha and beta are both 0: nothing is free");
        }
        match self.r2 {
            Some(r2) if r2.is_nan() || r2 > 1.0 => config_err!("{name}: r2 = {r2}: it is at most 1"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(cost: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (1..=20).map(|i| f64::from(i) * 1e6).map(|n| (n, cost(n))).collect()
    }

    proptest! {
        #[test]
        fn a_line_is_found_again(alpha in 0.0f64..1e-3, beta in 1e-13f64..1e-9) {
            let fit = Cost::fit(&points(|n| alpha + beta * n)).unwrap();
            prop_assert!((fit.alpha - alpha).abs() < 1e-9 && (fit.beta - beta).abs() < 1e-6 * beta);
            prop_assert!(fit.r2.unwrap() > 1.0 - 1e-9);
        }

        /// No line nearby that is allowed has a smaller error.
        #[test]
        fn the_fit_is_the_best_allowed(times in prop::collection::vec(0.0f64..1.0, 5), step in -0.1f64..0.1, turn in -0.1f64..0.1) {
            let points: Vec<(f64, f64)> = times.iter().enumerate().map(|(i, &t)| (i as f64 + 1.0, t)).collect();
            let fit = Cost::fit(&points).unwrap();
            let error = |a: f64, b: f64| points.iter().map(|&(n, t)| (t - a - b * n).powi(2)).sum::<f64>();
            let other = ((fit.alpha + step).max(0.0), (fit.beta + turn).max(0.0));
            prop_assert!(fit.alpha >= 0.0 && fit.beta >= 0.0);
            prop_assert!(error(fit.alpha, fit.beta) <= error(other.0, other.1) + 1e-12);
        }
    }

    #[test]
    fn noise_lowers_r2_and_nonsense_is_refused() {
        let noisy = Cost::fit(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]).unwrap();
        // By hand: slope 0.8, intercept 0.5, squared errors 1.8 of 5.
        assert!((noisy.beta - 0.8).abs() < 1e-12 && (noisy.alpha - 0.5).abs() < 1e-12);
        assert!((noisy.r2.unwrap() - 0.64).abs() < 1e-12);
        for (points, part) in [
            (vec![(1.0, 1.0)], "1 points"),
            (vec![(2.0, 1.0), (2.0, 2.0)], "two different sizes"),
            (vec![(1.0, 1.0), (2.0, f64::NAN)], "NaN"),
            (vec![(1.0, 1.0), (2.0, -3.0)], "-3"),
        ] {
            let error = Cost::fit(&points).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
