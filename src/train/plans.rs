//! Plans for the MoE layers of a run over ranks.

use super::world::WorldConfig;
use crate::autograd::Parameter;
use crate::comm::{AllToAllKind, Topology};
use crate::error::Result;
use crate::model::{Block, Transformer};
use crate::moe::Capacity;
use crate::moe::distributed::{GradientBuffers, LayerPlan};
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use crate::schedule::{
    BlockShape, CollectiveCosts, ComputeCosts, Cost, Degree, LayerShape, ModelCosts, Planner, Policy, Profile, Slice,
    policy,
};
use std::sync::Arc;

/// What threads that share a machine's cores cost each other, in orders of magnitude: plans need costs before there is a
/// measured profile.
fn nominal() -> Profile {
    let cost = |alpha, beta| Cost { alpha, beta, r2: None };
    let exchange = Some(cost(5e-5, 2e-10));
    let collectives =
        CollectiveCosts { all_to_all: exchange, all_gather: exchange, reduce_scatter: exchange, all_reduce: exchange };
    Profile {
        name: "threads".to_owned(),
        source: "nominal costs".to_owned(),
        element_bytes: 4,
        compute: ComputeCosts { gemm: cost(2e-5, 1e-10) },
        intra_node: collectives,
        inter_node: collectives,
    }
}

/// A plan for every MoE layer of `model`, front to back, on micro-batches of T = `tokens` tokens of an MP group.
///
/// # Errors
/// If the profile cannot be read, or lacks a cost that the world needs.
pub(super) fn plans(
    config: &WorldConfig,
    model: &Transformer,
    tokens: usize,
    gradients: &Arc<GradientBuffers>,
) -> Result<Vec<LayerPlan>> {
    let topology = Topology::new(config.sizes)?;
    let profile = config.profile.as_deref().map_or_else(|| Ok(nominal()), Profile::find)?;
    // Slices are bytes of these gradients, whatever the profile was measured with.
    let profile = Profile { element_bytes: model.dtype().size(), ..profile };
    let policy: Arc<dyn Policy> = Arc::from(policy::by_name(&config.schedule)?);

    let mut blocks: Vec<BlockShape> =
        model.blocks().iter().map(|block| shape(model, block, tokens, &topology, config.all_to_all)).collect();
    // The last norm and the output projection come after the blocks; embeddings are complete when nothing is left to
    // overlap their sum.
    blocks.push(dense(&model.outer_parameters().1, tokens, &topology));
    let costs = ModelCosts::new(&blocks, &topology, &profile)?;
    let plan = Planner::new().plan(&*policy, &costs)?;

    let mut plans: Vec<LayerPlan> = Vec::new();
    // Of windows that no MoE layer opens: summed in the next one's, when what they hold is surely complete.
    let mut waiting: Vec<Slice> = Vec::new();
    for (b, degrees) in plan.degrees.iter().enumerate().rev() {
        let (moe, dense) = (&plan.windows.moe[b], &plan.windows.dense[b]);
        let Some(degrees) = *degrees else {
            waiting.extend(dense);
            continue;
        };
        let mut slices = std::mem::take(&mut waiting);
        slices.extend(moe);
        let degrees: [Degree; 2] = degrees;
        let gradients = Some(gradients.clone());
        plans.push(LayerPlan { policy: policy.clone(), degrees, slices, after: dense.clone(), gradients });
    }
    plans.reverse();
    Ok(plans)
}

/// A part of the model that every MP rank computes for itself: as many products as parameters that are matrices.
fn dense(parameters: &[Parameter], tokens: usize, topology: &Topology) -> BlockShape {
    let mp = topology.sizes().mp;
    let elements: usize = parameters.iter().map(Parameter::elements).sum();
    let matrices = parameters.iter().filter(|p| p.value().rank() == 2);
    BlockShape {
        gemms: matrices.map(|p| 2.0 * (tokens * mp * p.elements()) as f64).collect(),
        mp_reduced: 0,
        mp_gathered: 0,
        sharded: (elements * mp) as u64,
        replicated: 0,
        moe: None,
    }
}

fn shape(
    model: &Transformer,
    block: &Block,
    tokens: usize,
    topology: &Topology,
    all_to_all: AllToAllKind,
) -> BlockShape {
    let mut shape = dense(&block.dense_parameters(), tokens, topology);
    let Some(layer) = block.moe().and_then(|moe| moe.ranks()) else { return shape };
    let config = layer.config();
    let mp = topology.sizes().mp;
    let own = tokens / mp;
    let rows_per_token = match (config.gate, config.capacity) {
        (GateKind::Soft, _) => (config.experts * config.soft_slots * config.groups) as f64 / own as f64,
        (_, Capacity::Factor(f)) => f * config.top_k as f64,
        (_, Capacity::Dropless) => config.top_k as f64,
    };
    shape.gemms.push(2.0 * (own * config.hidden * config.experts * mp) as f64);
    shape.mp_gathered = tokens * model.config().hidden;
    shape.replicated = layer.gate_parameters().iter().map(|p| p.elements() as u64).sum();
    shape.moe = Some(LayerShape {
        tokens: own,
        rows_per_token,
        hidden: config.hidden,
        ffn: config.ffn,
        experts: config.experts,
        gemms: if config.expert == ExpertKind::Gpt { 2 } else { 3 },
        all_to_all,
    });
    shape
}
