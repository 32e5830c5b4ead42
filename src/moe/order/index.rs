//! What the sparse orders share: a list of row numbers per token and its inverse. Where a group's rows of an expert
//! begin is all that the padded and the ragged layout differ in.

use super::{refuse_dense, starts, weights};
use crate::device::{Lane, RowIndex, block_rows};
use crate::error::{Result, shape_err};
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
                let (index, out) = Self::tensors(lane, experts, rows)?;
                lane.row_index(experts, slots, &starts(lane, routing, start)?, &index)?;
                lane.invert_index(&index, &out.row_weight, &out.row_token)?;
                Ok(out)
            }
            Assignment::ExpertChoice { .. } => Self::of_expert_choice(lane, routing),
            Assignment::Dense { .. } => refuse_dense(order),
        }
    }

    /// The index of the padded layout (E, G·C).
    pub(super) fn padded(order: &str, lane: &Lane, routing: &Routing) -> Result<Index> {
        match &routing.assignment {
            Assignment::TokenChoice { experts, slots, .. } => {
                let (index, out) = Self::tensors(lane, experts, routing.padded_rows())?;
                lane.padded_index(experts, slots, &routing.loads, routing.capacity, out.kernels(&index))?;
                Ok(out)
            }
            Assignment::ExpertChoice { .. } => Self::of_expert_choice(lane, routing),
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
        let (index, mut out) = Self::tensors(lane, experts, block_rows(experts.elements(), routing.experts, block))?;
        let offsets = lane.empty([routing.experts + 1], DType::I32)?;
        let starts = lane.empty_like(&routing.loads)?;
        let (loads, capacity) = (&routing.loads, routing.capacity);
        lane.block_index(experts, slots, loads, capacity, block, &offsets, &starts, out.kernels(&index))?;
        out.end = Some(offsets.narrow(0, routing.experts, 1)?);
        Ok((out, offsets))
    }

    /// Room for the index of a token choice, (T, k) as the kernels write it and as one list, and for its inverse.
    fn tensors(lane: &Lane, experts: &Tensor, rows: usize) -> Result<(Tensor, Index)> {
        let index = lane.empty_like(experts)?;
        let (row_token, row_weight) = (lane.empty([rows], DType::I32)?, lane.empty([rows], DType::I32)?);
        let list = index.reshape([index.elements()])?;
        Ok((index, Index { rows: list, offsets: None, row_token, row_weight, end: None }))
    }

    /// The rows as (T, k): of a token choice.
    fn choices(&self, tokens: usize) -> Result<Tensor> {
        self.rows.reshape([tokens, self.rows.elements() / tokens.max(1)])
    }

    fn kernels<'a>(&'a self, index: &'a Tensor) -> RowIndex<'a> {
        RowIndex { index, row_token: &self.row_token, row_weight: &self.row_weight }
    }

    /// Every slot is taken, so the padded and the ragged layout are both the routing's own.
    fn of_expert_choice(lane: &Lane, routing: &Routing) -> Result<Index> {
        let Assignment::ExpertChoice { tokens, .. } = &routing.assignment else {
            shape_err!("an index of an expert choice of a routing that is none")
        };
        let rows = tokens.elements();
        let row_token = tokens.reshape([rows])?;
        let (list, offsets) = (lane.empty([rows], DType::I32)?, lane.empty([routing.tokens + 1], DType::I32)?);
        lane.rows_by_token(&row_token, &offsets, &list)?;
        let row_weight = lane.empty([rows], DType::I32)?;
        lane.iota(&row_weight)?;
        Ok(Index { rows: list, offsets: Some(offsets), row_token, row_weight, end: None })
    }

    /// (R, M): the tokens x in their rows, zeros in empty slots.
    pub(super) fn dispatch(&self, lane: &Lane, x: &Tensor) -> Result<Tensor> {
        let rows = lane.empty([self.row_token.elements(), x.dim(1)], x.dtype())?;
        match self.offsets {
            Some(_) => lane.gather_rows(x, &self.row_token, &rows)?,
            None => lane.dispatch_rows(x, &self.choices(x.dim(0))?, &self.row_token, self.end.as_ref(), &rows)?,
        }
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
        let (flat, d_flat) = (weights.reshape([n])?, d_weights.reshape([n])?);
        if self.offsets.is_some() {
            let (tokens, choices) = (&self.row_token, &self.row_weight);
            lane.combine_rows_backward(dy, rows, tokens, choices, &flat, &d_rows, &d_flat)?;
        } else {
            let index = self.choices(routing.tokens)?;
            lane.combine_choices_backward(dy, rows, self.kernels(&index), &flat, self.end.as_ref(), &d_rows, &d_flat)?;
        }
        Ok((d_rows, d_weights))
    }
}

/// `out[i] = values[index[i]]`, 0 where the index is −1; values of any shape, taken as a list.
fn gather(lane: &Lane, values: &Tensor, index: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let out = lane.empty([index.elements()], values.dtype())?;
    lane.gather_scalars(&values.reshape([values.elements()])?, index, &out)?;
    out.reshape(shape)
}
