//! A model's settings, and what follows from them without building it: parameter counts and FLOPs.

use crate::comm::Sizes;
use crate::error::{Result, config_err};
use crate::moe::MoeConfig;
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use serde::{Deserialize, Serialize};

/// Whose blocks a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// GPT-2's (Radford et al. 2019): LayerNorm, learned positions, biases in attention and in GELU FFNs.
    Gpt2,
    /// Mixtral's (Jiang et al. 2024): RMSNorm, rotary positions, grouped-query attention, no biases.
    Mixtral,
}

/// A model's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Whose blocks.
    pub arch: Arch,
    /// V, the number of token ids.
    pub vocab: usize,
    /// The longest sequence.
    pub max_seq: usize,
    /// The number of blocks.
    pub layers: usize,
    /// M.
    pub hidden: usize,
    /// Query heads; divides M.
    pub heads: usize,
    /// Key and value heads; divides the query heads. Equal to them: plain multi-head attention.
    pub kv_heads: usize,
    /// H, the inner width of an expert and of a dense FFN.
    pub ffn: usize,
    /// What the MoE layers are like. Their width M, inner width H and initial weights are the model's own and replace
    /// those given here (see [`ModelConfig::moe_layer`]); the kind of expert is also the kind of the dense FFNs.
    pub moe: MoeConfig,
    /// n: of every n consecutive blocks the last has an MoE layer, the others a dense FFN.
    pub moe_every: usize,
    /// A dense FFN of width `shared_experts`·H is added to every MoE layer's output; 0: none (DeepSeekMoE, Dai et al. 2024).
    pub shared_experts: usize,
    /// Whether the output projection is the token embedding.
    pub tie_embeddings: bool,
    /// The base of the rotary frequencies; Mixtral's kind only.
    pub rope_theta: f64,
    /// Added to the variance in every norm.
    pub norm_eps: f64,
    /// Standard deviation of the initial weights; projections onto the residual stream have 1/√(2·layers) of it, as
    /// GPT-2's.
    pub init_std: f64,
}

impl Default for ModelConfig {
    /// The `mixtral-tiny` preset.
    fn default() -> Self {
        ModelConfig {
            arch: Arch::Mixtral,
            vocab: 256,
            max_seq: 256,
            layers: 4,
            hidden: 128,
            heads: 4,
            kv_heads: 2,
            ffn: 256,
            moe: MoeConfig { expert: ExpertKind::Mixtral, ..MoeConfig::default() },
            moe_every: 1,
            shared_experts: 0,
            tie_embeddings: false,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            init_std: 0.02,
        }
    }
}

impl ModelConfig {
    /// Checks the settings against each other, the MoE layers' included.
    ///
    /// # Errors
    /// Names the first value that breaks a rule, and the rule.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("vocab", self.vocab),
            ("max_seq", self.max_seq),
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("ffn", self.ffn),
            ("moe_every", self.moe_every),
        ] {
            if value == 0 {
                config_err!("{name} = 0: it is at least 1");
            }
        }
        if i32::try_from(self.vocab).is_err() {
            config_err!("vocab = {}: token ids are 32-bit, so it is at most {}", self.vocab, i32::MAX);
        }
        if !self.hidden.is_multiple_of(self.heads) {
            config_err!("hidden = {} with {} heads: the heads divide the width", self.hidden, self.heads);
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            config_err!("heads = {} with {} kv_heads: the kv_heads divide the heads", self.heads, self.kv_heads);
        }
        if self.arch == Arch::Mixtral && !self.head_dim().is_multiple_of(2) {
            config_err!(
                "hidden = {} with {} heads: rotary positions turn pairs, so a head's width, here {}, is even",
                self.hidden,
                self.heads,
                self.head_dim()
            );
        }
        if self.moe_every > self.layers {
            config_err!("moe_every = {} with {} layers: no block would have an MoE layer", self.moe_every, self.layers);
        }
        for (name, value) in [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps)] {
            if !(value.is_finite() && value > 0.0) {
                config_err!("{name} = {value}: it is a finite number above 0");
            }
        }
        if !(self.init_std.is_finite() && self.init_std >= 0.0) {
            config_err!("init_std = {}: it is a finite number, at least 0", self.init_std);
        }
        self.moe_layer().validate()
    }

    /// D, a head's width.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Whether block `layer`, counted from 0, has an MoE layer.
    pub fn has_moe(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.moe_every)
    }

    /// The number of MoE layers.
    pub fn moe_layers(&self) -> usize {
        self.layers / self.moe_every
    }

    /// Standard deviation of the initial weights of projections onto the residual stream: each block adds two, so the
    /// stream's variance would grow with depth.
    pub fn output_std(&self) -> f64 {
        self.init_std / (2.0 * self.layers as f64).sqrt()
    }

    /// The settings of an MoE layer of this model.
    pub fn moe_layer(&self) -> MoeConfig {
        MoeConfig {
            hidden: self.hidden,
            ffn: self.ffn,
            init_std: self.init_std,
            output_std: Some(self.output_std()),
            ..self.moe.clone()
        }
    }

    /// All parameters.
    pub fn total_parameters(&self) -> u64 {
        self.count(self.moe.experts)
    }

    /// The parameters that take part in one token's computation: those of k experts per MoE layer, and all others. With
    /// SoftMoE, whose tokens mix the outputs of all experts, all of them.
    pub fn active_parameters(&self) -> u64 {
        self.count(self.active_experts())
    }

    /// The parameters that each rank of a world has: its part of experts, attention and dense FFNs, all others whole.
    pub fn rank_parameters(&self, sizes: Sizes) -> u64 {
        let Sizes { mp, ep, esp, .. } = sizes;
        let (m, layers, with_moe) = (self.hidden, self.layers, self.moe_layers());
        let (matrices, bias) = if self.moe.expert == ExpertKind::Gpt { (2, 1) } else { (3, 0) };
        let experts = with_moe * self.moe.experts * matrices * m * self.ffn;
        let kv_heads = if self.kv_heads.is_multiple_of(mp) { self.kv_heads } else { 0 };
        let qkv = (self.heads + 2 * kv_heads) * self.head_dim();
        let attention = m * qkv + m * m + if self.arch == Arch::Gpt2 { qkv } else { 0 };
        let width = (layers - with_moe + with_moe * self.shared_experts) * self.ffn;
        let dense = layers * attention + width * (matrices * m + bias);
        self.total_parameters() - (experts - experts / (ep * esp) + dense - dense / mp) as u64
    }

    /// FLOPs of one token's forward and backward in sequences of `seq` tokens: six per parameter of a matrix it is
    /// multiplied by (two forward, four backward), and causal attention's 6·L·M per block (Chowdhery et al. 2022, halved
    /// for the mask). What a backward recomputes, norms and activations are not counted.
    pub fn flops_per_token(&self, seq: usize) -> f64 {
        // An embedding is looked up, not multiplied; a tied one is multiplied as the output projection.
        let looked_up = if self.tie_embeddings { 0 } else { self.vocab * self.hidden } + self.position_parameters();
        let matrices = self.active_parameters() - looked_up as u64;
        6.0 * matrices as f64 + 6.0 * (seq * self.hidden * self.layers) as f64
    }

    fn active_experts(&self) -> usize {
        if self.moe.gate == GateKind::Soft { self.moe.experts } else { self.moe.top_k }
    }

    fn position_parameters(&self) -> usize {
        if self.arch == Arch::Gpt2 { self.max_seq * self.hidden } else { 0 }
    }

    /// The parameters, each MoE layer's with `experts` experts.
    fn count(&self, experts: usize) -> u64 {
        let (m, gpt2) = (self.hidden, self.arch == Arch::Gpt2);
        let norm = if gpt2 { 2 * m } else { m };
        let qkv = (self.heads + 2 * self.kv_heads) * self.head_dim();
        let attention = m * qkv + m * m + if gpt2 { qkv + m } else { 0 };
        let matrices = if self.moe.expert == ExpertKind::Gpt { 2 } else { 3 };
        let dense = |width: usize| {
            let biases = if self.moe.expert == ExpertKind::Gpt { width + m } else { 0 };
            matrices * m * width + biases
        };
        let shared = if self.shared_experts > 0 { dense(self.shared_experts * self.ffn) } else { 0 };
        let moe = self.gate_parameters() + experts * matrices * m * self.ffn + shared;
        let moe_layers = self.moe_layers();
        let head = if self.tie_embeddings { 0 } else { self.vocab * m };
        let all = self.vocab * m
            + self.position_parameters()
            + self.layers * (2 * norm + attention)
            + moe_layers * moe
            + (self.layers - moe_layers) * dense(self.ffn)
            + norm
            + head;
        all as u64
    }

    fn gate_parameters(&self) -> usize {
        let (m, e) = (self.hidden, self.moe.experts);
        match self.moe.gate {
            GateKind::TopK if self.moe.gate_noise => 2 * m * e,
            GateKind::TopK | GateKind::Sigmoid | GateKind::ExpertChoice => m * e,
            // The projection, the experts' embeddings and the scale.
            GateKind::XMoe => m * self.moe.x_moe_dim + self.moe.x_moe_dim * e + 1,
            GateKind::Soft => m * e * self.moe.soft_slots,
        }
    }
}
