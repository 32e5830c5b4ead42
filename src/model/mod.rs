//! Transformers with MoE layers: GPT-2's kind and Mixtral's, their presets, checkpoints and sampling.

mod attention;
mod block;
pub mod checkpoint;
mod config;
mod ffn;
mod norm;
mod parallel;
mod presets;
mod sample;
mod transformer;
mod workload;

pub use block::{Block, BlockOutput, Moe};
pub use config::{Arch, ModelConfig};
pub use presets::{PRESETS, preset};
pub use sample::{Sampling, generate};
pub use transformer::{ModelOutput, Transformer};
