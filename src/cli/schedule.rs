//! `fsmoe bench schedule`.

use super::world::{World, WorldArgs};
use super::{write_line, write_out};
use fsmoe::bench::schedule::{self, Outcome, ScheduleRow, Settings, Shape};
use fsmoe::bench::schedule_table;
use fsmoe::engine::Timeline;
use fsmoe::fsio::atomic_write;
use fsmoe::report::{gantt_svg, perfetto};
use fsmoe::schedule::{Policy, Profile, policy};
use fsmoe::tensor::{DType, Place};
use fsmoe::{Error, Result};
use std::io::stdout;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

#[derive(clap::Args)]
#[command(
    after_help = "Sizes of groups that are not given are the shape's: mp the ranks of a node where that divides the \
heads, esp as many or fewer, ep the others."
)]
pub(crate) struct Schedule {
    #[command(flatten)]
    world: WorldArgs,
    /// inter-bound, intra-bound, expert-bound, gpt2-xl, mixtral-8x7b or tiny; may be given several times. By default the first
    /// three where costs are emulated, the next two on a GPU, tiny on the CPU
    #[arg(long, value_name = "SHAPE")]
    shape: Vec<Shape>,
    /// Blocks of the stack, at least 4 (4)
    #[arg(long, value_parser = clap::value_parser!(u64).range(4..=64))]
    layers: Option<u64>,
    /// Sequences for each model-parallel group (the shape's)
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of a sequence (the shape's)
    #[arg(long)]
    seq: Option<usize>,
    /// Policy; may be given several times. By default all
    #[arg(long, value_name = "NAME")]
    policy: Vec<String>,
    /// Emulate a machine of these costs: fsmoe-paper, or a TOML file. Every task does its work on a small image of the shape,
    /// then waits until it has taken what it costs
    #[arg(long, value_name = "PROFILE")]
    emulate: Option<String>,
    /// Element type (f32 on the CPU, bf16 on a GPU)
    #[arg(long, value_parser = super::float)]
    dtype: Option<DType>,
    /// Steps of each policy that are timed
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Write the timelines of one more step of each policy into this folder: Perfetto JSON of all ranks, and an SVG of the
    /// first rank beside its simulation
    #[arg(long, value_name = "DIR")]
    trace: Option<PathBuf>,
    /// JSON lines on standard output
    #[arg(long)]
    json: bool,
}

impl Schedule {
    pub(crate) fn run(self) -> Result<()> {
        let policies: Vec<Arc<dyn Policy>> = match self.policy.is_empty() {
            true => policy::all().into_iter().map(Arc::from).collect(),
            false => self.policy.iter().map(|name| policy::by_name(name).map(Arc::from)).collect::<Result<_>>()?,
        };
        let emulate = self.emulate.as_deref().map(Profile::find).transpose()?;
        let world = self.world.world()?;
        let cpu = world.place == Place::Cpu;
        if emulate.is_some() && !cpu {
            return Err(Error::Config(format!("--emulate on {}: ranks emulate on the CPU", world.place)));
        }
        let settings = Settings {
            dtype: self.dtype.unwrap_or(if cpu { DType::F32 } else { DType::BF16 }),
            all_to_all: world.all_to_all(),
            steps: self.steps as usize,
            measure: Duration::from_secs(2),
            trace: self.trace.is_some(),
            emulate,
        };
        if settings.emulate.is_some() {
            schedule::prepare_emulation();
        }
        let mut shapes = self.shape;
        if shapes.is_empty() {
            shapes = Shape::defaults(settings.emulate.is_some(), cpu)?;
        }
        if let Some(folder) = &self.trace {
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        let mut rows = Vec::new();
        for mut shape in shapes {
            shape.model.layers = self.layers.map_or(shape.model.layers, |n| n as usize);
            shape.batch = self.batch.unwrap_or(shape.batch);
            shape.seq = self.seq.unwrap_or(shape.seq);
            shape.model.max_seq = shape.seq;
            let sizes = world.sizes(shape.sizes(world.ranks, world.nodes));
            let names: Vec<&str> = policies.iter().map(|policy| policy.name()).collect();
            let agree = vec![("--shape".to_owned(), format!("{shape:?} {settings:?} {names:?}"))];
            let outcomes = world.run(sizes, agree, |parallel| schedule::run(parallel, &shape, &settings, &policies))?;
            if let Some(folder) = &self.trace {
                write_traces(folder, &shape.name, &world, &outcomes)?;
            }
            let Some(first) = outcomes.into_iter().next().filter(|_| world.leads()) else { continue };
            if let Some(measured) = &first.measured {
                eprintln!("{}: costs {}", shape.name, measured.profile.source);
            }
            if self.json {
                first.rows.iter().try_for_each(write_line)?;
            } else {
                let head = if rows.is_empty() { "" } else { "\n" };
                write_out(&mut stdout(), format!("{head}{}", schedule_table(&first.rows)).as_bytes())?;
            }
            rows.extend(first.rows);
        }
        match rows.iter().find(|row: &&ScheduleRow| !row.valid) {
            None => Ok(()),
            Some(row) => Err(Error::Config(format!(
                "emulation of {} under {}: {:.1} % of its tasks took longer than they cost, and its step {:.1} % longer than \
                 predicted, which are to be under 1 % and 10 %: this machine is too slow for the ranks, or busy",
                row.shape,
                row.policy,
                row.overran_percent.unwrap_or_default(),
                row.error_percent
            ))),
        }
    }
}

/// For each policy the ranks that this process has and the simulation; and the first of them beside it, drawn.
fn write_traces(folder: &Path, shape: &str, world: &World, outcomes: &[Outcome]) -> Result<()> {
    let first = world.first_rank();
    for p in 0..outcomes.first().map_or(0, |outcome| outcome.timelines.len()) {
        let (policy, measured, simulated) = &outcomes[0].timelines[p];
        let names: Vec<String> = (0..outcomes.len()).map(|rank| format!("rank {}", first + rank)).collect();
        let mut ranks: Vec<(&str, &Timeline)> =
            names.iter().map(String::as_str).zip(outcomes.iter().map(|outcome| &outcome.timelines[p].1)).collect();
        ranks.push(("simulated", simulated));
        let file = |end: &str| match world.is_process() {
            true => folder.join(format!("{shape}-{policy}-rank{first}.{end}")),
            false => folder.join(format!("{shape}-{policy}.{end}")),
        };
        let (title, model) = (format!("{shape}, {policy}: rank {first}, measured"), format!("{policy}: simulated"));
        write(&file("json"), &perfetto(&ranks))?;
        write(&file("svg"), &gantt_svg(&[(&title, measured), (&model, simulated)]))?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    atomic_write(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))
}
