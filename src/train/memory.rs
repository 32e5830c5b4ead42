//! How much device memory a run needs: known for what is kept per parameter, estimated for activations.

use super::config::TrainConfig;
use super::world::CommKind;
use crate::comm::Sizes;
use crate::device::Lane;
use crate::error::{Result, config_err};
use crate::model::ModelConfig;
use crate::moe::Capacity;
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use crate::moe::order::OrderKind;
use crate::report::bytes;
use std::fmt;

/// What cuBLAS is given.
const WORKSPACE: u64 = 32 << 20;

/// Bytes of device memory that each rank of a training run needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The parameters, in their type.
    pub parameters: u64,
    /// A gradient of each, in the same type.
    pub gradients: u64,
    /// AdamW's two moments, in the type that sums have.
    pub moments: u64,
    /// The 32-bit copies of 16-bit parameters that the optimizer updates.
    pub masters: u64,
    /// What the backward reads of a micro-batch, and what is under way in one block: an estimate, with even loads where
    /// nothing is dropped.
    pub activations: u64,
    /// The logits of a micro-batch and their gradient.
    pub logits: u64,
    /// Of the matrix products.
    pub workspace: u64,
}

impl MemoryEstimate {
    /// Of a run with these settings.
    pub fn new(config: &TrainConfig, model: &ModelConfig) -> Self {
        let (own, acc) = (config.dtype.size() as u64, config.dtype.accumulate().size() as u64);
        let sizes = config.world.sizes;
        let parameters = model.rank_parameters(sizes);
        let tokens = (config.batch / sizes.dp * config.seq) as u64;
        MemoryEstimate {
            parameters: parameters * own,
            gradients: parameters * own,
            moments: 2 * parameters * acc,
            masters: if own == acc { 0 } else { parameters * acc },
            activations: activations(model, tokens, sizes, own, acc),
            logits: 2 * tokens * model.vocab as u64 * own,
            workspace: WORKSPACE,
        }
    }

    /// The parts, named.
    fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("moments", self.moments),
            ("master weights", self.masters),
            ("activations, about", self.activations),
            ("logits", self.logits),
            ("workspace", self.workspace),
        ]
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Fails where `free` bytes are too few.
    ///
    /// # Errors
    /// With the sum, and what could be smaller.
    pub fn require(&self, place: &str, free: u64) -> Result<()> {
        if self.total() > free {
            config_err!(
                "this run needs {self}, and {place} has {} free: take a smaller --batch (and a larger --accumulate), a \
                 shorter --seq, a smaller model, or --dtype bf16",
                bytes(free as f64)
            );
        }
        Ok(())
    }
}

/// `12.3 GiB (parameters 1.2 GiB + …)`.
impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts().into_iter().filter(|(_, n)| *n > 0);
        let parts: Vec<String> = parts.map(|(name, n)| format!("{name} {}", bytes(n as f64))).collect();
        write!(f, "{} ({})", bytes(self.total() as f64), parts.join(" + "))
    }
}

/// What the tape keeps of all blocks, and as much again as the largest block keeps, for gradients under way. `own` and
/// `acc` are sizes of one value, `tokens` those of an MP group.
fn activations(model: &ModelConfig, tokens: u64, sizes: Sizes, own: u64, acc: u64) -> u64 {
    let (m, h, mp, esp) = (model.hidden as u64, model.ffn as u64, sizes.mp as u64, sizes.esp as u64);
    let qkv = ((model.heads + 2 * model.kv_heads.max(sizes.mp)) * model.head_dim()) as u64;
    // x and its norm; q, k, v and the mix of values, of a rank's heads; x and its norm again, before the FFN.
    let attention = tokens * (4 * m + (m + qkv) / mp) * own + tokens * model.heads as u64 / mp * acc;
    // Per row: before and after the activation.
    let inner = if model.moe.expert == ExpertKind::Gpt { 2 * h } else { 3 * h };
    let dense = tokens * inner / mp * own;
    let routed = tokens / mp;
    let moe = &model.moe;
    let rows = match moe.gate {
        GateKind::Soft => (moe.experts * moe.soft_slots * moe.groups) as u64,
        _ => {
            let factor = if let Capacity::Factor(f) = moe.capacity { f } else { 1.0 };
            (factor * (moe.top_k as u64 * routed) as f64).ceil() as u64
        }
    };
    // GShard's one-hot tensors (T, R) of a routing group: which token goes where, and with which weight.
    let masks = match moe.order {
        OrderKind::GShard => 2 * routed * rows / moe.groups.max(1) as u64 * own,
        OrderKind::Tutel | OrderKind::Ragged => 0,
    };
    // Computed again, what is before the activation is there in one layer at a time.
    let (kept, again) = if moe.recompute { (h, inner - h) } else { (inner, 0) };
    // Rows before and after the experts, of all that share them, and inside; logits.
    let shared = dense * model.shared_experts as u64 + masks;
    let experts = rows * (2 * esp * m + kept) * own + routed * moe.experts as u64 * acc + shared;
    let (all, with_moe) = (model.layers as u64, model.moe_layers() as u64);
    let kept = all * attention + (all - with_moe) * dense + with_moe * experts;
    kept + attention + dense.max(experts + rows * again * own)
}

/// Fails where the lane's device, or the host, has too little memory for the run.
///
/// # Errors
/// With the sum.
pub(super) fn check(lane: &Lane, config: &TrainConfig, model: &ModelConfig) -> Result<()> {
    let Some(free) = lane.free_memory()? else { return Ok(()) };
    let place = match lane.device()? {
        Some(device) => format!("{} ({})", lane.place(), device.name),
        None => "this machine".to_owned(),
    };
    let (place, ranks) = match (config.world.comm, config.world.sizes.ranks) {
        (CommKind::Local, ranks @ 2..) => (format!("each of {ranks} ranks on {place}"), ranks),
        _ => (place, 1),
    };
    MemoryEstimate::new(config, model).require(&place, free / ranks as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;
    use crate::tensor::DType;
    use crate::train::world::WorldConfig;

    #[test]
    fn the_sum_is_shown_and_refused_where_it_is_too_much() {
        let model = preset("mixtral-8x7b").unwrap();
        let config = TrainConfig { dtype: DType::BF16, ..TrainConfig::default() };
        let estimate = MemoryEstimate::new(&config, &model);
        let n = model.total_parameters();
        assert_eq!((estimate.parameters, estimate.moments, estimate.masters), (2 * n, 8 * n, 4 * n));
        assert!(estimate.total() > 16 * n && estimate.activations > 0);
        estimate.require("a device", estimate.total()).unwrap();
        let error = estimate.require("cuda:0 (a device)", 80 << 30).unwrap_err().to_string();
        for part in ["parameters 87.0 GiB", "moments 348", "master weights 174", "80.0 GiB free", "--batch", "cuda:0"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let mut other = model.clone();
        other.moe.recompute = true;
        let again = MemoryEstimate::new(&config, &other).activations;
        other.moe.order = OrderKind::GShard;
        assert!(again < estimate.activations && MemoryEstimate::new(&config, &other).activations > again);
        let wide = MemoryEstimate::new(&TrainConfig { dtype: DType::F32, ..config }, &model);
        assert_eq!((wide.parameters, wide.masters), (4 * n, 0));
        let error = check(&Lane::cpu(), &TrainConfig::default(), &model).unwrap_err().to_string();
        assert!(error.contains("this machine has"), "{error}");
        check(&Lane::cpu(), &TrainConfig::default(), &preset("mixtral-tiny").unwrap()).unwrap();
    }

    #[test]
    fn of_many_ranks_each_has_a_part() {
        let model = ModelConfig { shared_experts: 1, ..preset("mixtral-8x7b").unwrap() };
        let estimate = |sizes| {
            let world = WorldConfig { sizes, ..WorldConfig::default() };
            MemoryEstimate::new(&TrainConfig { world, batch: 8, ..TrainConfig::default() }, &model)
        };
        let [one, mp, all] = [(1, 1, 1), (4, 1, 1), (4, 4, 2)]
            .map(|(mp, ep, esp)| estimate(Sizes::new(if ep == 1 { mp } else { 8 }, 1, mp, ep, esp)));
        let (m, h, layers) = (4096, 14_336, 32);
        // Attention and the shared expert, then the experts as well.
        let dense = layers * (2 * m * m + 2 * m * m / 4 + 3 * m * h);
        assert_eq!(one.parameters - mp.parameters, 4 * (dense - dense / 4));
        let experts = layers * 8 * 3 * m * h;
        assert_eq!(mp.parameters - all.parameters, 4 * (experts - experts / 8));
        assert!(mp.activations < one.activations && all.activations < mp.activations);
        assert_eq!((mp.logits, all.logits), (one.logits, one.logits / 2));
    }
}
