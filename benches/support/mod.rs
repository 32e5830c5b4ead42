//! What the benchmarks share: random inputs and Criterion's settings.

use criterion::Criterion;
use fsmoe::device::Lane;
use fsmoe::moe::StepContext;
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Shape, Tensor};
use std::time::Duration;

/// A training step.
pub(crate) const STEP: StepContext = StepContext { train: true, seed: 7, step: 3, first_token: 0 };

/// Few samples and short ones: a whole benchmark takes less than a minute.
pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .configure_from_args()
}

/// An f32 tensor of standard normal deviates, other ones for another `stream`.
pub(crate) fn normal(lane: &Lane, stream: u64, shape: impl Into<Shape>) -> Tensor {
    let t = lane.empty(shape, DType::F32).expect("host memory");
    lane.normal(Counter { seed: 5, purpose: Purpose::Test, step: stream }, 0, &t).expect("a float tensor");
    t
}
