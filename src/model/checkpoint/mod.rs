//! Checkpoints: a folder with a `config.json` and safetensors files, as Hugging Face's transformers has them.
//!
//! A Mixtral folder from there loads as it is. What is saved here loads there wherever the model is one that
//! transformers knows as Mixtral; any model is read back here from the `fsmoe` object of its `config.json`.

mod config;
mod tensors;

pub use config::read_config;
pub use tensors::{TensorFile, write_tensors};

use super::{ModelConfig, Transformer};
use crate::autograd::Init;
use crate::device::Lane;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An [`Error::Checkpoint`] at `path`.
fn bad(path: &Path, reason: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), reason: reason.into() }
}

/// Writes the model to the folder `dir`, which is made if it is not there: `config.json` and `model.safetensors`, each
/// expert a tensor of its own. Waits for what has been issued on `lane`.
///
/// # Errors
/// If a file cannot be written, or the device fails.
pub fn write(dir: &Path, lane: &Lane, model: &Transformer) -> Result<()> {
    write_as(dir, lane, model.config(), model.dtype(), named(model))
}

/// [`write()`] of a model whose parameters and buffers are given by name, each as a whole: one that is spread over ranks.
///
/// # Errors
/// As [`write()`].
pub fn write_as(
    dir: &Path,
    lane: &Lane,
    config: &ModelConfig,
    dtype: DType,
    tensors: Vec<(String, Tensor)>,
) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    config::write_config(&dir.join(CONFIG), config, dtype)?;
    write_tensors(&dir.join(WEIGHTS), lane, on_disk(tensors)?)
}

/// The model in the folder `dir`, on `lane`'s device, its weights converted to `dtype`.
///
/// # Errors
/// If the folder is not a whole checkpoint of a model known here: names the file, the tensor, and the rule.
pub fn load(dir: &Path, lane: &Lane, dtype: DType) -> Result<Transformer> {
    load_as(dir, lane, dtype, &read_config(dir)?)
}

/// [`load`] with settings that replace the folder's: others that need the same tensors, such as another capacity.
///
/// # Errors
/// As [`load`].
pub fn load_as(dir: &Path, lane: &Lane, dtype: DType, config: &ModelConfig) -> Result<Transformer> {
    let model = Transformer::new(&Init::zeros(lane, dtype), config)?;
    load_into(dir, lane, &model)?;
    Ok(model)
}

/// Replaces all of `model`'s weights and buffers by those in the folder `dir`. Everything is checked before the first is
/// written.
///
/// # Errors
/// If a file is missing or broken, a tensor is missing, of another shape or not of floats, or one is there that the model
/// has not: names the file, the tensor, and the rule.
pub fn load_into(dir: &Path, lane: &Lane, model: &Transformer) -> Result<()> {
    load_named(dir, lane, named(model))
}

/// [`load_into`] of parameters and buffers that are given by name, each as a whole.
///
/// # Errors
/// As [`load_into`].
pub fn load_named(dir: &Path, lane: &Lane, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let (listing, shards) = open_shards(dir)?;
    let targets = on_disk(tensors)?;
    let holders = tensors::locate(&listing, &shards, &targets)?;
    targets.iter().zip(holders).try_for_each(|((name, target), shard)| shard.copy_to(lane, name, target))
}

/// A model's parameters and buffers by name, sharing its memory.
pub fn named(model: &Transformer) -> Vec<(String, Tensor)> {
    let parameters = model.parameters().into_iter().map(|p| (p.name().to_owned(), p.value().clone()));
    parameters.chain(model.buffers()).collect()
}

/// Tensors under their names on disk, sharing their memory: a stack of experts is one tensor per expert there.
fn on_disk(tensors: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
    let mut out = Vec::new();
    for (name, value) in tensors {
        match name.rsplit_once(".experts.") {
            Some((layer, matrix)) => {
                for j in 0..value.dim(0) {
                    out.push((format!("{layer}.experts.{j}.{matrix}.weight"), value.index(j)?));
                }
            }
            None => out.push((name, value)),
        }
    }
    Ok(out)
}

/// The weight files of a folder, and the file that says which they are.
fn open_shards(dir: &Path) -> Result<(PathBuf, Vec<TensorFile>)> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let single = dir.join(WEIGHTS);
    if single.exists() {
        return Ok((single.clone(), vec![TensorFile::open(&single)?]));
    }
    let path = dir.join(INDEX);
    if !path.exists() {
        return Err(bad(dir, format!("neither {WEIGHTS} nor {INDEX} is there")));
    }
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|e| bad(&path, format!("not an index of safetensors files: {e}")))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let open = |name: &&String| {
        let shard = dir.join(name);
        if shard.exists() {
            TensorFile::open(&shard)
        } else {
            Err(bad(&path, format!("names {name}, which is not there")))
        }
    };
    let shards = names.iter().map(open).collect::<Result<_>>()?;
    Ok((path, shards))
}
