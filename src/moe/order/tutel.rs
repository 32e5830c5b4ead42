//! Tutel's sparse order.

use super::index::Index;
use super::{check_tokens, padded};
use crate::device::Lane;
use crate::error::Result;
use crate::moe::{Order, Routing, Rows, Saved, SparseOrder, saved};
use crate::tensor::Tensor;

/// Rows are gathered by index into the padded layout (E, G·C, M) (Hwang et al. 2023): work and memory grow with the rows,
/// not with tokens times rows, and shapes do not depend on the routing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tutel;

impl Order for Tutel {
    fn name(&self) -> &str {
        "tutel"
    }

    fn dispatch(&self, lane: &Lane, routing: &Routing, x: &Tensor) -> Result<(Rows, Saved)> {
        check_tokens(self.name(), routing, x)?;
        let index = Index::padded(self.name(), lane, routing)?;
        Ok((Rows { data: index.dispatch(lane, x)?, split: padded(routing) }, Box::new(index)))
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

impl SparseOrder for Tutel {
    fn gather_grad(&self, lane: &Lane, routing: &Routing, index: &Saved, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let index: &Index = saved(index)?;
        Ok((index.dispatch(lane, dy)?, index.row_weights(self.name(), lane, routing)?))
    }

    fn weights_grad(&self, lane: &Lane, routing: &Routing, index: &Saved, d_weights: &Tensor) -> Result<Tensor> {
        saved::<Index>(index)?.weights_grad(self.name(), lane, routing, d_weights)
    }
}
