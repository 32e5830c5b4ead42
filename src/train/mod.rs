//! Training: data, optimizer, the loop, checkpoints, and the folder of a run.

pub mod checkpoint;
mod config;
pub mod data;
pub mod interrupt;
mod optimizer;
mod plans;
pub mod progress;
mod ranks;
mod run;
mod session;
mod trainer;
mod world;

pub use config::{Settings, TrainConfig};
pub use optimizer::{Optimizer, OptimizerConfig, SumOverExperts};
pub use run::{Metrics, RunDir};
pub use session::{Request, train};
pub use trainer::{StepOutcome, Trainer};
pub use world::{CommKind, WorldConfig};
