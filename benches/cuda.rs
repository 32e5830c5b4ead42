//! The operations and the layer on a GPU, timed by the device's events.
//!
//! `cargo bench --bench cuda [-- NAME]`; without a GPU it says so and does nothing. Throughput is of the least bytes, or, for
//! what products bound, of their FLOPs. The cases are those of `fsmoe bench kernels`, in bf16.

use criterion::{BenchmarkId, Criterion, Throughput};
use fsmoe::Result;
use fsmoe::bench::kernels::{Overrides, cases};
use fsmoe::bench::{Bench, Ceiling};
use fsmoe::tensor::{DType, Place};
use std::time::Duration;

/// FLOPs per byte above which products take longer than moving their operands, on any GPU that this is for.
const INTENSE: f64 = 100.0;

fn main() -> Result<()> {
    let mut bench = match Bench::open(Place::Cuda(0)) {
        Ok(bench) => bench,
        Err(error) => {
            println!("cuda: nothing is benchmarked: {error}");
            return Ok(());
        }
    };
    println!("{}", Ceiling::measure(&mut bench, DType::BF16)?);
    let mut c = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300))
        .configure_from_args();
    operations(&mut c, &mut bench)?;
    c.final_summary();
    Ok(())
}

fn operations(c: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let lane = bench.lane().clone();
    for case in cases() {
        let sizes = case.benchmarked(false, &Overrides::default())?;
        let (bytes, flops) = (case.bytes(&sizes, DType::BF16), (case.flops)(&sizes));
        let mut group = c.benchmark_group(case.family);
        let intense = flops > INTENSE * bytes;
        group.throughput(if intense { Throughput::Elements(flops as u64) } else { Throughput::Bytes(bytes as u64) });
        // Inputs are made when a benchmark runs: a filter leaves most of them out.
        let mut made = None;
        group.bench_function(BenchmarkId::new(case.name, &sizes), |b| {
            b.iter_custom(|repeats| {
                let tensors = made.get_or_insert_with(|| case.tensors(&*lane, &sizes, DType::BF16).expect("inputs"));
                let mut work = || (case.run)(&*lane, &sizes, tensors);
                bench.total(repeats, &mut work).expect("a GPU that goes on")
            })
        });
        group.finish();
        drop(made);
        bench.release_unused();
    }
    Ok(())
}
