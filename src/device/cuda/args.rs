//! The parameters of a kernel launch.

use std::ffi::c_void;

use crate::tensor::{DType, Tensor};

/// The values of a kernel's parameters, in order: each in 8 bytes, of which a kernel reads as many as its parameter has.
#[derive(Debug, Default)]
pub(super) struct Args {
    values: Vec<u64>,
}

impl Args {
    pub(super) fn new() -> Self {
        Args { values: Vec::with_capacity(16) }
    }

    /// The address of a tensor's first element.
    pub(super) fn tensor(mut self, t: &Tensor) -> Self {
        self.values.push(t.ptr() as u64);
        self
    }

    /// The address of a tensor's first element, or null.
    pub(super) fn optional(mut self, t: Option<&Tensor>) -> Self {
        self.values.push(t.map_or(0, |t| t.ptr() as u64));
        self
    }

    /// A 64-bit size or stride (`index_t`).
    pub(super) fn size(mut self, n: usize) -> Self {
        self.values.push(n as u64);
        self
    }

    /// A 32-bit integer.
    pub(super) fn int(mut self, n: i32) -> Self {
        self.values.push(u64::from(n as u32));
        self
    }

    /// A float.
    pub(super) fn float(mut self, x: f64) -> Self {
        self.values.push(u64::from((x as f32).to_bits()));
        self
    }

    /// Pointers to the values, as a launch takes them.
    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        self.values.iter_mut().map(|value| (value as *mut u64).cast()).collect()
    }
}

/// The suffix of the entry points for an element type; none for types that no kernel takes.
pub(super) fn suffix(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::BF16 => Some("bf16"),
        DType::F16 => Some("f16"),
        DType::F32 => Some("f32"),
        DType::F64 | DType::I32 => None,
    }
}
