//! Matrix products.

use super::{reshaped, rows};
use crate::autograd::{Tape, Var};
use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::tensor::{Shape, Tensor};

/// `t` as a matrix of its last dimension's rows; a matrix stays the view it is.
fn matrix(lane: &Lane, t: &Tensor) -> Result<Tensor> {
    if t.rank() == 2 {
        return Ok(t.clone());
    }
    let (r, n) = t.rows();
    reshaped(lane, t, [r, n])
}

/// `shape` with another last dimension.
fn with_last(shape: &Shape, last: usize) -> Shape {
    let mut dims = shape.dims().to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    Shape::new(&dims)
}

impl Tape {
    /// `a·b`: a (…, m, k), b (…, k, n) with a's leading dimensions, or (k, n) for all of them; the result (…, m, n).
    /// Transposed views are multiplied as they lie.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or the device fails.
    pub fn matmul(&self, a: &Var, b: &Var) -> Result<Var> {
        let lane = self.lane();
        let (x, y) = (a.value(), b.value());
        let (ra, rb) = (x.rank(), y.rank());
        let fits = ra >= 2
            && (rb == 2 || rb == ra && x.shape()[..ra - 2] == y.shape()[..rb - 2])
            && x.dim(ra - 1) == y.dim(rb - 2);
        if !fits {
            shape_err!(
                "matmul of {} and {}: it takes (…, m, k) and (…, k, n) or (k, n), leading dimensions alike",
                x.shape(),
                y.shape()
            );
        }
        let out = lane.empty(with_last(x.shape(), y.dim(rb - 1)), x.dtype())?;
        lane.gemm(1.0, x, y, 0.0, &out)?;
        let (to_a, to_b) = (a.sink(), b.sink());
        let (for_a, for_b) = (to_a.needed().then(|| y.clone()), to_b.needed().then(|| x.clone()));
        Ok(self.record1(&[a, b], out, move |lane, dy| {
            let da = match for_a {
                Some(b) => to_a.product(lane, dy, &b.t()?)?,
                None => None,
            };
            let db = match for_b {
                // One b for all of a's matrices: their rows are one long matrix.
                Some(a) if to_b.shape().len() == 2 => {
                    to_b.product(lane, &matrix(lane, &a)?.t()?, &matrix(lane, dy)?)?
                }
                Some(a) => to_b.product(lane, &a.t()?, dy)?,
                None => None,
            };
            Ok(vec![da, db])
        }))
    }

    /// `x·wᵀ + bias`: x (…, in), w (out, in), bias (out); the result (…, out).
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or the device fails.
    pub fn linear(&self, x: &Var, w: &Var, bias: Option<&Var>) -> Result<Var> {
        let lane = self.lane();
        let (xv, wv) = (x.value(), w.value());
        let (outputs, inputs) = (wv.dim(0), wv.dim(1));
        if xv.rank() == 0 || wv.rank() != 2 || xv.rows().1 != inputs {
            shape_err!("linear of x {} and w {}: it takes (…, in) and (out, in)", xv.shape(), wv.shape());
        }
        if let Some(b) = bias.map(Var::value).filter(|b| b.shape().dims() != [outputs]) {
            shape_err!("linear with w {} and bias {}: the bias is (out)", wv.shape(), b.shape());
        }
        let xm = matrix(lane, xv)?;
        let y = lane.empty([xm.dim(0), outputs], xv.dtype())?;
        lane.gemm(1.0, &xm, &wv.t()?, 0.0, &y)?;
        if let Some(b) = bias {
            lane.add(&y, &lane.contiguous(b.value())?, &y)?;
        }
        let out = y.reshape(with_last(xv.shape(), outputs))?;
        let (to_x, to_w, to_bias) = (x.sink(), w.sink(), bias.map(Var::sink));
        let (for_x, for_w) = (to_x.needed().then(|| wv.clone()), to_w.needed().then_some(xm));
        let vars: Vec<&Var> = [x, w].into_iter().chain(bias).collect();
        Ok(self.record1(&vars, out, move |lane, dy| {
            let dy = matrix(lane, dy)?;
            let mut grads = Vec::with_capacity(3);
            grads.push(match for_x {
                Some(w) => to_x.product(lane, &dy, &w)?,
                None => None,
            });
            grads.push(match for_w {
                Some(x) => to_w.product(lane, &dy.t()?, &x)?,
                None => None,
            });
            if let Some(to) = to_bias {
                grads.push(match to.needed() {
                    true => {
                        let sum = to.accumulator(lane)?;
                        lane.sum_rows(&rows(lane, &dy)?, &sum)?;
                        to.accumulated(sum)
                    }
                    false => None,
                });
            }
            Ok(grads)
        }))
    }
}
