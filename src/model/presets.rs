//! Named settings.

use super::config::{Arch, ModelConfig};
use crate::device::Gelu;
use crate::error::{Result, config_err};
use crate::moe::expert::ExpertKind;
use crate::moe::{Capacity, MoeConfig};

/// The presets' names: two that train on a laptop and one on a GPU, over bytes, and three of the published dimensions.
pub const PRESETS: &[&str] =
    &["gpt2-moe-tiny", "mixtral-tiny", "gpt2-moe-small", "gpt2-xl-moe", "mixtral-8x7b", "mixtral-8x22b"];

/// A preset's settings.
///
/// # Errors
/// If there is none of this name; lists those there are.
pub fn preset(name: &str) -> Result<ModelConfig> {
    Ok(match name {
        "gpt2-moe-tiny" => {
            ModelConfig { heads: 4, kv_heads: 4, hidden: 128, ffn: 256, layers: 4, max_seq: 256, vocab: 256, ..gpt2() }
        }
        "mixtral-tiny" => ModelConfig::default(),
        // GPT-2 small (Radford et al. 2019) with experts in place of every second FFN, over bytes: training here is on
        // bytes, and a vocabulary of which 255 parts in 256 never occur would only cost.
        "gpt2-moe-small" => {
            let base = gpt2();
            let moe = MoeConfig { capacity: Capacity::Factor(1.2), ..base.moe };
            ModelConfig { layers: 12, hidden: 768, heads: 12, kv_heads: 12, ffn: 3072, vocab: 256, moe, ..base }
        }
        // GPT-2 XL (Radford et al. 2019) with experts in place of every second FFN, as GShard.
        "gpt2-xl-moe" => {
            let base = gpt2();
            let moe = MoeConfig { capacity: Capacity::Factor(1.2), ..base.moe };
            ModelConfig { layers: 48, hidden: 1600, heads: 25, kv_heads: 25, ffn: 6400, moe, ..base }
        }
        // The config.json of mistralai/Mixtral-8x7B-v0.1.
        "mixtral-8x7b" => mixtral(32, 4096, 14336, 32, 32768, 0.02),
        // The config.json of mistralai/Mixtral-8x22B-v0.1.
        "mixtral-8x22b" => mixtral(56, 6144, 16384, 48, 65536, 0.001),
        _ => config_err!("unknown preset {name:?}: it is one of {}", PRESETS.join(", ")),
    })
}

/// GPT-2's vocabulary, context and tied embeddings; MoE in every second block.
fn gpt2() -> ModelConfig {
    ModelConfig {
        arch: Arch::Gpt2,
        vocab: 50257,
        max_seq: 1024,
        moe: MoeConfig { expert: ExpertKind::Gpt, gelu: Gelu::Tanh, ..MoeConfig::default() },
        moe_every: 2,
        tie_embeddings: true,
        ..ModelConfig::default()
    }
}

fn mixtral(layers: usize, hidden: usize, ffn: usize, heads: usize, max_seq: usize, balance_weight: f64) -> ModelConfig {
    let base = ModelConfig::default();
    ModelConfig {
        vocab: 32000,
        max_seq,
        layers,
        hidden,
        heads,
        kv_heads: 8,
        ffn,
        moe: MoeConfig { balance_weight, ..base.moe },
        rope_theta: 1e6,
        ..base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_parameter_counts() {
        let count = |name| {
            let config = preset(name).unwrap();
            (config.total_parameters(), config.active_parameters())
        };
        // 46.7B and 12.9B; 140.6B and 39.1B (Mistral AI's announcements), to the parameter by hand.
        assert_eq!(count("mixtral-8x7b"), (46_702_792_704, 12_879_925_248));
        assert_eq!(count("mixtral-8x22b"), (140_620_634_112, 39_152_031_744));
        // GPT-2 small's 124,439,808, less the tokens that are no bytes, 6 FFNs, plus 6 routers and 6 × 8 experts.
        let (m, h) = (768, 3072);
        let (total, _) = count("gpt2-moe-small");
        assert_eq!(total, 124_439_808 - (50257 - 256) * m - 6 * (2 * m * h + h + m) + 6 * 8 * (m + 2 * m * h));
        // GPT-2 XL's 1,557,611,200, less 24 FFNs, plus 24 routers and 24 × 8 experts without biases.
        let (m, h) = (1600, 6400);
        let (total, _) = count("gpt2-xl-moe");
        assert_eq!(total, 1_557_611_200 - 24 * (2 * m * h + h + m) + 24 * 8 * (m + 2 * m * h));
    }

    #[test]
    fn every_preset_is_valid_and_others_are_refused() {
        for name in PRESETS {
            preset(name).unwrap().validate().unwrap();
        }
        let error = preset("mixtral-9x9b").unwrap_err().to_string();
        assert!(error.contains("\"mixtral-9x9b\"") && error.contains("mixtral-8x7b"), "{error}");
    }
}
