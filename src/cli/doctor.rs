//! `fsmoe doctor`.

use super::write_out;
use fsmoe::device::cuda::probe;
use fsmoe::{Error, Result};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// One JSON object instead of lines
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        let report = probe::probe();
        let text = if self.json {
            serde_json::to_string_pretty(&report).map_err(|e| Error::Config(format!("as JSON: {e}")))?
        } else {
            report.to_string()
        };
        write_out(&mut std::io::stdout(), format!("{text}\n").as_bytes())
    }
}
