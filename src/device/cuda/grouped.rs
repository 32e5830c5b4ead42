//! The grouped operations: on Hopper and in bf16, rows in segments go through kernels of this crate's own, the rest is put
//! together from cuBLAS and elementwise kernels.

use super::Cuda;
use super::hopper::{Blocks, ROW_TILE, RowScale};
use crate::device::{Gelu, GroupedKernels, RowWeights, Segments, compose};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

impl Cuda {
    /// The segments, if the kernels for Hopper take them.
    fn row_blocks<'a>(&self, segments: Segments<'a>, t: &Tensor) -> Option<Blocks<'a>> {
        match segments {
            Segments::Device { offsets, counts } if t.dtype() == DType::BF16 && self.has_hopper() => {
                Some(Blocks { offsets, counts })
            }
            _ => None,
        }
    }

    /// Runs a backward with the scale that `weights` ask for, `tiles` shares per row, and adds the shares up.
    fn scaled(
        &self,
        blocks: Blocks<'_>,
        tiles: usize,
        weights: Option<RowWeights<'_>>,
        run: impl FnOnce(Option<RowScale<'_>>) -> Result<()>,
    ) -> Result<()> {
        let Some(RowWeights { weights, d_weights }) = weights else { return run(None) };
        let partial = self.allocate([tiles, weights.elements()].into(), DType::F32)?;
        run(Some(RowScale { weight: weights, partial: &partial }))?;
        self.hopper_partials_sum(blocks.offsets, &partial, d_weights)
    }
}

impl GroupedKernels for Cuda {
    fn row_block(&self, dtype: DType, m: usize, h: usize) -> Option<usize> {
        let fits = dtype == DType::BF16 && m.is_multiple_of(8) && h.is_multiple_of(8) && self.has_hopper();
        fits.then_some(ROW_TILE)
    }

    fn grouped_linear(&self, segments: Segments<'_>, x: &Tensor, w: &Tensor, y: &Tensor) -> Result<()> {
        match (self.row_blocks(segments, x), segments) {
            (Some(blocks), _) => self.hopper_linear(blocks, x, w, y),
            (None, Segments::Host(offsets)) => self.ragged_linear(offsets, x, w, y),
            (None, _) => compose::linear(self, segments, x, w, y),
        }
    }

    fn grouped_linear_data(&self, segments: Segments<'_>, pairs: &[(&Tensor, &Tensor)], dx: &Tensor) -> Result<()> {
        match (self.row_blocks(segments, dx), segments) {
            (Some(blocks), _) => self.hopper_data(blocks, pairs, dx),
            (None, Segments::Host(offsets)) => self.ragged_data(offsets, pairs, dx),
            (None, _) => compose::linear_data(self, segments, pairs, dx),
        }
    }

    fn grouped_linear_weight(
        &self,
        segments: Segments<'_>,
        pairs: &[(&Tensor, &Tensor, f64)],
        x: &Tensor,
    ) -> Result<()> {
        if let Segments::Host(offsets) = segments {
            return self.ragged_weight(offsets, pairs, x);
        }
        let Some(blocks) = self.row_blocks(segments, x).filter(|_| pairs.iter().all(|p| p.2 == 0.0 || p.2 == 1.0))
        else {
            return compose::linear_weight(self, segments, pairs, x);
        };
        // One launch for pairs that accumulate alike.
        for alike in pairs.chunk_by(|a, b| a.2 == b.2) {
            let both: Vec<_> = alike.iter().map(|(dy, dw, _)| (*dy, *dw)).collect();
            self.hopper_weight(blocks, &both, x, alike[0].2 == 1.0)?;
        }
        Ok(())
    }

    fn grouped_gelu(
        &self,
        form: Gelu,
        segments: Segments<'_>,
        x: &Tensor,
        w: &Tensor,
        pre: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        match self.row_blocks(segments, x) {
            Some(blocks) => self.hopper_linear_gelu(form, blocks, x, w, Some(pre), act),
            None => compose::gelu(self, form, segments, x, w, pre, act),
        }
    }

    fn grouped_swiglu(
        &self,
        segments: Segments<'_>,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        match self.row_blocks(segments, x) {
            Some(blocks) => self.hopper_linear_swiglu(blocks, x, w_gate, w_up, Some((gate, up)), act),
            None => compose::swiglu(self, segments, x, w_gate, w_up, gate, up, act),
        }
    }

    fn grouped_gelu_backward(
        &self,
        form: Gelu,
        segments: Segments<'_>,
        dy: &Tensor,
        w: &Tensor,
        pre: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_pre: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        let Some(blocks) = self.row_blocks(segments, dy) else {
            return compose::gelu_backward(self, form, segments, dy, w, pre, weights, d_pre, act);
        };
        self.scaled(blocks, Cuda::hopper_partials_gelu(pre.dim(1)), weights, |scale| {
            self.hopper_data_gelu(form, blocks, dy, w, pre, scale, d_pre, Some(act))
        })
    }

    fn grouped_swiglu_backward(
        &self,
        segments: Segments<'_>,
        dy: &Tensor,
        w: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_gate: &Tensor,
        d_up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        let Some(blocks) = self.row_blocks(segments, dy) else {
            return compose::swiglu_backward(self, segments, dy, w, gate, up, weights, d_gate, d_up, act);
        };
        self.scaled(blocks, Cuda::hopper_partials_swiglu(gate.dim(1)), weights, |scale| {
            self.hopper_data_swiglu(blocks, dy, w, gate, up, scale, d_gate, d_up, Some(act))
        })
    }
}
