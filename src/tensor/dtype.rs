//! Element types.

use crate::named::named;
use half::{bf16, f16};
use std::fmt;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 64-bit float: the type gradients are checked in.
    F64,
    /// 32-bit float.
    F32,
    /// bfloat16: stored in 16 bits, computed in f32.
    BF16,
    /// IEEE half precision: stored in 16 bits, computed in f32.
    F16,
    /// 32-bit signed integer: token ids, expert ids, slots, row indices. No arithmetic.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
        }
    }

    /// Whether this is a floating-point type.
    pub const fn is_float(self) -> bool {
        !matches!(self, DType::I32)
    }

    /// The type arithmetic is done in, and that logits, probabilities, statistics and losses have: f64 for f64, f32 for
    /// every other float.
    pub const fn accumulate(self) -> DType {
        match self {
            DType::F64 => DType::F64,
            DType::I32 => DType::I32,
            _ => DType::F32,
        }
    }
}
named!(DType, "dtype", { F64 => "f64", F32 => "f32", BF16 => "bf16", F16 => "f16", I32 => "i32" });

/// A Rust type that can be a tensor's element.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug {
    /// Its [`DType`].
    const DTYPE: DType;
}

macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
element!(f64 => F64, f32 => F32, bf16 => BF16, f16 => F16, i32 => I32);
