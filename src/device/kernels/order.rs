//! Moving rows: tokens to expert rows and back.
//!
//! A row index names a row of the experts' buffer; −1 stands for "none": a dropped choice, an empty slot.

use crate::error::Result;
use crate::tensor::Tensor;

/// Moving rows.
pub trait OrderKernels: Send + Sync {
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
}
