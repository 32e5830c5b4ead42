//! Elementwise operations, sums, and views.

use super::{filled_with, reshaped, total};
use crate::autograd::tape::{InputGrad, Sink};
use crate::autograd::{Tape, Var};
use crate::device::{Gelu, Lane};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Shape, Tensor};

/// The gradient of an operand that was repeated over its partner's leading dimensions: `d` summed over them.
fn unrepeat(lane: &Lane, to: &Sink, d: Tensor) -> InputGrad {
    if d.shape() == &to.shape() {
        return Ok(Some(d));
    }
    let n = to.shape().elements();
    let sum = to.accumulator(lane)?;
    lane.sum_rows(&lane.contiguous(&d)?.reshape([d.elements() / n.max(1), n])?, &sum.reshape([n])?)?;
    Ok(to.accumulated(sum))
}

/// Fails unless b's shape is a's, or a's last dimensions.
fn check_repeats(op: &str, a: &Tensor, b: &Tensor) -> Result<()> {
    if !a.shape().ends_with(b.shape()) {
        shape_err!("{op} of {} and {}: the second's shape is the first's or its last dimensions", a.shape(), b.shape());
    }
    Ok(())
}

/// A tensor as rows (R, H) with unit stride within a row, for kernels that take rows of a wider buffer.
fn strided_rows(lane: &Lane, t: &Tensor) -> Result<Tensor> {
    let (r, h) = t.rows();
    match t.reshape([r, h]) {
        Ok(view) if view.layout().strides()[1] == 1 => Ok(view),
        _ => lane.contiguous(t)?.reshape([r, h]),
    }
}

impl Tape {
    /// `a + b`; b's shape is a's, or a's last dimensions (then it is repeated).
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or the device fails.
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var> {
        let lane = self.lane();
        check_repeats("add", a.value(), b.value())?;
        let out = lane.empty_like(a.value())?;
        lane.add(&lane.contiguous(a.value())?, &lane.contiguous(b.value())?, &out)?;
        let to_b = b.sink();
        Ok(self.record1(&[a, b], out, move |lane, dy| {
            let db = if to_b.needed() { unrepeat(lane, &to_b, dy.clone())? } else { None };
            Ok(vec![Some(dy.clone()), db])
        }))
    }

    /// `a · b`, elementwise; shapes as in [`Tape::add`].
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or the device fails.
    pub fn mul(&self, a: &Var, b: &Var) -> Result<Var> {
        let lane = self.lane();
        check_repeats("mul", a.value(), b.value())?;
        let (x, y) = (lane.contiguous(a.value())?, lane.contiguous(b.value())?);
        let out = lane.empty_like(&x)?;
        lane.mul(&x, &y, &out)?;
        let (to_a, to_b) = (a.sink(), b.sink());
        let (for_a, for_b) = (to_a.needed().then_some(y), to_b.needed().then_some(x));
        Ok(self.record1(&[a, b], out, move |lane, dy| {
            let dy = lane.contiguous(dy)?;
            let times = |factor: &Tensor| -> Result<Tensor> {
                let d = lane.empty_like(&dy)?;
                lane.mul(&dy, factor, &d)?;
                Ok(d)
            };
            let da = for_a.map(|b| times(&b)).transpose()?;
            let db = match for_b {
                Some(a) => unrepeat(lane, &to_b, times(&a)?)?,
                None => None,
            };
            Ok(vec![da, db])
        }))
    }

    /// `factor · a`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn scale(&self, a: &Var, factor: f64) -> Result<Var> {
        let scaled = move |lane: &Lane, t: &Tensor| -> Result<Tensor> {
            let out = lane.empty_like(t)?;
            lane.axpby(factor, &lane.contiguous(t)?, 0.0, &out)?;
            Ok(out)
        };
        let out = scaled(self.lane(), a.value())?;
        Ok(self.record1(&[a], out, move |lane, dy| Ok(vec![Some(scaled(lane, dy)?)])))
    }

    /// The sum of all elements: (1) acc.
    ///
    /// # Errors
    /// If the device fails.
    pub fn sum(&self, a: &Var) -> Result<Var> {
        let out = total(self.lane(), a.value(), 1.0)?;
        let to = a.sink();
        Ok(self.record1(&[a], out, move |lane, dy| Ok(vec![Some(filled_with(lane, dy, to.shape(), to.dtype())?)])))
    }

    /// The same elements under another shape; a view where the layout allows one.
    ///
    /// # Errors
    /// If the number of elements differs, or the device fails.
    pub fn reshape(&self, a: &Var, shape: impl Into<Shape>) -> Result<Var> {
        let out = reshaped(self.lane(), a.value(), shape)?;
        let from = *a.value().shape();
        Ok(self.record1(&[a], out, move |lane, dy| Ok(vec![Some(reshaped(lane, dy, from)?)])))
    }

    /// Two dimensions exchanged; a view.
    ///
    /// # Errors
    /// If a dimension does not exist.
    pub fn transpose(&self, a: &Var, d0: usize, d1: usize) -> Result<Var> {
        let out = a.value().transpose(d0, d1)?;
        Ok(self.record1(&[a], out, move |_, dy| Ok(vec![Some(dy.transpose(d0, d1)?)])))
    }

    /// `len` entries of dimension `dim` from `start` on; a view.
    ///
    /// # Errors
    /// If the range does not lie in the dimension.
    pub fn narrow(&self, a: &Var, dim: usize, start: usize, len: usize) -> Result<Var> {
        let out = a.value().narrow(dim, start, len)?;
        let to = a.sink();
        Ok(self.record1(&[a], out, move |lane, dy| {
            let dx = lane.zeros(to.shape(), to.dtype())?;
            lane.copy(dy, &dx.narrow(dim, start, len)?)?;
            Ok(vec![Some(dx)])
        }))
    }

    /// Dimension `dim` in consecutive parts of these sizes, which add up to it; views. One operation, where as many calls
    /// of [`Tape::narrow`] would each make a gradient of the whole.
    ///
    /// # Errors
    /// If the sizes do not add up to the dimension's, or there is no such dimension.
    pub fn split(&self, a: &Var, dim: usize, sizes: &[usize]) -> Result<Vec<Var>> {
        if dim >= a.value().rank() || sizes.iter().sum::<usize>() != a.value().dim(dim) {
            shape_err!("split of dimension {dim} of {} into {sizes:?}: the sizes add up to it", a.value().shape());
        }
        let starts = sizes.iter().scan(0, |next, size| {
            let start = *next;
            *next += size;
            Some(start)
        });
        let parts: Vec<(usize, usize)> = starts.zip(sizes.iter().copied()).collect();
        let views = parts.iter().map(|&(start, size)| a.value().narrow(dim, start, size)).collect::<Result<_>>()?;
        let to = a.sink();
        Ok(self.record(&[a], views, move |lane, grads| {
            let dx = to.empty(lane)?;
            for (&(start, size), grad) in parts.iter().zip(grads) {
                let part = dx.narrow(dim, start, size)?;
                match grad {
                    Some(grad) => lane.copy(grad, &part)?,
                    None => lane.fill(&part, 0.0)?,
                }
            }
            Ok(vec![Some(dx)])
        }))
    }

    /// The same values as `dtype`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn cast(&self, x: &Var, dtype: DType) -> Result<Var> {
        let from = x.value().dtype();
        if from == dtype {
            return Ok(x.clone());
        }
        let out = self.lane().cast(x.value(), dtype)?;
        Ok(self.record1(&[x], out, move |lane, dy| Ok(vec![Some(lane.cast(dy, from)?)])))
    }

    /// `1 / (1 + e^−x)`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn sigmoid(&self, x: &Var) -> Result<Var> {
        let y = self.lane().empty_like(x.value())?;
        self.lane().sigmoid(&self.lane().contiguous(x.value())?, &y)?;
        let kept = y.clone();
        Ok(self.record1(&[x], y, move |lane, dy| {
            let dx = lane.empty_like(&kept)?;
            lane.sigmoid_backward(&kept, &lane.contiguous(dy)?, &dx)?;
            Ok(vec![Some(dx)])
        }))
    }

    /// GELU in the given form.
    ///
    /// # Errors
    /// If the device fails.
    pub fn gelu(&self, form: Gelu, x: &Var) -> Result<Var> {
        let kept = self.lane().contiguous(x.value())?;
        let y = self.lane().empty_like(&kept)?;
        self.lane().gelu(form, &kept, &y)?;
        Ok(self.record1(&[x], y, move |lane, dy| {
            let dx = lane.empty_like(&kept)?;
            lane.gelu_backward(form, &kept, &lane.contiguous(dy)?, &dx)?;
            Ok(vec![Some(dx)])
        }))
    }

    /// SwiGLU, `silu(gate)·up`: same shape (…, H). Halves of one wider tensor, narrowed, are read where they lie.
    ///
    /// # Errors
    /// If the shapes or dtypes differ, or the device fails.
    pub fn swiglu(&self, gate: &Var, up: &Var) -> Result<Var> {
        let lane = self.lane();
        if gate.value().shape() != up.value().shape() {
            shape_err!("swiglu of {} and {}: both have one shape", gate.value().shape(), up.value().shape());
        }
        let (g, u) = (strided_rows(lane, gate.value())?, strided_rows(lane, up.value())?);
        let y = lane.empty_like(&g)?;
        lane.swiglu(&g, &u, &y)?;
        let shape = *gate.value().shape();
        Ok(self.record1(&[gate, up], y.reshape(shape)?, move |lane, dy| {
            let (dg, du) = (lane.empty_like(&g)?, lane.empty_like(&u)?);
            lane.swiglu_backward(&g, &u, &super::rows(lane, dy)?, &dg, &du)?;
            Ok(vec![Some(dg.reshape(shape)?), Some(du.reshape(shape)?)])
        }))
    }
}
