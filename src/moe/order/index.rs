//! What the sparse orders share: a list of row numbers per token and its inverse. Where a group's rows of an expert
//! begin is all that the padded and the ragged layout differ in.

use super::{refuse_dense, starts, weights};
use crate::device::Lane;
use crate::error::Result;
use crate::moe::{Assignment, Routing};
use crate::tensor::{DType, Shape, Tensor};

/// A routing as row numbers, for R expert rows.
pub(super) struct Index {
    /// (N) i32: the rows of token 0, of token 1, …; −1 for a dropped choice.
    rows: Tensor,
    /// (T + 1) i32: where each token's rows begin in `rows`; none where every token has k.
    offsets: Option<Tensor>,
    /// (R) i32: the token in every row; −1 in an empty slot.
    row_token: Tensor,
    /// (R) i32: which of the routing's weights, flattened, is every row's; −1 in an empty slot.
    row_weight: Tensor,
    /// (1) i32: from which row on nothing is read or written; none where all rows are used.
    end: Option<Tensor>,
}

impl Index {
    /// The index of a routing whose rows of expert e and group g begin at `start(g, e)`, for `rows` rows in all.
    pub(super) fn new(
        order: &str,
        lane: &Lane,
        routing: &Routing,
        rows: usize,
        start: impl Fn(usize, usize) -> usize,
    ) -> Result<Index> {
        match &routing.assignment {
            Assignment::TokenChoice { experts, slots, .. } => {
                let index = lane.empty(*experts.shape(), DType::I32)?;
                lane.row_index(experts, slots, &starts(lane, routing, start)?, &index)?;
                let (row_weight, row_token) = (lane.empty([rows], DType::I32)?, lane.empty([rows], DType::I32)?);
                lane.invert_index(&index, &row_weight, &row_token)?;
                Ok(Index { rows: index.reshape([index.elements()])?, offsets: None, row_token, row_weight, end: None })
            }
            Assignment::ExpertChoice { tokens, .. } => {
                // Every slot is taken, so both layouts are the routing's own.
                let row_token = tokens.reshape([rows])?;
                let (list, offsets) = (lane.empty([rows], DType::I32)?, lane.empty([routing.tokens + 1], DType::I32)?);
                lane.rows_by_token(&row_token, &offsets, &list)?;
                let identity: Vec<i32> = (0..rows as i32).collect();
                let row_weight = lane.to_device(&Tensor::from_slice(&identity, [rows])?)?;
                Ok(Index { rows: list, offsets: Some(offsets), row_token, row_weight, end: None })
            }
            Assignment::Dense { .. } => refuse_dense(order),
        }
    }

    /// The index of a token choice whose rows lie in segments of a multiple of `block` rows, and the segments' offsets,
    /// (E + 1) i32. Nothing is read to the host: R is as many rows as there can be.
    pub(super) fn blocks(
        lane: &Lane,
        routing: &Routing,
        experts: &Tensor,
        slots: &Tensor,
        block: usize,
    ) -> Result<(Index, Tensor)> {
        let most = routing.padded_rows().min(experts.elements());
        let rows = (most + routing.experts * (block - 1)) / block * block;
        let int = |shape: &[usize]| lane.empty(shape, DType::I32);
        let offsets = int(&[routing.experts + 1])?;
        let (index, row_weight, row_token) = (int(experts.shape().dims())?, int(&[rows])?, int(&[rows])?);
        lane.block_index(
            experts,
            slots,
            &routing.loads,
            routing.capacity,
            block,
            &offsets,
            &index,
            &row_weight,
            &row_token,
        )?;
        let end = Some(offsets.narrow(0, routing.experts, 1)?);
        Ok((Index { rows: index.reshape([index.elements()])?, offsets: None, row_token, row_weight, end }, offsets))
    }

    /// (R, M): the tokens x in their rows, zeros in empty slots.
    pub(super) fn dispatch(&self, lane: &Lane, x: &Tensor) -> Result<Tensor> {
        let rows = lane.empty([self.row_token.elements(), x.dim(1)], x.dtype())?;
        lane.gather_rows_until(x, &self.row_token, self.end.as_ref(), &rows)?;
        Ok(rows)
    }

    /// Every row's weight, (R) acc.
    pub(super) fn row_weights(&self, order: &str, lane: &Lane, routing: &Routing) -> Result<Tensor> {
        gather(lane, weights(order, routing)?, &self.row_weight, [self.row_weight.elements()])
    }

    /// The gradient of the routing's weights from that of the rows'.
    pub(super) fn weights_grad(&self, order: &str, lane: &Lane, routing: &Routing, d: &Tensor) -> Result<Tensor> {
        let weights = weights(order, routing)?;
        if self.offsets.is_some() {
            // Every slot is taken: weights and rows are one list.
            return d.reshape(*weights.shape());
        }
        gather(lane, d, &self.rows, *weights.shape())
    }

    /// Writes dx (T, M): the sum of each token's rows.
    pub(super) fn dispatch_backward(&self, lane: &Lane, d_rows: &Tensor, dx: &Tensor) -> Result<()> {
        lane.combine_rows(d_rows, &self.rows, self.offsets.as_ref(), None, dx)
    }

    /// (T, M): the weighted sum of each token's rows.
    pub(super) fn combine(&self, order: &str, lane: &Lane, routing: &Routing, rows: &Tensor) -> Result<Tensor> {
        let n = self.rows.elements();
        let mut weights = weights(order, routing)?.reshape([n])?;
        if self.offsets.is_some() {
            // One weight per row, needed in the order of the list.
            weights = gather(lane, &weights, &self.rows, [n])?;
        }
        let y = lane.empty([routing.tokens, rows.dim(1)], rows.dtype())?;
        lane.combine_rows(rows, &self.rows, self.offsets.as_ref(), Some(&weights), &y)?;
        Ok(y)
    }

    /// The gradients of the rows (R, M) and of the routing's weights.
    pub(super) fn combine_backward(
        &self,
        order: &str,
        lane: &Lane,
        routing: &Routing,
        rows: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let weights = weights(order, routing)?;
        let n = self.rows.elements();
        let (d_rows, d_weights) = (lane.empty_like(rows)?, lane.empty_like(weights)?);
        lane.combine_rows_backward(
            dy,
            rows,
            &self.row_token,
            &self.row_weight,
            &weights.reshape([n])?,
            &d_rows,
            &d_weights.reshape([n])?,
        )?;
        Ok((d_rows, d_weights))
    }
}

/// `out[i] = values[index[i]]`, 0 where the index is −1; values of any shape, taken as a list.
fn gather(lane: &Lane, values: &Tensor, index: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let n = index.elements();
    let out = lane.empty([n, 1], values.dtype())?;
    lane.gather_rows(&values.reshape([values.elements(), 1])?, index, &out)?;
    out.reshape(shape)
}
