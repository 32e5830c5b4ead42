//! Gates: which expert takes which token, with which weight.

mod sigmoid;

pub use sigmoid::SigmoidOptions;

use super::named::named;
use super::{Gate, MoeConfig};
use crate::autograd::Init;
use crate::error::Result;

/// The gates of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateKind {
    /// Softmax over experts, the k most probable (Shazeer et al. 2017, GShard, Switch).
    TopK,
    /// Independent sigmoid scores (BASE, StableMoE), with DeepSeek-V3's options.
    Sigmoid,
    /// Cosine similarity in a low dimension (Chi et al. 2022).
    XMoe,
    /// Experts choose tokens (Zhou et al. 2022).
    ExpertChoice,
    /// Slots are mixes of all tokens (Puigcerver et al. 2024).
    Soft,
}
named!(GateKind, "gate", {
    TopK => "top-k", Sigmoid => "sigmoid", XMoe => "x-moe", ExpertChoice => "expert-choice", Soft => "soft",
});

/// The gate that `config` asks for, its parameters named under `init`'s prefix.
///
/// # Errors
/// If the device has no memory left.
pub fn build(_init: &Init, _config: &MoeConfig) -> Result<Box<dyn Gate>> {
    todo!()
}
