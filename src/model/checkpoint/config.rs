//! `config.json`: transformers' MixtralConfig, and our own settings beside it.

use super::{CONFIG, bad};
use crate::error::{Error, Result};
use crate::model::{Arch, ModelConfig};
use crate::moe::MoeConfig;
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use crate::tensor::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

const MIXTRAL: &str = "mixtral";

/// Where our own settings stand.
const OURS: &str = "fsmoe";

/// The fields of transformers' MixtralConfig that matter to the computation, with its defaults.
#[derive(Serialize, Deserialize)]
#[serde(default)]
struct MixtralConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: String,
    max_position_embeddings: usize,
    initializer_range: f64,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    sliding_window: Option<usize>,
    num_experts_per_tok: usize,
    num_local_experts: usize,
    router_aux_loss_coef: f64,
    /// Where transformers 4 has the base.
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    /// Where transformers 5 has it.
    rope_parameters: Option<Rope>,
}

#[derive(Serialize, Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

impl Default for MixtralConfig {
    fn default() -> Self {
        MixtralConfig {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 14336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: Some(8),
            head_dim: None,
            hidden_act: "silu".to_owned(),
            max_position_embeddings: 4096 * 32,
            initializer_range: 0.02,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
            sliding_window: None,
            num_experts_per_tok: 2,
            num_local_experts: 8,
            router_aux_loss_coef: 0.001,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
        }
    }
}

/// The settings in a folder's `config.json`: ours where it has them, otherwise transformers' for Mixtral.
///
/// # Errors
/// If the file is missing or broken, describes another model, or one with something that is not built here: names the
/// field and the rule.
pub fn read_config(dir: &Path) -> Result<ModelConfig> {
    let path = dir.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let broken = |e: serde_json::Error| bad(&path, format!("not the configuration of a model: {e}"));
    let mut fields: Map<String, Value> = serde_json::from_str(&text).map_err(broken)?;
    let config = if let Some(ours) = fields.remove(OURS) {
        serde_json::from_value(ours).map_err(broken)?
    } else {
        match fields.get("model_type").and_then(Value::as_str) {
            Some(MIXTRAL) => {}
            Some(other) => return Err(bad(&path, format!("model_type {other:?}: only {MIXTRAL:?} is known"))),
            None => return Err(bad(&path, format!("no model_type: it is {MIXTRAL:?}"))),
        }
        let theirs: MixtralConfig = serde_json::from_value(Value::Object(fields)).map_err(broken)?;
        from_theirs(theirs).map_err(|reason| bad(&path, reason))?
    };
    config.validate().map_err(|e| bad(&path, e.to_string()))?;
    Ok(config)
}

/// Writes `config.json`, atomically.
pub(super) fn write_config(path: &Path, config: &ModelConfig, dtype: DType) -> Result<()> {
    let broken = |e: serde_json::Error| bad(path, format!("settings that JSON cannot express: {e}"));
    let mut value = if is_mixtral(config) {
        let mut value = serde_json::to_value(to_theirs(config)).map_err(broken)?;
        value["architectures"] = json!(["MixtralForCausalLM"]);
        value["model_type"] = json!(MIXTRAL);
        value
    } else {
        // A name of its own: transformers must not take it for a model that computes something else.
        json!({"architectures": ["FsmoeForCausalLM"], "model_type": OURS})
    };
    let dtype = match dtype {
        DType::F64 => "float64",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F32 | DType::I32 => "float32",
    };
    value["torch_dtype"] = json!(dtype);
    value["dtype"] = json!(dtype);
    value[OURS] = serde_json::to_value(config).map_err(broken)?;
    let text = serde_json::to_string_pretty(&value).map_err(broken)? + "\n";
    crate::fsio::atomic_write(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))
}

/// Whether transformers' Mixtral computes what this model does: softmax over all experts, the best k normalised, SwiGLU
/// experts in every block and nothing beside them.
fn is_mixtral(config: &ModelConfig) -> bool {
    let moe = &config.moe;
    config.arch == Arch::Mixtral
        && config.moe_every == 1
        && config.shared_experts == 0
        && moe.expert == ExpertKind::Mixtral
        && moe.gate == GateKind::TopK
        && !moe.gate_noise
        && moe.normalises_weights()
}

fn to_theirs(config: &ModelConfig) -> MixtralConfig {
    MixtralConfig {
        vocab_size: config.vocab,
        hidden_size: config.hidden,
        intermediate_size: config.ffn,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: Some(config.kv_heads),
        head_dim: Some(config.head_dim()),
        max_position_embeddings: config.max_seq,
        initializer_range: config.init_std,
        rms_norm_eps: config.norm_eps,
        tie_word_embeddings: config.tie_embeddings,
        num_experts_per_tok: config.moe.top_k,
        num_local_experts: config.moe.experts,
        router_aux_loss_coef: config.moe.balance_weight,
        rope_theta: Some(config.rope_theta),
        rope_parameters: Some(Rope { rope_type: Some("default".into()), rope_theta: Some(config.rope_theta) }),
        ..MixtralConfig::default()
    }
}

/// Our settings from theirs; the error is a field's value and the rule it breaks.
fn from_theirs(theirs: MixtralConfig) -> std::result::Result<ModelConfig, String> {
    let hidden = theirs.hidden_size;
    let heads = theirs.num_attention_heads;
    if let Some(d) = theirs.head_dim
        && d * heads != hidden
    {
        return Err(format!("head_dim = {d} with {heads} heads: together they are as wide as hidden_size = {hidden}"));
    }
    if theirs.hidden_act != "silu" {
        return Err(format!("hidden_act {:?}: the experts' activation is \"silu\"", theirs.hidden_act));
    }
    let ropes = || theirs.rope_parameters.iter().chain(&theirs.rope_scaling);
    if let Some(kind) = ropes().filter_map(|r| r.rope_type.as_deref()).find(|kind| *kind != "default") {
        return Err(format!("rope_type {kind:?}: rotary positions are not rescaled here, so it is \"default\""));
    }
    let rope_theta = ropes().find_map(|r| r.rope_theta).or(theirs.rope_theta);
    let base = ModelConfig::default();
    Ok(ModelConfig {
        arch: Arch::Mixtral,
        vocab: theirs.vocab_size,
        // Attention is over the whole sequence; up to the window's length that is the same.
        max_seq: theirs
            .sliding_window
            .map_or(theirs.max_position_embeddings, |w| w.min(theirs.max_position_embeddings)),
        layers: theirs.num_hidden_layers,
        hidden,
        heads,
        kv_heads: theirs.num_key_value_heads.unwrap_or(heads),
        ffn: theirs.intermediate_size,
        moe: MoeConfig {
            gate: GateKind::TopK,
            expert: ExpertKind::Mixtral,
            experts: theirs.num_local_experts,
            top_k: theirs.num_experts_per_tok,
            balance_weight: theirs.router_aux_loss_coef,
            normalise_weights: Some(true),
            ..base.moe
        },
        moe_every: 1,
        shared_experts: 0,
        tie_embeddings: theirs.tie_word_embeddings,
        rope_theta: rope_theta.unwrap_or(1e6),
        norm_eps: theirs.rms_norm_eps,
        init_std: theirs.initializer_range,
    })
}
