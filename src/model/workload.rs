//! A model's blocks as the planner sees them: FLOPs, volumes and parameters.

use super::config::{Arch, ModelConfig};
use crate::comm::{AllToAllKind, Sizes, Topology};
use crate::error::{Result, config_err};
use crate::moe::Capacity;
use crate::moe::expert::ExpertKind;
use crate::schedule::{BlockShape, LayerShape};

impl ModelConfig {
    /// The blocks of a step on `batch` sequences of `seq` tokens for each model-parallel group: the model's, then one that
    /// is the output projection. The embedding counts with the first. A dropless layer is priced at its mean load.
    ///
    /// # Errors
    /// If the settings, or what the world asks of them, break a rule.
    pub fn workload(
        &self,
        batch: usize,
        seq: usize,
        topology: &Topology,
        kind: AllToAllKind,
    ) -> Result<Vec<BlockShape>> {
        self.validate()?;
        if batch == 0 || seq == 0 || seq > self.max_seq {
            config_err!("{batch} sequences of {seq} tokens: at least 1, of 1 to {} tokens (max_seq)", self.max_seq);
        }
        let (tokens, Sizes { mp, .. }) = (batch * seq, topology.sizes());
        if !tokens.is_multiple_of(mp) {
            config_err!("{batch} sequences of {seq} tokens with mp = {mp}: it divides the tokens");
        }
        self.check_mp(mp)?;
        // Rows are indexed by 32 bits on every device.
        let (own, k, most) = (tokens / mp, self.moe.top_k, i32::MAX);
        if let Capacity::Factor(f) = self.moe.capacity
            && f * (k * own) as f64 > f64::from(most)
        {
            config_err!(
                "capacity factor {f:?} with {k} experts for each of {own} tokens: a rank has at most {most} rows, which are \
                 the product"
            );
        }
        let mut blocks: Vec<BlockShape> = (0..self.layers).map(|i| self.block(i, seq, tokens, mp, kind)).collect();
        let embedding = (self.vocab * self.hidden) as u64;
        let positions = if self.arch == Arch::Gpt2 { self.max_seq * self.hidden } else { 0 } as u64;
        if let Some(first) = blocks.first_mut() {
            first.replicated += embedding + positions;
        }
        blocks.push(BlockShape {
            gemms: vec![product(tokens, self.hidden, self.vocab)],
            mp_reduced: 0,
            mp_gathered: 0,
            sharded: 0,
            // A tied one is complete only with the embedding, and is the same.
            replicated: self.norm() + if self.tie_embeddings { 0 } else { embedding },
            moe: None,
        });
        Ok(blocks)
    }

    fn block(&self, block: usize, seq: usize, tokens: usize, mp: usize, kind: AllToAllKind) -> BlockShape {
        let (m, gpt2) = (self.hidden, self.arch == Arch::Gpt2);
        let qkv = (self.heads + 2 * self.kv_heads) * self.head_dim();
        // MP ranks that share a head of keys and values compute it each, and have its weights whole.
        let shared = if self.kv_heads.is_multiple_of(mp) { 0 } else { 2 * self.kv_heads * self.head_dim() };
        let computed = (self.heads + 2 * self.kv_heads.max(mp)) * self.head_dim();
        let matrices = if self.moe.expert == ExpertKind::Gpt { 2 } else { 3 };
        // Causal scores, and the sums they weight: half of a full product each.
        let mixed = product(tokens, m, seq) / 2.0;
        let mut shape = BlockShape {
            gemms: vec![product(tokens, m, computed), mixed, mixed, product(tokens, m, m)],
            mp_reduced: tokens * m,
            mp_gathered: 0,
            sharded: (m * (qkv - shared) + m * m) as u64,
            replicated: 2 * self.norm() + (m * shared + if gpt2 { qkv + m } else { 0 }) as u64,
            moe: None,
        };
        let mut dense = |width: usize| {
            shape.gemms.extend(vec![product(tokens, m, width); matrices]);
            shape.mp_reduced += tokens * m;
            shape.sharded += (matrices * m * width) as u64;
        };
        if !self.has_moe(block) {
            dense(self.ffn);
            return shape;
        }
        if self.shared_experts > 0 {
            dense(self.shared_experts * self.ffn);
        }
        // Each rank routes its share of the tokens; the layer's output is gathered again.
        shape.gemms.push(product(tokens, m, self.moe.experts));
        shape.mp_gathered = tokens * m;
        shape.replicated += (m * self.moe.experts) as u64;
        let factor = match self.moe.capacity {
            Capacity::Factor(f) => f,
            Capacity::Dropless => 1.0,
        };
        shape.moe = Some(LayerShape {
            tokens: tokens / mp,
            rows_per_token: factor * self.moe.top_k as f64,
            hidden: m,
            ffn: self.ffn,
            experts: self.moe.experts,
            gemms: matrices,
            all_to_all: kind,
        });
        shape
    }

    /// Parameters of a norm.
    fn norm(&self) -> u64 {
        (if self.arch == Arch::Gpt2 { 2 * self.hidden } else { self.hidden }) as u64
    }
}

/// FLOPs of (rows, inner) times (inner, columns).
fn product(rows: usize, inner: usize, columns: usize) -> f64 {
    2.0 * rows as f64 * inner as f64 * columns as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{PRESETS, preset};
    use crate::moe::MoeConfig;

    /// Against the counts that the settings give in another way.
    #[test]
    fn parameters_and_flops_are_the_models() {
        for name in PRESETS {
            let config = preset(name).unwrap();
            let seq = config.max_seq.min(1024);
            let blocks = config.workload(1, seq, &Topology::single(), AllToAllKind::Direct).unwrap();
            let moe = |b: &BlockShape| b.moe.map_or(0, |l| (l.gemms * l.hidden * l.ffn * l.experts) as u64);
            let counted: u64 = blocks.iter().map(|b| b.sharded + b.replicated + moe(b)).sum();
            // GPT-2's dense FFNs have biases, which are not worth a volume of their own.
            let biases = if config.arch == Arch::Gpt2 {
                (config.layers - config.moe_layers()) * (config.ffn + config.hidden)
            } else {
                0
            };
            assert_eq!(counted + biases as u64, config.total_parameters(), "{name}");

            let routed = |b: &BlockShape| {
                let flops = |l: LayerShape| {
                    2.0 * l.gemms as f64 * l.rows_per_token * l.tokens as f64 * (l.hidden * l.ffn) as f64
                };
                b.moe.map_or(0.0, flops)
            };
            let forward: f64 = blocks.iter().map(|b| b.gemms.iter().sum::<f64>() + routed(b)).sum();
            let factor = if let Capacity::Factor(f) = config.moe.capacity { f } else { 1.0 };
            let expected = config.flops_per_token(seq) * seq as f64;
            // Backward is twice the forward. A capacity above 1 computes empty rows, which the model's count leaves out; that
            // has norms and biases as if they were matrices.
            let tolerance = if factor == 1.0 { 0.01 } else { 0.15 };
            assert!((3.0 * forward / expected - 1.0).abs() < tolerance, "{name}: {} and {expected}", 3.0 * forward);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let config = preset("mixtral-8x7b").unwrap();
        let world = Topology::new(Sizes::new(32, 4, 8, 4, 8)).unwrap();
        let shape = config.workload(2, 1024, &world, AllToAllKind::Direct).unwrap()[0].moe.unwrap();
        assert_eq!((shape.tokens, shape.rows_per_token, shape.gemms), (256, 2.0, 3));
        let moe = MoeConfig { capacity: Capacity::Factor(1e300), ..config.moe.clone() };
        let huge = ModelConfig { moe, ..config.clone() };
        let error = huge.workload(2, 1024, &world, AllToAllKind::Direct).unwrap_err().to_string();
        assert!(error.contains("capacity factor 1e300 with 2 experts for each of 256 tokens"), "{error}");
        for (batch, seq, mp, part) in [
            (0, 8, 1, "0 sequences"),
            (1, 40_000, 1, "1 to 32768 tokens"),
            (1, 12, 8, "mp = 8: it divides the tokens"),
            (1, 64, 32, "mp = 64"),
        ] {
            let mp = if part == "mp = 64" { 64 } else { mp };
            let world = Topology::new(Sizes::new(64, 1, mp, 1, 1)).unwrap();
            let error = config.workload(batch, seq, &world, AllToAllKind::Direct).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
