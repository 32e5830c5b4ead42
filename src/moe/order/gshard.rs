//! GShard's dense order.

use super::{check_tokens, padded, refuse_dense, weights};
use crate::device::{Lane, RowIndex};
use crate::error::{Result, config_err};
use crate::moe::{Assignment, Order, Routing, Rows, Saved, saved};
use crate::tensor::{DType, Tensor};

/// The largest one-hot mask that is made, in bytes.
const MASK_LIMIT: usize = 1 << 30;

/// Dispatch and combine as matrix products with a one-hot mask (T, E·G·C) (Lepikhin et al. 2021). It is the only order
/// for dense routings (SoftMoE), whose matrices take the mask's place; for others it costs tokens times rows in time and
/// memory, so masks above 1 GiB are refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct GShard;

/// What a sparse routing's dispatch keeps: where its mask's ones are, and the mask.
struct Mask {
    /// (T, k): the row of each choice; for expert choice (R, 1): the token of each row.
    index: Tensor,
    /// Whether `index` goes by row: then masks are made as (R, T) and read transposed.
    by_row: bool,
    /// (T, R): 1 where the token is in the row, in x's dtype.
    ones: Tensor,
}

impl Mask {
    /// Of a sparse routing.
    fn new(lane: &Lane, routing: &Routing, dtype: DType) -> Result<Mask> {
        check_size(routing, dtype)?;
        let (index, by_row) = match &routing.assignment {
            Assignment::TokenChoice { experts, slots, .. } => {
                let index = lane.empty(*experts.shape(), DType::I32)?;
                let [row_token, row_weight] = [(); 2].map(|()| lane.empty([routing.padded_rows()], DType::I32));
                let inverse = RowIndex { index: &index, row_token: &row_token?, row_weight: &row_weight? };
                lane.padded_index(experts, slots, &routing.loads, routing.capacity, inverse)?;
                (index, false)
            }
            Assignment::ExpertChoice { tokens, .. } => (tokens.reshape([routing.padded_rows(), 1])?, true),
            Assignment::Dense { .. } => refuse_dense("one-hot")?,
        };
        let ones = lane.full(*index.shape(), dtype, 1.0)?;
        let ones = one_hot(lane, routing, &index, by_row, &ones, dtype)?;
        Ok(Mask { index, by_row, ones })
    }

    /// (T, R): the routing's weights in the mask's ones' places.
    fn weighted(&self, lane: &Lane, routing: &Routing) -> Result<Tensor> {
        let weights = weights("gshard", routing)?.reshape(*self.index.shape())?;
        one_hot(lane, routing, &self.index, self.by_row, &weights, self.ones.dtype())
    }

    /// The gradient of the routing's weights: dy·rowsᵀ where the mask has its ones.
    fn d_weights(&self, lane: &Lane, routing: &Routing, rows: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let weights = weights("gshard", routing)?;
        let (a, b) = if self.by_row { (rows, dy) } else { (dy, rows) };
        let d_mask = lane.empty([a.dim(0), b.dim(0)], weights.dtype())?;
        lane.gemm(1.0, a, &b.t()?, 0.0, &d_mask)?;
        let d_weights = lane.empty_like(weights)?;
        lane.gather_cols(&d_mask, &self.index, &d_weights.reshape(*self.index.shape())?)?;
        Ok(d_weights)
    }
}

/// (T, R) of zeros, but `values` at the places that `index` names.
fn one_hot(
    lane: &Lane,
    routing: &Routing,
    index: &Tensor,
    by_row: bool,
    values: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    let (tokens, rows) = (routing.tokens, routing.padded_rows());
    let mask = lane.zeros(if by_row { [rows, tokens] } else { [tokens, rows] }, dtype)?;
    lane.scatter_cols(values, index, &mask)?;
    if by_row { mask.t() } else { Ok(mask) }
}

/// Refuses masks above [`MASK_LIMIT`].
fn check_size(routing: &Routing, dtype: DType) -> Result<()> {
    let bytes = routing.tokens.saturating_mul(routing.padded_rows()).saturating_mul(dtype.size());
    if bytes > MASK_LIMIT {
        config_err!(
            "gshard order: the mask of T = {} tokens by E = {} experts by C = {} rows in each of {} groups takes {:.1} GiB \
             as {dtype}, above its limit of {} GiB: use tutel or ragged",
            routing.tokens,
            routing.experts,
            routing.capacity,
            routing.groups,
            bytes as f64 / f64::from(1 << 30),
            MASK_LIMIT >> 30
        );
    }
    Ok(())
}

/// (a·b·c, M) rows as (b, a, c, M): from the experts' layout (E, G·C) to a matrix per group (G, E·C), or back. Copies only
/// where both a and b exceed 1.
fn swap_outer(lane: &Lane, rows: &Tensor, [a, b, c]: [usize; 3]) -> Result<Tensor> {
    lane.contiguous(&rows.reshape([a, b, c, rows.elements() / (a * b * c)])?.transpose(0, 1)?)
}

/// A dense routing's products, a batch of one matrix per group: `w` is the dispatch or the combine matrix (T, E·C).
struct Mix<'a> {
    lane: &'a Lane,
    routing: &'a Routing,
}

impl Mix<'_> {
    /// (G, T/G, ·) of a matrix by token.
    fn tokens(&self, t: &Tensor) -> Result<Tensor> {
        t.reshape([self.routing.groups, self.routing.tokens / self.routing.groups, t.dim(1)])
    }

    /// A mixing matrix (T, E·C) as (G, T/G, E·C), in the data's dtype.
    fn matrix(&self, w: &Tensor, dtype: DType) -> Result<Tensor> {
        self.tokens(&if w.dtype() == dtype { w.clone() } else { self.lane.cast(w, dtype)? })
    }

    /// (G, E·C, M) of expert rows (R, M).
    fn slots(&self, rows: &Tensor) -> Result<Tensor> {
        let Routing { experts, groups, capacity, .. } = *self.routing;
        swap_outer(self.lane, rows, [experts, groups, capacity])?.reshape([groups, experts * capacity, rows.dim(1)])
    }

    /// Expert rows (R, M): `wᵀ·x` of every group.
    fn gather(&self, w: &Tensor, x: &Tensor) -> Result<Tensor> {
        let Routing { experts, groups, capacity, .. } = *self.routing;
        let mixed = self.lane.empty([groups, experts * capacity, x.dim(1)], x.dtype())?;
        self.lane.gemm(1.0, &self.matrix(w, x.dtype())?.t()?, &self.tokens(x)?, 0.0, &mixed)?;
        swap_outer(self.lane, &mixed, [groups, experts, capacity])?.reshape([self.routing.padded_rows(), x.dim(1)])
    }

    /// Writes y (T, M): `w·rows` of every group.
    fn scatter(&self, w: &Tensor, rows: &Tensor, y: &Tensor) -> Result<()> {
        self.lane.gemm(1.0, &self.matrix(w, rows.dtype())?, &self.slots(rows)?, 0.0, &self.tokens(y)?)
    }

    /// The gradient of w (T, E·C) acc: `x·rowsᵀ` of every group, x by token.
    fn d_matrix(&self, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let shape = [self.routing.tokens, self.routing.experts * self.routing.capacity];
        let d = self.lane.empty(shape, x.dtype().accumulate())?;
        self.lane.gemm(1.0, &self.tokens(x)?, &self.slots(rows)?.t()?, 0.0, &self.tokens(&d)?)?;
        Ok(d)
    }
}

impl Order for GShard {
    fn name(&self) -> &str {
        "gshard"
    }

    fn dispatch(&self, lane: &Lane, routing: &Routing, x: &Tensor) -> Result<(Rows, Saved)> {
        check_tokens(self.name(), routing, x)?;
        let split = padded(routing);
        if let Assignment::Dense { dispatch, .. } = &routing.assignment {
            return Ok((Rows { data: Mix { lane, routing }.gather(dispatch, x)?, split }, Box::new(())));
        }
        let mask = Mask::new(lane, routing, x.dtype())?;
        let data = lane.empty([routing.padded_rows(), x.dim(1)], x.dtype())?;
        lane.gemm(1.0, &mask.ones.t()?, x, 0.0, &data)?;
        Ok((Rows { data, split }, Box::new(mask)))
    }

    fn dispatch_backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        mask: &Saved,
        x: &Tensor,
        d_rows: &Tensor,
        dx: &Tensor,
    ) -> Result<Option<Tensor>> {
        if let Assignment::Dense { dispatch, .. } = &routing.assignment {
            let mix = Mix { lane, routing };
            mix.scatter(dispatch, d_rows, dx)?;
            return Ok(Some(mix.d_matrix(x, d_rows)?));
        }
        lane.gemm(1.0, &saved::<Mask>(mask)?.ones, d_rows, 0.0, dx)?;
        Ok(None)
    }

    fn combine(&self, lane: &Lane, routing: &Routing, mask: &Saved, rows: &Tensor) -> Result<Tensor> {
        let y = lane.empty([routing.tokens, rows.dim(1)], rows.dtype())?;
        if let Assignment::Dense { combine, .. } = &routing.assignment {
            Mix { lane, routing }.scatter(combine, rows, &y)?;
        } else {
            lane.gemm(1.0, &saved::<Mask>(mask)?.weighted(lane, routing)?, rows, 0.0, &y)?;
        }
        Ok(y)
    }

    fn combine_backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        mask: &Saved,
        rows: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        if let Assignment::Dense { combine, .. } = &routing.assignment {
            let mix = Mix { lane, routing };
            return Ok((mix.gather(combine, dy)?, mix.d_matrix(dy, rows)?));
        }
        let mask = saved::<Mask>(mask)?;
        let d_rows = lane.empty_like(rows)?;
        lane.gemm(1.0, &mask.weighted(lane, routing)?.t()?, dy, 0.0, &d_rows)?;
        Ok((d_rows, mask.d_weights(lane, routing, rows, dy)?))
    }
}
