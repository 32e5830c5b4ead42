//! Moving rows: tokens to expert rows and back.
//!
//! A row index names a row of the experts' buffer; −1 stands for "none": a dropped choice, an empty slot.

use super::MemoryKernels;
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Moving rows.
pub trait OrderKernels: MemoryKernels {
    /// `dst[n] = src[index[n]]`, a row of zeros where the index is −1. src: (R, M), index: (N) i32, dst: (N, M), same
    /// dtype. Any index ≥ R is an error on the CPU.
    fn gather_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()>;

    /// `dst[index[n]] += src[n]`, n ascending, nothing where the index is −1. src: (N, M), dst: (R, M); dst has src's
    /// dtype or acc.
    fn scatter_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()>;

    /// `index[t,j] = starts[g,e] + slots[t,j]` for `e = experts[t,j]` and g the group of token t, −1 where the slot is −1.
    /// experts, slots, index: (T, k) i32; starts: (G, E) i32.
    fn row_index(&self, experts: &Tensor, slots: &Tensor, starts: &Tensor, index: &Tensor) -> Result<()>;

    /// The inverse of an index of (T, k): `row_choice[index[t,j]] = t·k + j` and `row_token[…] = t`, −1 for rows that
    /// nothing names. row_choice, row_token: (R) i32.
    fn invert_index(&self, index: &Tensor, row_choice: &Tensor, row_token: &Tensor) -> Result<()>;

    /// The rows of each token: `rows` lists 0..R ordered by `row_token` (ascending rows inside a token), token t's being
    /// `rows[offsets[t]..offsets[t+1]]`. row_token: (R) i32 without −1; offsets: (T+1) i32; rows: (R) i32.
    fn rows_by_token(&self, row_token: &Tensor, offsets: &Tensor, rows: &Tensor) -> Result<()>;

    /// Weighted sum of each token's rows: `out[t] = Σ_n weights[n]·rows[index[n]]`, n ascending over
    /// `offsets[t]..offsets[t+1]`, or, without offsets, over t·k..(t+1)·k with k = N/T; index −1 adds nothing; without
    /// weights each is 1. rows: (R, M), index: (N) i32, weights: (N) acc, out: (T, M) of rows' dtype.
    fn combine_rows(
        &self,
        rows: &Tensor,
        index: &Tensor,
        offsets: Option<&Tensor>,
        weights: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<()>;

    /// Backward of a weighted sum, row by row, with `t = row_token[r]` and `n = row_weight[r]`:
    /// `d_rows[r] = weights[n]·dy[t]`, `d_weights[n] = dy[t]·rows[r]`; where t is −1, a row of zeros. Weights that no row
    /// names get gradient 0. dy: (T, M); rows, d_rows: (R, M); row_token, row_weight: (R) i32; weights, d_weights: acc.
    fn combine_rows_backward(
        &self,
        dy: &Tensor,
        rows: &Tensor,
        row_token: &Tensor,
        row_weight: &Tensor,
        weights: &Tensor,
        d_rows: &Tensor,
        d_weights: &Tensor,
    ) -> Result<()>;

    /// [`OrderKernels::gather_rows`] of the first `end[0]` rows; those after it are not touched. end: (1) i32.
    fn gather_rows_until(&self, src: &Tensor, index: &Tensor, end: Option<&Tensor>, dst: &Tensor) -> Result<()> {
        match end {
            None => self.gather_rows(src, index, dst),
            Some(end) => {
                let rows = ints(self, end)?[0] as usize;
                self.gather_rows(src, &index.narrow(0, 0, rows)?, &dst.narrow(0, 0, rows)?)
            }
        }
    }

    /// Lays a token choice's rows out in segments: expert e's rows are `offsets[e]..offsets[e+1]`, group after group, what
    /// is left of the last `block` rows empty. loads: (G, E) i32, choices before drops, of which each group keeps up to
    /// `capacity`. Writes offsets (E+1), `index[t,j]`, the row of every choice (−1: dropped), and its inverse
    /// `row_choice`, `row_token` (R) as [`OrderKernels::invert_index`] does, −1 also from `offsets[E]` on. experts, slots,
    /// index: (T, k) i32. R is at least what the kept rows take.
    fn block_index(
        &self,
        experts: &Tensor,
        slots: &Tensor,
        loads: &Tensor,
        capacity: usize,
        block: usize,
        offsets: &Tensor,
        index: &Tensor,
        row_choice: &Tensor,
        row_token: &Tensor,
    ) -> Result<()> {
        let (groups, num_experts) = (loads.dim(0), loads.dim(1));
        let kept: Vec<usize> = ints(self, loads)?.iter().map(|&n| capacity.min(n as usize)).collect();
        let (mut starts, mut ends, mut row) = (vec![0; groups * num_experts], vec![0], 0);
        for e in 0..num_experts {
            for g in 0..groups {
                starts[g * num_experts + e] = row as i32;
                row += kept[g * num_experts + e];
            }
            row = row.next_multiple_of(block);
            ends.push(row as i32);
        }
        if row > row_token.elements() {
            shape_err!("block_index: {row} rows in segments of {block}, and room for {}", row_token.elements());
        }
        self.upload(&Tensor::from_slice(&ends, [num_experts + 1])?, offsets)?;
        let on_device = self.alloc([groups, num_experts].into(), DType::I32)?;
        self.upload(&Tensor::from_slice(&starts, [groups, num_experts])?, &on_device)?;
        self.row_index(experts, slots, &on_device, index)?;
        self.invert_index(index, row_choice, row_token)
    }
}

/// An i32 tensor of the device on the host.
fn ints<K: OrderKernels + ?Sized>(k: &K, t: &Tensor) -> Result<Vec<i32>> {
    let host = Tensor::host(*t.shape(), t.dtype());
    k.download(t, &host)?;
    host.to_vec()
}
