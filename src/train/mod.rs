//! Training: data, optimizer, the loop, checkpoints, and the folder of a run.

mod cache;
mod ceiling;
pub mod checkpoint;
mod config;
pub mod data;
pub mod interrupt;
mod memory;
mod optimizer;
mod plans;
pub mod progress;
mod ranks;
mod readings;
mod run;
mod session;
mod start;
mod trainer;
mod world;

pub use config::{Settings, TrainConfig};
pub use memory::MemoryEstimate;
pub use optimizer::{Optimizer, OptimizerConfig, SumOverShards};
pub(crate) use plans::{StepPlan, block_shapes};
pub(crate) use ranks::Ranks;
pub use run::{Metrics, RunDir};
pub use session::{Request, train, train_rank};
pub use start::{launched, on_ranks};
pub use trainer::{StepOutcome, Trainer};
pub use world::{CacheUse, CommKind, WorldConfig};
