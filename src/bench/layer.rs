//! The whole MoE layer, forward and forward + backward, beside the dense matrix products of the same useful FLOPs.
//!
//! The gate runs on fresh random tokens inside the time; x's gradient, the router's and the experts' are written. The
//! dense baseline is what one expert's matrices take of all T·k rows in one product each, forward: a layer's efficiency
//! is its time's share, three times it for forward + backward.

use super::ceiling::random;
use super::loads::{plant_in_router, plant_in_tokens};
use super::{Bench, Ceiling, Load, Replay, Spread, Work};
use crate::autograd::{Init, Parameter, Tape};
use crate::device::{Gelu, Lane};
use crate::error::{Error, Result, config_err};
use crate::moe::expert::ExpertKind;
use crate::moe::gate::GateKind;
use crate::moe::order::OrderKind;
use crate::moe::{Assignment, Capacity, MoeConfig, MoeLayer, Routing, RoutingStats, StepContext};
use crate::report::bytes as readable;
use crate::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::str::FromStr;

/// A layer's sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// A name, or the sizes as they were given.
    pub name: String,
    /// T, tokens.
    pub tokens: usize,
    /// M, their width.
    pub hidden: usize,
    /// H, an expert's inner width.
    pub ffn: usize,
    /// E, experts.
    pub experts: usize,
    /// k, experts per token.
    pub top_k: usize,
    /// The experts' kind.
    pub expert: ExpertKind,
}

/// The shapes that have names: those of well-known models and of the other implementations' own benchmarks, and one
/// that a processor does in a moment.
const NAMED: [(&str, [usize; 5], ExpertKind); 6] = [
    ("mixtral8x7b_T8k", [8192, 4096, 14336, 8, 2], ExpertKind::Mixtral),
    ("gpt2xl_moe_T8k", [8192, 1600, 6400, 8, 2], ExpertKind::Gpt),
    ("sonic_default", [32768, 4096, 1024, 128, 8], ExpertKind::Mixtral),
    ("qwen3_30b_T16k", [16384, 2048, 768, 128, 8], ExpertKind::Mixtral),
    ("tutel_hello_bf16", [8192, 2048, 2048, 2, 2], ExpertKind::Gpt),
    ("small", [1024, 128, 256, 8, 2], ExpertKind::Mixtral),
];

impl LayerShape {
    fn new(name: &str, [tokens, hidden, ffn, experts, top_k]: [usize; 5], expert: ExpertKind) -> Self {
        LayerShape { name: name.to_owned(), tokens, hidden, ffn, experts, top_k, expert }
    }

    /// What is benchmarked where no shape is named: on a GPU the five large shapes, on a processor the small one.
    pub fn defaults(cpu: bool) -> Vec<LayerShape> {
        let chosen = if cpu { &NAMED[5..] } else { &NAMED[..5] };
        chosen.iter().map(|(name, sizes, expert)| Self::new(name, *sizes, *expert)).collect()
    }

    /// FLOPs of the experts' matrices for `rows` rows, forward.
    fn flops(&self, rows: usize) -> f64 {
        2.0 * rows as f64 * self.weights_of_one() as f64
    }

    /// Elements of one expert's matrices.
    fn weights_of_one(&self) -> usize {
        let matrices = if self.expert == ExpertKind::Gpt { 2 } else { 3 };
        matrices * self.hidden * self.ffn
    }
}

impl FromStr for LayerShape {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        if let Some((name, sizes, expert)) = NAMED.iter().find(|(name, ..)| *name == s) {
            return Ok(Self::new(name, *sizes, *expert));
        }
        let parts: Vec<&str> = s.split(',').map(str::trim).collect();
        let sizes: Vec<usize> = parts.iter().take(5).filter_map(|p| p.parse().ok()).collect();
        match (<[usize; 5]>::try_from(sizes), parts.get(5), parts.len()) {
            (Ok(sizes), Some(expert), 6) => {
                if let Some((name, _)) = ["T", "M", "H", "E", "k"].iter().zip(sizes).find(|(_, size)| *size == 0) {
                    config_err!("shape {s}: {name} = 0, which is at least 1");
                }
                let product: f64 = sizes.iter().map(|size| *size as f64).product();
                if product > MOST {
                    config_err!("shape {s}: {product:.1e} is the product of its sizes, and at most {MOST:.1e}");
                }
                Ok(Self::new(s, sizes, expert.parse()?))
            }
            _ => config_err!(
                "unknown shape {s:?}: it is one of {}, or T,M,H,E,k,expert by hand",
                NAMED.map(|(name, ..)| name).join(", ")
            ),
        }
    }
}

/// Which layers are benchmarked.
#[derive(Clone, Debug)]
pub struct LayerSettings {
    /// Their sizes.
    pub shapes: Vec<LayerShape>,
    /// The gate.
    pub gate: GateKind,
    /// The order.
    pub order: OrderKind,
    /// Rows per expert.
    pub capacity: Capacity,
    /// The type of tokens, weights and gradients.
    pub dtype: DType,
    /// How tokens fall to experts.
    pub load: Load,
    /// Whether the backward computes the experts' inner products again.
    pub recompute: bool,
}

/// One measurement; other implementations' have the same fields.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerRow {
    /// Always "layer".
    pub bench: String,
    /// Whose layer it is.
    #[serde(rename = "impl")]
    pub implementation: String,
    /// The device's name.
    pub device: String,
    /// The shape's name.
    pub shape: String,
    /// T.
    #[serde(rename = "T")]
    pub tokens: usize,
    /// M.
    #[serde(rename = "M")]
    pub hidden: usize,
    /// H.
    #[serde(rename = "H")]
    pub ffn: usize,
    /// E.
    #[serde(rename = "E")]
    pub experts: usize,
    /// k.
    #[serde(rename = "k")]
    pub top_k: usize,
    /// The experts' kind.
    pub expert: String,
    /// The element type.
    pub dtype: String,
    /// The gate.
    pub gate: String,
    /// The order.
    pub order: String,
    /// The capacity factor, `*` where nothing is dropped.
    pub capacity_factor: String,
    /// The router's load.
    pub load: String,
    /// `forward` or `forward+backward`.
    pub pass: String,
    /// `eager`, or `graph` for the replay of a captured graph.
    pub mode: String,
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The figures.
    #[serde(default, flatten)]
    pub figures: Option<LayerFigures>,
}

/// What was measured, and what it is compared with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerFigures {
    /// The layer's time.
    #[serde(flatten)]
    pub time: Spread,
    /// Useful FLOPs: the rows that were asked for through the experts' matrices, three times for forward + backward.
    pub flops: f64,
    /// Least bytes: tokens and results, weights and gradients, each once.
    pub bytes: f64,
    /// Useful TFLOP/s.
    pub tflops: f64,
    /// The dense products' median, forward, in the same rounds.
    pub dense_ms: f64,
    /// dense_ms, three times for forward + backward, over the layer's median.
    pub efficiency: f64,
    /// The least time by the ceiling's rates.
    pub floor_ms: f64,
    /// The most bytes in tensors at one time, forward and backward.
    pub peak_bytes: Option<usize>,
    /// The largest expert's load over the mean.
    pub load_max_over_mean: f64,
    /// Choices that found no slot.
    pub dropped: u64,
}

/// Benchmarks every shape, giving each row to `emit` as it comes.
///
/// # Errors
/// The first failure, once the other shapes are done: a row has it too.
pub fn run(
    bench: &mut Bench,
    settings: &LayerSettings,
    ceiling: &Ceiling,
    emit: &mut dyn FnMut(LayerRow) -> Result<()>,
) -> Result<()> {
    let mut failure = None;
    for shape in &settings.shapes {
        bench.release_unused();
        if let Err(error) = run_shape(bench, settings, shape, ceiling, emit) {
            emit(LayerRow {
                error: Some(error.to_string()),
                ..row(bench, settings, shape, "forward+backward", "eager")
            })?;
            failure = failure.or(Some(error));
        }
    }
    failure.map_or(Ok(()), Err)
}

fn row(bench: &Bench, settings: &LayerSettings, shape: &LayerShape, pass: &str, mode: &str) -> LayerRow {
    LayerRow {
        bench: "layer".into(),
        implementation: "fsmoe".into(),
        device: bench.device().to_owned(),
        shape: shape.name.clone(),
        tokens: shape.tokens,
        hidden: shape.hidden,
        ffn: shape.ffn,
        experts: shape.experts,
        top_k: shape.top_k,
        expert: shape.expert.to_string(),
        dtype: settings.dtype.to_string(),
        gate: settings.gate.to_string(),
        order: settings.order.to_string(),
        capacity_factor: settings.capacity.to_string(),
        load: settings.load.to_string(),
        pass: pass.into(),
        mode: mode.into(),
        error: None,
        figures: None,
    }
}

/// Different tokens, taken in turn.
const TOKEN_SETS: usize = 3;
/// Of tokens and of the output's gradient.
const TOKEN_STD: f64 = 0.2;

/// A layer and what it is run on.
struct Subject {
    lane: Lane,
    layer: MoeLayer,
    parameters: Vec<Parameter>,
    /// (T, M): what the layer is given; always the same memory, so that a captured graph finds the next tokens there.
    x: Tensor,
    dy: Tensor,
    tokens: Vec<Tensor>,
    /// The last forward's.
    routing: RefCell<Option<Routing>>,
}

impl Subject {
    fn new(bench: &Bench, settings: &LayerSettings, shape: &LayerShape) -> Result<Self> {
        let lane = bench.lane().clone();
        let config = MoeConfig {
            gate: settings.gate,
            order: settings.order,
            capacity: settings.capacity,
            expert: shape.expert,
            experts: shape.experts,
            top_k: shape.top_k,
            hidden: shape.hidden,
            ffn: shape.ffn,
            gelu: Gelu::Erf,
            soft_slots: (shape.tokens * shape.top_k).div_ceil(shape.experts),
            recompute: settings.recompute,
            ..MoeConfig::default()
        };
        let layer = MoeLayer::new(&Init::new(&lane, settings.dtype, 1), &config)?;
        let parameters = layer.parameters();
        let scaled = |stream| -> Result<Tensor> {
            let t = random(bench, stream, [shape.tokens, shape.hidden], settings.dtype)?;
            let out = lane.empty_like(&t)?;
            lane.axpby(TOKEN_STD, &t, 0.0, &out)?;
            Ok(out)
        };
        let tokens = (0..TOKEN_SETS).map(|n| scaled(20 + n as u64)).collect::<Result<Vec<_>>>()?;
        if let Some(assignment) = settings.load.assignment(shape.tokens, shape.top_k, shape.experts)? {
            let Some(router) =
                parameters.first().filter(|_| matches!(settings.gate, GateKind::TopK | GateKind::Sigmoid))
            else {
                config_err!("load {} with the {} gate: only top-k and sigmoid take one", settings.load, settings.gate);
            };
            plant_in_router(&lane, router.value())?;
            for x in &tokens {
                plant_in_tokens(&lane, &assignment, shape.top_k, x)?;
            }
        }
        let (x, dy) = (lane.empty_like(&tokens[0])?, scaled(19)?);
        lane.copy(&tokens[0], &x)?;
        Ok(Subject { lane, layer, parameters, x, dy, tokens, routing: RefCell::new(None) })
    }

    /// Fresh tokens.
    fn prepare(&self, n: usize) -> Result<()> {
        self.lane.copy(&self.tokens[n % TOKEN_SETS], &self.x)
    }

    fn forward(&self) -> Result<()> {
        let tape = Tape::inference(&self.lane);
        let out = self.layer.forward(&tape, &tape.constant(self.x.clone()), STEP)?;
        self.routing.replace(Some(out.routing));
        Ok(())
    }

    fn forward_backward(&self) -> Result<()> {
        // The backward writes the gradients, as the first of a step does.
        self.parameters.iter().for_each(Parameter::zero_grad);
        let tape = Tape::new(&self.lane);
        let out = self.layer.forward(&tape, &tape.leaf(self.x.clone()), STEP)?;
        tape.backward(&[(&out.y, self.dy.clone())])?;
        Ok(())
    }
}

impl Subject {
    /// The last forward's statistics, and the rows it asked the experts for. It is forgotten, with its memory.
    fn last_routing(&self, shape: &LayerShape) -> Result<(RoutingStats, usize)> {
        let Some(routing) = self.routing.take() else {
            config_err!("a layer was not run before its routing was asked for");
        };
        let stats = routing.stats(&self.lane)?;
        let rows = useful_rows(shape, &routing, &stats);
        Ok((stats, rows))
    }
}

const STEP: StepContext = StepContext { train: true, seed: 1, step: 0, first_token: 0 };

/// The dense products of the same useful FLOPs.
struct Dense {
    lane: Lane,
    /// (operand, operand, product).
    products: [[Tensor; 3]; 2],
}

impl Dense {
    fn new(bench: &Bench, shape: &LayerShape, rows: usize, dtype: DType) -> Result<Self> {
        let (m, h) = (shape.hidden, shape.ffn);
        let up = if shape.expert == ExpertKind::Gpt { h } else { 2 * h };
        let product = |stream, rows, inner, cols| -> Result<[Tensor; 3]> {
            let c = bench.lane().empty([rows, cols], dtype)?;
            Ok([random(bench, stream, [rows, inner], dtype)?, random(bench, stream + 1, [inner, cols], dtype)?, c])
        };
        let products = [product(30, rows, m, up)?, product(32, rows, h, m)?];
        Ok(Dense { lane: bench.lane().clone(), products })
    }

    fn forward(&self) -> Result<()> {
        self.products.iter().try_for_each(|[a, b, c]| self.lane.gemm(1.0, a, b, 0.0, c))
    }
}

/// No layer's sizes have a larger product: what is made of them is counted in whole numbers.
const MOST: f64 = (1u64 << 60) as f64;

/// Fails where the device, or the host, has too little memory for a layer, forward and backward.
fn require_memory(lane: &Lane, settings: &LayerSettings, shape: &LayerShape) -> Result<()> {
    let Some(free) = lane.free_memory()? else { return Ok(()) };
    let (own, t, m) = (settings.dtype.size() as f64, shape.tokens as f64, shape.hidden as f64);
    let factor = if let Capacity::Factor(f) = settings.capacity { f } else { 1.0 };
    let rows = (factor * t * shape.top_k as f64).min(t * shape.experts as f64);
    let inner = if shape.expert == ExpertKind::Gpt { 2.0 } else { 3.0 } * shape.ffn as f64;
    let masks = if settings.order == OrderKind::GShard { 2.0 * t * rows } else { 0.0 };
    let parts = [
        ("weights and gradients", 2.0 * shape.experts as f64 * shape.weights_of_one() as f64 * own),
        ("tokens", (TOKEN_SETS as f64 + 4.0) * t * m * own),
        ("rows", rows * (2.0 * m + inner) * own),
        ("masks", masks * own),
        ("logits", t * shape.experts as f64 * 4.0),
    ];
    let sum: f64 = parts.iter().map(|(_, n)| n).sum();
    if sum > free as f64 {
        let parts: Vec<String> =
            parts.iter().filter(|(_, n)| *n > 0.0).map(|(name, n)| format!("{name} {}", readable(*n))).collect();
        config_err!(
            "layer {} needs at least {} ({}), and {} are free",
            shape.name,
            readable(sum),
            parts.join(" + "),
            readable(free as f64)
        );
    }
    Ok(())
}

/// The rows that the experts are useful for: what is dropped is not done.
fn useful_rows(shape: &LayerShape, routing: &Routing, stats: &RoutingStats) -> usize {
    match routing.assignment {
        Assignment::TokenChoice { .. } => (shape.tokens * shape.top_k).saturating_sub(stats.dropped as usize).max(1),
        _ => routing.padded_rows(),
    }
}

fn run_shape(
    bench: &mut Bench,
    settings: &LayerSettings,
    shape: &LayerShape,
    ceiling: &Ceiling,
    emit: &mut dyn FnMut(LayerRow) -> Result<()>,
) -> Result<()> {
    require_memory(bench.lane(), settings, shape)?;
    let before = bench.memory().map_or(0, |memory| memory.used);
    let subject = Subject::new(bench, settings, shape)?;
    for n in 0..TOKEN_SETS {
        subject.prepare(n)?;
        subject.forward()?;
        subject.forward_backward()?;
    }
    let (stats, rows) = subject.last_routing(shape)?;
    // The other token sets are the benchmark's, not the layer's.
    let token_sets = subject.tokens.iter().map(|t| t.storage().bytes()).sum::<usize>();
    let peak = bench.peak(|| subject.forward_backward())?.map(|peak| peak.saturating_sub(before + token_sets));

    let dense = Dense::new(bench, shape, rows, settings.dtype)?;
    // Last, because a graph's tensors are memory that later ones could be given.
    let mut graph = |work: &dyn Fn() -> Result<()>| match bench.capture(work) {
        Ok(replay) => (replay, None),
        Err(error) => (None, Some(error.to_string())),
    };
    let forward = || subject.forward();
    let both = || subject.forward_backward();
    subject.prepare(0)?;
    let (forward_graph, forward_error) = graph(&forward);
    subject.routing.replace(None);
    let (both_graph, both_error) = graph(&both);

    let mut passes: Vec<(&str, &str)> = vec![("forward", "eager"), ("forward+backward", "eager")];
    let prepare = |n| subject.prepare(n);
    let mut works =
        vec![Work::new(|| dense.forward()), Work::new(forward).prepared(prepare), Work::new(both).prepared(prepare)];
    let graphs: [(&str, Option<Replay>); 2] = [("forward", forward_graph), ("forward+backward", both_graph)];
    for (pass, replay) in graphs {
        if let Some(replay) = replay {
            passes.push((pass, "graph"));
            works.push(Work::new(replay).prepared(prepare));
        }
    }
    let spreads = bench.time(&mut works)?;
    drop(works);

    let dense_ms = spreads[0].median_ms;
    let mean = stats.choices as f64 / shape.experts as f64;
    let tokens = (shape.tokens * shape.hidden) as f64;
    let weights = (shape.experts * shape.weights_of_one() + shape.experts * shape.hidden) as f64;
    for ((pass, mode), time) in passes.into_iter().zip(&spreads[1..]) {
        let times = if pass == "forward" { 1.0 } else { 3.0 };
        let flops = times * shape.flops(rows);
        // Forward reads x and the weights and writes y; with backward also dy, dx and the weights' gradients.
        let elements = if pass == "forward" { 2.0 * tokens + weights } else { 4.0 * tokens + 2.0 * weights };
        let bytes = elements * settings.dtype.size() as f64;
        let figures = LayerFigures {
            time: *time,
            flops,
            bytes,
            tflops: flops / time.median_ms / 1e9,
            dense_ms,
            efficiency: times * dense_ms / time.median_ms,
            floor_ms: ceiling.floor_ms(bytes, flops).0,
            peak_bytes: peak,
            load_max_over_mean: stats.loads.iter().copied().max().unwrap_or(0) as f64 / mean,
            dropped: stats.dropped,
        };
        emit(LayerRow { figures: Some(figures), ..row(bench, settings, shape, pass, mode) })?;
    }
    for (pass, error) in [("forward", forward_error), ("forward+backward", both_error)] {
        if let Some(error) = error {
            emit(LayerRow { error: Some(error), ..row(bench, settings, shape, pass, "graph") })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_by_name_and_by_hand() {
        let named: LayerShape = "qwen3_30b_T16k".parse().unwrap();
        assert_eq!((named.tokens, named.experts, named.expert), (16384, 128, ExpertKind::Mixtral));
        let by_hand: LayerShape = "64, 16,32,4,2,gpt".parse().unwrap();
        assert_eq!((by_hand.tokens, by_hand.hidden, by_hand.top_k, by_hand.expert), (64, 16, 2, ExpertKind::Gpt));
        for wrong in ["mixtral", "1,2,3", "1,2,3,4,5", "a,2,3,4,5,gpt", "1,2,3,4,5,gpt,7"] {
            let message = wrong.parse::<LayerShape>().unwrap_err().to_string();
            assert!(message.contains("T,M,H,E,k,expert") && message.contains("sonic_default"), "{message}");
        }
        let huge = "99999999999,4096,4096,8,2,gpt".parse::<LayerShape>().unwrap_err().to_string();
        assert!(huge.contains("product of its sizes"), "{huge}");
        let large: LayerShape = "1000000,16384,65536,64,8,gpt".parse().unwrap();
        let settings = LayerSettings {
            shapes: Vec::new(),
            gate: GateKind::TopK,
            order: OrderKind::GShard,
            capacity: Capacity::Dropless,
            dtype: DType::F32,
            load: Load::Uniform,
            recompute: false,
        };
        let error = require_memory(&Lane::cpu(), &settings, &large).unwrap_err().to_string();
        assert!(error.contains("weights and gradients") && error.contains("masks"), "{error}");
        let zero = "1,2,0,4,5,gpt".parse::<LayerShape>().unwrap_err().to_string();
        assert!(zero.contains("H = 0"), "{zero}");
        assert!("1,2,3,4,5,mlp".parse::<LayerShape>().unwrap_err().to_string().contains("gpt, mixtral"));
    }
}
