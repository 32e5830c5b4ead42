//! A transformer block: attention, then an MoE layer or a dense FFN, each on a norm of the stream and added to it.

use super::attention::{Attention, Cache};
use super::config::{Arch, ModelConfig};
use super::ffn::Ffn;
use super::norm::Norm;
use super::parallel::{MpGroup, Shards};
use crate::autograd::{Init, Parameter, Tape, Var};
use crate::device::Lane;
use crate::error::Result;
use crate::moe::distributed::{DistributedMoe, LayerPlan, Parallel, Sharding};
use crate::moe::{MoeLayer, MoeOutput, Routing, StepContext};
use crate::schedule::{LayerOp, Pass};
use crate::tensor::{DType, Tensor};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A transformer block, pre-norm.
pub struct Block {
    attention_norm: Norm,
    attention: Attention,
    ffn_norm: Norm,
    feed_forward: FeedForward,
    /// Of the dense part.
    shards: Shards,
}

enum FeedForward {
    Dense { ffn: Ffn, ranks: Option<Arc<OnRank>> },
    Moe { layer: Moe, shared: Option<Ffn> },
}

/// What a block without an MoE layer has of the ranks of a world: what its backward goes on beside.
struct OnRank {
    parallel: Arc<Parallel>,
    plan: Mutex<LayerPlan>,
}

/// A block's MoE layer.
pub enum Moe {
    /// On one rank.
    Single(MoeLayer),
    /// One rank's part of a layer over several.
    Ranks(DistributedMoe),
}

impl Moe {
    /// Its parameters: the gate's, then the experts', of the latter this rank's part.
    pub fn parameters(&self) -> Vec<Parameter> {
        match self {
            Moe::Single(layer) => layer.parameters(),
            Moe::Ranks(layer) => layer.parameters(),
        }
    }

    /// State without gradient that checkpoints keep, by name.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        match self {
            Moe::Single(layer) => layer.buffers(),
            Moe::Ranks(layer) => layer.buffers(),
        }
    }

    /// As [`MoeLayer::sees_other_tokens`].
    pub fn sees_other_tokens(&self) -> bool {
        match self {
            Moe::Single(layer) => layer.sees_other_tokens(),
            Moe::Ranks(layer) => layer.sees_other_tokens(),
        }
    }

    /// As [`MoeLayer::after_step`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn after_step(&self, lane: &Lane) -> Result<()> {
        match self {
            Moe::Single(layer) => layer.after_step(lane),
            Moe::Ranks(layer) => layer.after_step(lane),
        }
    }

    /// The part on this rank of a layer over several; none of a layer on one.
    pub fn ranks(&self) -> Option<&DistributedMoe> {
        match self {
            Moe::Single(_) => None,
            Moe::Ranks(layer) => Some(layer),
        }
    }

    fn forward(&self, tape: &Tape, x: &Var, step: StepContext) -> Result<MoeOutput> {
        match self {
            Moe::Single(layer) => layer.forward(tape, x, step),
            Moe::Ranks(layer) => layer.forward(tape, x, step),
        }
    }
}

/// What a block gives.
#[derive(Clone, Debug)]
pub struct BlockOutput {
    /// (B·L, M).
    pub y: Var,
    /// The MoE layer's weighted losses, (1) acc, and its routing; none for a dense block.
    pub moe: Option<(Var, Routing)>,
}

impl Block {
    /// Block `layer`, counted from 0, of a model. Names under `init`'s prefix are GPT-2's or Mixtral's in Hugging Face's
    /// transformers; what those lack is named alike: GPT-2's MoE layer is `moe`, Mixtral's dense FFN `mlp`.
    ///
    /// # Errors
    /// If the settings break a rule, or the device has no memory left.
    pub fn new(init: &Init, config: &ModelConfig, layer: usize) -> Result<Self> {
        Self::on(init, config, layer, None)
    }

    /// [`Block::new`] over the ranks of a world: of the MoE layer, attention and dense FFNs a rank has a part, norms it has
    /// whole.
    ///
    /// # Errors
    /// As [`Block::new`], and if the block does not fit the world.
    pub(super) fn on(
        init: &Init,
        config: &ModelConfig,
        layer: usize,
        parallel: Option<&Arc<Parallel>>,
    ) -> Result<Self> {
        config.validate()?;
        let (mp, mut shards) = (MpGroup::new(parallel), Shards::new());
        config.check_mp(mp.size())?;
        let mut dense = |init: &Init, width| Ffn::new(init, config, width, &mp, &mut shards);
        let (attention_norm, attention, ffn_norm, moe) = match config.arch {
            Arch::Gpt2 => ("ln_1", "attn", "ln_2", "moe"),
            Arch::Mixtral => ("input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe"),
        };
        let feed_forward = if config.has_moe(layer) {
            let init = init.child(moe);
            let width = config.shared_experts * config.ffn;
            FeedForward::Moe {
                layer: match parallel {
                    None => Moe::Single(MoeLayer::new(&init, &config.moe_layer())?),
                    Some(parallel) => Moe::Ranks(DistributedMoe::new(&init, &config.moe_layer(), parallel)?),
                },
                shared: (width > 0).then(|| dense(&init.child("shared_expert"), width)).transpose()?,
            }
        } else {
            let ranks = parallel.map(|parallel| OnRank { parallel: parallel.clone(), plan: Mutex::default() });
            FeedForward::Dense { ffn: dense(&init.child("mlp"), config.ffn)?, ranks: ranks.map(Arc::new) }
        };
        Ok(Block {
            attention_norm: Norm::new(&init.child(attention_norm), config)?,
            attention: Attention::new(&init.child(attention), config, &mp, &mut shards)?,
            ffn_norm: Norm::new(&init.child(ffn_norm), config)?,
            feed_forward,
            shards,
        })
    }

    /// Its dense FFN, or shared expert.
    fn ffn(&self) -> Option<&Ffn> {
        match &self.feed_forward {
            FeedForward::Dense { ffn, .. } => Some(ffn),
            FeedForward::Moe { shared, .. } => shared.as_ref(),
        }
    }

    /// Its parameters but for the MoE layer's gate and experts, in the order of the computation.
    pub fn dense_parameters(&self) -> Vec<Parameter> {
        let norms = (self.attention_norm.parameters(), self.ffn_norm.parameters());
        [norms.0, self.attention.parameters(), norms.1, self.ffn().map_or(Vec::new(), Ffn::parameters)].concat()
    }

    /// Those of the dense parameters that every MP rank has whole and a part of whose gradient it has: keys' and values',
    /// where MP ranks share heads of them. Of the others it has a part, or the whole gradient.
    pub fn shared_parameters(&self) -> Vec<Parameter> {
        self.attention.shared_parameters()
    }

    /// Which dense parameters are divided among MP ranks, and how, by name.
    pub fn dense_shards(&self) -> &[(String, Sharding)] {
        &self.shards
    }

    /// The elements of the dense part's matrices that this rank's tokens are multiplied with.
    pub(crate) fn dense_products(&self) -> Vec<usize> {
        [self.attention.products(), self.ffn().map_or(Vec::new(), Ffn::products)].concat()
    }

    /// How often the MP group sums activations in a forward, and as often in a backward.
    pub(crate) fn mp_sums(&self) -> usize {
        1 + usize::from(self.ffn().is_some())
    }

    /// Its parameters, in the order of the computation.
    pub fn parameters(&self) -> Vec<Parameter> {
        let feed_forward = match &self.feed_forward {
            FeedForward::Dense { ffn, .. } => ffn.parameters(),
            FeedForward::Moe { layer, shared } => {
                let shared = shared.as_ref().map_or(Vec::new(), Ffn::parameters);
                [layer.parameters(), shared].concat()
            }
        };
        let norms = (self.attention_norm.parameters(), self.ffn_norm.parameters());
        [norms.0, self.attention.parameters(), norms.1, feed_forward].concat()
    }

    /// State without gradient that checkpoints keep, by name.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.moe().map_or(Vec::new(), Moe::buffers)
    }

    /// Its MoE layer; none where the FFN is dense.
    pub fn moe(&self) -> Option<&Moe> {
        match &self.feed_forward {
            FeedForward::Dense { .. } => None,
            FeedForward::Moe { layer, .. } => Some(layer),
        }
    }

    /// How the next passes go, on a rank: nothing where it is not on one.
    pub(crate) fn set_plan(&self, plan: LayerPlan) {
        match &self.feed_forward {
            FeedForward::Moe { layer: Moe::Ranks(layer), .. } => layer.set_plan(plan),
            FeedForward::Dense { ranks: Some(ranks), .. } => *ranks.plan() = plan,
            _ => {}
        }
    }

    /// Runs the block on x: (B·L, M).
    ///
    /// # Errors
    /// If x has another shape, or the device fails.
    pub fn forward(&self, tape: &Tape, x: &Var, batch: usize, seq: usize, step: StepContext) -> Result<BlockOutput> {
        self.run(tape, x, step, |h| self.attention.forward(tape, h, batch, seq))
    }

    /// An empty cache for [`Block::decode`].
    pub(super) fn cache(&self, lane: &Lane, dtype: DType) -> Result<Cache> {
        self.attention.cache(lane, dtype)
    }

    /// The token at `position`, x: (1, M), with those before it in `cache`, to which it is added. No gradients.
    pub(super) fn decode(
        &self,
        tape: &Tape,
        x: &Var,
        cache: &Cache,
        position: usize,
        step: StepContext,
    ) -> Result<Var> {
        Ok(self.run(tape, x, step, |h| self.attention.decode(tape, h, cache, position))?.y)
    }

    fn run(
        &self,
        tape: &Tape,
        x: &Var,
        step: StepContext,
        attend: impl FnOnce(&Var) -> Result<Var>,
    ) -> Result<BlockOutput> {
        let x = tape.add(x, &attend(&self.attention_norm.forward(tape, x)?)?)?;
        let h = self.ffn_norm.forward(tape, &x)?;
        let (y, moe) = match &self.feed_forward {
            FeedForward::Dense { ffn, .. } => (ffn.forward(tape, &h)?, None),
            FeedForward::Moe { layer, shared } => {
                let out = layer.forward(tape, &h, step)?;
                let y = match shared {
                    Some(shared) => tape.add(&out.y, &shared.forward(tape, &h)?)?,
                    None => out.y,
                };
                (y, Some((out.aux_loss, out.routing)))
            }
        };
        let y = tape.add(&x, &y)?;
        match &self.feed_forward {
            FeedForward::Dense { ranks: Some(ranks), .. } => Ok(BlockOutput { y: ranks.boundary(tape, &y)?, moe }),
            _ => Ok(BlockOutput { y, moe }),
        }
    }
}

impl OnRank {
    fn plan(&self) -> MutexGuard<'_, LayerPlan> {
        // A plan is replaced in one step.
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end of the block's forward, at which its backward begins.
    fn boundary(self: &Arc<Self>, tape: &Tape, y: &Var) -> Result<Var> {
        let (ranks, next) = (self.clone(), self.plan().block + 1);
        self.parallel.dense(Some(LayerOp::Dense { block: next, pass: Pass::Forward }))?;
        Ok(tape.record1(&[y], y.value().clone(), move |_, dy| {
            let plan = ranks.plan().clone();
            plan.begin_dense_backward(&ranks.parallel)?;
            Ok(vec![Some(dy.clone())])
        }))
    }
}
