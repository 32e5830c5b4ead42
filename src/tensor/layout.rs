//! Shapes and strides: which element of a storage a tensor's index means.

use super::DType;
use crate::error::{Result, shape_err};
use std::fmt;
use std::ops::Deref;

/// The most dimensions a tensor can have.
pub const MAX_RANK: usize = 6;

/// The sizes of a tensor's dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: usize,
}

impl Shape {
    /// A shape from its dimensions.
    ///
    /// # Panics
    /// With more than [`MAX_RANK`] dimensions: no operation of this crate makes such a shape.
    pub fn new(dims: &[usize]) -> Self {
        assert!(dims.len() <= MAX_RANK, "a tensor has at most {MAX_RANK} dimensions, not {}", dims.len());
        let mut out = [1; MAX_RANK];
        out[..dims.len()].copy_from_slice(dims);
        Shape { dims: out, rank: dims.len() }
    }

    /// The number of elements: the product of the dimensions, 1 for a scalar; the largest number where it is larger.
    pub fn elements(&self) -> usize {
        if self.contains(&0) { 0 } else { self.iter().fold(1, |product: usize, &d| product.saturating_mul(d)) }
    }

    /// The bytes of as many elements of a type.
    ///
    /// # Errors
    /// If no process can address as many.
    pub fn bytes(&self, dtype: DType) -> Result<usize> {
        match self.elements().checked_mul(dtype.size()) {
            Some(bytes) if isize::try_from(bytes).is_ok() => Ok(bytes),
            _ => shape_err!("a tensor of shape {self} in {dtype}: it has at most {} bytes", isize::MAX),
        }
    }

    /// The dimensions as a slice.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        self.dims()
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (i, d) in self.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { ", " } else { "" })?;
        }
        f.write_str(")")
    }
}

macro_rules! shape_from {
    ($($n:literal),*) => { $(impl From<[usize; $n]> for Shape { fn from(d: [usize; $n]) -> Self { Shape::new(&d) } })* };
}
shape_from!(0, 1, 2, 3, 4, 5, 6);
impl From<&[usize]> for Shape {
    fn from(d: &[usize]) -> Self {
        Shape::new(d)
    }
}

/// A shape, a stride per dimension and an offset, all in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    shape: Shape,
    strides: [usize; MAX_RANK],
    offset: usize,
}

impl Layout {
    /// The row-major layout of `shape`, from offset 0.
    pub fn contiguous(shape: Shape) -> Self {
        Layout { shape, strides: row_major(&shape), offset: 0 }
    }

    /// A layout from its parts (DLPack, borrowed buffers).
    ///
    /// # Errors
    /// If `strides` has another length than `shape`.
    pub fn strided(shape: Shape, strides: &[usize], offset: usize) -> Result<Self> {
        if strides.len() != shape.len() {
            shape_err!(
                "{} strides for the {}-dimensional shape {shape}: one per dimension",
                strides.len(),
                shape.len()
            );
        }
        let mut out = [0; MAX_RANK];
        out[..strides.len()].copy_from_slice(strides);
        Ok(Layout { shape, strides: out, offset })
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The strides, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.shape.len()]
    }

    /// The first element's index in the storage.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Whether the elements lie row-major without gaps.
    pub fn is_contiguous(&self) -> bool {
        let want = row_major(&self.shape);
        self.shape.iter().enumerate().all(|(i, &d)| d <= 1 || self.strides[i] == want[i]) || self.shape.elements() == 0
    }

    /// One past the largest storage index that this layout reaches.
    pub fn end(&self) -> usize {
        if self.shape.elements() == 0 {
            return self.offset;
        }
        self.offset + 1 + self.shape.iter().enumerate().map(|(i, &d)| (d - 1) * self.strides[i]).sum::<usize>()
    }

    /// `len` entries of dimension `dim` from `start` on.
    ///
    /// # Errors
    /// If the range does not lie in the dimension.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        if dim >= self.shape.len() || start + len > self.shape[dim] {
            shape_err!("narrow to {start}..{} of dimension {dim}, out of shape {}", start + len, self.shape);
        }
        let mut out = *self;
        out.shape.dims[dim] = len;
        out.offset += start * self.strides[dim];
        Ok(out)
    }

    /// Two dimensions exchanged.
    ///
    /// # Errors
    /// If a dimension does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Self> {
        if a.max(b) >= self.shape.len() {
            shape_err!("transpose of dimensions {a} and {b} of shape {}", self.shape);
        }
        let mut out = *self;
        out.shape.dims.swap(a, b);
        out.strides.swap(a, b);
        Ok(out)
    }

    /// The same elements under another shape, if that needs no copy: dimensions are split anywhere, and merged where
    /// they follow each other in memory.
    ///
    /// # Errors
    /// If the element counts differ, or if only a copy could give this shape.
    pub fn reshape(&self, shape: Shape) -> Result<Self> {
        if shape.elements() != self.shape.elements() {
            shape_err!(
                "reshape of {} ({} elements) to {shape} ({})",
                self.shape,
                self.shape.elements(),
                shape.elements()
            );
        }
        if self.is_contiguous() {
            return Ok(Layout { shape, strides: row_major(&shape), offset: self.offset });
        }
        // Runs of source dimensions that lie row-major among themselves: (elements, stride of the innermost).
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (&d, &s) in self.shape.iter().zip(self.strides()).filter(|(d, _)| **d != 1) {
            match runs.last_mut() {
                Some((n, inner)) if *inner == d * s => {
                    *n *= d;
                    *inner = s;
                }
                _ => runs.push((d, s)),
            }
        }
        let mut strides = [1; MAX_RANK];
        let (mut run, mut left) = (runs.len(), 1);
        let mut inner = 0;
        for i in (0..shape.len()).rev().filter(|&i| shape[i] != 1) {
            if left == 1 {
                run -= 1;
                (left, inner) = runs[run];
            }
            if left % shape[i] != 0 {
                shape_err!("reshape of {} with strides {:?} to {shape} needs a copy", self.shape, self.strides());
            }
            strides[i] = inner;
            inner *= shape[i];
            left /= shape[i];
        }
        Ok(Layout { shape, strides, offset: self.offset })
    }
}

fn row_major(shape: &Shape) -> [usize; MAX_RANK] {
    let mut strides = [1; MAX_RANK];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = usize::saturating_mul(strides[i + 1], shape[i + 1].max(1));
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_beyond_any_memory_has_an_error_not_a_size() {
        let huge = Shape::new(&[1 << 40, 1 << 40]);
        assert_eq!((huge.elements(), Shape::new(&[1 << 40, 1 << 40, 0]).elements()), (usize::MAX, 0));
        let error = huge.bytes(DType::F32).unwrap_err().to_string();
        assert!(error.contains("1099511627776") && error.contains("at most"), "{error}");
        assert_eq!(Shape::new(&[3, 5]).bytes(DType::F64).unwrap(), 120);
    }

    #[test]
    fn reshape_splits_and_merges_without_copies() {
        let l = Layout::contiguous([4, 6, 5].into());
        assert_eq!(l.reshape([24, 5].into()).unwrap().strides(), [5, 1]);
        let n = l.narrow(1, 2, 3).unwrap(); // (4, 3, 5), strides (30, 5, 1)
        assert_eq!(n.offset(), 10);
        assert_eq!(n.reshape([4, 15].into()).unwrap().strides(), [30, 1]);
        assert_eq!(n.reshape([2, 2, 3, 5].into()).unwrap().strides(), [60, 30, 5, 1]);
        assert!(n.reshape([12, 5].into()).is_err(), "rows of narrowed blocks do not merge");
        let t = l.transpose(0, 1).unwrap(); // (6, 4, 5), strides (5, 30, 1)
        assert_eq!(t.reshape([3, 2, 4, 5].into()).unwrap().strides(), [10, 5, 30, 1]);
        assert!(t.reshape([24, 5].into()).is_err());
        assert!(l.reshape([4, 6].into()).is_err());
    }

    #[test]
    fn contiguity_ignores_dimensions_of_one() {
        let l = Layout::contiguous([1, 7].into()).transpose(0, 1).unwrap();
        assert!(l.is_contiguous());
        assert!(!Layout::contiguous([2, 7].into()).transpose(0, 1).unwrap().is_contiguous());
        assert_eq!(Layout::contiguous([2, 7].into()).narrow(1, 3, 2).unwrap().end(), 12);
    }
}
