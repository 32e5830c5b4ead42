//! Dense feed-forward networks: of blocks without experts, and shared experts.

use super::config::ModelConfig;
use crate::autograd::{Init, Parameter, ReduceGroup, Tape, Var};
use crate::device::Gelu;
use crate::error::Result;
use crate::moe::expert::ExpertKind;

/// `x·w + b`, with w as GPT-2's checkpoints have it: (in, out).
pub(super) struct Conv1d {
    weight: Parameter,
    bias: Parameter,
}

impl Conv1d {
    /// Random weights and a bias of zero, named `weight` and `bias`.
    pub(super) fn new(init: &Init, inputs: usize, outputs: usize, std: f64) -> Result<Self> {
        Ok(Conv1d {
            weight: init.normal("weight", [inputs, outputs], std, ReduceGroup::Replicated)?,
            bias: init.constant("bias", [outputs], 0.0)?,
        })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    /// x: (T, in) to (T, out).
    pub(super) fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        tape.add(&tape.matmul(x, &tape.param(&self.weight))?, &tape.param(&self.bias))
    }
}

/// A dense FFN, of the same kind as the model's experts.
pub(super) enum Ffn {
    /// `gelu(x·w_fc + b_fc)·w_proj + b_proj`.
    Gpt { gelu: Gelu, c_fc: Conv1d, c_proj: Conv1d },
    /// `(silu(x·w_gateᵀ) · x·w_upᵀ)·w_downᵀ`, each weight (out, in).
    SwiGlu { gate: Parameter, up: Parameter, down: Parameter },
}

impl Ffn {
    /// Inner width `width`, random weights. Names are GPT-2's (`c_fc`, `c_proj`) or LLaMA's (`gate_proj`, `up_proj`,
    /// `down_proj`).
    pub(super) fn new(init: &Init, config: &ModelConfig, width: usize) -> Result<Self> {
        let (m, std, output_std) = (config.hidden, config.init_std, config.output_std());
        let matrix = |name, shape: [usize; 2], std| init.normal(name, shape, std, ReduceGroup::Replicated);
        Ok(match config.moe.expert {
            ExpertKind::Gpt => Ffn::Gpt {
                gelu: config.moe.gelu,
                c_fc: Conv1d::new(&init.child("c_fc"), m, width, std)?,
                c_proj: Conv1d::new(&init.child("c_proj"), width, m, output_std)?,
            },
            ExpertKind::Mixtral => Ffn::SwiGlu {
                gate: matrix("gate_proj.weight", [width, m], std)?,
                up: matrix("up_proj.weight", [width, m], std)?,
                down: matrix("down_proj.weight", [m, width], output_std)?,
            },
        })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        match self {
            Ffn::Gpt { c_fc, c_proj, .. } => [c_fc.parameters(), c_proj.parameters()].concat(),
            Ffn::SwiGlu { gate, up, down } => vec![gate.clone(), up.clone(), down.clone()],
        }
    }

    /// x: (T, M) to (T, M).
    pub(super) fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        match self {
            Ffn::Gpt { gelu, c_fc, c_proj } => c_proj.forward(tape, &tape.gelu(*gelu, &c_fc.forward(tape, x)?)?),
            Ffn::SwiGlu { gate, up, down } => {
                let gate = tape.linear(x, &tape.param(gate), None)?;
                let up = tape.linear(x, &tape.param(up), None)?;
                tape.linear(&tape.swiglu(&gate, &up)?, &tape.param(down), None)
            }
        }
    }
}
