//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::tensor::Tensor;

impl OrderKernels for Cpu {
    fn gather_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()> {
        todo!()
    }
    fn scatter_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()> {
        todo!()
    }
    fn row_index(&self, experts: &Tensor, slots: &Tensor, starts: &Tensor, index: &Tensor) -> Result<()> {
        todo!()
    }
    fn invert_index(&self, index: &Tensor, row_choice: &Tensor, row_token: &Tensor) -> Result<()> {
        todo!()
    }
    fn rows_by_token(&self, row_token: &Tensor, offsets: &Tensor, rows: &Tensor) -> Result<()> {
        todo!()
    }
    fn combine_rows(
        &self,
        rows: &Tensor,
        index: &Tensor,
        offsets: Option<&Tensor>,
        weights: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<()> {
        todo!()
    }
    fn combine_rows_backward(
        &self,
        dy: &Tensor,
        rows: &Tensor,
        row_token: &Tensor,
        row_weight: &Tensor,
        weights: &Tensor,
        d_rows: &Tensor,
        d_weights: &Tensor,
    ) -> Result<()> {
        todo!()
    }
}
