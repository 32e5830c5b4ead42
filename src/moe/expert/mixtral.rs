//! Mixtral's feed-forward network.

use super::super::{Expert, FusedExpert, MoeConfig, Rows, Saved, saved};
use crate::autograd::{Init, Parameter, ReduceGroup};
use crate::device::{Lane, RowWeights};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// `y = (silu(x·w1ᵀ) · x·w3ᵀ)·w2ᵀ` for every expert (Jiang et al. 2024; SwiGLU: Shazeer 2020).
pub struct MixtralFfn {
    recompute: bool,
    /// (E, H, M): the gate projection.
    w1: Parameter,
    /// (E, M, H): the down projection.
    w2: Parameter,
    /// (E, H, M): the up projection.
    w3: Parameter,
}

/// What a forward keeps: (R, H), x·w1ᵀ and x·w3ᵀ; nothing where they are to be computed again.
struct Hidden(Option<[Tensor; 2]>);

/// What the data gradient leaves for the weights'.
struct HiddenGrad {
    /// (R, H).
    d_gate: Tensor,
    /// (R, H).
    d_up: Tensor,
    /// (R, H): silu(gate)·up, times the rows' weights where dy is without them.
    act: Tensor,
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
            recompute: config.recompute,
            w1: init.normal("w1", [e, h, m], config.init_std, ReduceGroup::Expert)?,
            w2: init.normal("w2", [e, m, h], output_std, ReduceGroup::Expert)?,
            w3: init.normal("w3", [e, h, m], config.init_std, ReduceGroup::Expert)?,
        })
    }
}

impl MixtralFfn {
    fn data_gradient(
        &self,
        lane: &Lane,
        rows: &Rows,
        state: &Saved,
        dy: &Tensor,
        weights: Option<RowWeights<'_>>,
    ) -> Result<(Tensor, Saved)> {
        let (segments, w2) = (rows.split.segments(), self.w2.value());
        let [gate, up] = match saved(state)? {
            Hidden(Some(hidden)) => hidden.clone(),
            Hidden(None) => {
                let gate = lane.empty([rows.data.dim(0), self.w1.value().dim(1)], rows.data.dtype())?;
                let up = lane.empty_like(&gate)?;
                lane.grouped_linear(segments, &rows.data, self.w1.value(), &gate)?;
                lane.grouped_linear(segments, &rows.data, self.w3.value(), &up)?;
                [gate, up]
            }
        };
        let (d_gate, d_up, act) = (lane.empty_like(&gate)?, lane.empty_like(&gate)?, lane.empty_like(&gate)?);
        lane.grouped_swiglu_backward(segments, dy, w2, &gate, &up, weights, &d_gate, &d_up, &act)?;
        let d_rows = lane.empty_like(&rows.data)?;
        lane.grouped_linear_data(segments, &[(&d_gate, self.w1.value()), (&d_up, self.w3.value())], &d_rows)?;
        Ok((d_rows, Box::new(HiddenGrad { d_gate, d_up, act })))
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
        let (w1, segments) = (self.w1.value(), rows.split.segments());
        let gate = lane.empty([rows.data.dim(0), w1.dim(1)], rows.data.dtype())?;
        let (up, act, y) = (lane.empty_like(&gate)?, lane.empty_like(&gate)?, lane.empty_like(&rows.data)?);
        lane.grouped_swiglu(segments, &rows.data, w1, self.w3.value(), &gate, &up, &act)?;
        lane.grouped_linear(segments, &act, self.w2.value(), &y)?;
        Ok((y, Box::new(Hidden((!self.recompute).then_some([gate, up])))))
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
        let HiddenGrad { d_gate, d_up, act } = saved(state_backward)?;
        let segments = rows.split.segments();
        let [(dw1, beta1), (dw2, beta2), (dw3, beta3)] = [&self.w1, &self.w2, &self.w3].map(Parameter::grad_to_write);
        lane.grouped_linear_weight(segments, &[(d_out, dw2, beta2)], act)?;
        lane.grouped_linear_weight(segments, &[(d_gate, dw1, beta1), (d_up, dw3, beta3)], &rows.data)
    }

    fn fused(&self) -> Option<&dyn FusedExpert> {
        Some(self)
    }
}

impl FusedExpert for MixtralFfn {
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
