//! The parameters of a kernel launch.

use std::ffi::c_void;

use crate::tensor::{DType, Tensor};

/// The values of a kernel's parameters, in order: each in 8 bytes, of which a kernel reads as many as its parameter has,
/// or, for a structure, in as many as it takes.
#[derive(Debug, Default)]
pub(super) struct Args {
    values: Vec<u64>,
    /// Where each parameter begins.
    starts: Vec<usize>,
}

impl Args {
    pub(super) fn new() -> Self {
        Args { values: Vec::with_capacity(32), starts: Vec::with_capacity(16) }
    }

    fn push(mut self, value: u64) -> Self {
        self.starts.push(self.values.len());
        self.values.push(value);
        self
    }

    /// The address of a tensor's first element.
    pub(super) fn tensor(self, t: &Tensor) -> Self {
        self.push(t.ptr() as u64)
    }

    /// The address of a tensor's first element, or null.
    pub(super) fn optional(self, t: Option<&Tensor>) -> Self {
        self.push(t.map_or(0, |t| t.ptr() as u64))
    }

    /// A 64-bit size or stride (`index_t`).
    pub(super) fn size(self, n: usize) -> Self {
        self.push(n as u64)
    }

    /// A 32-bit integer.
    pub(super) fn int(self, n: i32) -> Self {
        self.push(u64::from(n as u32))
    }

    /// A float.
    pub(super) fn float(self, x: f64) -> Self {
        self.push(u64::from((x as f32).to_bits()))
    }

    /// 64 bits, whatever they mean.
    pub(super) fn bits(self, bits: u64) -> Self {
        self.push(bits)
    }

    /// A structure of 64-bit members, by value.
    pub(super) fn structure(mut self, words: &[u64]) -> Self {
        self.starts.push(self.values.len());
        self.values.extend_from_slice(words);
        self
    }

    /// Pointers to the values, as a launch takes them.
    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        let values = self.values.as_mut_ptr();
        self.starts.iter().map(|&start| values.wrapping_add(start).cast()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_found_at_its_address() {
        let mut args = Args::new().size(7).structure(&[1, 2, 3]).float(1.5).int(-1);
        let at = |pointer: *mut c_void, n: usize| {
            // SAFETY: within the values of `args`, which outlives the pointers.
            unsafe { *pointer.cast::<u64>().add(n) }
        };
        let pointers = args.pointers();
        assert_eq!(pointers.len(), 4);
        assert_eq!(at(pointers[0], 0), 7);
        assert_eq!([0, 1, 2].map(|n| at(pointers[1], n)), [1, 2, 3]);
        assert_eq!(at(pointers[2], 0), u64::from(1.5_f32.to_bits()));
        assert_eq!(at(pointers[3], 0) as u32 as i32, -1);
    }
}
