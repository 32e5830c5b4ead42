//! `fsmoe doctor`.

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
        if self.json {
            let text = serde_json::to_string_pretty(&report).map_err(|e| Error::Config(format!("as JSON: {e}")))?;
            println!("{text}");
        } else {
            println!("{report}");
        }
        Ok(())
    }
}
