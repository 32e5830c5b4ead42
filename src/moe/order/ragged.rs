//! The ragged order: rows sorted by expert, no padding.

use super::index::Index;
use super::{check_tokens, padded};
use crate::device::Lane;
use crate::error::Result;
use crate::moe::{Assignment, Order, Routing, RowSplit, Rows, Saved, SparseOrder, saved};
use crate::tensor::Tensor;

/// Rows lie sorted by expert, then by group, with an offset per expert and no empty slots (MegaBlocks, Gale et al. 2023):
/// the experts compute only what is kept. The loads are read to the host once per dispatch, except where all experts have as
/// many rows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ragged;

/// Whether every expert has rows for its whole capacity, in the padded layout. An expert that chooses fills them. On a GPU
/// a capacity that can drop something gives them too: shapes that are known beforehand make one batch of the experts'
/// products, and need no read of the loads, which would wait for the GPU and cannot be captured in a graph.
fn is_even(lane: &Lane, routing: &Routing) -> bool {
    let chosen = matches!(routing.assignment, Assignment::ExpertChoice { .. });
    chosen || (lane.as_cuda().is_some() && routing.groups * routing.capacity < routing.tokens)
}

impl Order for Ragged {
    fn name(&self) -> &str {
        "ragged"
    }

    fn pads(&self) -> bool {
        false
    }

    fn dispatch(&self, lane: &Lane, routing: &Routing, x: &Tensor) -> Result<(Rows, Saved)> {
        check_tokens(self.name(), routing, x)?;
        if is_even(lane, routing) {
            let index = Index::padded(self.name(), lane, routing)?;
            return Ok((Rows { data: index.dispatch(lane, x)?, split: padded(routing) }, Box::new(index)));
        }
        let (groups, experts, capacity) = (routing.groups, routing.experts, routing.capacity);
        let loads = lane.to_host(&routing.loads)?.to_vec::<i32>()?;
        let kept: Vec<usize> = loads.iter().map(|&n| capacity.min(n as usize)).collect();
        // starts[e·G + g], then the number of rows.
        let mut starts = vec![0; groups * experts + 1];
        for e in 0..experts {
            for g in 0..groups {
                starts[e * groups + g + 1] = starts[e * groups + g] + kept[g * experts + e];
            }
        }
        let start = |g: usize, e: usize| starts[e * groups + g];
        let index = Index::new(self.name(), lane, routing, start(0, experts), start)?;
        let split = RowSplit::Ragged((0..=experts).map(|e| start(0, e)).collect());
        Ok((Rows { data: index.dispatch(lane, x)?, split }, Box::new(index)))
    }

    fn dispatch_backward(
        &self,
        lane: &Lane,
        _routing: &Routing,
        index: &Saved,
        _x: &Tensor,
        d_rows: &Tensor,
        dx: &Tensor,
    ) -> Result<Option<Tensor>> {
        saved::<Index>(index)?.dispatch_backward(lane, d_rows, dx)?;
        Ok(None)
    }

    fn combine(&self, lane: &Lane, routing: &Routing, index: &Saved, rows: &Tensor) -> Result<Tensor> {
        saved::<Index>(index)?.combine(self.name(), lane, routing, rows)
    }

    fn combine_backward(
        &self,
        lane: &Lane,
        routing: &Routing,
        index: &Saved,
        rows: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        saved::<Index>(index)?.combine_backward(self.name(), lane, routing, rows, dy)
    }

    fn sparse(&self) -> Option<&dyn SparseOrder> {
        Some(self)
    }
}

impl SparseOrder for Ragged {
    fn dispatch_blocks(
        &self,
        lane: &Lane,
        routing: &Routing,
        x: &Tensor,
        block: usize,
    ) -> Result<Option<(Rows, Saved)>> {
        check_tokens(self.name(), routing, x)?;
        let Assignment::TokenChoice { experts, slots, .. } = &routing.assignment else { return Ok(None) };
        let (index, offsets) = Index::blocks(lane, routing, experts, slots, block)?;
        // Loads are before drops and per group: they are what an expert has where there is one group and none are dropped.
        let kept = routing.groups == 1 && routing.capacity >= routing.tokens;
        let counts = if kept { Some(routing.loads.reshape([routing.experts])?) } else { None };
        let split = RowSplit::Blocks { offsets, counts };
        Ok(Some((Rows { data: index.dispatch(lane, x)?, split }, Box::new(index))))
    }

    fn gather_grad(&self, lane: &Lane, routing: &Routing, index: &Saved, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let index: &Index = saved(index)?;
        Ok((index.dispatch(lane, dy)?, index.row_weights(self.name(), lane, routing)?))
    }

    fn weights_grad(&self, lane: &Lane, routing: &Routing, index: &Saved, d_weights: &Tensor) -> Result<Tensor> {
        saved::<Index>(index)?.weights_grad(self.name(), lane, routing, d_weights)
    }
}
