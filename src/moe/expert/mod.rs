//! Experts: the feed-forward networks, all of a layer's at once, with their weights stacked.

mod gpt;
mod mixtral;

pub use gpt::GptFfn;
pub use mixtral::MixtralFfn;

use super::{Expert, MoeConfig};
use crate::autograd::Init;
use crate::error::Result;
use crate::named::named;

/// The experts of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertKind {
    /// GPT's FFN: two matrices and GELU.
    Gpt,
    /// Mixtral's FFN: three matrices and SwiGLU.
    Mixtral,
}
named!(ExpertKind, "expert", { Gpt => "gpt", Mixtral => "mixtral" });

/// The experts that `config` asks for, their parameters named under `init`'s prefix.
///
/// # Errors
/// If the device has no memory left.
pub fn build(init: &Init, config: &MoeConfig) -> Result<Box<dyn Expert>> {
    Ok(match config.expert {
        ExpertKind::Gpt => Box::new(GptFfn::new(init, config)?),
        ExpertKind::Mixtral => Box::new(MixtralFfn::new(init, config)?),
    })
}
