//! Checkpoints: a folder with a `config.json` and safetensors files, as Hugging Face's transformers has them.
//!
//! A Mixtral folder from there loads as it is. What is saved here loads there wherever the model is one that
//! transformers knows as Mixtral; any model is read back here from the `fsmoe` object of its `config.json`.

mod config;
mod tensors;

pub use config::read_config;
pub use tensors::{TensorFile, Whole, write_order, write_tensors, write_wholes};

use super::{ModelConfig, Transformer};
use crate::autograd::Init;
use crate::device::Lane;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};
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
    let tensors = named(model);
    write_as(dir, model.config(), model.dtype(), &Whole::of(&tensors), &mut |i| lane.to_host(&tensors[i].1))
}

/// [`write()`] of a model that is spread over ranks: `whole` gives its i-th parameter or buffer as [`write_wholes`] takes it.
///
/// # Errors
/// As [`write()`], and those of `whole`.
pub fn write_as(
    dir: &Path,
    config: &ModelConfig,
    dtype: DType,
    tensors: &[Whole],
    whole: &mut dyn FnMut(usize) -> Result<Tensor>,
) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    config::write_config(&dir.join(CONFIG), config, dtype)?;
    tensors::write_divided(&dir.join(WEIGHTS), tensors, on_disk, whole)
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
    let targets = named(model);
    load_wholes(dir, &Whole::of(&targets), &mut |i, whole| lane.copy(&lane.to_device(whole)?, &targets[i].1))
}

/// [`load_into`] of a model that is spread over ranks: `take` is given the i-th of `tensors`, its parameters and buffers, in
/// host memory and of the type it has on disk, one after the other.
///
/// # Errors
/// As [`load_into`], and those of `take`.
pub fn load_wholes(dir: &Path, tensors: &[Whole], take: &mut dyn FnMut(usize, &Tensor) -> Result<()>) -> Result<()> {
    let (listing, shards) = open_shards(dir)?;
    let mut targets = Vec::new();
    for tensor in tensors {
        let Whole { dtype, .. } = *tensor;
        targets.extend(on_disk(tensor).into_iter().map(|(name, shape)| Whole { name, dtype, shape }));
    }
    let holders = tensors::locate(&listing, &shards, &targets)?;
    let mut parts = targets.iter().zip(holders);
    for (i, tensor) in tensors.iter().enumerate() {
        let parts: Vec<_> = parts.by_ref().take(on_disk(tensor).len()).collect();
        let whole = match parts[..] {
            [(target, file)] if target.shape == tensor.shape => file.read(&target.name)?,
            _ => {
                let whole = Tensor::host(tensor.shape, tensor.dtype);
                for (j, (target, file)) in parts.into_iter().enumerate() {
                    Lane::cpu().copy(&file.read(&target.name)?, &whole.index(j)?)?;
                }
                whole
            }
        };
        take(i, &whole)?;
    }
    Ok(())
}

/// A model's parameters and buffers by name, sharing its memory.
pub fn named(model: &Transformer) -> Vec<(String, Tensor)> {
    let parameters = model.parameters().into_iter().map(|p| (p.name().to_owned(), p.value().clone()));
    parameters.chain(model.buffers()).collect()
}

/// What a tensor is on disk: a stack of experts is one tensor per expert there.
fn on_disk(tensor: &Whole) -> Vec<(String, Shape)> {
    match (tensor.name.rsplit_once(".experts."), tensor.shape.dims()) {
        (Some((layer, matrix)), [experts, each @ ..]) => {
            let name = |j| format!("{layer}.experts.{j}.{matrix}.weight");
            (0..*experts).map(|j| (name(j), Shape::new(each))).collect()
        }
        _ => vec![(tensor.name.clone(), tensor.shape)],
    }
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
