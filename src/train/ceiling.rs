//! What a device does at its best, to compare a run's speed with.

use crate::device::Lane;
use crate::error::Result;
use crate::rng::{Counter, Purpose};
use crate::tensor::{DType, Tensor};
use std::time::Instant;

/// Products timed.
const REPEATS: usize = 10;

/// FLOP/s of a large square matrix product of `dtype`: the ceiling of everything that multiplies matrices.
///
/// # Errors
/// If the device fails.
pub(super) fn product_flops(lane: &Lane, dtype: DType, size: usize) -> Result<f64> {
    let (a, b, c) = (random(lane, dtype, size, 0)?, random(lane, dtype, size, 1)?, lane.empty([size, size], dtype)?);
    let wait = |c: &Tensor| lane.scalar(&c.narrow(0, 0, 1)?.narrow(1, 0, 1)?);
    let run = |times: usize| -> Result<f64> {
        lane.gemm(1.0, &a, &b.t()?, 0.0, &c)?;
        wait(&c)?;
        let start = Instant::now();
        for _ in 0..times {
            lane.gemm(1.0, &a, &b.t()?, 0.0, &c)?;
        }
        wait(&c)?;
        Ok(start.elapsed().as_secs_f64())
    };
    Ok(2.0 * (size as f64).powi(3) * REPEATS as f64 / run(REPEATS)?)
}

/// A square of normal deviates: with constants a device draws less power, and runs faster than it ever will.
fn random(lane: &Lane, dtype: DType, size: usize, step: u64) -> Result<Tensor> {
    let t = lane.empty([size, size], dtype)?;
    lane.normal(Counter { seed: 1, purpose: Purpose::Test, step }, 0, &t)?;
    Ok(t)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_timed() {
        assert!(product_flops(&Lane::cpu(), DType::F32, 64).unwrap() > 0.0);
    }
}
