//! Dense feed-forward networks: of blocks without experts, and shared experts.

use super::config::ModelConfig;
use super::parallel::{MpGroup, Shards};
use crate::autograd::{Init, Parameter, ReduceGroup, Tape, Var};
use crate::device::Gelu;
use crate::error::Result;
use crate::moe::expert::ExpertKind;

/// `x·w + b`, with w as GPT-2's checkpoints have it: (in, out).
pub(super) struct Conv1d {
    weight: Parameter,
    bias: Parameter,
    /// The ranks whose products are summed before the bias is added.
    summed: Option<MpGroup>,
}

impl Conv1d {
    /// Random weights and a bias of zero, named `weight` and `bias`. MP ranks have a part of the columns each, of each of
    /// `sections` its share.
    pub(super) fn columns(
        init: &Init,
        inputs: usize,
        sections: &[usize],
        std: f64,
        mp: &MpGroup,
        shards: &mut Shards,
    ) -> Result<Self> {
        let Conv1d { weight, bias, .. } = Self::whole(init, inputs, sections.iter().sum(), std)?;
        let (weight, bias) = (mp.part(weight, 1, sections, shards)?, mp.part(bias, 0, sections, shards)?);
        Ok(Conv1d { weight, bias, summed: None })
    }

    /// The same, of which MP ranks have a part of the rows each: their products are summed.
    pub(super) fn rows(
        init: &Init,
        inputs: usize,
        outputs: usize,
        std: f64,
        mp: &MpGroup,
        shards: &mut Shards,
    ) -> Result<Self> {
        let Conv1d { weight, bias, .. } = Self::whole(init, inputs, outputs, std)?;
        Ok(Conv1d { weight: mp.part(weight, 0, &[inputs], shards)?, bias, summed: Some(mp.clone()) })
    }

    fn whole(init: &Init, inputs: usize, outputs: usize, std: f64) -> Result<Self> {
        Ok(Conv1d {
            weight: init.normal("weight", [inputs, outputs], std, ReduceGroup::Replicated)?,
            bias: init.constant("bias", [outputs], 0.0)?,
            summed: None,
        })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    /// The elements of its matrix.
    pub(super) fn product(&self) -> usize {
        self.weight.elements()
    }

    /// x: (T, in) to (T, out).
    pub(super) fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let y = tape.matmul(x, &tape.param(&self.weight))?;
        let y = match &self.summed {
            Some(mp) => mp.sum(tape, &y)?,
            None => y,
        };
        tape.add(&y, &tape.param(&self.bias))
    }
}

/// A dense FFN; of an MP rank, its part of the inner width.
pub(super) struct Ffn {
    mp: MpGroup,
    kind: Kind,
}

/// The same kinds as those of the model's experts.
enum Kind {
    /// `gelu(x·w_fc + b_fc)·w_proj + b_proj`.
    Gpt { gelu: Gelu, c_fc: Conv1d, c_proj: Conv1d },
    /// `(silu(x·w_gateᵀ) · x·w_upᵀ)·w_downᵀ`, each weight (out, in).
    SwiGlu { gate: Parameter, up: Parameter, down: Parameter },
}

impl Ffn {
    /// Inner width `width`, random weights. Names are GPT-2's (`c_fc`, `c_proj`) or LLaMA's (`gate_proj`, `up_proj`,
    /// `down_proj`).
    pub(super) fn new(
        init: &Init,
        config: &ModelConfig,
        width: usize,
        mp: &MpGroup,
        shards: &mut Shards,
    ) -> Result<Self> {
        let (m, std, output_std) = (config.hidden, config.init_std, config.output_std());
        let matrix = |name, shape: [usize; 2], std| init.normal(name, shape, std, ReduceGroup::Replicated);
        let kind = match config.moe.expert {
            ExpertKind::Gpt => Kind::Gpt {
                gelu: config.moe.gelu,
                c_fc: Conv1d::columns(&init.child("c_fc"), m, &[width], std, mp, shards)?,
                c_proj: Conv1d::rows(&init.child("c_proj"), width, m, output_std, mp, shards)?,
            },
            ExpertKind::Mixtral => Kind::SwiGlu {
                gate: mp.part(matrix("gate_proj.weight", [width, m], std)?, 0, &[width], shards)?,
                up: mp.part(matrix("up_proj.weight", [width, m], std)?, 0, &[width], shards)?,
                down: mp.part(matrix("down_proj.weight", [m, width], output_std)?, 1, &[width], shards)?,
            },
        };
        Ok(Ffn { mp: mp.clone(), kind })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        match &self.kind {
            Kind::Gpt { c_fc, c_proj, .. } => [c_fc.parameters(), c_proj.parameters()].concat(),
            Kind::SwiGlu { gate, up, down } => vec![gate.clone(), up.clone(), down.clone()],
        }
    }

    /// The elements of its matrices.
    pub(super) fn products(&self) -> Vec<usize> {
        match &self.kind {
            Kind::Gpt { c_fc, c_proj, .. } => vec![c_fc.product(), c_proj.product()],
            Kind::SwiGlu { gate, up, down } => [gate, up, down].map(Parameter::elements).to_vec(),
        }
    }

    /// x: (T, M) to (T, M).
    pub(super) fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let x = &self.mp.shared(tape, x);
        match &self.kind {
            Kind::Gpt { gelu, c_fc, c_proj } => c_proj.forward(tape, &tape.gelu(*gelu, &c_fc.forward(tape, x)?)?),
            Kind::SwiGlu { gate, up, down } => {
                let gate = tape.linear(x, &tape.param(gate), None)?;
                let up = tape.linear(x, &tape.param(up), None)?;
                self.mp.sum(tape, &tape.linear(&tape.swiglu(&gate, &up)?, &tape.param(down), None)?)
            }
        }
    }
}
