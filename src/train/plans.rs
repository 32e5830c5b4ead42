//! Plans for the steps of a run over ranks, and the costs that they are made of.

use super::cache::Cache;
use super::world::WorldConfig;
use crate::autograd::Parameter;
use crate::comm::{AllToAllKind, Topology, broadcast_text};
use crate::device::LaneKind;
use crate::error::{Error, Result};
use crate::model::{Block, Transformer};
use crate::moe::distributed::{METHOD, Parallel, Subject, measure};
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use crate::moe::{Capacity, MoeConfig};
use crate::schedule::{BlockShape, Cost, LayerShape, ModelCosts, Plan, Planner, Policy, Profile, policy};
use std::sync::Arc;
use std::time::Duration;

/// A plan and whose it is.
#[derive(Clone)]
pub(crate) struct StepPlan {
    pub(crate) policy: Arc<dyn Policy>,
    pub(crate) plan: Plan,
}

/// For how long costs are measured at the beginning of a run.
const MEASURE: Duration = Duration::from_millis(800);

/// A plan for the steps of a run whose micro-batches have `tokens` tokens for each MP group: on all ranks the first one's. What
/// is worth telling is added to `notes`. A collective.
///
/// # Errors
/// If a profile cannot be read, or lacks a cost that the world needs; if a rank fails or never comes.
pub(super) fn of_run(
    config: &WorldConfig,
    parallel: &Parallel,
    model: &Transformer,
    tokens: usize,
    notes: &mut Vec<String>,
) -> Result<StepPlan> {
    let (groups, lane) = (parallel.groups(), parallel.lane(LaneKind::Compute));
    let (topology, world) = (groups.topology(), groups.world());
    let leads = groups.rank() == 0;
    let cache = if leads { Cache::new(config.cache, notes) } else { Cache::none() };
    let blocks = block_shapes(model, tokens, topology, config.all_to_all);
    let profile = match &config.profile {
        Some(name) => Profile::find(name)?,
        None => {
            let key = machine(&lane.name()?, model, &blocks, config);
            let known = cache.profile(&key, notes).map_or(Ok(String::new()), |p| p.to_toml())?;
            let text = broadcast_text(&**world, lane, &known)?;
            if text.is_empty() {
                let layer = model.config().moe_layer();
                let subject = Subject::of(layer, &blocks, topology, model.dtype(), MEASURE)?;
                let measured = measure(parallel, &subject)?.profile;
                cache.keep_profile(&key, &measured, notes);
                measured
            } else {
                Profile::from_toml(&text)?
            }
        }
    };
    if leads {
        notes.extend(doubts(&profile, config.profile.is_none()));
    }
    // Slices are bytes of these gradients, whatever the profile was measured with.
    let profile = Profile { element_bytes: model.dtype().size(), ..profile };
    let policy: Arc<dyn Policy> = Arc::from(policy::by_name(&config.schedule)?);
    let costs = ModelCosts::new(&blocks, topology, &profile)?;
    let mut text = String::new();
    if leads {
        let key = format!("{}\n{costs:?}\n", policy.name());
        let known = cache.plan(&key, notes);
        let plan = known.map_or_else(|| Planner::new().plan(&*policy, &costs), Ok)?;
        cache.keep_plan(&key, &plan, notes);
        text = serde_json::to_string(&plan).map_err(|e| Error::Config(format!("a plan as JSON: {e}")))?;
    }
    let text = broadcast_text(&**world, lane, &text)?;
    let plan = serde_json::from_str(&text).map_err(|e| Error::Config(format!("the first rank's plan: {e}")))?;
    Ok(StepPlan { policy, plan })
}

/// A note for each cost whose times are on no line. `measured`: on these ranks, for this run or one before it.
fn doubts(profile: &Profile, measured: bool) -> Vec<String> {
    let again = match measured {
        true => "--reprofile measures again: while nothing else runs on this machine",
        false => "fsmoe profile --time measures for longer",
    };
    let doubtful = |(name, cost): (String, Cost)| {
        let r2 = cost.r2.filter(|&r2| r2 < Cost::LEAST_R2)?;
        Some(format!("note: R² = {r2:.2} for the {name}: its times are on no line, and plans may be off; {again}"))
    };
    profile.costs().into_iter().filter_map(doubtful).collect()
}

/// What decides the costs: the machine, the ranks, what they compute, and how it is measured.
fn machine(device: &str, model: &Transformer, blocks: &[BlockShape], config: &WorldConfig) -> String {
    let WorldConfig { sizes, comm, all_to_all, share_gpu, comm_ctas, hosts, .. } = config;
    let shape = blocks.iter().find_map(|block| block.moe);
    let MoeConfig { gate, order, .. } = &model.config().moe;
    format!(
        "{device}, method {METHOD}\n{sizes:?}\n{comm}, hosts {hosts:?}, GPUs shared {share_gpu}, CTAs {comm_ctas:?}\n\
         {all_to_all}\n{}, {gate}, {order}\n{shape:?}\n",
        model.dtype()
    )
}

/// What each block of a model is, on micro-batches of `tokens` tokens of an MP group; what comes after the blocks is one more.
/// The embedding's gradients count with the first: they are complete when its backward has ended.
pub(crate) fn block_shapes(
    model: &Transformer,
    tokens: usize,
    topology: &Topology,
    all_to_all: AllToAllKind,
) -> Vec<BlockShape> {
    let mut blocks: Vec<BlockShape> =
        model.blocks().iter().map(|block| shape(model, block, tokens, topology, all_to_all)).collect();
    let (first, last) = model.outer_parameters();
    let matrices: Vec<usize> = last.iter().filter(|p| p.value().rank() == 2).map(Parameter::elements).collect();
    blocks.push(dense(&last, &matrices, tokens, topology));
    let embeddings: usize = first.iter().map(Parameter::elements).sum();
    blocks[0].sharded += (embeddings * topology.sizes().mp) as u64;
    blocks
}

/// A part of the model without experts: `products` are the elements of the matrices that a rank's tokens are multiplied
/// with, and `parameters` those that it has, summed over its DP group.
fn dense(parameters: &[Parameter], products: &[usize], tokens: usize, topology: &Topology) -> BlockShape {
    let mp = topology.sizes().mp;
    let elements: usize = parameters.iter().map(Parameter::elements).sum();
    BlockShape {
        gemms: products.iter().map(|elements| 2.0 * (tokens * mp * elements) as f64).collect(),
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
    let mp = topology.sizes().mp;
    let mut shape = dense(&block.dense_parameters(), &block.dense_products(), tokens, topology);
    let shared: u64 = block.shared_parameters().iter().map(|p| p.elements() as u64).sum();
    shape.sharded -= shared * mp as u64;
    shape.replicated = shared;
    shape.mp_reduced = block.mp_sums() * tokens * model.config().hidden;
    let Some(layer) = block.moe().and_then(|moe| moe.ranks()) else { return shape };
    let config = layer.config();
    let own = tokens / mp;
    let rows_per_token = match (config.gate, config.capacity) {
        (GateKind::Soft, _) => (config.experts * config.soft_slots * config.groups) as f64 / own as f64,
        (_, Capacity::Factor(f)) => f * config.top_k as f64,
        (_, Capacity::Dropless) => config.top_k as f64,
    };
    shape.gemms.push(2.0 * (own * config.hidden * config.experts * mp) as f64);
    shape.mp_gathered = tokens * model.config().hidden;
    shape.replicated += layer.gate_parameters().iter().map(|p| p.elements() as u64).sum::<u64>();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Init;
    use crate::comm::{Sizes, local};
    use crate::device::Lane;
    use crate::model::{Arch, ModelConfig, preset};
    use crate::moe::order::OrderKind;
    use crate::tensor::DType;
    use crate::train::CommKind;

    #[test]
    fn costs_on_no_line_are_told() {
        let published = Profile::published().unwrap();
        assert_eq!(doubts(&published, false), Vec::<String>::new());
        let mut profile = published;
        profile.compute.gemm.r2 = Some(Cost::LEAST_R2);
        profile.compute.expert = Some(Cost { alpha: 1e-5, beta: 1e-15, r2: Some(0.5) });
        profile.inter_node.all_to_all.as_mut().unwrap().r2 = Some(0.894);
        let notes = doubts(&profile, true);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].contains("R² = 0.50 for the expert product") && notes[0].contains("--reprofile"), "{notes:?}");
        assert!(notes[1].contains("R² = 0.89 for the inter-node all-to-all"), "{notes:?}");
        assert!(doubts(&profile, false)[0].contains("fsmoe profile"));
    }

    /// Costs that were measured of something else are not taken for this one's.
    #[test]
    fn whatever_decides_the_costs_is_in_their_key() {
        let tiny = preset("mixtral-tiny").unwrap();
        let blocks = |config: &ModelConfig| {
            let single = Topology::single();
            config.workload(1, 16, &single, AllToAllKind::Direct).unwrap()
        };
        let key = |device: &str, dtype: DType, config: &ModelConfig, world: &WorldConfig| {
            let model = Transformer::new(&Init::zeros(&Lane::cpu(), dtype), config).unwrap();
            machine(device, &model, &blocks(config), world)
        };
        let world = WorldConfig::default();
        let moe = |change: fn(&mut crate::moe::MoeConfig)| {
            let mut config = tiny.clone();
            change(&mut config.moe);
            key("a", DType::F32, &config, &world)
        };
        let ranks = |change: fn(&mut WorldConfig)| {
            let mut world = world.clone();
            change(&mut world);
            key("a", DType::F32, &tiny, &world)
        };
        let keys = [
            key("a", DType::F32, &tiny, &world),
            key("b", DType::F32, &tiny, &world),
            key("a", DType::F64, &tiny, &world),
            moe(|moe| moe.gate = GateKind::Sigmoid),
            moe(|moe| moe.order = OrderKind::GShard),
            moe(|moe| moe.top_k = 1),
            ranks(|world| world.sizes.ranks = 2),
            ranks(|world| world.comm = CommKind::Nccl),
            ranks(|world| world.all_to_all = AllToAllKind::Hierarchical1d),
            ranks(|world| world.share_gpu = true),
            ranks(|world| world.comm_ctas = Some(8)),
            ranks(|world| world.hosts = Some(2)),
        ];
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key), "{i}: {key}");
            assert!(key.contains(&format!("method {METHOD}")), "{key}");
        }
        assert_eq!(keys[0], key("a", DType::F32, &tiny, &WorldConfig { schedule: "tutel".into(), ..world.clone() }));
    }

    /// What ranks really have, against what the settings say.
    #[test]
    fn volumes_of_ranks_are_those_of_their_parts() {
        let mixtral = ModelConfig { shared_experts: 1, ..preset("mixtral-tiny").unwrap() };
        for (model, mp) in [
            (preset("gpt2-moe-tiny").unwrap(), 2),
            (ModelConfig { moe_every: 4, ..mixtral.clone() }, 2),
            // Two ranks to each head of keys and values.
            (mixtral, 4),
        ] {
            let topology = Topology::new(Sizes::new(4, 2, mp, 2, 1)).unwrap();
            let direct = AllToAllKind::Direct;
            let nominal = model.workload(1, 16, &topology, direct).unwrap();
            let (all, parameters) = local::run(4, Duration::from_secs(20), |world| {
                let parallel = Parallel::new(&Lane::cpu(), world, topology, direct.build())?;
                let part = Transformer::on_ranks(&Init::zeros(&Lane::cpu(), DType::F32), &model, &parallel)?;
                let parameters: usize = part.parameters().iter().map(Parameter::elements).sum();
                Ok((block_shapes(&part, 16, &topology, direct), parameters as u64))
            })
            .unwrap()
            .pop()
            .unwrap();
            assert_eq!(parameters, model.rank_parameters(topology.sizes()));
            let bytes: u64 = all.iter().map(|b| b.sharded / mp as u64 + b.replicated).sum();
            let experts = model.moe_layers() * model.moe.experts / 2 * model.hidden * model.ffn;
            let matrices = if model.arch == Arch::Gpt2 { 2 } else { 3 };
            assert_eq!(bytes + (experts * matrices) as u64, parameters);
            let blocks = model.layers;
            for (real, said) in all[..blocks].iter().zip(&nominal) {
                // The mixing of values is no product with a parameter.
                let mixed = said.gemms[1] + said.gemms[2];
                let products = |shape: &BlockShape| shape.gemms.iter().sum::<f64>();
                assert_eq!(products(real), products(said) - mixed);
                assert_eq!(
                    (real.mp_reduced, real.mp_gathered, real.moe),
                    (said.mp_reduced, said.mp_gathered, said.moe)
                );
            }
        }
    }
}
