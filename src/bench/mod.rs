//! Benchmarks: the whole MoE layer, and every primitive operation, each beside what the same device can do at most,
//! measured in the same run.
//!
//! - [`layer`](mod@layer) times a layer's forward and forward + backward beside the dense matrix products of the same
//!   useful FLOPs;
//! - [`kernels`] has a case for every primitive operation: what it is given, the bytes it must move, the FLOPs it must do;
//! - [`schedule`](mod@schedule) runs a training step on the ranks of a world under every policy, beside what was predicted;
//! - [`against`] checks and times somebody else's CUDA kernel in the place of one of ours;
//! - [`Bench`] is the device under test and its clock.
//!
//! How it is measured: what is compared takes turns, round after round; before each time the last level of cache is
//! overwritten; the time is the device's own (events on a GPU's stream, the wall clock on the CPU); what is told is the
//! median and the spread from the tenth to the ninetieth percentile.

pub mod against;
mod ceiling;
mod clock;
mod gpu;
mod image;
pub mod kernels;
pub mod layer;
mod loads;
pub mod schedule;
mod stats;
mod table;

pub use ceiling::Ceiling;
pub use clock::{Bench, Clock, HostClock, Memory, Replay, Theirs, Work};
pub use image::Image;
pub use loads::Load;
pub use stats::Spread;
pub use table::{kernel_table, layer_table, schedule_table};
