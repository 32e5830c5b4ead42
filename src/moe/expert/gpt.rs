//! GPT's feed-forward network.

use super::super::{Expert, MoeConfig, Rows, Saved, saved};
use super::products::{check, linear, linear_data, linear_weight};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::{Gelu, Lane};
use crate::error::Result;
use crate::tensor::Tensor;

/// `y = gelu(x·w1ᵀ)·w2ᵀ` for every expert; no biases (Radford et al. 2019, sparse as in GShard).
pub struct GptFfn {
    gelu: Gelu,
    /// (E, H, M).
    w1: Parameter,
    /// (E, M, H).
    w2: Parameter,
}

struct Hidden {
    /// (R, H): x·w1ᵀ.
    pre: Tensor,
    /// (R, H): gelu(pre).
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
            w1: init.normal("w1", [e, h, m], config.init_std, ReduceGroup::Expert)?,
            w2: init.normal("w2", [e, m, h], output_std, ReduceGroup::Expert)?,
        })
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
        let (w1, split) = (self.w1.value(), &rows.split);
        check(&rows.data, split, w1.dim(0), w1.dim(2))?;
        let pre = linear(lane, split, &rows.data, w1)?;
        let act = lane.empty_like(&pre)?;
        lane.gelu(self.gelu, &pre, &act)?;
        let y = linear(lane, split, &act, self.w2.value())?;
        Ok((y, Box::new(Hidden { pre, act })))
    }

    fn backward_data(&self, lane: &Lane, rows: &Rows, state: &Saved, d_out: &Tensor) -> Result<(Tensor, Saved)> {
        let hidden: &Hidden = saved(state)?;
        let d_pre = lane.empty_like(&hidden.pre)?;
        linear_data(lane, &rows.split, d_out, self.w2.value(), 0.0, &d_pre)?;
        lane.gelu_backward(self.gelu, &hidden.pre, &d_pre, &d_pre)?;
        let d_rows = lane.empty_like(&rows.data)?;
        linear_data(lane, &rows.split, &d_pre, self.w1.value(), 0.0, &d_rows)?;
        Ok((d_rows, Box::new(d_pre)))
    }

    fn backward_weights(
        &self,
        lane: &Lane,
        rows: &Rows,
        state: &Saved,
        d_out: &Tensor,
        state_backward: &Saved,
    ) -> Result<()> {
        let hidden: &Hidden = saved(state)?;
        let d_pre: &Tensor = saved(state_backward)?;
        linear_weight(lane, &rows.split, d_out, &hidden.act, self.w2.grad())?;
        linear_weight(lane, &rows.split, d_pre, &rows.data, self.w1.grad())
    }
}
