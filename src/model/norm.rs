//! The two norms as one type, so that a block reads the same for both architectures.

use super::config::{Arch, ModelConfig};
use crate::autograd::{Init, Parameter, Tape, Var};
use crate::error::Result;

/// LayerNorm where there is a bias, otherwise RMSNorm.
pub(super) struct Norm {
    /// (M).
    gain: Parameter,
    /// (M).
    bias: Option<Parameter>,
    eps: f64,
}

impl Norm {
    /// The architecture's norm, at the identity's gain; its parameters are `weight` and `bias`.
    pub(super) fn new(init: &Init, config: &ModelConfig) -> Result<Self> {
        let gain = init.constant("weight", [config.hidden], 1.0)?;
        let bias = match config.arch {
            Arch::Gpt2 => Some(init.constant("bias", [config.hidden], 0.0)?),
            Arch::Mixtral => None,
        };
        Ok(Norm { gain, bias, eps: config.norm_eps })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        std::iter::once(&self.gain).chain(&self.bias).cloned().collect()
    }

    /// x: (T, M), normalised over M.
    pub(super) fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let gain = tape.param(&self.gain);
        match &self.bias {
            Some(bias) => tape.layer_norm(x, &gain, &tape.param(bias), self.eps),
            None => tape.rms_norm(x, &gain, self.eps),
        }
    }
}
