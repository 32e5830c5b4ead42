//! `fsmoe sample`.

use super::write_out;
use fsmoe::device::{DeviceChoice, Lane};
use fsmoe::model::{Sampling, checkpoint as weights, generate};
use fsmoe::tensor::DType;
use fsmoe::train::{RunDir, checkpoint};
use fsmoe::{Error, Result};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run folder, checkpoint, or Hugging Face Mixtral folder; by default the newest run below runs/
    #[arg(value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text to continue
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Bytes to write
    #[arg(long, default_value_t = 500)]
    bytes: usize,
    /// Logits are divided by it; 0 takes the most probable byte each time
    #[arg(long, default_value_t = 0.7, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw only from the most probable bytes that together reach this probability
    #[arg(long, default_value_t = 0.95, allow_negative_numbers = true)]
    top_p: f64,
    /// The same seed, model and prompt give the same text
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Bytes the model looks back at; by default as many as it was trained on
    #[arg(long, value_name = "BYTES")]
    context: Option<usize>,
    /// Where to run: cpu, cuda, cuda:N (GPU number N), or auto: a GPU if one works, else the CPU
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        let path = match self.model {
            Some(path) => path,
            None => RunDir::newest()?.path().to_path_buf(),
        };
        let dir = checkpoint::find(&path)?;
        let config = weights::read_config(&dir)?;
        if config.vocab != 256 {
            return Err(Error::Config(format!(
                "{}: a vocabulary of {}; sampling writes bytes, and takes a byte-level model (256)",
                dir.display(),
                config.vocab
            )));
        }
        let context = match (self.context, RunDir::of(&dir)) {
            (Some(context), _) => context,
            (None, Ok(run)) => run.settings()?.resolve()?.0.seq,
            (None, Err(_)) => config.max_seq,
        };
        let sampling = Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed, context };
        sampling.validate()?;
        let lane = Lane::at(self.device.place())?;
        let model = weights::load(&dir, &lane, DType::F32)?;
        let prompt: Vec<i32> = self.prompt.bytes().map(i32::from).collect();
        let mut out = std::io::stdout().lock();
        write_out(&mut out, self.prompt.as_bytes())?;
        generate(&lane, &model, &prompt, self.bytes, sampling, |byte| write_out(&mut out, &[byte as u8]))?;
        write_out(&mut out, b"\n")
    }
}
