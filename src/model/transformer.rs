//! The language model: embeddings, blocks, a last norm and the output projection.

use super::attention::Cache;
use super::block::Block;
use super::config::{Arch, ModelConfig};
use super::norm::Norm;
use crate::autograd::{Init, Parameter, ReduceGroup, Tape, Var};
use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::moe::distributed::Parallel;
use crate::moe::{Routing, StepContext};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// A causal language model with MoE layers.
pub struct Transformer {
    config: ModelConfig,
    /// (V, M).
    tokens: Parameter,
    /// (max_seq, M).
    positions: Option<Parameter>,
    blocks: Vec<Block>,
    norm: Norm,
    /// (V, M); none where it is `tokens`.
    head: Option<Parameter>,
}

/// What a forward gives.
#[derive(Clone, Debug)]
pub struct ModelOutput {
    /// (B·L, V), of the parameters' type.
    pub logits: Var,
    /// (1) acc: the MoE layers' weighted balance and z-losses, added up.
    pub aux_loss: Var,
    /// Of every MoE layer, front to back.
    pub routings: Vec<Routing>,
}

/// The keys and values of one sequence so far, for [`Transformer::decode`].
pub(super) struct SequenceCache {
    layers: Vec<Cache>,
    len: usize,
}

impl SequenceCache {
    /// The tokens it holds.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Forgets them all.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }
}

impl Transformer {
    /// A model with random weights. Parameters have Hugging Face's names for GPT-2 and Mixtral; the experts of a layer
    /// are stacked, as `….experts.w1`.
    ///
    /// # Errors
    /// If the settings break a rule, or the device has no memory left.
    pub fn new(init: &Init, config: &ModelConfig) -> Result<Self> {
        Self::on(init, config, None)
    }

    /// One rank's part of a model over the ranks of a world: of the MoE layers, and, among the ranks of an MP group, of
    /// attention and dense FFNs; embeddings, norms and the output projection each rank has whole. Weights are those that one
    /// rank alone would have, names as well.
    ///
    /// # Errors
    /// As [`Transformer::new`], and if the model does not fit the world.
    pub fn on_ranks(init: &Init, config: &ModelConfig, parallel: &Arc<Parallel>) -> Result<Self> {
        Self::on(init, config, Some(parallel))
    }

    fn on(init: &Init, config: &ModelConfig, parallel: Option<&Arc<Parallel>>) -> Result<Self> {
        config.validate()?;
        let (body, tokens, positions, blocks, norm) = match config.arch {
            Arch::Gpt2 => ("transformer", "wte.weight", Some("wpe.weight"), "h", "ln_f"),
            Arch::Mixtral => ("model", "embed_tokens.weight", None, "layers", "norm"),
        };
        let (inner, std) = (init.child(body), config.init_std);
        let table = |init: &Init, name, rows| init.normal(name, [rows, config.hidden], std, ReduceGroup::Replicated);
        let by_layer = inner.child(blocks);
        let model = Transformer {
            tokens: table(&inner, tokens, config.vocab)?,
            positions: positions.map(|name| table(&inner, name, config.max_seq)).transpose()?,
            blocks: (0..config.layers)
                .map(|i| Block::on(&by_layer.child(i), config, i, parallel))
                .collect::<Result<_>>()?,
            norm: Norm::new(&inner.child(norm), config)?,
            head: (!config.tie_embeddings).then(|| table(init, "lm_head.weight", config.vocab)).transpose()?,
            config: config.clone(),
        };
        if let (Some(_), Some(cuda)) = (parallel, init.lane().as_cuda()) {
            // A rank has taken its parts from tensors that were whole.
            cuda.release_unused();
        }
        Ok(model)
    }

    /// The settings.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The parameters' type.
    pub fn dtype(&self) -> DType {
        self.tokens.value().dtype()
    }

    /// The blocks, front to back.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// All parameters, in the order of the computation.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut all: Vec<Parameter> = std::iter::once(&self.tokens).chain(&self.positions).cloned().collect();
        all.extend(self.blocks.iter().flat_map(Block::parameters));
        all.extend(self.norm.parameters());
        all.extend(self.head.clone());
        all
    }

    /// The parameters before the blocks, embeddings, and those after them: the last norm, the output projection where it is
    /// not the embedding.
    pub fn outer_parameters(&self) -> (Vec<Parameter>, Vec<Parameter>) {
        let mut last = self.norm.parameters();
        last.extend(self.head.clone());
        (std::iter::once(&self.tokens).chain(&self.positions).cloned().collect(), last)
    }

    /// State without gradient that checkpoints keep (selection biases), by name.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.blocks.iter().flat_map(Block::buffers).collect()
    }

    /// Whether a token's logits depend on later tokens through the routing: then the loss is not comparable with other
    /// gates', and tokens cannot be decoded one at a time.
    pub fn sees_other_tokens(&self) -> bool {
        self.blocks.iter().filter_map(Block::moe).any(|moe| moe.sees_other_tokens())
    }

    /// Called once after each optimizer step.
    ///
    /// # Errors
    /// If the device fails.
    pub fn after_step(&self, lane: &Lane) -> Result<()> {
        self.blocks.iter().filter_map(Block::moe).try_for_each(|moe| moe.after_step(lane))
    }

    /// The logits of every next token. ids: (B·L) i32 on the tape's device, B = `batch` sequences of L = `seq` tokens.
    ///
    /// # Errors
    /// If there are no tokens, other than B·L ids, an L above `max_seq` or an id outside the vocabulary (on the CPU), or
    /// the device fails.
    pub fn forward(
        &self,
        tape: &Tape,
        ids: &Tensor,
        batch: usize,
        seq: usize,
        step: StepContext,
    ) -> Result<ModelOutput> {
        if batch == 0 || seq == 0 || seq > self.config.max_seq {
            shape_err!("{batch} sequences of {seq} tokens: at least one, of 1 to max_seq = {}", self.config.max_seq);
        }
        let mut x = self.embed(tape, ids, batch, seq, 0)?;
        let mut aux_loss: Option<Var> = None;
        let mut routings = Vec::with_capacity(self.config.moe_layers());
        for block in &self.blocks {
            let out = block.forward(tape, &x, batch, seq, step)?;
            x = out.y;
            if let Some((loss, routing)) = out.moe {
                aux_loss = Some(match aux_loss {
                    Some(sum) => tape.add(&sum, &loss)?,
                    None => loss,
                });
                routings.push(routing);
            }
        }
        let aux_loss = match aux_loss {
            Some(sum) => sum,
            None => tape.constant(tape.lane().zeros([1], self.dtype().accumulate())?),
        };
        Ok(ModelOutput { logits: self.project(tape, &x)?, aux_loss, routings })
    }

    /// The mean cross-entropy of `targets`, (B·L) i32, in nats: (1) acc, and what the forward gave. The auxiliary loss
    /// is not in it; a training loss is the sum of both.
    ///
    /// # Errors
    /// As [`Transformer::forward`], and if there is not one target per token.
    pub fn loss(
        &self,
        tape: &Tape,
        ids: &Tensor,
        targets: &Tensor,
        batch: usize,
        seq: usize,
        step: StepContext,
    ) -> Result<(Var, ModelOutput)> {
        let out = self.forward(tape, ids, batch, seq, step)?;
        Ok((tape.cross_entropy(&out.logits, targets)?, out))
    }

    /// Token embeddings (B·L, M), with positions from `first` on where they are learned.
    fn embed(&self, tape: &Tape, ids: &Tensor, batch: usize, seq: usize, first: usize) -> Result<Var> {
        if ids.shape().dims() != [batch * seq] || ids.dtype() != DType::I32 {
            shape_err!("{ids:?} for {batch} sequences of {seq} tokens: ids are i32 of shape ({})", batch * seq);
        }
        let x = tape.embedding(ids, &tape.param(&self.tokens))?;
        let Some(positions) = &self.positions else { return Ok(x) };
        let positions = tape.narrow(&tape.param(positions), 0, first, seq)?;
        let x = tape.add(&tape.reshape(&x, [batch, seq, self.config.hidden])?, &positions)?;
        tape.reshape(&x, [batch * seq, self.config.hidden])
    }

    fn project(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let x = self.norm.forward(tape, x)?;
        tape.linear(&x, &tape.param(self.head.as_ref().unwrap_or(&self.tokens)), None)
    }

    /// An empty cache.
    pub(super) fn cache(&self, lane: &Lane) -> Result<SequenceCache> {
        let layers = self.blocks.iter().map(|b| b.cache(lane, self.dtype())).collect::<Result<_>>()?;
        Ok(SequenceCache { layers, len: 0 })
    }

    /// The logits (1, V) after one more token, `id`: (1) i32, of the sequence in `cache`, which holds at most `max_seq`.
    pub(super) fn decode(
        &self,
        lane: &Lane,
        id: &Tensor,
        cache: &mut SequenceCache,
        step: StepContext,
    ) -> Result<Tensor> {
        if cache.len >= self.config.max_seq {
            shape_err!("token {} of a sequence: it has at most max_seq = {}", cache.len + 1, self.config.max_seq);
        }
        let tape = Tape::inference(lane);
        let mut x = self.embed(&tape, id, 1, 1, cache.len)?;
        for (block, layer) in self.blocks.iter().zip(&cache.layers) {
            x = block.decode(&tape, &x, layer, cache.len, step)?;
        }
        cache.len += 1;
        Ok(self.project(&tape, &x)?.value().clone())
    }
}
