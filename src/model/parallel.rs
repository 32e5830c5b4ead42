//! Megatron's model parallelism of the dense part (Shoeybi et al. 2019): the first matrices of an attention or an FFN are
//! divided by columns among the ranks of an MP group, the last by rows, whose products the ranks sum.

use super::config::{Arch, ModelConfig};
use crate::autograd::{Parameter, ReduceGroup, Tape, Var};
use crate::comm::GroupKind;
use crate::device::{Lane, LaneKind};
use crate::error::{Result, config_err};
use crate::moe::distributed::{Parallel, Sharding};
use crate::tensor::Tensor;
use std::sync::Arc;

/// A rank's MP group; nothing where it has no other ranks.
#[derive(Clone)]
pub(super) struct MpGroup(Option<Arc<Parallel>>);

impl MpGroup {
    pub(super) fn new(parallel: Option<&Arc<Parallel>>) -> Self {
        MpGroup(parallel.filter(|p| p.groups().get(GroupKind::Model).size() > 1).cloned())
    }

    /// The number of its ranks.
    pub(super) fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |p| p.groups().get(GroupKind::Model).size())
    }

    /// This rank's number in it.
    pub(super) fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |p| p.groups().get(GroupKind::Model).rank())
    }

    /// x, the same on every rank, for products with matrices that are divided by columns: Megatron's f. The backward sums
    /// the ranks' gradients of it.
    pub(super) fn shared(&self, tape: &Tape, x: &Var) -> Var {
        let Some(parallel) = self.0.clone() else { return x.clone() };
        tape.record1(&[x], x.value().clone(), move |lane, dy| Ok(vec![Some(sum(&parallel, lane, dy)?)]))
    }

    /// The sum of the ranks' `y`, their products with matrices that are divided by rows: Megatron's g, f's counterpart.
    pub(super) fn sum(&self, tape: &Tape, y: &Var) -> Result<Var> {
        let Some(parallel) = &self.0 else { return Ok(y.clone()) };
        let all = sum(parallel, tape.lane(), y.value())?;
        Ok(tape.record1(&[y], all, |_, dy| Ok(vec![Some(dy.clone())])))
    }

    /// This rank's part of a parameter whose dimension `dim` is divided, each of `sections` for itself; it is noted in
    /// `shards`. Of one rank the parameter itself.
    pub(super) fn part(
        &self,
        whole: Parameter,
        dim: usize,
        sections: &[usize],
        shards: &mut Shards,
    ) -> Result<Parameter> {
        let Some(parallel) = &self.0 else { return Ok(whole) };
        let (lane, rank) = (parallel.lane(LaneKind::Compute), parallel.groups().rank());
        let sharding = Sharding::dense(*whole.value().shape(), dim, sections, self.size())?;
        let value = lane.empty(sharding.part(), whole.value().dtype())?;
        sharding.take(lane, rank, whole.value(), &value)?;
        shards.push((whole.name().to_owned(), sharding));
        Parameter::new(lane, whole.name(), value, ReduceGroup::Sharded, whole.decay())
    }
}

/// By name, how parameters are divided.
pub(super) type Shards = Vec<(String, Sharding)>;

fn sum(parallel: &Parallel, lane: &Lane, t: &Tensor) -> Result<Tensor> {
    let groups = parallel.groups();
    // What is given may be in use elsewhere.
    let all = lane.empty(*t.shape(), t.dtype())?;
    lane.copy(t, &all)?;
    let kind = GroupKind::Model;
    parallel.beside(groups.lane(kind), |lane| groups.get(kind).all_reduce(lane, &all))?;
    Ok(all)
}

impl ModelConfig {
    /// Fails unless attention heads and dense FFNs can be divided among `mp` ranks.
    ///
    /// # Errors
    /// Names the value that cannot, and the rule.
    pub fn check_mp(&self, mp: usize) -> Result<()> {
        let ModelConfig { heads, kv_heads, ffn, shared_experts, .. } = *self;
        if !heads.is_multiple_of(mp) {
            config_err!("{heads} heads with mp = {mp}: it divides them");
        }
        // Where there are fewer heads of keys and values than ranks, several ranks have the same one.
        let shared = self.arch == Arch::Mixtral && mp.is_multiple_of(kv_heads);
        if !kv_heads.is_multiple_of(mp) && !shared {
            let rule = if self.arch == Arch::Mixtral { "one divides the other" } else { "it divides them" };
            config_err!("{kv_heads} kv_heads with mp = {mp}: {rule}");
        }
        if self.moe_layers() < self.layers && !ffn.is_multiple_of(mp) {
            config_err!("ffn = {ffn} with mp = {mp}: it divides the width of a dense FFN");
        }
        if !(shared_experts * ffn).is_multiple_of(mp) {
            config_err!("{shared_experts} shared experts of ffn = {ffn} with mp = {mp}: it divides their width");
        }
        Ok(())
    }
}
