//! `fsmoe train`.

use super::write_out;
use fsmoe::Result;
use fsmoe::train::{Request, Settings, train_rank};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(
    after_help = "In round brackets: what is taken where neither a flag nor --config says. The model's sizes come from the preset."
)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: Settings,
    /// TOML file with any of these settings (`_` for `-`); flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Go on from a run folder's newest checkpoint, or from a checkpoint in one
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Only JSON lines on standard output, everything else on standard error
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        let settings = match &self.config {
            Some(path) => self.settings.or(Settings::read(path)?),
            None => self.settings,
        };
        let json = self.json.then(|| Box::new(std::io::stdout()) as Box<dyn std::io::Write + Send>);
        // The first rank speaks.
        let Some(summary) = train_rank(Request { settings, resume: self.resume, json })? else { return Ok(()) };
        if self.json {
            eprint!("{summary}");
            Ok(())
        } else {
            write_out(&mut std::io::stdout(), summary.to_string().as_bytes())
        }
    }
}
