//! A fixed set of small shapes for compute-sanitizer, one test per family: every operation, with ragged tails, and the
//! variants that widths and types choose among, in a time that racecheck leaves. `scripts/sanitize.sh` runs them.
//!
//! The other tests compare more shapes; these compare the same way, so that they fail also without the tool.

use fsmoe::bench::kernels::{Case, cases, named};
use fsmoe::bench::{Bench, against};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::tensor::{DType, Place};

use super::{gate, hopper, layer, optim, order, replay};

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn bench() -> Bench {
    Bench::open(Place::Cuda(0)).unwrap()
}

/// Every case of a family on all-ones and on one random shape, the type changing from one to the next.
fn family(name: &str) {
    let bench = bench();
    for (n, case) in cases().filter(|case| case.family == name).enumerate() {
        for round in 0..2 {
            check(&bench, case, &case.random(round).to_string(), DTYPES[(n + round as usize) % 3]);
        }
    }
}

fn check(bench: &Bench, case: &Case, sizes: &str, dtype: DType) {
    let sizes = case.benchmarked(false, &sizes.parse().unwrap()).unwrap();
    against::check_shape(case, &**bench.lane(), &sizes, dtype).unwrap();
}

/// Operations on shapes by hand, the type changing from one to the next.
fn shapes(operations: &[&str], sizes: &[&str]) {
    let bench = bench();
    for name in operations {
        for (n, sizes) in sizes.iter().enumerate() {
            check(&bench, named(Some(name)).unwrap()[0], sizes, DTYPES[n % 3]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_memory() {
    family("memory");
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_math() {
    family("math");
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_gate() {
    family("gate");
    gate::noise(33, 7);
}

/// A row of a gate takes another variant for each power of two of experts.
#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_gate_widths() {
    let sizes =
        ["T=37,E=5,k=2", "T=18,E=40,k=3", "T=18,E=128,k=8", "T=17,E=200,k=5", "T=5,E=301,k=2", "T=3,E=1024,k=16"];
    shapes(&["top_k", "choose_experts", "choose_experts_backward"], &sizes);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_order() {
    family("order");
    order::iota();
}

/// Rows that a warp has in one go and more, aligned or not, for every number of them that is in flight.
#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_order_widths() {
    let sizes =
        ["T=9,M=264,E=4,k=1", "T=7,M=40,E=5,k=2", "T=5,M=13,E=9,k=3", "T=3,M=1032,E=9,k=5", "T=2,M=8,E=20,k=11"];
    shapes(&["dispatch_rows", "combine_rows", "combine_choices_backward"], &sizes);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_expert() {
    family("expert");
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_grouped() {
    family("grouped");
}

/// The products written for Hopper: an expert without rows, one with a part of a tile, one with more than one.
#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_hopper_forward() {
    hopper::forward(&hopper::Rows::new(&[0, 5, 130]), 72, 40);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_hopper_data() {
    hopper::data_gradient(&hopper::Rows::new(&[0, 5, 130]), 72, 40);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_hopper_backward() {
    hopper::backward(&hopper::Rows::new(&[0, 5, 130]), 72, 40);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_hopper_weight() {
    hopper::weight(&hopper::Rows::new(&[0, 5, 130]), 72, 40);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_comm() {
    family("comm");
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_model() {
    family("model");
}

/// Attention takes another variant for each head width, and one for widths that are none of these.
#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_attention_widths() {
    let sizes = [
        "B=1,L=70,Hq=2,Hkv=1,D=64",
        "B=1,L=35,Hq=2,Hkv=2,D=128",
        "B=2,L=19,Hq=1,Hkv=1,D=24",
        "B=1,L=17,Hq=1,Hkv=1,D=256",
    ];
    shapes(&["attention", "attention_backward"], &sizes);
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_optim() {
    family("optim");
    for dtype in DTYPES {
        optim::adamw_of_many(&[1, 300, 0, 5, 16_385, 7, 20], dtype);
        optim::squares_of_many(&[3, 0, 300, 16_385], dtype);
    }
    optim::clip_scales();
}

/// A layer's forward and backward, with each order.
#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_layer() {
    for (order, expert) in [(OrderKind::Ragged, ExpertKind::Mixtral), (OrderKind::Tutel, ExpertKind::Gpt)] {
        layer::compare("a small layer", &layer::config(GateKind::TopK, order, expert), 16, DType::BF16);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn sanitize_replay() {
    let config = layer::config(GateKind::TopK, OrderKind::GShard, ExpertKind::Gpt);
    replay::replays_with_the_same_bits("a small layer", &config, 16, DType::BF16);
}
