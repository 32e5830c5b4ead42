//! `fsmoe plan`.

use super::world::{GroupArgs, usual_sizes};
use super::write_out;
use fsmoe::comm::{Sizes, Topology};
use fsmoe::engine::Timeline;
use fsmoe::fsio::atomic_write;
use fsmoe::model::{ModelConfig, preset};
use fsmoe::moe::Capacity;
use fsmoe::moe::expert::ExpertKind;
use fsmoe::report::{Plans, duration, gantt, gantt_svg, perfetto};
use fsmoe::schedule::{
    LayerPass, ModelCosts, Pass, Plan, Planner, Policy, Profile, SliceTask, layer_graph, policy, step_graph,
};
use fsmoe::{Error, Result};
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(
    after_help = "Times are simulated from the profile's costs: nothing is run. Where sizes do not say: mp and esp are the ranks of a \
                  node, ep the nodes. In round brackets: the preset's."
)]
pub(crate) struct Args {
    /// Model: gpt2-moe-tiny, mixtral-tiny, gpt2-moe-small, gpt2-xl-moe, mixtral-8x7b or mixtral-8x22b
    #[arg(long, value_name = "NAME", default_value = "mixtral-8x7b")]
    preset: String,
    /// Costs: fsmoe-paper (FSMoE's published ones), or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "fsmoe-paper")]
    profile: String,
    /// Ranks
    #[arg(long, default_value_t = 32)]
    ranks: usize,
    /// Nodes, with as many ranks each
    #[arg(long, default_value_t = 4)]
    nodes: usize,
    #[command(flatten)]
    groups: GroupArgs,
    /// Sequences of a step for each model-parallel group
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens of a sequence (the longest, at most 2048)
    #[arg(long)]
    seq: Option<usize>,
    /// Blocks (the preset's, as all below)
    #[arg(long)]
    layers: Option<usize>,
    /// Model width
    #[arg(long)]
    hidden: Option<usize>,
    /// Attention heads, with keys and values each
    #[arg(long)]
    heads: Option<usize>,
    /// Inner width of an expert
    #[arg(long)]
    ffn: Option<usize>,
    /// Experts
    #[arg(long)]
    experts: Option<usize>,
    /// Experts per token
    #[arg(long)]
    top_k: Option<usize>,
    /// Capacity factor; * drops nothing, and is priced at the mean load
    #[arg(long)]
    capacity: Option<Capacity>,
    /// Expert: gpt or mixtral
    #[arg(long)]
    expert: Option<ExpertKind>,
    /// Whose plan is drawn
    #[arg(long, value_name = "NAME", default_value = "fsmoe")]
    policy: String,
    /// Characters of the chart in the terminal, at least 10
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(10..))]
    width: u16,
    /// Write the chart as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the whole step under every policy for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// One JSON object instead of tables and charts
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        let (config, topology) = (self.config()?, self.topology()?);
        let profile = Profile::find(&self.profile)?;
        let seq = self.seq.unwrap_or(config.max_seq.min(2048));
        let model =
            ModelCosts::new(&config.workload(self.batch, seq, &topology, self.groups.a2a)?, &topology, &profile)?;
        let drawn = policy::by_name(&self.policy)?;

        let (mut planner, mut plans, mut timelines) = (Planner::new(), Plans::default(), Vec::new());
        let mut chosen = None;
        for policy in policy::all() {
            let plan = planner.plan(&*policy, &model)?;
            plans.add(&plan, &planner.bound(&*policy, &model)?, model.exposed(&plan));
            if self.trace.is_some() {
                let graph = step_graph(&*policy, &model, &plan)?;
                timelines.push((plan.policy.clone(), model.simulator().timeline(&graph, |op| model.price(op))));
            }
            if policy.name() == drawn.name() {
                chosen = Some(plan);
            }
        }
        let Some(chosen) = chosen else { return Err(Error::Config(format!("no plan of {}", drawn.name()))) };
        let charts = charts(&*drawn, &model, &chosen)?;
        let titled: Vec<(&str, &Timeline)> = charts.iter().map(|(title, t)| (title.as_str(), t)).collect();
        if let Some(path) = &self.svg {
            write(path, &gantt_svg(&titled))?;
        }
        if let Some(path) = &self.trace {
            let processes: Vec<(&str, &Timeline)> = timelines.iter().map(|(name, t)| (name.as_str(), t)).collect();
            write(path, &perfetto(&processes))?;
        }

        let text = if self.json {
            let shape = json!({"batch": self.batch, "seq": seq, "layers": config.layers, "hidden": config.hidden,
                "ffn": config.ffn, "experts": config.moe.experts, "top_k": config.moe.top_k});
            let object = json!({"preset": self.preset, "profile": profile.name, "world": topology.sizes(), "shape": shape,
                "policies": plans.policies, "plan": chosen});
            format!("{object}\n")
        } else {
            let Sizes { ranks, nodes, dp, mp, ep, esp } = topology.sizes();
            let mut text = format!(
                "{}, {} × {seq} tokens for each of {dp} model-parallel groups; {ranks} ranks on {nodes} nodes, mp {mp}, ep \
                 {ep}, esp {esp}, {} all-to-all; costs of {}\n{plans}",
                self.preset, self.batch, self.groups.a2a, profile.name
            );
            for (title, timeline) in &charts {
                text.push_str(&format!(
                    "\n{title}: {}\n{}",
                    duration(timeline.makespan()),
                    gantt(timeline, self.width.into())
                ));
            }
            text
        };
        write_out(&mut std::io::stdout(), text.as_bytes())
    }

    fn config(&self) -> Result<ModelConfig> {
        let mut config = preset(&self.preset)?;
        let set = |value: &mut usize, given: Option<usize>| *value = given.unwrap_or(*value);
        set(&mut config.layers, self.layers);
        set(&mut config.hidden, self.hidden);
        set(&mut config.heads, self.heads);
        set(&mut config.kv_heads, self.heads);
        set(&mut config.ffn, self.ffn);
        set(&mut config.moe.experts, self.experts);
        set(&mut config.moe.top_k, self.top_k);
        config.moe.capacity = self.capacity.unwrap_or(config.moe.capacity);
        config.moe.expert = self.expert.unwrap_or(config.moe.expert);
        Ok(config)
    }

    fn topology(&self) -> Result<Topology> {
        let (ranks, nodes) = (self.ranks, self.nodes);
        Topology::new(self.groups.sizes(ranks, nodes, usual_sizes(ranks, nodes)))
    }
}

/// Forward and backward of the MoE layer in the middle of the model, with what is reduced meanwhile.
fn charts(policy: &dyn Policy, model: &ModelCosts, plan: &Plan) -> Result<Vec<(String, Timeline)>> {
    let moe: Vec<usize> = (0..model.blocks.len()).filter(|&i| model.blocks[i].moe.is_some()).collect();
    let Some(&block) = moe.get(moe.len() / 2) else { return Ok(Vec::new()) };
    let (Some(costs), Some(degrees)) = (&model.blocks[block].moe, plan.degrees[block]) else { return Ok(Vec::new()) };
    let reduced = plan.windows.moe[block].iter().filter_map(|&slice| {
        let (lane, _) = model.reduce[slice.group as usize]?;
        Some(SliceTask { slice, lane: policy.reduce_lane(lane) })
    });
    let slices: Vec<SliceTask> = reduced.collect();
    Pass::ALL
        .iter()
        .map(|&pass| {
            let degree = degrees[pass as usize];
            let slices = if pass == Pass::Backward { &slices[..] } else { &[] };
            let graph = layer_graph(policy, costs, &LayerPass { block, pass, degree, after: None, slices })?;
            let title = format!("{}, {pass} of block {}, r = {}, d = {}", plan.policy, block + 1, degree.r, degree.d);
            Ok((title, model.simulator().timeline(&graph, |op| model.price(op))))
        })
        .collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    atomic_write(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))
}
