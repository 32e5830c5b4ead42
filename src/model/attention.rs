//! Causal self-attention: over whole sequences, and one token at a time over cached keys and values.

use super::config::{Arch, ModelConfig};
use super::ffn::Conv1d;
use super::parallel::{MpGroup, Shards};
use crate::autograd::{Init, Parameter, ReduceGroup, Tape, Var};
use crate::device::{AttentionShape, Lane, Rope};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Causal self-attention with its projections; of an MP rank, that of its heads.
pub(super) struct Attention {
    mp: MpGroup,
    projections: Projections,
    /// This rank's.
    heads: usize,
    /// Those that its query heads read.
    kv_heads: usize,
    head_dim: usize,
    max_seq: usize,
}

enum Projections {
    /// Queries, keys and values from one matrix; biases; no rotation.
    Gpt2 { c_attn: Conv1d, c_proj: Conv1d },
    /// A matrix each, (out, in); queries and keys are rotated.
    Mixtral {
        q: Parameter,
        k: Parameter,
        v: Parameter,
        o: Parameter,
        theta: f64,
        /// The row of `k` and `v` at which this rank's heads begin, where it has them whole: MP ranks share heads.
        shared: Option<usize>,
    },
}

/// The keys and values of the tokens of one sequence so far, of one attention.
pub(super) struct Cache {
    /// (max_seq, Hkv, D), rotated.
    keys: Tensor,
    /// (max_seq, Hkv, D).
    values: Tensor,
}

impl Attention {
    /// Random weights, under Hugging Face's names for the architecture.
    pub(super) fn new(init: &Init, config: &ModelConfig, mp: &MpGroup, shards: &mut Shards) -> Result<Self> {
        let (m, d) = (config.hidden, config.head_dim());
        let (std, output_std, kv) = (config.init_std, config.output_std(), config.kv_heads * d);
        let shared = !config.kv_heads.is_multiple_of(mp.size());
        let projections = match config.arch {
            Arch::Gpt2 => Projections::Gpt2 {
                c_attn: Conv1d::columns(&init.child("c_attn"), m, &[m, kv, kv], std, mp, shards)?,
                c_proj: Conv1d::rows(&init.child("c_proj"), m, m, output_std, mp, shards)?,
            },
            Arch::Mixtral => {
                let matrix = |name, shape: [usize; 2], std| init.normal(name, shape, std, ReduceGroup::Replicated);
                let mut keys = |name| match matrix(name, [kv, m], std)? {
                    whole if shared => Ok(whole),
                    whole => mp.part(whole, 0, &[kv], shards),
                };
                let (k, v) = (keys("k_proj.weight")?, keys("v_proj.weight")?);
                Projections::Mixtral {
                    q: mp.part(matrix("q_proj.weight", [m, m], std)?, 0, &[m], shards)?,
                    k,
                    v,
                    o: mp.part(matrix("o_proj.weight", [m, m], output_std)?, 1, &[m], shards)?,
                    theta: config.rope_theta,
                    shared: shared.then(|| mp.rank() * config.kv_heads / mp.size() * d),
                }
            }
        };
        Ok(Attention {
            mp: mp.clone(),
            projections,
            heads: config.heads / mp.size(),
            kv_heads: if shared { 1 } else { config.kv_heads / mp.size() },
            head_dim: d,
            max_seq: config.max_seq,
        })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        match &self.projections {
            Projections::Gpt2 { c_attn, c_proj } => [c_attn.parameters(), c_proj.parameters()].concat(),
            Projections::Mixtral { q, k, v, o, .. } => vec![q.clone(), k.clone(), v.clone(), o.clone()],
        }
    }

    /// Those of its parameters that all MP ranks have whole, but of whose gradients each has a part.
    pub(super) fn shared_parameters(&self) -> Vec<Parameter> {
        match &self.projections {
            Projections::Mixtral { k, v, shared: Some(_), .. } => vec![k.clone(), v.clone()],
            _ => Vec::new(),
        }
    }

    /// The elements of the matrices that this rank's tokens are multiplied with.
    pub(super) fn products(&self) -> Vec<usize> {
        match &self.projections {
            Projections::Gpt2 { c_attn, c_proj } => vec![c_attn.product(), c_proj.product()],
            Projections::Mixtral { q, k, o, .. } => {
                let keys = self.kv_heads * self.head_dim * k.value().dim(1);
                vec![q.elements(), keys, keys, o.elements()]
            }
        }
    }

    /// x: (B·L, M) to (B·L, M), each sequence for itself.
    pub(super) fn forward(&self, tape: &Tape, x: &Var, batch: usize, seq: usize) -> Result<Var> {
        let [q, k, v] = self.qkv(tape, x, batch, seq, 0)?;
        let Attention { heads, kv_heads, head_dim, .. } = *self;
        let mixed = tape.attention(AttentionShape { batch, seq, heads, kv_heads, head_dim }, &q, &k, &v)?;
        self.output(tape, &tape.reshape(&mixed, [batch * seq, heads * head_dim])?)
    }

    /// Queries (B·L, Hq·D), keys and values (B·L, Hkv·D); the sequences' first tokens stand at position `first`.
    fn qkv(&self, tape: &Tape, x: &Var, batch: usize, seq: usize, first: usize) -> Result<[Var; 3]> {
        let (width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let x = &self.mp.shared(tape, x);
        match &self.projections {
            Projections::Gpt2 { c_attn, .. } => {
                let all = c_attn.forward(tape, x)?;
                match <[Var; 3]>::try_from(tape.split(&all, 1, &[width, kv_width, kv_width])?) {
                    Ok(parts) => Ok(parts),
                    Err(parts) => shape_err!("{} parts of queries, keys and values: three", parts.len()),
                }
            }
            Projections::Mixtral { q, k, v, theta, shared, .. } => {
                let keys = |weight: &Parameter| match *shared {
                    Some(row) => tape.narrow(&tape.param(weight), 0, row, kv_width),
                    None => Ok(tape.param(weight)),
                };
                let rotated = |weight: &Var, heads: usize| {
                    let projected = tape.linear(x, weight, None)?;
                    let by_head = tape.reshape(&projected, [batch, seq, heads, self.head_dim])?;
                    let turned = tape.rope(&by_head, Rope { theta: *theta, first })?;
                    tape.reshape(&turned, [batch * seq, heads * self.head_dim])
                };
                let q = rotated(&tape.param(q), self.heads)?;
                Ok([q, rotated(&keys(k)?, self.kv_heads)?, tape.linear(x, &keys(v)?, None)?])
            }
        }
    }

    fn output(&self, tape: &Tape, mixed: &Var) -> Result<Var> {
        match &self.projections {
            Projections::Gpt2 { c_proj, .. } => c_proj.forward(tape, mixed),
            Projections::Mixtral { o, .. } => self.mp.sum(tape, &tape.linear(mixed, &tape.param(o), None)?),
        }
    }

    /// An empty cache.
    pub(super) fn cache(&self, lane: &Lane, dtype: DType) -> Result<Cache> {
        let shape = [self.max_seq, self.kv_heads, self.head_dim];
        Ok(Cache { keys: lane.empty(shape, dtype)?, values: lane.empty(shape, dtype)? })
    }

    /// The token at `position`, x: (1, M), with those before it in `cache`, to which it is added. No gradients.
    pub(super) fn decode(&self, tape: &Tape, x: &Var, cache: &Cache, position: usize) -> Result<Var> {
        let lane = tape.lane();
        let [q, k, v] = self.qkv(tape, x, 1, 1, position)?;
        let Attention { heads, kv_heads, head_dim, .. } = *self;
        for (new, all) in [(&k, &cache.keys), (&v, &cache.values)] {
            lane.copy(&new.value().reshape([kv_heads, head_dim])?, &all.index(position)?)?;
        }
        let seen = position + 1;
        // Key head by key head: (Hkv, Hq/Hkv, D) queries against (Hkv, L, D) keys.
        let queries = lane.contiguous(q.value())?.reshape([kv_heads, heads / kv_heads, head_dim])?;
        let keys = cache.keys.narrow(0, 0, seen)?.transpose(0, 1)?;
        let values = cache.values.narrow(0, 0, seen)?.transpose(0, 1)?;
        let scores = lane.empty([kv_heads, heads / kv_heads, seen], queries.dtype())?;
        lane.gemm(1.0 / (head_dim as f64).sqrt(), &queries, &keys.t()?, 0.0, &scores)?;
        let weights = lane.empty_like(&scores)?;
        lane.softmax(&scores, &weights)?;
        let mixed = lane.empty_like(&queries)?;
        lane.gemm(1.0, &weights, &values, 0.0, &mixed)?;
        self.output(tape, &tape.constant(mixed.reshape([1, heads * head_dim])?))
    }
}
