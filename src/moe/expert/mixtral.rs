//! Mixtral's feed-forward network.

use super::super::{Expert, MoeConfig, Rows, Saved, saved};
use super::products::{check, linear, linear_data, linear_weight};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::Lane;
use crate::error::Result;
use crate::tensor::Tensor;

/// `y = (silu(x·w1ᵀ) · x·w3ᵀ)·w2ᵀ` for every expert (Jiang et al. 2024; SwiGLU: Shazeer 2020).
pub struct MixtralFfn {
    /// (E, H, M): the gate projection.
    w1: Parameter,
    /// (E, M, H): the down projection.
    w2: Parameter,
    /// (E, H, M): the up projection.
    w3: Parameter,
}

struct Hidden {
    /// (R, H): x·w1ᵀ.
    gate: Tensor,
    /// (R, H): x·w3ᵀ.
    up: Tensor,
    /// (R, H): silu(gate)·up.
    act: Tensor,
}

struct HiddenGrad {
    gate: Tensor,
    up: Tensor,
}

impl MixtralFfn {
    /// Random weights `w1`, `w2` and `w3` for `config`'s experts.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(init: &Init, config: &MoeConfig) -> Result<Self> {
        let (e, m, h) = (config.experts, config.hidden, config.ffn);
        let output_std = config.output_std.unwrap_or(config.init_std);
        Ok(MixtralFfn {
            w1: init.normal("w1", [e, h, m], config.init_std, ReduceGroup::Expert)?,
            w2: init.normal("w2", [e, m, h], output_std, ReduceGroup::Expert)?,
            w3: init.normal("w3", [e, h, m], config.init_std, ReduceGroup::Expert)?,
        })
    }
}

impl Expert for MixtralFfn {
    fn name(&self) -> &str {
        "mixtral"
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![self.w1.clone(), self.w2.clone(), self.w3.clone()]
    }

    fn forward(&self, lane: &Lane, rows: &Rows) -> Result<(Tensor, Saved)> {
        let (w1, split) = (self.w1.value(), &rows.split);
        check(&rows.data, split, w1.dim(0), w1.dim(2))?;
        let gate = linear(lane, split, &rows.data, w1)?;
        let up = linear(lane, split, &rows.data, self.w3.value())?;
        let act = lane.empty_like(&gate)?;
        lane.swiglu(&gate, &up, &act)?;
        let y = linear(lane, split, &act, self.w2.value())?;
        Ok((y, Box::new(Hidden { gate, up, act })))
    }

    fn backward_data(&self, lane: &Lane, rows: &Rows, state: &Saved, d_out: &Tensor) -> Result<(Tensor, Saved)> {
        let hidden: &Hidden = saved(state)?;
        let d_act = lane.empty_like(&hidden.act)?;
        linear_data(lane, &rows.split, d_out, self.w2.value(), 0.0, &d_act)?;
        let d = HiddenGrad { gate: lane.empty_like(&d_act)?, up: lane.empty_like(&d_act)? };
        lane.swiglu_backward(&hidden.gate, &hidden.up, &d_act, &d.gate, &d.up)?;
        let d_rows = lane.empty_like(&rows.data)?;
        linear_data(lane, &rows.split, &d.gate, self.w1.value(), 0.0, &d_rows)?;
        linear_data(lane, &rows.split, &d.up, self.w3.value(), 1.0, &d_rows)?;
        Ok((d_rows, Box::new(d)))
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
        let d: &HiddenGrad = saved(state_backward)?;
        linear_weight(lane, &rows.split, d_out, &hidden.act, self.w2.grad())?;
        linear_weight(lane, &rows.split, &d.gate, &rows.data, self.w1.grad())?;
        linear_weight(lane, &rows.split, &d.up, &rows.data, self.w3.grad())
    }
}
