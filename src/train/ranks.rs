//! One rank of a run over several: its share of the work, the gradients it sums with the others, and the tensors that only
//! all of them together hold.

use super::plans::StepPlan;
use crate::autograd::Parameter;
use crate::comm::{GroupKind, Sizes};
use crate::device::Lane;
use crate::error::{Result, config_err};
use crate::model::Transformer;
use crate::moe::RoutingStats;
use crate::moe::distributed::{DistributedMoe, GradientBuffers, LayerPlan, Parallel, Sharding};
use crate::schedule::{Degree, GradGroup, LayerOp, Pass, Slice};
use crate::tensor::Tensor;
use std::collections::HashMap;
use std::sync::Arc;

/// One rank of a run: what goes with a step of its part of the model.
pub(crate) struct Ranks {
    parallel: Arc<Parallel>,
    gradients: Arc<GradientBuffers>,
    plan: StepPlan,
    /// By name, how the parameters are divided that ranks do not hold whole.
    shards: HashMap<String, Sharding>,
}

/// A model's MoE layers, front to back.
fn layers(model: &Transformer) -> impl DoubleEndedIterator<Item = &DistributedMoe> {
    model.blocks().iter().filter_map(|block| block.moe()?.ranks())
}

/// A model's parameters in the order in which its backward completes their gradients, with the groups that these are summed
/// over. MP ranks have the whole gradients of what they hold of the dense part, but for what they share.
fn by_completion(model: &Transformer) -> Vec<(Parameter, GradGroup)> {
    let (first, last) = model.outer_parameters();
    let mut all = Vec::new();
    let mut add = |parameters: Vec<Parameter>, group| all.extend(parameters.into_iter().map(|p| (p, group)));
    add(last, GradGroup::Dense);
    for block in model.blocks().iter().rev() {
        if let Some(layer) = block.moe().and_then(|moe| moe.ranks()) {
            add(layer.expert_parameters(), GradGroup::Expert);
            add(layer.gate_parameters(), GradGroup::Replicated);
        }
        let shared = block.shared_parameters();
        let own = block.dense_parameters().into_iter().filter(|p| shared.iter().all(|s| s.name() != p.name()));
        add(own.collect(), GradGroup::Dense);
        add(shared, GradGroup::Replicated);
    }
    add(first, GradGroup::Dense);
    all
}

impl Ranks {
    /// The rank of `parallel`, whose part of the model is `model`. `ends` is what [`GradientBuffers::planned_for`] takes, for a
    /// model that is an image of a larger one.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub(crate) fn new(
        lane: &Lane,
        parallel: &Arc<Parallel>,
        model: &Transformer,
        plan: StepPlan,
        ends: Option<[Vec<(u64, u64)>; 3]>,
    ) -> Result<Self> {
        let mut gradients = GradientBuffers::new(lane, parallel.groups(), &by_completion(model))?;
        if let Some(ends) = ends {
            gradients = gradients.planned_for(ends)?;
        }
        let shards = layers(model).flat_map(|layer| {
            let names = layer.expert_parameters().into_iter().map(|p| p.name().to_owned());
            names.zip(layer.shards().to_vec()).collect::<Vec<_>>()
        });
        let shards = shards.chain(model.blocks().iter().flat_map(|block| block.dense_shards().to_vec())).collect();
        Ok(Ranks { parallel: parallel.clone(), gradients: Arc::new(gradients), plan, shards })
    }

    /// From the next step on, this plan.
    pub(crate) fn set_plan(&mut self, plan: StepPlan) {
        self.plan = plan;
    }

    /// The gradients.
    pub(crate) fn gradients(&self) -> &GradientBuffers {
        &self.gradients
    }

    fn sizes(&self) -> Sizes {
        self.parallel.groups().topology().sizes()
    }

    /// This rank's number.
    pub(super) fn rank(&self) -> usize {
        self.parallel.groups().rank()
    }

    /// This rank's share of the data, of how many.
    pub(super) fn share(&self) -> (usize, usize) {
        (self.parallel.groups().get(GroupKind::Data).rank(), self.sizes().dp)
    }

    /// Begins a step.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn zero_grad(&self, lane: &Lane) -> Result<()> {
        self.gradients.zero(lane)
    }

    /// Begins a micro-batch's forward: gradients are summed during the last one's backward.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn begin(&self, model: &Transformer, last: bool) -> Result<()> {
        let StepPlan { policy, plan } = &self.plan;
        for (b, block) in model.blocks().iter().enumerate() {
            let slices = |window: &[Vec<_>]| if last { window[b].clone() } else { Vec::new() };
            block.set_plan(LayerPlan {
                policy: policy.clone(),
                block: b,
                degrees: plan.degrees[b].unwrap_or([Degree::all_first(1); 2]),
                slices: slices(&plan.windows.moe),
                after: slices(&plan.windows.dense),
                gradients: Some(self.gradients.clone()),
            });
        }
        self.parallel.dense(Some(LayerOp::Dense { block: 0, pass: Pass::Forward }))
    }

    /// Begins its backward, with what comes after the blocks.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn turn(&self, model: &Transformer) -> Result<()> {
        self.parallel.dense(Some(LayerOp::Dense { block: model.blocks().len(), pass: Pass::Backward }))
    }

    /// After the last micro-batch's backward: sums what is to be summed then, and waits for it and all that is under way.
    ///
    /// # Errors
    /// If a rank fails or never comes, or gradients are left that the plan does not have.
    pub(crate) fn finish(&self) -> Result<()> {
        self.parallel.dense(None)?;
        let StepPlan { policy, plan } = &self.plan;
        for &slice in &plan.windows.after {
            let lane = policy.reduce_lane(self.parallel.groups().lane(slice.group.kind()));
            self.parallel.submit(lane, self.gradients.clone(), slice)?;
        }
        self.parallel.settle()?;
        let alone = |slice: &Slice| self.parallel.groups().get(slice.group.kind()).size() == 1;
        match self.gradients.rest().into_iter().find(|slice| !alone(slice)) {
            None => Ok(()),
            Some(Slice { group, begin, end }) => {
                config_err!("bytes {begin}..{end} of the {} gradients are in no slice of the plan", group.name())
            }
        }
    }

    /// The sums over ranks of some numbers.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(crate) fn sums(&self, lane: &Lane, values: &[f64]) -> Result<Vec<f64>> {
        let all = lane.to_device(&Tensor::from_slice(values, [values.len()])?)?;
        self.parallel.groups().world().all_reduce(lane, &all)?;
        lane.to_host(&all)?.to_vec()
    }

    /// The means over ranks of numbers on the device.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(super) fn mean_of(&self, lane: &Lane, values: &Tensor) -> Result<Tensor> {
        self.parallel.groups().world().all_reduce(lane, values)?;
        let mean = lane.empty_like(values)?;
        lane.axpby(1.0 / self.sizes().ranks as f64, values, 0.0, &mean)?;
        Ok(mean)
    }

    /// The mean over ranks of a number.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(super) fn mean(&self, lane: &Lane, value: f64) -> Result<f64> {
        Ok(self.sums(lane, &[value])?[0] / self.sizes().ranks as f64)
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(super) fn any(&self, lane: &Lane, value: bool) -> Result<bool> {
        Ok(self.sums(lane, &[f64::from(u8::from(value))])?[0] > 0.0)
    }

    /// The statistics of all ranks' tokens: losses and entropy are so already.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(super) fn merge(&self, lane: &Lane, stats: &mut RoutingStats) -> Result<()> {
        let mut counts: Vec<f64> = stats.loads.iter().map(|&n| n as f64).collect();
        counts.extend([stats.choices as f64, stats.dropped as f64]);
        let sums: Vec<u64> = self.sums(lane, &counts)?.into_iter().map(|n| n as u64).collect();
        let experts = stats.loads.len();
        stats.loads.copy_from_slice(&sums[..experts]);
        (stats.choices, stats.dropped) = (sums[experts], sums[experts + 1]);
        Ok(())
    }

    /// Makes of the sums of squares of the gradients of this rank's experts and of its shards of the dense part, (2) acc,
    /// those of all ranks': what several ranks hold counts once.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(super) fn sum_over_shards(&self, lane: &Lane, sums: &Tensor) -> Result<()> {
        self.parallel.groups().world().all_reduce(lane, sums)?;
        let all = lane.cast(sums, sums.dtype())?;
        let topology = self.parallel.groups().topology();
        for (i, kind) in [GroupKind::Replica, GroupKind::Data].into_iter().enumerate() {
            let holders = topology.size(kind) as f64;
            lane.axpby(1.0 / holders, &all.narrow(0, i, 1)?, 0.0, &sums.narrow(0, i, 1)?)?;
        }
        Ok(())
    }

    /// How the tensor called `name`, a parameter or an optimizer's state for one (`m.NAME`), is divided; none if this rank
    /// holds all of it.
    pub(super) fn shard(&self, name: &str) -> Option<&Sharding> {
        self.shards.get(name).or_else(|| self.shards.get(name.split_once('.')?.1))
    }

    /// The tensor called `name`, of which this rank has `part`, as a whole in host memory, put together from the parts that
    /// ranks hold, one at a time on the device. A collective, in which the others [`Ranks::give`].
    ///
    /// # Errors
    /// If a rank fails or never comes, or the device has no memory left for one more part.
    pub(super) fn whole(&self, lane: &Lane, name: &str, part: &Tensor) -> Result<Tensor> {
        let Some(shard) = self.shard(name) else { return lane.to_host(part) };
        let whole = Tensor::host(shard.full(), part.dtype());
        self.each_part(lane, shard, part, |rank, part| shard.put(&Lane::cpu(), rank, &lane.to_host(part)?, &whole))?;
        Ok(whole)
    }

    /// Has the rank that calls [`Ranks::whole`] know `part`, this rank's of the tensor called `name`.
    ///
    /// # Errors
    /// As there.
    pub(super) fn give(&self, lane: &Lane, name: &str, part: &Tensor) -> Result<()> {
        self.shard(name).map_or(Ok(()), |shard| self.each_part(lane, shard, part, |_, _| Ok(())))
    }

    /// Calls `see` with every part of a tensor, and the rank that it comes from. A collective.
    fn each_part(
        &self,
        lane: &Lane,
        shard: &Sharding,
        own: &Tensor,
        see: impl Fn(usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let there = lane.empty(*own.shape(), own.dtype())?;
        for rank in 0..shard.parts() {
            if rank == self.rank() {
                lane.copy(own, &there)?;
            }
            self.parallel.groups().world().broadcast(lane, &there, rank)?;
            see(rank, &there)?;
        }
        Ok(())
    }

    /// This rank's part of the tensor called `name`, of which `whole` is all, both in host memory; none if that is all of it.
    ///
    /// # Errors
    /// If the whole has another shape.
    pub(super) fn own(&self, name: &str, whole: &Tensor) -> Result<Option<Tensor>> {
        let Some(shard) = self.shard(name) else { return Ok(None) };
        let part = Tensor::host(shard.part(), whole.dtype());
        shard.take(&Lane::cpu(), self.rank(), whole, &part)?;
        Ok(Some(part))
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// If a rank fails or never comes.
    pub(super) fn barrier(&self, lane: &Lane) -> Result<()> {
        self.parallel.groups().world().barrier(lane)
    }
}
