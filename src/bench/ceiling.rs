//! What the device can do at most.

use super::{Bench, Work};
use crate::error::Result;
use crate::rng::{Counter, Purpose};
use crate::tensor::{DType, Shape, Tensor};
use serde::{Deserialize, Serialize};

/// The two rates that bound any operation, measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ceiling {
    /// Always "ceiling".
    pub bench: String,
    /// The device's name.
    pub device: String,
    /// The matrix product's type.
    pub dtype: DType,
    /// Bytes per second, read plus written, of a copy that is many times larger than any cache.
    pub copy_bytes_per_s: f64,
    /// FLOPs per second of a large square matrix product.
    pub gemm_flops_per_s: f64,
}

impl Ceiling {
    /// Measures both rates.
    ///
    /// # Errors
    /// If the device fails or has no memory left.
    pub fn measure(bench: &mut Bench, dtype: DType) -> Result<Self> {
        let (elements, side) = if bench.is_cpu() { (8 << 20, 768) } else { (512 << 20, 8192) };
        let lane = bench.lane().clone();
        let src = lane.full([elements], DType::F32, 1.5)?;
        let dst = lane.empty_like(&src)?;
        let copy = bench.time(&mut [Work::new(|| lane.copy(&src, &dst))])?[0];
        drop((src, dst));
        let (a, b) = (random(bench, 1, [side, side], dtype)?, random(bench, 2, [side, side], dtype)?);
        let c = lane.empty_like(&a)?;
        let gemm = bench.time(&mut [Work::new(|| lane.gemm(1.0, &a, &b, 0.0, &c))])?[0];
        Ok(Ceiling {
            bench: "ceiling".into(),
            device: bench.device().to_owned(),
            dtype,
            copy_bytes_per_s: 2.0 * 4.0 * elements as f64 / (copy.median_ms / 1e3),
            gemm_flops_per_s: 2.0 * (side as f64).powi(3) / (gemm.median_ms / 1e3),
        })
    }

    /// The least milliseconds for so many bytes and FLOPs, and whether it is the bytes that take them.
    pub fn floor_ms(&self, bytes: f64, flops: f64) -> (f64, bool) {
        let (memory, math) = (bytes / self.copy_bytes_per_s, flops / self.gemm_flops_per_s);
        (memory.max(math) * 1e3, memory >= math)
    }
}

impl std::fmt::Display for Ceiling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (copy, gemm) = (self.copy_bytes_per_s / 1e9, self.gemm_flops_per_s / 1e12);
        write!(
            f,
            "{}: a copy moves {copy:.0} GB/s, {} matrix products run at {gemm:.2} TFLOP/s",
            self.device, self.dtype
        )
    }
}

/// Standard normal deviates, other ones for another `stream`: a product of zeros takes less power than one of numbers.
pub(super) fn random(bench: &Bench, stream: u64, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let t = bench.lane().empty(shape, dtype)?;
    bench.lane().normal(Counter { seed: 11, purpose: Purpose::Test, step: stream }, 0, &t)?;
    Ok(t)
}
