//! Training: data, optimizer, the loop, checkpoints, and the folder of a run.

pub mod checkpoint;
mod config;
pub mod data;
pub mod interrupt;
mod optimizer;
pub mod progress;
mod run;
mod session;
mod trainer;

pub use config::{Settings, TrainConfig};
pub use optimizer::{Optimizer, OptimizerConfig};
pub use run::{Metrics, RunDir};
pub use session::{Request, train};
pub use trainer::{StepOutcome, Trainer};
