//! A case for every primitive operation, and their benchmark.

mod case;
mod comm;
mod fused;
mod gate;
mod math;
mod model;

pub use case::{Arg, Case, Fix, Kind, Overrides, Role, Size, Sizes, Values};

use super::{Bench, Ceiling, Spread, Work};
use crate::device::Kernels;
use crate::error::{Result, config_err};
use crate::report::bytes as readable;
use crate::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

const NO_FIX: fn(&mut Fix<'_>) = |_| ();
const NO_SETUP: fn(&dyn Kernels, &Sizes, &[Tensor]) -> Result<()> = |_, _, _| Ok(());
const NO_FLOPS: fn(&Sizes) -> f64 = |_| 0.0;

/// Every case.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    math::CASES.iter().chain(gate::CASES).chain(fused::CASES).chain(comm::CASES).chain(model::CASES)
}

/// The cases that a name means: the case so called, or else a family's, or else those whose name has it as a part, or else
/// the one whose entry point is so called. Without a name, all.
///
/// # Errors
/// If there are none.
pub fn named(name: Option<&str>) -> Result<Vec<&'static Case>> {
    let Some(name) = name else { return Ok(cases().collect()) };
    let by = |rule: fn(&Case, &str) -> bool| cases().filter(|case| rule(case, name)).collect::<Vec<_>>();
    // An entry point begins with its operation's name.
    let entry = cases().filter(|case| name.starts_with(&format!("{}_", case.name))).max_by_key(|case| case.name.len());
    let found = [
        by(|case, name| case.name == name),
        by(|case, name| case.family == name),
        by(|case, name| case.name.contains(name)),
        entry.into_iter().collect(),
    ];
    match found.into_iter().find(|cases| !cases.is_empty()) {
        Some(cases) => Ok(cases),
        None => {
            let all: Vec<&str> = cases().map(|case| case.name).collect();
            config_err!("no operation is called {name:?}, nor has it in its name: there are {}", all.join(", "))
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelRow {
    /// Always "kernel".
    pub bench: String,
    /// Whose it is: "fsmoe", or the file it came from.
    #[serde(rename = "impl")]
    pub implementation: String,
    /// The operation.
    pub name: String,
    /// Its family.
    pub family: String,
    /// The device's name.
    pub device: String,
    /// The element type.
    pub dtype: String,
    /// The sizes.
    pub shape: String,
    /// `eager`, or `graph` for the replay of a captured graph.
    pub mode: String,
    /// The entry points of this crate that somebody's kernels stood in for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Vec<String>>,
    /// The largest error against the CPU, relative to the largest right value, of somebody's kernels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_error: Option<f64>,
    /// The sizes that somebody's results were compared with the CPU's on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compared: Option<Vec<String>>,
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The figures.
    #[serde(default, flatten)]
    pub figures: Option<KernelFigures>,
}

/// What was measured, and what it is compared with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelFigures {
    /// Its time.
    #[serde(flatten)]
    pub time: Spread,
    /// The least bytes: what it reads and writes, once; what it adds to, twice.
    pub bytes: f64,
    /// FLOPs of its matrix products.
    pub flops: f64,
    /// Bytes over the time, GB/s.
    pub gb_per_s: f64,
    /// FLOPs over the time, TFLOP/s.
    pub tflops: f64,
    /// `memory` or `math`: what bounds it.
    pub bound: String,
    /// The least time by the ceiling's rates.
    pub ceiling_ms: f64,
    /// ceiling_ms over the median.
    pub ratio: f64,
}

impl KernelRow {
    pub(super) fn new(bench: &Bench, case: &Case, sizes: &Sizes, dtype: DType, mode: &str) -> Self {
        KernelRow {
            bench: "kernel".into(),
            implementation: "fsmoe".into(),
            name: case.name.into(),
            family: case.family.into(),
            device: bench.device().to_owned(),
            dtype: dtype.to_string(),
            shape: sizes.to_string(),
            mode: mode.into(),
            replaces: None,
            largest_error: None,
            compared: None,
            error: None,
            figures: None,
        }
    }

    /// The row with a time and what follows from it.
    pub(super) fn timed(self, case: &Case, sizes: &Sizes, dtype: DType, ceiling: &Ceiling, time: Spread) -> Self {
        let (bytes, flops) = (case.bytes(sizes, dtype), (case.flops)(sizes));
        let (ceiling_ms, memory) = ceiling.floor_ms(bytes, flops);
        let figures = KernelFigures {
            time,
            bytes,
            flops,
            gb_per_s: bytes / time.median_ms / 1e6,
            tflops: flops / time.median_ms / 1e9,
            bound: if memory { "memory" } else { "math" }.into(),
            ceiling_ms,
            ratio: ceiling_ms / time.median_ms,
        };
        KernelRow { figures: Some(figures), ..self }
    }
}

/// Benchmarks `cases`, giving each row to `emit` as it comes.
///
/// # Errors
/// If an override names a size that none of the cases has; otherwise the first failure, once the other cases are done: a
/// row has it too.
pub fn run(
    bench: &mut Bench,
    cases: &[&Case],
    dtype: DType,
    overrides: &Overrides,
    ceiling: &Ceiling,
    emit: &mut dyn FnMut(KernelRow) -> Result<()>,
) -> Result<()> {
    check_overrides(cases, overrides)?;
    let mut failure = None;
    for case in cases {
        bench.release_unused();
        let sizes = case.benchmarked(bench.is_cpu(), overrides)?;
        if let Err(error) = run_case(bench, case, &sizes, dtype, ceiling, emit) {
            emit(KernelRow { error: Some(error.to_string()), ..KernelRow::new(bench, case, &sizes, dtype, "eager") })?;
            failure = failure.or(Some(error));
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Fails if an override names a size that none of `cases` has.
///
/// # Errors
/// Then, with the sizes that they have.
pub fn check_overrides(cases: &[&Case], overrides: &Overrides) -> Result<()> {
    let known = |name: &str| cases.iter().any(|case| case.sizes.iter().any(|size| size.name == name));
    match overrides.names().find(|name| !known(name)) {
        None => Ok(()),
        Some(unknown) => {
            let mut sizes: Vec<&str> = cases.iter().flat_map(|case| case.sizes.iter().map(|size| size.name)).collect();
            sizes.sort_unstable();
            sizes.dedup();
            config_err!("shape {unknown}: the sizes of what is benchmarked are {}", sizes.join(", "))
        }
    }
}

fn run_case(
    bench: &mut Bench,
    case: &Case,
    sizes: &Sizes,
    dtype: DType,
    ceiling: &Ceiling,
    emit: &mut dyn FnMut(KernelRow) -> Result<()>,
) -> Result<()> {
    let lane = bench.lane().clone();
    let (needed, free) = (case.memory(sizes, dtype), lane.free_memory()?);
    if let Some(free) = free.filter(|free| needed > *free as f64) {
        config_err!("{} with {sizes} needs {}, and {} are free", case.name, readable(needed), readable(free as f64));
    }
    let tensors = case.tensors(&*lane, sizes, dtype)?;
    let work = || (case.run)(&*lane, sizes, &tensors);
    work()?;
    let (replay, capture_error) = match bench.capture(work) {
        Ok(replay) => (replay, None),
        Err(error) => (None, Some(error.to_string())),
    };
    let mut works = vec![Work::new(work)];
    let mut modes = vec!["eager"];
    if let Some(replay) = replay {
        works.push(Work::new(replay));
        modes.push("graph");
    }
    let spreads = bench.time(&mut works)?;
    drop(works);
    for (mode, time) in modes.into_iter().zip(spreads) {
        emit(KernelRow::new(bench, case, sizes, dtype, mode).timed(case, sizes, dtype, ceiling, time))?;
    }
    if let Some(error) = capture_error {
        emit(KernelRow { error: Some(error), ..KernelRow::new(bench, case, sizes, dtype, "graph") })?;
    }
    Ok(())
}
