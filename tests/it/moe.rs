//! The whole MoE layer: gradients per gate, order and expert, hooks, micro-batches, dtypes, bad input.

use crate::support::{check, random, values};
use fsmoe::Result;
use fsmoe::autograd::{Init, Parameter, Tape, Var};
use fsmoe::device::{ExpertGroups, Gelu, Lane, RowWeights};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::{GateKind, SigmoidOptions};
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{
    Assignment, Capacity, Expert, FusedExpert, Hook, Hooks, MoeConfig, MoeLayer, MoeOutput, Routing, RowSplit, Rows,
    Saved, StepContext, expert, gate,
};
use fsmoe::tensor::{DType, Tensor};
use std::sync::{Arc, Mutex};

const STEP: StepContext = StepContext { train: true, seed: 7, step: 3, first_token: 0 };
const TOKENS: usize = 12;

/// Four experts in two routing groups, with a capacity that drops, and both losses weighted.
fn config(gate: GateKind, order: OrderKind, expert: ExpertKind) -> MoeConfig {
    MoeConfig {
        gate,
        order,
        expert,
        experts: 4,
        top_k: 2,
        hidden: 4,
        ffn: 5,
        capacity: Capacity::Factor(0.7),
        groups: 2,
        balance_weight: 0.3,
        z_weight: 0.2,
        x_moe_dim: 3,
        soft_slots: 2,
        init_std: 0.6,
        ..MoeConfig::default()
    }
}

fn layer(config: &MoeConfig) -> MoeLayer {
    MoeLayer::new(&Init::new(&Lane::cpu(), DType::F64, 11), config).unwrap()
}

/// Which experts take which tokens in which slots; nothing where all take all.
fn decisions(routing: &Routing) -> Vec<i32> {
    let host = |t: &Tensor| Lane::cpu().to_host(t).unwrap().to_vec::<i32>().unwrap();
    match &routing.assignment {
        Assignment::TokenChoice { experts, slots, .. } => [host(experts), host(slots)].concat(),
        Assignment::ExpertChoice { tokens, .. } => host(tokens),
        Assignment::Dense { .. } => Vec::new(),
    }
}

/// Runs the layer without recording.
fn run(layer: &MoeLayer, x: &Tensor, step: StepContext) -> MoeOutput {
    let tape = Tape::inference(&Lane::cpu());
    layer.forward(&tape, &tape.constant(x.clone()), step).unwrap()
}

/// Compares the gradients of x and of every parameter with finite differences: of both outputs, of y alone, of the
/// auxiliary loss alone. No perturbed forward may route otherwise than the unperturbed one: differences across a tie mean
/// nothing.
fn check_layer(name: &str, layer: &MoeLayer) -> Routing {
    let x = random(5, [TOKENS, layer.config().hidden]);
    let routing = run(layer, &x, STEP).routing;
    let expected = decisions(&routing);
    type Select = fn(MoeOutput) -> Vec<Var>;
    let outputs: [(&str, Select); 3] =
        [("y and loss", |out| vec![out.y, out.aux_loss]), ("y", |out| vec![out.y]), ("loss", |out| vec![out.aux_loss])];
    for (which, select) in outputs {
        let name = format!("{name}, {which}");
        check(&name, std::slice::from_ref(&x), &layer.parameters(), |tape, vars| {
            let out = layer.forward(tape, &vars[0], STEP)?;
            assert_eq!(decisions(&out.routing), expected, "{name}: a perturbation crossed a tie, take another seed");
            Ok(select(out))
        });
    }
    routing
}

fn dropped(routing: &Routing) -> u64 {
    routing.stats(&Lane::cpu()).unwrap().dropped
}

#[test]
fn gradients_per_gate_order_and_expert() {
    for &gate in GateKind::ALL {
        for &order in OrderKind::ALL {
            for &expert in ExpertKind::ALL {
                if gate == GateKind::Soft && order != OrderKind::GShard {
                    continue;
                }
                let routing = check_layer(&format!("{gate}, {order}, {expert}"), &layer(&config(gate, order, expert)));
                let chosen_by_tokens = matches!(routing.assignment, Assignment::TokenChoice { .. });
                assert_eq!(dropped(&routing) > 0, chosen_by_tokens, "{gate}: this capacity drops where tokens choose");
            }
        }
    }
}

#[test]
fn gradients_of_every_gate_option() {
    let base = |gate| config(gate, OrderKind::Tutel, ExpertKind::Gpt);
    let cases = [
        ("top-k, k = 1", MoeConfig { top_k: 1, ..base(GateKind::TopK) }),
        ("top-k, k = E", MoeConfig { top_k: 4, ..base(GateKind::TopK) }),
        ("top-k, dropless", MoeConfig { capacity: Capacity::Dropless, ..base(GateKind::TopK) }),
        ("top-k, weights as they are", MoeConfig { normalise_weights: Some(false), ..base(GateKind::TopK) }),
        ("top-k, noise", MoeConfig { gate_noise: true, ..base(GateKind::TopK) }),
        ("top-k, first choices", MoeConfig { balance_first_only: true, ..base(GateKind::TopK) }),
        ("top-k, batch-prioritised", MoeConfig { batch_prioritised: true, ..base(GateKind::TopK) }),
        ("top-k, tanh", MoeConfig { gelu: Gelu::Tanh, ..base(GateKind::TopK) }),
        ("sigmoid, k = 1", MoeConfig { top_k: 1, ..base(GateKind::Sigmoid) }),
        (
            "sigmoid, groups and scale",
            MoeConfig {
                sigmoid: SigmoidOptions {
                    groups: Some(ExpertGroups { groups: 2, kept: 1 }),
                    routed_scale: 2.5,
                    bias_rate: 0.1,
                },
                ..base(GateKind::Sigmoid)
            },
        ),
        ("x-moe, k = 1", MoeConfig { top_k: 1, ..base(GateKind::XMoe) }),
        ("expert-choice, C = T", MoeConfig { capacity: Capacity::Factor(2.0), ..base(GateKind::ExpertChoice) }),
        ("one expert", MoeConfig { experts: 1, top_k: 1, ..base(GateKind::TopK) }),
    ];
    for (name, config) in cases {
        let routing = check_layer(name, &layer(&config));
        if config.capacity == Capacity::Dropless {
            assert_eq!(dropped(&routing), 0, "{name}");
        }
    }
}

/// This crate's experts, asking for rows in segments of four.
struct InBlocks(Box<dyn Expert>);

impl Expert for InBlocks {
    fn name(&self) -> &str {
        "in blocks"
    }
    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters()
    }
    fn forward(&self, lane: &Lane, rows: &Rows) -> Result<(Tensor, Saved)> {
        assert!(matches!(rows.split, RowSplit::Blocks { .. }), "{:?}", rows.split);
        self.0.forward(lane, rows)
    }
    fn backward_data(&self, lane: &Lane, rows: &Rows, state: &Saved, d_out: &Tensor) -> Result<(Tensor, Saved)> {
        self.0.backward_data(lane, rows, state, d_out)
    }
    fn backward_weights(&self, lane: &Lane, rows: &Rows, s: &Saved, d_out: &Tensor, b: &Saved) -> Result<()> {
        self.0.backward_weights(lane, rows, s, d_out, b)
    }
    fn fused(&self) -> Option<&dyn FusedExpert> {
        Some(self)
    }
}

impl FusedExpert for InBlocks {
    fn row_block(&self, _lane: &Lane, _dtype: DType) -> Option<usize> {
        Some(4)
    }
    fn backward_data_weighted(
        &self,
        lane: &Lane,
        rows: &Rows,
        state: &Saved,
        dy: &Tensor,
        weights: RowWeights<'_>,
    ) -> Result<(Tensor, Saved)> {
        self.0.fused().unwrap().backward_data_weighted(lane, rows, state, dy, weights)
    }
}

#[test]
fn rows_in_blocks_give_what_ragged_rows_give() {
    for kind in [ExpertKind::Gpt, ExpertKind::Mixtral] {
        for (capacity, experts) in [(Capacity::Factor(0.7), 4), (Capacity::Dropless, 4), (Capacity::Dropless, 9)] {
            let config = MoeConfig { capacity, experts, ..config(GateKind::TopK, OrderKind::Ragged, kind) };
            let init = Init::new(&Lane::cpu(), DType::F64, 11);
            let gate = gate::build(&init.child("gate"), &config).unwrap();
            let blocks = Box::new(InBlocks(expert::build(&init.child("experts"), &config).unwrap()));
            let order = config.order.build();
            let blocks = MoeLayer::with_modules(config.clone(), gate, order, blocks, Hooks::default()).unwrap();
            let (x, dy) = (random(1, [TOKENS, 4]), random(2, [TOKENS, 4]));
            for (a, b) in results(&layer(&config), &x, &dy).iter().zip(results(&blocks, &x, &dy)) {
                assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12), "{kind}, {capacity}, {experts} experts");
            }
            check_layer(&format!("{kind} in blocks"), &blocks);
        }
    }
}

#[test]
fn recomputed_activations_change_nothing() {
    for kind in [ExpertKind::Gpt, ExpertKind::Mixtral] {
        let kept = config(GateKind::TopK, OrderKind::Tutel, kind);
        let recomputed = MoeConfig { recompute: true, ..kept.clone() };
        let (x, dy) = (random(1, [TOKENS, 4]), random(2, [TOKENS, 4]));
        assert_eq!(results(&layer(&kept), &x, &dy), results(&layer(&recomputed), &x, &dy), "{kind}");
    }
}

#[test]
fn batch_prioritised_routing_drops_other_tokens() {
    let in_order = config(GateKind::TopK, OrderKind::Tutel, ExpertKind::Gpt);
    let prioritised = MoeConfig { batch_prioritised: true, ..in_order.clone() };
    let x = random(5, [TOKENS, 4]);
    let slots = |config| decisions(&run(&layer(config), &x, STEP).routing);
    assert_ne!(slots(&in_order), slots(&prioritised));
}

#[test]
fn a_clamped_x_moe_scale_has_no_gradient() {
    let layer = layer(&config(GateKind::XMoe, OrderKind::Tutel, ExpertKind::Gpt));
    let log_scale = layer.parameters().into_iter().find(|p| p.name() == "gate.log_scale").unwrap();
    let x = random(5, [TOKENS, 4]);
    let lane = Lane::cpu();
    let logits_move = |value: f64| {
        lane.fill(log_scale.value(), value).unwrap();
        log_scale.zero_grad();
        let tape = Tape::new(&lane);
        let out = layer.forward(&tape, &tape.leaf(x.clone()), STEP).unwrap();
        tape.backward(&[(&out.y, random(6, [TOKENS, 4]))]).unwrap();
        (values(out.y.value()), lane.scalar(log_scale.grad()).unwrap())
    };
    assert_ne!(logits_move(4.6).1, 0.0);
    let (at_limit, d) = logits_move(5.0);
    assert_eq!(d, 0.0, "e^5 is above the limit of 100");
    assert_eq!(at_limit, logits_move(7.0).0, "above the limit, the scale is 100 whatever its logarithm");
}

#[test]
fn noise_depends_on_the_global_token_and_is_off_in_evaluation() {
    let config = MoeConfig {
        gate_noise: true,
        capacity: Capacity::Dropless,
        groups: 1,
        ..config(GateKind::TopK, OrderKind::Tutel, ExpertKind::Gpt)
    };
    let layer = layer(&config);
    let x = random(5, [TOKENS, 4]);
    let whole = values(run(&layer, &x, STEP).y.value());
    let half = |first: usize| {
        let step = StepContext { first_token: first as u64, ..STEP };
        values(run(&layer, &x.narrow(0, first, TOKENS / 2).unwrap(), step).y.value())
    };
    let halves = [half(0), half(TOKENS / 2)].concat();
    assert!(whole.iter().zip(&halves).all(|(a, b)| (a - b).abs() < 1e-12), "{whole:?} {halves:?}");
    let later = StepContext { step: 4, ..STEP };
    assert_ne!(whole, values(run(&layer, &x, later).y.value()), "every step has its own noise");
    let evaluated = |step| values(run(&layer, &x, StepContext { train: false, ..step }).y.value());
    assert_eq!(evaluated(STEP), evaluated(later));
}

#[test]
fn the_selection_bias_follows_the_loads_of_all_micro_batches() {
    let rate = 0.25;
    let config = MoeConfig {
        sigmoid: SigmoidOptions { bias_rate: rate, ..SigmoidOptions::default() },
        ..config(GateKind::Sigmoid, OrderKind::Tutel, ExpertKind::Gpt)
    };
    let layer = layer(&config);
    let lane = Lane::cpu();
    let (name, bias) = layer.buffers().pop().unwrap();
    assert_eq!(name, "gate.bias");

    let mut loads = vec![0i64; 4];
    for seed in [1, 2] {
        let out = run(&layer, &random(seed, [TOKENS, 4]), STEP);
        for (sum, load) in loads.iter_mut().zip(out.routing.stats(&lane).unwrap().loads) {
            *sum += load as i64;
        }
    }
    run(&layer, &random(3, [TOKENS, 4]), StepContext { train: false, ..STEP });
    layer.after_step(&lane).unwrap();
    let mean = 2 * TOKENS as i64 * 2 / 4;
    let expected: Vec<f64> = loads.iter().map(|load| rate * (mean - load).signum() as f64).collect();
    assert!(expected.iter().any(|&b| b > 0.0) && expected.iter().any(|&b| b < 0.0), "{loads:?} tests nothing");
    assert_eq!(values(&bias), expected);
    layer.after_step(&lane).unwrap();
    assert_eq!(values(&bias), expected, "a step without forwards leaves the bias alone");

    // A large bias makes every token choose expert 2 first; the weights do not contain it.
    bias.write(&[0.0, 0.0, 100.0, 0.0]).unwrap();
    let routing = run(&layer, &random(1, [TOKENS, 4]), STEP).routing;
    let Assignment::TokenChoice { experts, weights, .. } = &routing.assignment else { panic!("tokens choose") };
    assert!(experts.to_vec::<i32>().unwrap().chunks(2).all(|pair| pair[0] == 2));
    assert!(values(weights).iter().all(|&w| w > 0.0 && w < 1.0));
}

/// Multiplies by `factor`, and writes down when it did.
struct Scale {
    name: &'static str,
    factor: f64,
    log: Arc<Mutex<Vec<String>>>,
    alive: Arc<()>,
}

impl Scale {
    fn apply(&self, lane: &Lane, t: &Tensor, pass: &str) -> Result<Tensor> {
        self.log.lock().unwrap().push(format!("{pass} {}", self.name));
        let out = lane.empty_like(t)?;
        lane.axpby(self.factor, t, 0.0, &out)?;
        Ok(out)
    }
}

impl Hook for Scale {
    fn forward(&self, lane: &Lane, t: &Tensor) -> Result<(Tensor, Saved)> {
        Ok((self.apply(lane, t, "forward")?, Box::new(self.alive.clone())))
    }

    fn backward(&self, lane: &Lane, _saved: &Saved, d: &Tensor) -> Result<Tensor> {
        self.apply(lane, d, "backward")
    }
}

const HOOKS: [&str; 6] =
    ["before-moe-start", "before-dispatch", "after-dispatch", "before-combine", "after-combine", "before-moe-end"];

#[test]
fn hooks_run_in_order_and_their_backwards_in_reverse() {
    let (log, alive) = (Arc::new(Mutex::new(Vec::new())), Arc::new(()));
    let hook = |i: usize| -> Option<Box<dyn Hook>> {
        let factor = [0.9, 1.2, -0.8, 1.1, 0.7, 1.3][i];
        Some(Box::new(Scale { name: HOOKS[i], factor, log: log.clone(), alive: alive.clone() }))
    };
    let hooks = Hooks {
        before_moe_start: hook(0),
        before_dispatch: hook(1),
        after_dispatch: hook(2),
        before_combine: hook(3),
        after_combine: hook(4),
        before_moe_end: hook(5),
    };
    let config = config(GateKind::TopK, OrderKind::Tutel, ExpertKind::Gpt);
    let init = Init::new(&Lane::cpu(), DType::F64, 11);
    let (gate, expert) = (gate::build(&init, &config).unwrap(), expert::build(&init, &config).unwrap());
    let hooked = MoeLayer::with_modules(config.clone(), gate, config.order.build(), expert, hooks).unwrap();
    check_layer("hooks", &hooked);

    log.lock().unwrap().clear();
    let before = Arc::strong_count(&alive);
    let x = random(5, [TOKENS, 4]);
    run(&hooked, &x, STEP);
    assert_eq!(Arc::strong_count(&alive), before, "a tape that does not record keeps nothing");

    log.lock().unwrap().clear();
    let tape = Tape::new(&Lane::cpu());
    let out = hooked.forward(&tape, &tape.leaf(x.clone()), STEP).unwrap();
    assert_eq!(Arc::strong_count(&alive), before + HOOKS.len(), "a recording tape keeps what hooks saved");
    tape.backward(&[(&out.y, random(6, [TOKENS, 4]))]).unwrap();
    let forwards = HOOKS.iter().map(|name| format!("forward {name}"));
    let backwards = HOOKS.iter().rev().map(|name| format!("backward {name}"));
    assert_eq!(*log.lock().unwrap(), forwards.chain(backwards).collect::<Vec<_>>());
    assert_eq!(Arc::strong_count(&alive), before, "after its backward nothing is kept");
}

/// y, dx and the parameters' gradients of one forward and backward, as f64.
fn results(layer: &MoeLayer, x: &Tensor, dy: &Tensor) -> Vec<Vec<f64>> {
    let lane = Lane::cpu();
    let wide = |t: &Tensor| values(&lane.cast(t, DType::F64).unwrap());
    let tape = Tape::new(&lane);
    let leaf = tape.leaf(x.clone());
    let out = layer.forward(&tape, &leaf, STEP).unwrap();
    let d_loss = lane.full([1], x.dtype().accumulate(), 1.0).unwrap();
    let grads = tape.backward(&[(&out.y, dy.clone()), (&out.aux_loss, d_loss)]).unwrap();
    let mut all = vec![wide(out.y.value()), wide(out.aux_loss.value()), wide(grads.get(&leaf).unwrap())];
    all.extend(layer.parameters().iter().map(|p| wide(p.grad())));
    all
}

#[test]
fn narrower_types_agree_with_f64() {
    let lane = Lane::cpu();
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.04), (DType::F16, 0.005)] {
        for &gate in GateKind::ALL {
            let config = config(gate, OrderKind::GShard, ExpertKind::Mixtral);
            let narrow = MoeLayer::new(&Init::new(&lane, dtype, 11), &config).unwrap();
            let exact = layer(&config);
            for (a, b) in narrow.parameters().iter().zip(exact.parameters()) {
                lane.copy(a.value(), b.value()).unwrap();
            }
            let inputs = [random(5, [TOKENS, 4]), random(6, [TOKENS, 4])].map(|t| lane.cast(&t, dtype).unwrap());
            let wide = inputs.each_ref().map(|t| lane.cast(t, DType::F64).unwrap());
            let got = results(&narrow, &inputs[0], &inputs[1]);
            let want = results(&exact, &wide[0], &wide[1]);
            for (i, (a, b)) in got.iter().zip(&want).enumerate() {
                let largest = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off <= tolerance * largest, "{gate} {dtype}: result {i} is off by {off:e} of {largest:e}");
            }
        }
    }
}

#[test]
fn x_needs_no_gradient_for_the_parameters_to_get_theirs() {
    let layer = layer(&config(GateKind::TopK, OrderKind::Ragged, ExpertKind::Mixtral));
    let tape = Tape::new(&Lane::cpu());
    let out = layer.forward(&tape, &tape.constant(random(5, [TOKENS, 4])), STEP).unwrap();
    assert!(out.y.needs_grad() && out.aux_loss.needs_grad());
    tape.backward(&[(&out.y, random(6, [TOKENS, 4]))]).unwrap();
    let zero = |p: &Parameter| values(p.grad()).iter().all(|&g| g == 0.0);
    assert!(!layer.parameters().iter().any(zero));
}

/// The message of an error whose text must contain each of `parts`.
fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("this must be refused").to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message:?} does not name {parts:?}");
}

#[test]
fn settings_that_break_a_rule_are_refused() {
    let ok = config(GateKind::TopK, OrderKind::Tutel, ExpertKind::Gpt);
    ok.validate().unwrap();
    let with = |gate| MoeConfig { gate, order: OrderKind::GShard, ..ok.clone() };
    let groups = |groups, kept| MoeConfig {
        sigmoid: SigmoidOptions { groups: Some(ExpertGroups { groups, kept }), ..SigmoidOptions::default() },
        ..with(GateKind::Sigmoid)
    };
    let cases: [(MoeConfig, &[&str]); 17] = [
        (MoeConfig { top_k: 5, ..ok.clone() }, &["top_k = 5", "4 experts"]),
        (MoeConfig { experts: 0, ..ok.clone() }, &["experts = 0", "at least 1"]),
        (MoeConfig { groups: 0, ..ok.clone() }, &["groups = 0", "at least 1"]),
        (MoeConfig { capacity: Capacity::Factor(-1.0), ..ok.clone() }, &["-1", "above 0"]),
        (MoeConfig { capacity: Capacity::Factor(f64::NAN), ..ok.clone() }, &["NaN", "above 0"]),
        (MoeConfig { balance_weight: f64::INFINITY, ..ok.clone() }, &["balance_weight = inf", "finite"]),
        (MoeConfig { z_weight: -0.5, ..ok.clone() }, &["z_weight = -0.5", "at least 0"]),
        (MoeConfig { order: OrderKind::Tutel, ..with(GateKind::Soft) }, &["tutel", "soft", "gshard"]),
        (MoeConfig { order: OrderKind::Ragged, ..with(GateKind::Soft) }, &["ragged", "soft", "gshard"]),
        (MoeConfig { capacity: Capacity::Dropless, ..with(GateKind::Soft) }, &["*", "soft"]),
        (MoeConfig { capacity: Capacity::Dropless, ..with(GateKind::ExpertChoice) }, &["*", "expert-choice"]),
        (
            MoeConfig { batch_prioritised: true, ..with(GateKind::ExpertChoice) },
            &["batch_prioritised", "expert-choice"],
        ),
        (MoeConfig { gate_noise: true, ..with(GateKind::XMoe) }, &["gate_noise", "x-moe"]),
        (groups(3, 1), &["3 groups", "4 experts", "divide"]),
        (groups(2, 0), &["0 of 2", "between 1"]),
        (groups(4, 1), &["1 of 4", "top_k = 2"]),
        (MoeConfig { soft_slots: 0, ..with(GateKind::Soft) }, &["soft_slots = 0"]),
    ];
    let init = Init::new(&Lane::cpu(), DType::F64, 11);
    for (config, parts) in cases {
        assert_error(config.validate(), parts);
        assert_error(MoeLayer::new(&init, &config), parts);
    }
    assert_error("softmax".parse::<GateKind>(), &["softmax", "top-k, sigmoid, x-moe, expert-choice, soft"]);
    assert_error("llama".parse::<ExpertKind>(), &["llama", "gpt, mixtral"]);
}

#[test]
fn input_that_does_not_fit_is_refused() {
    let layer = layer(&config(GateKind::TopK, OrderKind::Tutel, ExpertKind::Gpt));
    let forward = |shape: &[usize]| {
        let tape = Tape::new(&Lane::cpu());
        layer.forward(&tape, &tape.leaf(random(1, shape)), STEP)
    };
    assert_error(forward(&[0, 4]), &["T = 0", "above 0"]);
    assert_error(forward(&[7, 4]), &["T = 7", "2 routing groups"]);
    assert_error(forward(&[8, 5]), &["(8, 5)", "width 4"]);
    assert_error(forward(&[2, 4, 4]), &["(2, 4, 4)", "(T, 4)"]);
}

#[test]
fn settings_survive_a_configuration_file() {
    let config = MoeConfig {
        sigmoid: SigmoidOptions {
            groups: Some(ExpertGroups { groups: 2, kept: 1 }),
            routed_scale: 2.5,
            bias_rate: 0.001,
        },
        normalise_weights: Some(false),
        ..config(GateKind::XMoe, OrderKind::Ragged, ExpertKind::Mixtral)
    };
    let text = toml::to_string(&config).unwrap();
    assert!(text.contains("gate = \"x-moe\""), "{text}");
    assert_eq!(toml::from_str::<MoeConfig>(&text).unwrap(), config);
    let message = toml::from_str::<MoeConfig>("gate = \"softmax\"").unwrap_err().to_string();
    assert!(message.contains("expert-choice"), "{message}");
}
