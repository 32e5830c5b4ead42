//! The differentiable operations, as methods of [`Tape`](super::Tape): each computes through the lane's kernels and
//! records its backward.
//!
//! A kernel that takes row-major tensors only is given a row-major copy of any other view. A backward keeps what it
//! reads and nothing else, and leaves out the work for inputs that need no gradient; a parameter's gradient is added
//! where it lies wherever the kernel can accumulate.

mod attention;
mod elementwise;
mod linear;
mod loss;
mod norm;
mod rows;

use crate::device::Lane;
use crate::error::Result;
use crate::tensor::{DType, Layout, Shape, Tensor};

/// `t` under another shape, copied only if no view can have it.
fn reshaped(lane: &Lane, t: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    t.reshape(shape).or_else(|_| lane.contiguous(t)?.reshape(shape))
}

/// `t` as rows (R, N) of its last dimension, row-major.
fn rows(lane: &Lane, t: &Tensor) -> Result<Tensor> {
    let (r, n) = t.rows();
    lane.contiguous(t)?.reshape([r, n])
}

/// A tensor of `shape` and `dtype`, every element the only one of `t`; nothing is read to the host.
fn filled_with(lane: &Lane, t: &Tensor, shape: Shape, dtype: DType) -> Result<Tensor> {
    let layout = Layout::strided(shape, &vec![0; shape.len()], t.layout().offset())?;
    lane.cast(&Tensor::new(t.storage().clone(), layout, t.dtype())?, dtype)
}

/// `scale·Σ t` over all elements: (1) acc.
fn total(lane: &Lane, t: &Tensor, scale: f64) -> Result<Tensor> {
    let acc = t.dtype().accumulate();
    let sum = lane.zeros([1], acc)?;
    lane.sum_rows(&reshaped(lane, t, [t.elements(), 1])?, &sum)?;
    if scale == 1.0 {
        return Ok(sum);
    }
    let out = lane.empty([1], acc)?;
    lane.axpby(scale, &sum, 0.0, &out)?;
    Ok(out)
}
