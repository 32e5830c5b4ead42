//! `fsmoe bench`.

use super::schedule::Schedule;
use super::{write_line, write_out};
use clap::Subcommand;
use fsmoe::bench::{self, Bench, Ceiling, Load, kernels, layer};
use fsmoe::device::DeviceChoice;
use fsmoe::moe::Capacity;
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::tensor::DType;
use fsmoe::{Error, Result};
use std::io::stdout;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time the whole MoE layer beside the dense matrix products of the same useful FLOPs
    Layer(Layer),
    /// Time the primitive operations beside the bytes and FLOPs they cannot do without
    Kernels(Kernels),
    /// Run a training step over ranks under every schedule, beside what was predicted
    Schedule(Box<Schedule>),
}

/// What both have.
#[derive(clap::Args)]
struct Common {
    /// Where: cpu, cuda, cuda:N, or auto, a GPU where there is one
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Element type: f32, bf16, f16, or f64 on the CPU; by default bf16 on a GPU and f32 on the CPU
    #[arg(long, value_parser = super::float)]
    dtype: Option<DType>,
    /// Milliseconds to measure for, per shape and per operation, between 7 and 500 repeats; by default 1500 and 150
    #[arg(long, value_name = "MS")]
    time: Option<u64>,
    /// JSON lines on standard output
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Layer {
    /// mixtral8x7b_T8k, gpt2xl_moe_T8k, sonic_default, qwen3_30b_T16k, tutel_hello_bf16, small, or T,M,H,E,k,expert; may be
    /// given several times. By default the first five on a GPU, and small on the CPU
    #[arg(long, value_name = "SHAPE")]
    shape: Vec<layer::LayerShape>,
    /// Gate: top-k, sigmoid, x-moe, expert-choice or soft
    #[arg(long, default_value = "top-k")]
    gate: GateKind,
    /// Order: gshard, tutel or ragged
    #[arg(long, default_value = "ragged")]
    order: OrderKind,
    /// Rows per expert over the even share, or * to drop nothing
    #[arg(long, default_value = "*")]
    capacity_factor: Capacity,
    /// Expert: gpt or mixtral; by default the shape's
    #[arg(long)]
    expert: Option<ExpertKind>,
    /// Router load: uniform, zipf (an expert's load as 1/rank), or a JSON file with "loads" or an "assignment"
    #[arg(long, default_value = "uniform", value_name = "LOAD")]
    load: Load,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct Kernels {
    /// An operation, a family, or a part of operations' names; by default all
    name: Option<String>,
    /// Sizes in place of the defaults, T=4096,M=1024 for instance
    #[arg(long, value_name = "SIZE=N,…", default_value = "")]
    shape: kernels::Overrides,
    /// CUDA source, or a fat binary or cubin, whose entry points are checked against the CPU and timed beside ours
    #[arg(long, value_name = "FILE", requires = "name")]
    against: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        match self.what {
            What::Layer(args) => args.run(),
            What::Kernels(args) => args.run(),
            What::Schedule(args) => args.run(),
        }
    }
}

impl Common {
    /// The type, and what the device can do at most, which is written first.
    fn begin(&self, bench: &mut Bench, budget_ms: u64) -> Result<(DType, Ceiling)> {
        let dtype = self.dtype.unwrap_or(if bench.is_cpu() { DType::F32 } else { DType::BF16 });
        let ceiling = Ceiling::measure(bench, dtype)?;
        bench.set_budget(Duration::from_millis(self.time.unwrap_or(budget_ms)));
        if self.json {
            write_line(&ceiling)?;
        } else {
            write_out(&mut stdout(), format!("{ceiling}\n").as_bytes())?;
        }
        Ok((dtype, ceiling))
    }

    /// Runs `work`, which gives its rows to what it is given: each is written as JSON, or all as a table at the end.
    fn report<Row: serde::Serialize>(
        &self,
        table: fn(&[Row]) -> String,
        failed: fn(&Row) -> bool,
        work: impl FnOnce(&mut dyn FnMut(Row) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let mut rows = Vec::new();
        let done = work(&mut |row| {
            if self.json {
                return write_line(&row);
            }
            rows.push(row);
            Ok(())
        });
        if !rows.is_empty() {
            write_out(&mut stdout(), table(&rows).as_bytes())?;
        }
        match rows.iter().filter(|row| failed(row)).count() {
            0 => done,
            // Below the table is what went wrong.
            n => done.map_err(|_| Error::Config(format!("{n} of {} measurements failed", rows.len()))),
        }
    }
}

impl Layer {
    fn run(self) -> Result<()> {
        let mut bench = Bench::open(self.common.device.place())?;
        let (dtype, ceiling) = self.common.begin(&mut bench, 1500)?;
        let mut shapes = self.shape;
        if shapes.is_empty() {
            shapes = layer::LayerShape::defaults(bench.is_cpu());
        }
        if let Some(expert) = self.expert {
            shapes.iter_mut().for_each(|shape| shape.expert = expert);
        }
        let settings = layer::LayerSettings {
            shapes,
            gate: self.gate,
            order: self.order,
            capacity: self.capacity_factor,
            dtype,
            load: self.load,
        };
        self.common.report(
            bench::layer_table,
            |row| row.error.is_some(),
            |emit| layer::run(&mut bench, &settings, &ceiling, emit),
        )
    }
}

impl Kernels {
    fn run(self) -> Result<()> {
        let cases = kernels::named(self.name.as_deref())?;
        kernels::check_overrides(&cases, &self.shape)?;
        let mut bench = Bench::open(self.common.device.place())?;
        let theirs = match &self.against {
            Some(path) => Some(bench.with_kernels(&bench::Image::of(path, bench.architecture())?)?),
            None => None,
        };
        let (dtype, ceiling) = self.common.begin(&mut bench, 150)?;
        self.common.report(
            bench::kernel_table,
            |row| row.error.is_some(),
            |emit| match &theirs {
                Some(theirs) => bench::against::run(&mut bench, theirs, &cases, dtype, &self.shape, &ceiling, emit),
                None => kernels::run(&mut bench, &cases, dtype, &self.shape, &ceiling, emit),
            },
        )
    }
}
