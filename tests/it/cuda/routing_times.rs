//! Prints what routing takes, and the bandwidth that moving rows reaches, counting the bytes that must move at least.

use std::sync::Arc;

use fsmoe::autograd::Init;
use fsmoe::device::cuda::Cuda;
use fsmoe::device::{
    ChoiceRule, Chosen, ChosenGrad, GateKernels, Lane, LaneKind, MemoryKernels, OrderKernels, RowIndex, Score, Slots,
    block_rows,
};
use fsmoe::moe::gate::{self, GateKind};
use fsmoe::moe::{Assignment, Capacity, GateContext, MoeConfig, StepContext};
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Tensor};

use super::bandwidth::{replayed_seconds, seconds};
use super::support::{assert_as_documented, gpu};

const F32: DType = DType::F32;
const ALIGN: usize = 128;

/// Logits and everything that a choice writes.
struct Bench {
    lane: Cuda,
    sizes: [usize; 3],
    logits: Tensor,
    experts: Tensor,
    slots: Tensor,
    weights: Tensor,
    loads: Tensor,
    best: Tensor,
    one: [Tensor; 3],
    fraction: Tensor,
    offsets: Tensor,
    starts: Tensor,
    row_token: Tensor,
    row_weight: Tensor,
    index: Tensor,
}

impl Bench {
    fn new(lane: &Cuda, tokens: usize, e: usize, k: usize) -> Self {
        let floats = |shape: &[usize]| lane.alloc(shape.into(), F32).unwrap();
        let ints = |shape: &[usize]| lane.alloc(shape.into(), DType::I32).unwrap();
        let rows = block_rows(tokens * k, e, ALIGN);
        Bench {
            lane: lane.clone(),
            sizes: [tokens, e, k],
            logits: random(lane, &[tokens, e], F32),
            experts: ints(&[tokens, k]),
            slots: ints(&[tokens, k]),
            weights: floats(&[tokens, k]),
            loads: ints(&[1, e]),
            best: floats(&[tokens]),
            one: [(); 3].map(|()| floats(&[1])),
            fraction: floats(&[e]),
            offsets: ints(&[e + 1]),
            starts: ints(&[1, e]),
            row_token: ints(&[rows]),
            row_weight: ints(&[rows]),
            index: ints(&[tokens, k]),
        }
    }

    fn rule(score: Score) -> ChoiceRule {
        ChoiceRule { score, expert_groups: None, normalise: true, scale: 1.0, balance_first_only: false }
    }

    fn choose(&self, score: Score, prioritised: bool) {
        let [balance_loss, z_loss, entropy] = &self.one;
        let chosen = Chosen {
            experts: &self.experts,
            weights: &self.weights,
            best: prioritised.then_some(&self.best),
            slots: Some(Slots { capacity: self.sizes[0], slots: &self.slots }),
            loads: &self.loads,
            balance_loss,
            fraction: &self.fraction,
            z_loss: (score == Score::Softmax).then_some(z_loss),
            entropy,
        };
        self.lane.choose_experts(&Self::rule(score), &self.logits, None, &chosen).unwrap();
    }

    fn rows(&self) -> RowIndex<'_> {
        RowIndex { index: &self.index, row_token: &self.row_token, row_weight: &self.row_weight }
    }

    fn place(&self) {
        let Bench { lane, sizes, experts, slots, loads, offsets, starts, .. } = self;
        lane.block_index(experts, slots, loads, sizes[0], ALIGN, offsets, starts, self.rows()).unwrap();
    }

    fn backward(&self, d_weights: &Tensor, d_logits: &Tensor) {
        let given = ChosenGrad {
            experts: &self.experts,
            weights: &self.weights,
            fraction: &self.fraction,
            d_weights,
            d_balance: &self.one[0],
            d_z: Some(&self.one[1]),
        };
        self.lane.choose_experts_backward(&Self::rule(Score::Softmax), &self.logits, &given, d_logits).unwrap();
    }
}

fn random(lane: &Cuda, shape: &[usize], dtype: DType) -> Tensor {
    let t = lane.alloc(shape.into(), dtype).unwrap();
    lane.normal(Counter { seed: 1, purpose: Purpose::Test, step: 0 }, 0, &t).unwrap();
    t
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_times_of_routing() {
    let lane = gpu().fork().unwrap();
    let report = |what: &str, launch: &dyn Fn()| {
        let replayed = replayed_seconds(&lane, 1, &|_| launch());
        println!("{what:60} {:9.1} us, as a graph {:9.1} us", seconds(&lane, launch) * 1e6, replayed * 1e6);
        replayed * 1e6
    };
    for (tokens, e, k) in
        [(32768, 128, 8), (16384, 128, 8), (8192, 8, 2), (8192, 2, 2), (32768, 256, 8), (8192, 1024, 16)]
    {
        let b = Bench::new(&lane, tokens, e, k);
        let shape = format!("({tokens}, {e}), k = {k}");
        let complete = report(&format!("{shape}: the complete routing"), &|| {
            b.choose(Score::Softmax, false);
            b.place();
        });
        if (tokens, e, k) == (32768, 128, 8) {
            assert_as_documented("microseconds of the complete routing", complete, 50.8);
        }
        report(&format!("{shape}: choice"), &|| b.choose(Score::Softmax, false));
        report(&format!("{shape}: choice by sigmoids"), &|| b.choose(Score::Sigmoid, false));
        report(&format!("{shape}: choice, batch-prioritised"), &|| b.choose(Score::Softmax, true));
        report(&format!("{shape}: index of blocks"), &|| b.place());
        let d_weights = random(&lane, &[tokens, k], F32);
        for dtype in [F32, DType::BF16] {
            let d_logits = lane.alloc([tokens, e].into(), dtype).unwrap();
            report(&format!("{shape}: gradient of the logits, {dtype}"), &|| b.backward(&d_weights, &d_logits));
        }
    }
    x_moe(&lane, &report);
    for (tokens, e, capacity) in [(32768, 128, 2048), (131_072, 128, 8192), (8192, 8, 2048)] {
        let probs = random(&lane, &[tokens, e], F32);
        let chosen = lane.alloc([e, capacity].into(), DType::I32).unwrap();
        let weights = lane.alloc([e, capacity].into(), F32).unwrap();
        report(&format!("expert choice of ({tokens}, {e}), C = {capacity}"), &|| {
            lane.expert_choice(&probs, 1, capacity, &chosen, &weights).unwrap();
        });
        let row_token = chosen.reshape([e * capacity]).unwrap();
        let offsets = lane.alloc([tokens + 1].into(), DType::I32).unwrap();
        let rows = lane.alloc([e * capacity].into(), DType::I32).unwrap();
        report(&format!("its rows by token, ({tokens}, {e}), C = {capacity}"), &|| {
            lane.rows_by_token(&row_token, &offsets, &rows).unwrap();
        });
    }
}

/// X-MoE's gate, from bf16 tokens to the complete routing.
fn x_moe(cuda: &Cuda, report: &dyn Fn(&str, &dyn Fn()) -> f64) {
    let (tokens, hidden, e, k) = (32768, 4096, 128, 8);
    let lane = Lane::new(Arc::new(cuda.clone()), LaneKind::Compute);
    let config =
        MoeConfig { gate: GateKind::XMoe, experts: e, top_k: k, hidden, x_moe_dim: 64, ..MoeConfig::default() };
    let gate = gate::build(&Init::new(&lane, DType::BF16, 3), &config).unwrap();
    let context = GateContext {
        lane: &lane,
        groups: 1,
        capacity: Capacity::Dropless,
        exact_capacity: false,
        step: StepContext { train: true, seed: 1, step: 0, first_token: 0 },
        ranks: None,
    };
    let x = random(cuda, &[tokens, hidden], DType::BF16);
    let b = Bench::new(cuda, tokens, e, k);
    let what = format!("X-MoE, ({tokens}, {hidden}) to 64, E = {e}, k = {k}");
    report(&format!("{what}: the complete routing"), &|| {
        let (routing, _) = gate.forward(&context, &x).unwrap();
        let Assignment::TokenChoice { experts, slots, .. } = &routing.assignment else {
            panic!("a choice of tokens");
        };
        cuda.block_index(experts, slots, &routing.loads, tokens, ALIGN, &b.offsets, &b.starts, b.rows()).unwrap();
    });
}

/// As graphs of several launches on several sets of tensors, so that no cache has what a launch reads.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_bandwidth_of_moving_rows() {
    let lane = gpu().fork().unwrap();
    let shapes =
        [(32768, 4096, 128, 8), (16384, 2048, 128, 8), (8192, 4096, 8, 2), (8192, 1600, 8, 2), (8192, 1024, 8, 2)];
    for (tokens, width, e, k) in shapes {
        let b = Bench::new(&lane, tokens, e, k);
        b.choose(Score::Softmax, false);
        b.place();
        let count = b.row_token.elements();
        // A token's row, and those of its choices: bytes of what must move.
        let (token, choices) = (2 * tokens * width, 2 * tokens * k * width);
        let sets = ((400 << 20) / (token + choices)).clamp(1, 8);
        let bf16 =
            |shape: [usize; 2]| -> Vec<Tensor> { (0..sets).map(|_| random(&lane, &shape, DType::BF16)).collect() };
        let (x, out) = (bf16([tokens, width]), bf16([tokens, width]));
        let (rows, d_rows) = (bf16([count, width]), bf16([count, width]));
        let limit = b.offsets.narrow(0, e, 1).unwrap();
        let (flat, weights) = (b.index.reshape([tokens * k]).unwrap(), b.weights.reshape([tokens * k]).unwrap());
        let d_weights = lane.alloc([tokens * k].into(), F32).unwrap();
        let report = |what: &str, bytes: usize, launch: &dyn Fn(usize)| {
            let seconds = replayed_seconds(&lane, 8, &|n| launch(n % sets));
            let shape = format!("({tokens}, {width}), k = {k}: {what}");
            println!("{shape:56} {:9.1} us {:8.1} GB/s", seconds * 1e6, bytes as f64 / seconds / 1e9);
            if what != "copy" {
                // 80 % of what a copy moves: 3.31 TB/s are the least that is documented for any of these.
                assert_as_documented(&format!("{shape}, microseconds"), seconds * 1e6, bytes as f64 / 3.31e6);
            }
        };
        let used = |t: &Tensor| t.narrow(0, 0, tokens * k).unwrap();
        report("copy", 2 * choices, &|n| lane.copy(&used(&rows[n]), &used(&d_rows[n])).unwrap());
        report("dispatch", token + choices, &|n| {
            lane.dispatch_rows(&x[n], &b.index, &b.row_token, Some(&limit), &rows[n]).unwrap();
        });
        report("combine", token + choices, &|n| {
            lane.combine_rows(&rows[n], &flat, None, Some(&weights), &out[n]).unwrap();
        });
        report("combine's backward", token + 2 * choices, &|n| {
            let (x, rows, d_rows) = (&x[n], &rows[n], &d_rows[n]);
            lane.combine_choices_backward(x, rows, b.rows(), &weights, Some(&limit), d_rows, &d_weights).unwrap();
        });
        report("dispatch's backward", token + choices, &|n| {
            lane.combine_rows(&d_rows[n], &flat, None, None, &out[n]).unwrap();
        });
    }
}
