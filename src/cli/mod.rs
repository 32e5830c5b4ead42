//! The command line: one file per subcommand, no logic.

mod bench;
mod doctor;
mod plan;
mod profile;
mod sample;
mod schedule;
mod train;
mod world;

use clap::{Parser, Subcommand};
use fsmoe::tensor::DType;
use fsmoe::{Error, Result};
use std::io::Write;

/// Trains sparse Mixture-of-Experts models.
#[derive(Parser)]
#[command(version, about)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model on text; with no --data, on this project's own sources
    Train(Box<train::Args>),
    /// Continue a prompt with a trained model
    Sample(sample::Args),
    /// Compare schedules of a model on a cluster, by its measured costs
    Plan(Box<plan::Args>),
    /// Measure what ranks cost: their collectives and matrix products, for fsmoe plan and fsmoe train
    Profile(Box<profile::Args>),
    /// Time the MoE layer, or its kernels, beside what the device can do at most
    Bench(Box<bench::Args>),
    /// Tell what this machine has, and what fsmoe will use
    Doctor(doctor::Args),
}

impl Cli {
    pub(crate) fn run(self) -> Result<()> {
        match self.command {
            Command::Train(args) => args.run(),
            Command::Sample(args) => args.run(),
            Command::Plan(args) => args.run(),
            Command::Profile(args) => args.run(),
            Command::Bench(args) => args.run(),
            Command::Doctor(args) => args.run(),
        }
    }
}

/// A type that arithmetic is done in.
fn float(name: &str) -> Result<DType> {
    let mut floats = DType::ALL.iter().copied().filter(|dtype| dtype.is_float());
    floats.clone().find(|dtype| dtype.name() == name).ok_or_else(|| {
        let known: Vec<&str> = floats.by_ref().map(DType::name).collect();
        Error::Config(format!("{name:?} is none of {}", known.join(", ")))
    })
}

/// Writes to standard output, flushed. A pipe that nobody reads any more is an error, where `print!` would panic.
fn write_out(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| Error::io("standard output", e))
}

/// A row as a line of JSON.
fn write_line(row: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string(row).map_err(|e| Error::Config(format!("as JSON: {e}")))?;
    write_out(&mut std::io::stdout(), format!("{json}\n").as_bytes())
}
