//! GPT's feed-forward network.

use super::super::{Expert, FusedExpert, MoeConfig, Rows, Saved, saved};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::{Gelu, Lane, RowWeights};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// `y = gelu(x·w1ᵀ)·w2ᵀ` for every expert; no biases (Radford et al. 2019, sparse as in GShard).
pub struct GptFfn {
    gelu: Gelu,
    recompute: bool,
    /// (E, H, M).
    w1: Parameter,
    /// (E, M, H).
    w2: Parameter,
}

/// What a forward keeps: (R, H), x·w1ᵀ; nothing where it is to be computed again.
struct Hidden(Option<Tensor>);

/// What the data gradient leaves for the weights'.
struct HiddenGrad {
    /// (R, H): pre's gradient.
    d_pre: Tensor,
    /// (R, H): gelu(pre), times the rows' weights where dy is without them.
    act: Tensor,
}

impl GptFfn {
    /// Random weights `w1` and `w2` for `config`'s experts.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let (e, m, h) = (config.experts, config.hidden, config.ffn);
        let output_std = config.output_std.unwrap_or(config.init_std);
        Ok(GptFfn {
            gelu: config.gelu,
            recompute: config.recompute,
            w1: init.normal("w1", [e, h, m], config.init_std, ReduceGroup::Expert)?,
            w2: init.normal("w2", [e, m, h], output_std, ReduceGroup::Expert)?,
        })
    }
}

impl GptFfn {
    fn data_gradient(
        &self,
        lane: &Lane,
        rows: &Rows,
        state: &Saved,
        dy: &Tensor,
        weights: Option<RowWeights<'_>>,
    ) -> Result<(Tensor, Saved)> {
        let (segments, w1, w2) = (rows.split.segments(), self.w1.value(), self.w2.value());
        let pre = match saved(state)? {
            Hidden(Some(pre)) => pre.clone(),
            Hidden(None) => {
                let pre = lane.empty([rows.data.dim(0), w1.dim(1)], rows.data.dtype())?;
                lane.grouped_linear(segments, &rows.data, w1, &pre)?;
                pre
            }
        };
        let (d_pre, act) = (lane.empty_like(&pre)?, lane.empty_like(&pre)?);
        lane.grouped_gelu_backward(self.gelu, segments, dy, w2, &pre, weights, &d_pre, &act)?;
        let d_rows = lane.empty_like(&rows.data)?;
        lane.grouped_linear_data(segments, &[(&d_pre, w1)], &d_rows)?;
        Ok((d_rows, Box::new(HiddenGrad { d_pre, act })))
    }
}

impl Expert for GptFfn {
    fn name(&self) -> &str {
        "gpt"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.w1.clone(), self.w2.clone()]
    }

    fn forward(&self, lane: &Lane, rows: &Rows) -> Result<(Tensor, Saved)> {
        let (w1, segments) = (self.w1.value(), rows.split.segments());
        let pre = lane.empty([rows.data.dim(0), w1.dim(1)], rows.data.dtype())?;
        let (act, y) = (lane.empty_like(&pre)?, lane.empty_like(&rows.data)?);
        lane.grouped_gelu(self.gelu, segments, &rows.data, w1, &pre, &act)?;
        lane.grouped_linear(segments, &act, self.w2.value(), &y)?;
        Ok((y, Box::new(Hidden((!self.recompute).then_some(pre)))))
    }

    fn backward_data(&self, lane: &Lane, rows: &Rows, state: &Saved, d_out: &Tensor) -> Result<(Tensor, Saved)> {
        self.data_gradient(lane, rows, state, d_out, None)
    }

    fn backward_weights(
        &self,
        lane: &Lane,
        rows: &Rows,
        _state: &Saved,
        d_out: &Tensor,
        state_backward: &Saved,
    ) -> Result<()> {
        let HiddenGrad { d_pre, act } = saved(state_backward)?;
        let (segments, (dw1, beta1), (dw2, beta2)) =
            (rows.split.segments(), self.w1.grad_to_write(), self.w2.grad_to_write());
        lane.grouped_linear_weight(segments, &[(d_out, dw2, beta2)], act)?;
        lane.grouped_linear_weight(segments, &[(d_pre, dw1, beta1)], &rows.data)
    }

    fn fused(&self) -> Option<&dyn FusedExpert> {
        Some(self)
    }
}

impl FusedExpert for GptFfn {
    fn row_block(&self, lane: &Lane, dtype: DType) -> Option<usize> {
        lane.row_block(dtype, self.w1.value().dim(2), self.w1.value().dim(1))
    }

    fn backward_data_weighted(
        &self,
        lane: &Lane,
        rows: &Rows,
        state: &Saved,
        dy: &Tensor,
        weights: RowWeights<'_>,
    ) -> Result<(Tensor, Saved)> {
        self.data_gradient(lane, rows, state, dy, Some(weights))
    }
}
