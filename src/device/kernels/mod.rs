//! Every primitive operation, as traits that a backend implements: one trait per family, [`Kernels`] for all of them.
//!
//! The CPU implementation ([`super::cpu`]) is the specification: plain code, checked in f64 against finite
//! differences, that every other backend is compared with.
//!
//! Rules that hold unless an operation says otherwise:
//! - An operation writes into tensors it is given, never allocates what it returns, and is issued on a lane: it may
//!   return before it has run, and operations of one lane run in order.
//! - Tensors are row-major and contiguous; an output shares no memory with an input or another output.
//! - Every element of an output is written, whatever it held before. What is accumulated says `+=`.
//! - "acc" is [`DType::accumulate`](crate::tensor::DType::accumulate) of the data's type: f64 for f64, else f32. 16-bit
//!   data is read to f32, computed in f32, rounded once.
//! - Sums run in a fixed order that depends on shapes alone: the same inputs give the same bits, on any thread count.
//! - Shapes and dtypes are checked; an error names the operation, the shape and the rule.

mod choice;
mod comm;
mod expert;
mod gate;
mod grouped;
mod math;
mod memory;
mod model;
mod optim;
mod order;

pub use choice::{ChoiceRule, Chosen, ChosenGrad, SUM_EPS, Score, Slots};
pub use comm::CommKernels;
pub(in crate::device) use comm::{check_pairs, check_parts};
pub use expert::{ExpertKernels, Gelu};
pub use gate::{ExpertGroups, GateKernels};
pub(in crate::device) use grouped::compose;
pub use grouped::{GroupedKernels, RowWeights, Segments};
pub use math::MathKernels;
pub use memory::{DeviceInfo, MemoryKernels};
pub use model::{AttentionShape, ModelKernels, Rope};
pub use optim::{AdamW, AdamWItem, OptimKernels};
pub use order::{OrderKernels, RowIndex, block_rows};
pub(in crate::device) use order::{check_blocks, check_index};

/// All primitive operations of a backend.
pub trait Kernels:
    MemoryKernels
    + MathKernels
    + ExpertKernels
    + GroupedKernels
    + GateKernels
    + OrderKernels
    + CommKernels
    + ModelKernels
    + OptimKernels
{
}

impl<K> Kernels for K where
    K: MemoryKernels
        + MathKernels
        + ExpertKernels
        + GroupedKernels
        + GateKernels
        + OrderKernels
        + CommKernels
        + ModelKernels
        + OptimKernels
{
}
