//! Tensors: typed, strided views of storage. There is no arithmetic here; that is [`crate::device`]'s.

mod dtype;
mod host;
mod layout;
mod storage;

pub use dtype::{DType, Element};
pub use layout::{Layout, MAX_RANK, Shape};
pub use storage::{Place, Storage};

use crate::error::{Result, shape_err};
use std::fmt;

/// A strided view of a [`Storage`]. Cloning shares the memory.
#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    layout: Layout,
    dtype: DType,
}

impl Tensor {
    /// A view of `storage`.
    ///
    /// # Errors
    /// If the layout reaches past the storage, or its address is not aligned for `dtype`.
    pub fn new(storage: Storage, layout: Layout, dtype: DType) -> Result<Self> {
        if layout.end() * dtype.size() > storage.bytes() {
            shape_err!(
                "a {dtype} tensor of shape {} and strides {:?} from element {} reaches past its {} bytes",
                layout.shape(),
                layout.strides(),
                layout.offset(),
                storage.bytes()
            );
        }
        if !(storage.ptr() as usize).is_multiple_of(dtype.size()) {
            shape_err!("address {:p} is not aligned to the {} bytes of {dtype}", storage.ptr(), dtype.size());
        }
        Ok(Tensor { storage, layout, dtype })
    }

    /// A new row-major host tensor of unspecified content.
    pub fn host(shape: impl Into<Shape>, dtype: DType) -> Self {
        Self::host_block(shape.into(), dtype, false)
    }

    /// A new row-major host tensor of zeros.
    pub fn host_zeros(shape: impl Into<Shape>, dtype: DType) -> Self {
        Self::host_block(shape.into(), dtype, true)
    }

    fn host_block(shape: Shape, dtype: DType, zeroed: bool) -> Self {
        let storage = Storage::host(shape.elements() * dtype.size(), zeroed);
        Tensor { storage, layout: Layout::contiguous(shape), dtype }
    }

    /// A host tensor with a copy of `data`, row-major.
    ///
    /// # Errors
    /// If `data` has another number of elements than `shape`.
    pub fn from_slice<T: Element>(data: &[T], shape: impl Into<Shape>) -> Result<Self> {
        let t = Self::host(shape, T::DTYPE);
        t.write(data)?;
        Ok(t)
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        self.layout.shape()
    }

    /// The size of dimension `i`, 1 where there is none.
    pub fn dim(&self, i: usize) -> usize {
        self.shape().get(i).copied().unwrap_or(1)
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape().len()
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape().elements()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory lies.
    pub fn place(&self) -> Place {
        self.storage.place()
    }

    /// Shape, strides and offset.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Whether the elements lie row-major without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }

    /// The address of the first element, on [`Tensor::place`].
    pub fn ptr(&self) -> *mut u8 {
        // The constructor checked that the layout lies inside the storage.
        self.storage.ptr().wrapping_add(self.layout.offset() * self.dtype.size())
    }

    /// The last dimension's size and the number of rows before it: the tensor as rows.
    pub fn rows(&self) -> (usize, usize) {
        let width = self.shape().last().copied().unwrap_or(1);
        (self.elements() / width.max(1), width)
    }

    fn with(&self, layout: Layout) -> Self {
        Tensor { storage: self.storage.clone(), layout, dtype: self.dtype }
    }

    /// `len` entries of dimension `dim` from `start` on; shares memory.
    ///
    /// # Errors
    /// If the range does not lie in the dimension.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        Ok(self.with(self.layout.narrow(dim, start, len)?))
    }

    /// Entry `index` of the first dimension, which goes; shares memory.
    ///
    /// # Errors
    /// If there is no such entry.
    pub fn index(&self, index: usize) -> Result<Self> {
        let one = self.narrow(0, index, 1)?;
        let layout = Layout::strided(Shape::new(&one.shape()[1..]), &one.layout.strides()[1..], one.layout.offset())?;
        Ok(self.with(layout))
    }

    /// Two dimensions exchanged; shares memory.
    ///
    /// # Errors
    /// If a dimension does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Self> {
        Ok(self.with(self.layout.transpose(a, b)?))
    }

    /// The last two dimensions exchanged; shares memory.
    ///
    /// # Errors
    /// If there are fewer than two dimensions.
    pub fn t(&self) -> Result<Self> {
        match self.rank() {
            0 | 1 => shape_err!("t() of shape {}: it takes at least two dimensions", self.shape()),
            n => self.transpose(n - 2, n - 1),
        }
    }

    /// The same elements under another shape; shares memory.
    ///
    /// # Errors
    /// If the number of elements differs, or only a copy could give this shape.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        Ok(self.with(self.layout.reshape(shape.into())?))
    }

    /// Whether the two views' memory ranges overlap; one without elements overlaps nothing, wherever it points.
    pub fn overlaps(&self, other: &Tensor) -> bool {
        let range = |t: &Tensor| {
            let from = t.ptr() as usize;
            from..from + (t.layout.end() - t.layout.offset()) * t.dtype.size()
        };
        let (a, b) = (range(self), range(other));
        let empty = self.elements() == 0 || other.elements() == 0;
        !empty && self.place() == other.place() && a.start < b.end && b.start < a.end
    }

    fn check_host<T: Element>(&self) -> Result<()> {
        if self.place() != Place::Cpu {
            shape_err!("host access to a tensor on {}: copy it to the host first", self.place());
        }
        if self.dtype != T::DTYPE {
            shape_err!("access as {} to a tensor of {}", T::DTYPE, self.dtype);
        }
        if !self.is_contiguous() {
            shape_err!("host access to a view of shape {} with strides {:?}", self.shape(), self.layout.strides());
        }
        Ok(())
    }

    /// The elements of a contiguous host tensor.
    ///
    /// # Errors
    /// If the tensor is not on the host, not of type `T`, or not contiguous.
    ///
    /// # Safety
    /// No operation may write these elements while the slice lives.
    pub unsafe fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.check_host::<T>()?;
        // SAFETY: in bounds and aligned by construction, initialised or plain-old-data; the caller rules out writers.
        Ok(unsafe { std::slice::from_raw_parts(self.ptr().cast(), self.elements()) })
    }

    /// The elements of a contiguous host tensor, to write.
    ///
    /// # Errors
    /// As [`Tensor::as_slice`].
    ///
    /// # Safety
    /// No operation may read or write these elements, through this or another view, while the slice lives.
    #[allow(clippy::mut_from_ref)] // A tensor is a handle; exclusive access is the caller's promise.
    pub unsafe fn as_mut_slice<T: Element>(&self) -> Result<&mut [T]> {
        self.check_host::<T>()?;
        // SAFETY: in bounds and aligned by construction; the caller promises exclusive access.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr().cast(), self.elements()) })
    }

    /// A copy of the elements of a contiguous host tensor, in row-major order.
    ///
    /// # Errors
    /// As [`Tensor::as_slice`].
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        // SAFETY: the slice is copied at once; CPU lanes have finished an operation when its call returns.
        unsafe { self.as_slice::<T>() }.map(<[T]>::to_vec)
    }

    /// Writes `data` into a contiguous host tensor, in row-major order.
    ///
    /// # Errors
    /// As [`Tensor::as_slice`], and if `data` has another number of elements.
    pub fn write<T: Element>(&self, data: &[T]) -> Result<()> {
        if data.len() != self.elements() {
            shape_err!("{} values for a tensor of shape {}", data.len(), self.shape());
        }
        // SAFETY: CPU lanes have finished an operation when its call returns, so nothing else runs on these bytes.
        unsafe { self.as_mut_slice::<T>() }?.copy_from_slice(data);
        Ok(())
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {} on {})", self.dtype, self.shape(), self.place())
    }
}
