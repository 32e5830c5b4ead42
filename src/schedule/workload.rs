//! From shapes to volumes to costs: what every task of a step takes.

use super::op::lane;
use super::{Collective, Cost, GradGroup, LayerOp, Plan, Profile, Stage};
use crate::comm::{AllToAllKind, GroupKind, NodeShape, Sizes, Topology};
use crate::device::LaneKind;
use crate::engine::{Price, Simulator, Slowdown};
use crate::error::{Result, config_err};

/// The most chunks that a layer is cut in.
pub const MAX_CHUNKS: usize = 16;

/// An MoE layer as one rank sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// T, tokens on a rank; where model parallelism splits them, after that.
    pub tokens: usize,
    /// f·k: rows that are routed, per token. A dropless layer is priced at its mean load, f = 1.
    pub rows_per_token: f64,
    /// M.
    pub hidden: usize,
    /// H.
    pub ffn: usize,
    /// E.
    pub experts: usize,
    /// Matrix products of an expert: GPT 2, Mixtral 3.
    pub gemms: usize,
    /// How the all-to-all is carried out.
    pub all_to_all: AllToAllKind,
}

impl LayerShape {
    /// Checks it by itself and against a world.
    ///
    /// # Errors
    /// Names the first value that breaks a rule, and the rule.
    pub fn fits(&self, topology: &Topology) -> Result<()> {
        let LayerShape { tokens, rows_per_token, hidden, ffn, experts, gemms, .. } = *self;
        for (name, value) in
            [("tokens", tokens), ("hidden", hidden), ("ffn", ffn), ("experts", experts), ("gemms", gemms)]
        {
            if value == 0 {
                config_err!("{name} = 0: it is at least 1");
            }
        }
        if !(rows_per_token.is_finite() && rows_per_token > 0.0) {
            config_err!("{rows_per_token} rows per token: it is a finite number above 0");
        }
        let Sizes { ep, esp, .. } = topology.sizes();
        if !experts.is_multiple_of(ep) {
            config_err!("{experts} experts with ep = {ep}: the EP group has as many on each member");
        }
        if !ffn.is_multiple_of(esp) {
            config_err!("ffn = {ffn} with esp = {esp}: each rank of the ESP group has as much of H");
        }
        Ok(())
    }
}

/// A block as one rank sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockShape {
    /// FLOPs of each matrix product of the forward's dense part, over the whole MP group; the backward has two for each.
    pub gemms: Vec<f64>,
    /// Elements of activations that the MP group sums in the forward, and as many in the backward.
    pub mp_reduced: usize,
    /// Elements of activations that the MP group gathers in the forward, and as many in the backward.
    pub mp_gathered: usize,
    /// Parameters sharded over MP, all shards together.
    pub sharded: u64,
    /// Parameters that every rank has.
    pub replicated: u64,
    /// Its MoE layer, if it has one.
    pub moe: Option<LayerShape>,
}

/// Work that costs `times`·(α + β·n/r) seconds as one of r chunks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// The cost of one.
    pub cost: Cost,
    /// n of one over all chunks: bytes or FLOPs.
    pub n: f64,
    /// How many, one after the other.
    pub times: f64,
}

impl Work {
    /// Seconds of one of `r` chunks.
    pub fn seconds(&self, r: usize) -> f64 {
        self.times * self.cost.seconds(self.n / r as f64)
    }
}

/// A collective of a layer: its lane and its work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// Where it runs.
    pub lane: LaneKind,
    /// What it takes.
    pub work: Work,
}

/// What the stages of an MoE layer cost, forward and backward alike but for the expert, whose backward is twice its forward:
/// data gradient and weight gradient. Groups of one have no stages.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCosts {
    /// The phases of the all-to-all to the experts.
    pub dispatch: Vec<Exchange>,
    /// The all-gather in the ESP group.
    pub all_gather: Option<Exchange>,
    /// The expert; also each half of its backward.
    pub expert: Work,
    /// The reduce-scatter in the ESP group.
    pub reduce_scatter: Option<Exchange>,
    /// The phases of the all-to-all back.
    pub combine: Vec<Exchange>,
    /// In how many chunks it can be cut: an expert's rows from one rank, at most [`MAX_CHUNKS`].
    pub max_chunks: usize,
}

impl LayerCosts {
    /// Prices a layer.
    ///
    /// # Errors
    /// If the shape does not fit the world, or the profile lacks a cost that it needs.
    pub fn new(shape: &LayerShape, topology: &Topology, profile: &Profile) -> Result<Self> {
        shape.fits(topology)?;
        let LayerShape { tokens, rows_per_token, hidden, ffn, experts, gemms, all_to_all } = *shape;
        let rows = rows_per_token * tokens as f64;
        let bytes = rows * hidden as f64 * profile.element_bytes as f64;
        let exchange = |kind: Collective, lane: LaneKind, n: f64| {
            Ok(Exchange { lane, work: Work { cost: profile.collective(kind, lane)?, n, times: 1.0 } })
        };
        let shard_lane = lane(topology, GroupKind::Shard);
        let esp = |kind| shard_lane.map(|lane| exchange(kind, lane, bytes * topology.sizes().esp as f64)).transpose();
        let dispatch = dispatch_phases(all_to_all, topology, bytes, &exchange)?;
        let combine = dispatch.clone();
        Ok(LayerCosts {
            dispatch,
            all_gather: esp(Collective::AllGather)?,
            // N_ESP times the tokens, one N_ESP-th of H.
            expert: Work {
                cost: profile.compute.expert.unwrap_or(profile.compute.gemm),
                n: 2.0 * rows * hidden as f64 * ffn as f64,
                times: gemms as f64,
            },
            reduce_scatter: esp(Collective::ReduceScatter)?,
            combine,
            max_chunks: ((rows / experts as f64).ceil() as usize).clamp(1, MAX_CHUNKS),
        })
    }

    /// The lane of a stage; none for one that the layer does not have.
    pub fn lane(&self, stage: Stage) -> Option<LaneKind> {
        match stage {
            Stage::Dispatch(phase) => self.dispatch.get(usize::from(phase)).map(|e| e.lane),
            Stage::AllGather => self.all_gather.map(|e| e.lane),
            Stage::Expert | Stage::WeightGrad => Some(LaneKind::Compute),
            Stage::ReduceScatter => self.reduce_scatter.map(|e| e.lane),
            Stage::Combine(phase) => self.combine.get(usize::from(phase)).map(|e| e.lane),
        }
    }

    /// A stage's seconds as one of `r` chunks; 0 for one that the layer does not have.
    pub fn seconds(&self, stage: Stage, r: usize) -> f64 {
        let phase = |phases: &[Exchange], i: u8| phases.get(usize::from(i)).copied();
        let exchange = match stage {
            Stage::Expert | Stage::WeightGrad => return self.expert.seconds(r),
            Stage::Dispatch(i) => phase(&self.dispatch, i),
            Stage::Combine(i) => phase(&self.combine, i),
            Stage::AllGather => self.all_gather,
            Stage::ReduceScatter => self.reduce_scatter,
        };
        exchange.map_or(0.0, |e| e.work.seconds(r))
    }
}

/// The phases of the all-to-all to the experts, and of the one back, which goes the same way; `bytes` are what a rank sends.
fn dispatch_phases(
    kind: AllToAllKind,
    topology: &Topology,
    bytes: f64,
    exchange: &dyn Fn(Collective, LaneKind, f64) -> Result<Exchange>,
) -> Result<Vec<Exchange>> {
    let Some(lane) = lane(topology, GroupKind::Expert) else { return Ok(Vec::new()) };
    let (intra, inter) = (LaneKind::IntraNode, LaneKind::InterNode);
    let here = match topology.node_shape(GroupKind::Expert) {
        Some(NodeShape { nodes, per_node }) if nodes > 1 => per_node,
        // In one node, or unevenly on several.
        _ => 1,
    };
    match kind {
        // One rank of the group in each node, or one node: there is no hierarchy to use.
        _ if here == 1 => Ok(vec![exchange(Collective::AllToAll, lane, bytes)?]),
        AllToAllKind::Direct => Ok(vec![exchange(Collective::AllToAll, lane, bytes)?]),
        // The leader takes in what all of the node send, as each would in an all-gather, and sends it.
        AllToAllKind::Hierarchical1d => {
            let node = bytes * here as f64;
            let gather = exchange(Collective::AllGather, intra, node)?;
            Ok(vec![gather, exchange(Collective::AllToAll, inter, node)?, gather])
        }
        AllToAllKind::Hierarchical2d => {
            Ok(vec![exchange(Collective::AllToAll, intra, bytes)?, exchange(Collective::AllToAll, inter, bytes)?])
        }
    }
}

/// What a block costs.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockCosts {
    /// Seconds of the dense part, forward and backward.
    pub dense: [f64; 2],
    /// The MoE layer.
    pub moe: Option<LayerCosts>,
    /// Bytes of gradients of the MoE layer on a rank, by group: complete when its backward has ended.
    pub moe_gradients: [u64; 3],
    /// Bytes of gradients of the dense part on a rank, by group: complete when its backward has ended.
    pub dense_gradients: [u64; 3],
}

/// What a model costs: all that a plan is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCosts {
    /// Its blocks, in the order of the forward.
    pub blocks: Vec<BlockCosts>,
    /// The lane and cost of each group's all-reduce, by [`GradGroup`]; none where a group is one rank.
    pub reduce: [Option<(LaneKind, Cost)>; 3],
    /// What lanes lose to each other.
    pub slowdown: Slowdown,
}

impl ModelCosts {
    /// Prices a stack of blocks.
    ///
    /// # Errors
    /// As [`LayerCosts::new`]; also if a sharded dense part does not fit the world.
    pub fn new(blocks: &[BlockShape], topology: &Topology, profile: &Profile) -> Result<Self> {
        let blocks =
            blocks.iter().map(|block| BlockCosts::new(block, topology, profile)).collect::<Result<Vec<_>>>()?;
        let mut costs = ModelCosts { blocks, reduce: [None; 3], slowdown: profile.slowdown.unwrap_or_default() };
        for group in GradGroup::ALL {
            let bytes: u64 = costs.gradients().map(|(_, _, bytes)| bytes[group as usize]).sum();
            if let (Some(lane), true) = (group.lane(topology), bytes > 0) {
                costs.reduce[group as usize] = Some((lane, profile.collective(Collective::AllReduce, lane)?));
            }
        }
        Ok(costs)
    }

    /// The gradients in the order in which the backward completes them: block, whether of its MoE layer, bytes by group.
    pub fn gradients(&self) -> impl Iterator<Item = (usize, bool, [u64; 3])> {
        let of = |(i, block): (usize, &BlockCosts)| [(i, true, block.moe_gradients), (i, false, block.dense_gradients)];
        self.blocks.iter().enumerate().rev().flat_map(of)
    }

    /// Seconds that a plan's all-reduces after the backward take.
    pub fn exposed(&self, plan: &Plan) -> f64 {
        plan.windows.after.iter().map(|&slice| self.seconds(&LayerOp::Reduce(slice))).sum()
    }

    /// A simulator of lanes that lose to each other what these do.
    pub fn simulator(&self) -> Simulator {
        Simulator::with(self.slowdown)
    }

    /// What a task of a step costs, to a simulator: it loses to others what a task of its kind does on its own lane, wherever
    /// a policy has put it.
    pub fn price(&self, op: &LayerOp) -> Price {
        let like = match *op {
            LayerOp::Dense { .. } => None,
            LayerOp::Chunk { block, stage, .. } => self.blocks[block].moe.as_ref().and_then(|moe| moe.lane(stage)),
            LayerOp::Reduce(slice) => self.reduce[slice.group as usize].map(|(lane, _)| lane),
        };
        Price { seconds: self.seconds(op), like }
    }

    /// What a task of a step costs by itself, in seconds.
    pub fn seconds(&self, op: &LayerOp) -> f64 {
        match *op {
            LayerOp::Dense { block, pass } => self.blocks[block].dense[pass as usize],
            LayerOp::Chunk { block, stage, of, .. } => {
                self.blocks[block].moe.as_ref().map_or(0.0, |moe| moe.seconds(stage, of))
            }
            LayerOp::Reduce(slice) => {
                self.reduce[slice.group as usize].map_or(0.0, |(_, cost)| cost.seconds(slice.bytes() as f64))
            }
        }
    }
}

impl BlockCosts {
    fn new(shape: &BlockShape, topology: &Topology, profile: &Profile) -> Result<Self> {
        let element = profile.element_bytes as f64;
        let Sizes { mp, ep, esp, .. } = topology.sizes();
        let gemm = |flops: &f64| profile.compute.gemm.seconds(flops / mp as f64);
        let compute: f64 = shape.gemms.iter().map(gemm).sum();
        let mut exchanged = 0.0;
        if let Some(lane) = lane(topology, GroupKind::Model) {
            let cost = |kind, elements: usize| -> Result<f64> {
                Ok(if elements == 0 { 0.0 } else { profile.collective(kind, lane)?.seconds(elements as f64 * element) })
            };
            exchanged = cost(Collective::AllGather, shape.mp_gathered)?
                // Where it was not measured: an all-reduce is a reduce-scatter and an all-gather.
                + cost(Collective::AllReduce, shape.mp_reduced).or_else(|_| {
                    Ok::<_, crate::Error>(
                        cost(Collective::ReduceScatter, shape.mp_reduced)?
                            + cost(Collective::AllGather, shape.mp_reduced)?,
                    )
                })?;
        }
        let bytes = |parameters: u64| parameters * profile.element_bytes as u64;
        let (mut moe_gradients, mut dense_gradients) = ([0; 3], [0; 3]);
        dense_gradients[GradGroup::Dense as usize] = bytes(shape.sharded / mp as u64);
        dense_gradients[GradGroup::Replicated as usize] = bytes(shape.replicated);
        if let Some(moe) = &shape.moe {
            let expert = (moe.gemms * moe.hidden * moe.ffn) as u64;
            moe_gradients[GradGroup::Expert as usize] = bytes(moe.experts as u64 * expert / (ep * esp) as u64);
        }
        Ok(BlockCosts {
            dense: [compute + exchanged, 2.0 * compute + exchanged],
            moe: shape.moe.as_ref().map(|moe| LayerCosts::new(moe, topology, profile)).transpose()?,
            moe_gradients,
            dense_gradients,
        })
    }
}
