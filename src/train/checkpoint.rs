//! Checkpoints of a run: a folder `step-NNNNNN` with the model as Hugging Face has it (config.json,
//! model.safetensors), the optimizer's moments and selection biases (optimizer.safetensors) and the step (state.json).
//!
//! A folder is complete or absent: it is built beside its name, synced, and renamed. Randomness is counter-based, so seed
//! and step are the whole state of the generators.

use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::checkpoint as weights;
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// What a checkpoint holds besides tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Version of this layout.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// The run's seed.
    pub seed: u64,
    /// Steps of the whole schedule.
    pub steps: u64,
    /// Samples (sequences) seen.
    pub samples: u64,
}

/// The version of the layout written here.
pub const FORMAT: u32 = 1;

/// Writes `dir/step-NNNNNN` and removes the oldest checkpoints beyond `keep_last`. Returns the new folder. Of several ranks
/// all take part, and the one that is given a folder writes what all of them hold, one tensor at a time.
///
/// Checkpoints of later steps are removed as well: the run has gone back, and they belong to a course it has left.
///
/// # Errors
/// If a parameter is not finite, or a file cannot be written; checkpoints that were there before are then whole.
pub fn save(dir: Option<&Path>, trainer: &Trainer, state: &RunState, keep_last: usize) -> Result<Option<PathBuf>> {
    trainer.check_finite()?;
    // Of a rank that has failed, nothing is written.
    trainer.barrier()?;
    let (model, optimizer) = (weights::named(trainer.model()), optimizer(trainer));
    let (model_wholes, optimizer_wholes) = (trainer.wholes(&model), trainer.wholes(&optimizer));
    let Some(dir) = dir else {
        // As the rank that writes asks for them.
        for (tensors, wholes) in [(&model, &model_wholes), (&optimizer, &optimizer_wholes)] {
            weights::write_order(wholes).into_iter().try_for_each(|i| trainer.give(&tensors[i]))?;
        }
        trainer.barrier()?;
        return Ok(None);
    };
    let path = dir.join(format!("step-{:06}", state.step));
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    fsio::atomic_dir(&path, |tmp| {
        let (config, dtype) = (trainer.model().config(), trainer.model().dtype());
        weights::write_as(tmp, config, dtype, &model_wholes, &mut |i| trainer.whole(&model[i]))?;
        weights::write_wholes(&tmp.join(OPTIMIZER), &optimizer_wholes, &mut |i| trainer.whole(&optimizer[i]))?;
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::Config(format!("run state: {e}")))?;
        let file = tmp.join(STATE);
        fsio::atomic_write(&file, |w| w.write_all(text.as_bytes()).map_err(|e| Error::io(&file, e)))
    })?;
    let mut kept = list(dir)?;
    let later = kept.split_off(kept.iter().position(|p| *p == path).map_or(kept.len(), |i| i + 1));
    let old = kept.len().saturating_sub(keep_last.max(1));
    for gone in kept.drain(..old).chain(later) {
        std::fs::remove_dir_all(&gone).map_err(|e| Error::io(&gone, e))?;
    }
    trainer.barrier()?;
    Ok(Some(path))
}

/// What goes into the optimizer's file.
fn optimizer(trainer: &Trainer) -> Vec<(String, Tensor)> {
    let buffers = trainer.model().buffers().into_iter().map(|(name, t)| (format!("buffer.{name}"), t));
    trainer.optimizer().state().into_iter().chain(buffers).collect()
}

/// The checkpoints below `dir`, oldest first.
///
/// # Errors
/// If the folder cannot be read; one that does not exist holds none.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(dir, e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let step = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix("step-"));
        if let Some(step) = step.and_then(|s| s.parse::<u64>().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The checkpoint that `path` means: itself, or, for a run folder, its newest.
///
/// # Errors
/// If there is none.
pub fn find(path: &Path) -> Result<PathBuf> {
    if path.join("config.json").is_file() {
        return Ok(path.to_path_buf());
    }
    let checkpoints = path.join("checkpoints");
    list(&checkpoints)?.pop().ok_or_else(|| Error::Checkpoint {
        path: path.to_path_buf(),
        reason: "neither a checkpoint (no config.json) nor a run with one (no checkpoints/step-NNNNNN)".into(),
    })
}

/// Reads the step and seed of a checkpoint.
///
/// # Errors
/// If state.json is missing or not of this format.
pub fn read_state(dir: &Path) -> Result<RunState> {
    let path = dir.join(STATE);
    let bad = |reason: String| Error::Checkpoint { path: path.clone(), reason };
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let state: RunState = serde_json::from_str(&text).map_err(|e| bad(format!("not a run's state: {e}")))?;
    if state.format != FORMAT {
        return Err(bad(format!("format {}, this version reads {FORMAT}", state.format)));
    }
    Ok(state)
}

/// Puts a checkpoint's weights, moments, biases and step into `trainer`. Everything is checked before anything is written.
///
/// # Errors
/// If a file is missing, damaged, or of another model.
pub fn restore(dir: &Path, trainer: &mut Trainer) -> Result<RunState> {
    let state = read_state(dir)?;
    let file = weights::TensorFile::open(&dir.join(OPTIMIZER))?;
    let (model, optimizer) = (weights::named(trainer.model()), optimizer(trainer));
    file.check(&trainer.wholes(&optimizer))?;
    weights::load_wholes(dir, &trainer.wholes(&model), &mut |i, whole| trainer.take(&model[i], whole))?;
    optimizer.iter().try_for_each(|tensor| trainer.take(tensor, &file.read(&tensor.0)?))?;
    trainer.set_steps_done(state.step);
    Ok(state)
}
