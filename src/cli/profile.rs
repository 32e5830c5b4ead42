//! `fsmoe profile`.

use super::world::{WorldArgs, usual_sizes};
use super::write_out;
use fsmoe::comm::Topology;
use fsmoe::model::preset;
use fsmoe::moe::distributed::{Measured, Subject, measure};
use fsmoe::report::Costs;
use fsmoe::tensor::{DType, Place};
use fsmoe::{Error, Result};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
#[command(
    after_help = "Every collective that the groups of these ranks use, dense products and the experts, measured on all ranks \
                  at once; t(n) = α + β·n is fitted to each. Where sizes do not say: mp and esp are the ranks of a node, ep \
                  the nodes. fsmoe plan and fsmoe train take what is written (--profile FILE)."
)]
pub(crate) struct Args {
    #[command(flatten)]
    world: WorldArgs,
    /// Model whose layers are measured: gpt2-moe-tiny, mixtral-tiny, gpt2-moe-small, gpt2-xl-moe, mixtral-8x7b or
    /// mixtral-8x22b
    #[arg(long, value_name = "NAME", default_value = "mixtral-tiny")]
    preset: String,
    /// Sequences of a step for each model-parallel group: what is measured is as large as in such a step, and smaller
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence (the longest, at most 2048)
    #[arg(long)]
    seq: Option<usize>,
    /// Type of what is sent and multiplied: f32, bf16, f16 or f64 (f32 on the CPU, bf16 on a GPU)
    #[arg(long)]
    dtype: Option<DType>,
    /// For how long to measure; everything is measured five times at least
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, allow_negative_numbers = true)]
    time: f64,
    /// Write the costs as TOML
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// One JSON object instead of the table, with what was measured at each size
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        let budget = Duration::try_from_secs_f64(self.time).map_err(|_| {
            Error::Config(format!("--time {}: it is a finite number of seconds, at least 0", self.time))
        })?;
        let world = self.world.world()?;
        let dtype = self.dtype.unwrap_or(if world.place == Place::Cpu { DType::F32 } else { DType::BF16 });
        if !dtype.is_float() || (dtype == DType::F64 && world.place != Place::Cpu) {
            return Err(Error::Config(format!(
                "--dtype {dtype} on {}: it is f32, bf16, f16 or, on the CPU, f64",
                world.place
            )));
        }
        let topology = Topology::new(world.sizes(usual_sizes(world.ranks, world.nodes)))?;
        let config = preset(&self.preset)?;
        let seq = self.seq.unwrap_or(config.max_seq.min(2048));
        let blocks = config.workload(self.batch, seq, &topology, world.all_to_all())?;
        let subject = Subject::of(config.moe_layer(), &blocks, &topology, dtype, budget)?;

        let agree = [("--preset", self.preset.clone()), ("--dtype", dtype.to_string())].into_iter();
        let numbers =
            [("--batch", self.batch.to_string()), ("--seq", seq.to_string()), ("--time", self.time.to_string())];
        let agree = agree.chain(numbers).map(|(name, value)| (name.to_owned(), value)).collect();
        let all = world.run(topology.sizes(), agree, |parallel| measure(parallel, &subject))?;
        // Every rank has the same.
        let Some(mut measured) = all.into_iter().next().filter(|_| world.leads()) else {
            return Ok(());
        };
        if let Some(name) = self.out.as_ref().and_then(|path| path.file_stem()) {
            measured.profile.name = name.to_string_lossy().into_owned();
        }
        let costs = Costs::new(&measured);
        let Measured { profile, repeats, .. } = measured;
        let text = if self.json {
            let shape = json!({"batch": self.batch, "seq": seq, "hidden": config.hidden, "ffn": config.ffn,
                "experts": config.moe.experts, "top_k": config.moe.top_k});
            let object = json!({"preset": self.preset, "world": topology.sizes(), "a2a": world.all_to_all().to_string(),
                "shape": shape, "dtype": dtype.to_string(), "source": profile.source, "repeats": repeats, "costs": costs.costs,
                "slowdown": costs.slowdown});
            format!("{object}\n")
        } else {
            format!(
                "{}, {} × {seq} tokens for each of {} model-parallel groups, {} all-to-all\n{costs}{}\n",
                self.preset,
                self.batch,
                topology.sizes().dp,
                world.all_to_all(),
                profile.source
            )
        };
        write_out(&mut std::io::stdout(), text.as_bytes())?;
        let Some(path) = &self.out else { return Ok(()) };
        profile.save(path)?;
        let path = path.display();
        let text = format!("written to {path}: fsmoe plan and fsmoe train take it, --profile {path}\n");
        if self.json {
            write_out(&mut std::io::stderr(), text.as_bytes())
        } else {
            write_out(&mut std::io::stdout(), text.as_bytes())
        }
    }
}
