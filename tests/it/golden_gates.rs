//! Every gate against `tests/golden/gates.py`: routing to the last slot, and weights, losses, outputs and gradients of a
//! whole layer to 1e-12. The order is Tutel's, for SoftMoE GShard's; the properties show that the others agree.

use crate::support::values;
use fsmoe::autograd::{Init, Tape};
use fsmoe::device::{ExpertGroups, Gelu, Lane};
use fsmoe::model::checkpoint::TensorFile;
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::{GateKind, SigmoidOptions};
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Assignment, MoeConfig, MoeLayer, StepContext};
use fsmoe::tensor::{DType, Tensor};
use std::path::PathBuf;

const TOLERANCE: f64 = 1e-12;
const STEP: StepContext = StepContext { train: true, seed: 1, step: 0, first_token: 0 };

struct Golden(TensorFile);

impl Golden {
    fn open(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/gate_{name}.safetensors"));
        Golden(TensorFile::open(&path).unwrap())
    }

    fn get(&self, name: &str) -> Tensor {
        self.0.read(name).unwrap()
    }

    fn has(&self, name: &str) -> bool {
        self.0.names().any(|n| n == name)
    }

    fn setting<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.0.metadata().get(name).map(|v| v.to_lowercase().parse().ok().unwrap())
    }

    fn config(&self) -> MoeConfig {
        let x = self.get("in.x");
        let w1 = self.get("in.w1");
        let groups = self.setting("n_group").map(|groups| ExpertGroups { groups, kept: self.setting("kept").unwrap() });
        let base = MoeConfig::default();
        let gate: GateKind = self.0.metadata()["gate"].parse().unwrap();
        MoeConfig {
            gate,
            order: if gate == GateKind::Soft { OrderKind::GShard } else { OrderKind::Tutel },
            expert: ExpertKind::Gpt,
            gelu: Gelu::Erf,
            experts: w1.dim(0),
            hidden: x.dim(1),
            ffn: w1.dim(1),
            top_k: self.setting("k").unwrap_or(1),
            capacity: self.setting("f").unwrap_or("1".parse().unwrap()),
            groups: self.setting("groups").unwrap(),
            balance_weight: self.setting("balance_weight").unwrap(),
            z_weight: self.setting("z_weight").unwrap(),
            balance_first_only: self.0.metadata()["count"] == "first",
            normalise_weights: self.setting("normalise"),
            batch_prioritised: self.setting("prioritised").unwrap_or(false),
            sigmoid: SigmoidOptions {
                groups,
                routed_scale: self.setting("routed_scale").unwrap_or(1.0),
                bias_rate: self.setting("gamma").unwrap_or(0.0),
            },
            x_moe_dim: if self.has("in.projection") { self.get("in.projection").dim(0) } else { base.x_moe_dim },
            soft_slots: self.setting("slots").unwrap_or(1),
            ..base
        }
    }
}

/// The golden files' name of a layer's parameter.
fn golden_name(parameter: &str, gate: GateKind) -> &str {
    match parameter.rsplit('.').next().unwrap() {
        "weight" if gate == GateKind::Soft => "phi",
        "weight" => "w",
        other => other,
    }
}

#[track_caller]
fn near(what: &str, seen: &Tensor, expected: &Tensor) {
    let (seen, expected) = (values(seen), values(expected));
    assert_eq!(seen.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
    for (a, b) in seen.iter().zip(&expected) {
        assert!((a - b).abs() < TOLERANCE * largest, "{what}: {a} where {b} is expected (largest {largest})");
    }
}

#[track_caller]
fn same(what: &str, seen: &Tensor, expected: &Tensor) {
    assert_eq!(seen.to_vec::<i32>().unwrap(), expected.to_vec::<i32>().unwrap(), "{what}");
}

fn check(name: &str) {
    let golden = Golden::open(name);
    let lane = Lane::cpu();
    let config = golden.config();
    let layer = MoeLayer::new(&Init::new(&lane, DType::F64, 1), &config).unwrap();
    for p in layer.parameters() {
        let given = golden.get(&format!("in.{}", golden_name(p.name(), config.gate)));
        lane.copy(&given, p.value()).unwrap();
    }
    for (_, buffer) in layer.buffers() {
        lane.copy(&golden.get("in.bias"), &buffer).unwrap();
    }

    let tape = Tape::new(&lane);
    let x = tape.leaf(golden.get("in.x"));
    let out = layer.forward(&tape, &x, STEP).unwrap();
    match &out.routing.assignment {
        Assignment::TokenChoice { experts, slots, weights } => {
            same("experts", experts, &golden.get("experts"));
            same("slots", slots, &golden.get("slots"));
            near("weights", weights, &golden.get("weights"));
            same("loads", &out.routing.loads, &golden.get("loads"));
            let stats = out.routing.stats(&lane).unwrap();
            assert_eq!(stats.dropped as i32, golden.get("dropped").to_vec::<i32>().unwrap()[0], "dropped");
            let balance = format!("balance_{}", golden.0.metadata()["count"]);
            near(&balance, out.routing.balance_loss.as_ref().unwrap(), &golden.get(&balance));
        }
        Assignment::ExpertChoice { tokens, weights } => {
            same("tokens", tokens, &golden.get("tokens"));
            near("weights", weights, &golden.get("weights"));
        }
        Assignment::Dense { dispatch, combine } => {
            near("dispatch", dispatch, &golden.get("dispatch"));
            near("combine", combine, &golden.get("combine"));
        }
    }
    if golden.has("capacity") {
        assert_eq!(out.routing.capacity as i32, golden.get("capacity").to_vec::<i32>().unwrap()[0], "capacity");
    }
    if config.z_weight > 0.0 {
        near("z-loss", out.routing.z_loss.as_ref().unwrap(), &golden.get("z"));
    }
    near("y", out.y.value(), &golden.get("y"));

    let one = lane.full([1], DType::F64, 1.0).unwrap();
    let grads = tape.backward(&[(&out.y, golden.get("in.dy")), (&out.aux_loss, one)]).unwrap();
    near("grad.x", grads.get(&x).unwrap(), &golden.get("grad.x"));
    let mut compared = 0;
    for p in layer.parameters() {
        let name = format!("grad.{}", golden_name(p.name(), config.gate));
        if golden.has(&name) {
            near(&name, p.grad(), &golden.get(&name));
            compared += 1;
        }
    }
    assert!(compared > 0, "no gate parameter was compared");

    layer.after_step(&lane).unwrap();
    for (_, buffer) in layer.buffers() {
        near("bias after the step", &buffer, &golden.get("in.bias_after"));
    }
}

macro_rules! cases {
    ($($name:ident),* $(,)?) => { $(#[test] fn $name() { check(stringify!($name)); })* };
}
cases!(
    top_k1,
    top_k2,
    top_k2_raw,
    top_k2_prioritised,
    top_k2_groups,
    top_k2_ties,
    top_k3_dropless,
    sigmoid1,
    sigmoid2,
    sigmoid_deepseek,
    sigmoid_deepseek_groups,
    x_moe,
    x_moe_clamped,
    expert_choice,
    expert_choice_all,
    expert_choice_groups,
    soft,
    soft_groups,
);

/// The layer draws its own noise, so the noisy logits and what follows from them are compared kernel by kernel.
#[test]
fn top_k2_noise() {
    let golden = Golden::open("top_k2_noise");
    let lane = Lane::cpu();
    let x = golden.get("in.x");
    let linear = |w: &str| {
        let y = lane.empty([x.dim(0), 8], DType::F64).unwrap();
        lane.gemm(1.0, &x, &golden.get(w).t().unwrap(), 0.0, &y).unwrap();
        y
    };
    let (clean, raw) = (linear("in.w"), linear("in.w_noise"));
    let logits = lane.empty_like(&clean).unwrap();
    lane.add_gate_noise(&clean, &raw, &golden.get("in.noise"), &logits).unwrap();
    near("logits", &logits, &golden.get("logits"));
    let experts = lane.empty([x.dim(0), 2], DType::I32).unwrap();
    lane.top_k(&logits, None, None, &experts).unwrap();
    same("experts", &experts, &golden.get("experts"));
    let slots = lane.empty_like(&experts).unwrap();
    let capacity = golden.get("capacity").to_vec::<i32>().unwrap()[0] as usize;
    lane.assign_slots(&experts, None, 8, 1, capacity, &slots).unwrap();
    same("slots", &slots, &golden.get("slots"));
}
