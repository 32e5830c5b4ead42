//! Rows taken and put by index.

use crate::autograd::{Tape, Var};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Fails unless x is a matrix and the index a list of i32.
fn check(op: &str, x: &Tensor, index: &Tensor) -> Result<()> {
    if x.rank() != 2 || index.rank() != 1 || index.dtype() != DType::I32 {
        shape_err!("{op} of {x:?} by {index:?}: it takes rows (R, M) and an i32 index (N)");
    }
    Ok(())
}

impl Tape {
    /// The rows of `table` (V, M) that `ids` (N, i32) name: (N, M).
    ///
    /// # Errors
    /// If the shapes do not fit, an id is out of range, or the device fails.
    pub fn embedding(&self, ids: &Tensor, table: &Var) -> Result<Var> {
        self.gather_rows(table, ids)
    }

    /// `out[n] = x[index[n]]`, a row of zeros where the index is −1: x (R, M), index (N) i32; (N, M).
    ///
    /// # Errors
    /// If the shapes do not fit, an index is out of range, or the device fails.
    pub fn gather_rows(&self, x: &Var, index: &Tensor) -> Result<Var> {
        let lane = self.lane();
        check("gather_rows", x.value(), index)?;
        let index = lane.contiguous(index)?;
        let out = lane.empty([index.dim(0), x.value().dim(1)], x.value().dtype())?;
        lane.gather_rows(&lane.contiguous(x.value())?, &index, &out)?;
        let to = x.sink();
        Ok(self.record1(&[x], out, move |lane, dy| {
            let dx = to.accumulator(lane)?;
            lane.scatter_rows(&lane.contiguous(dy)?, &index, &dx)?;
            Ok(vec![to.accumulated(dx)])
        }))
    }

    /// `out[index[n]] += x[n]` from zeros, nothing where the index is −1: x (N, M), index (N) i32; (rows, M).
    ///
    /// # Errors
    /// If the shapes do not fit, an index is out of range, or the device fails.
    pub fn scatter_rows(&self, x: &Var, index: &Tensor, rows: usize) -> Result<Var> {
        let lane = self.lane();
        check("scatter_rows", x.value(), index)?;
        let (n, m) = (x.value().dim(0), x.value().dim(1));
        if index.dim(0) != n {
            shape_err!("scatter_rows of {n} rows by {} indices: one each", index.dim(0));
        }
        let (index, dtype) = (lane.contiguous(index)?, x.value().dtype());
        let out = lane.zeros([rows, m], dtype)?;
        lane.scatter_rows(&lane.contiguous(x.value())?, &index, &out)?;
        Ok(self.record1(&[x], out, move |lane, dy| {
            let dx = lane.empty([n, m], dtype)?;
            lane.gather_rows(&lane.contiguous(dy)?, &index, &dx)?;
            Ok(vec![Some(dx)])
        }))
    }
}
