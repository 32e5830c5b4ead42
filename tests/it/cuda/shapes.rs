//! Every operation on shapes drawn at random, the edges of warps and vectors among them.

use fsmoe::bench::kernels::{Sizes, cases};
use fsmoe::bench::{Bench, against};
use fsmoe::tensor::{DType, Place};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::support::DTYPES;

/// What a size may be where an operation's rules and [`ELEMENTS`] allow it: one, around a warp and a vector of 8, others.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(1),
        4 => prop::sample::select(vec![2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129]),
        2 => 1_usize..200,
        1 => prop::sample::select(vec![255, 256, 257, 511, 1023, 1024]),
    ]
}

/// The most elements that an operation's tensors have together: the CPU computes them in f64.
const ELEMENTS: usize = 1 << 17;
/// And the most FLOPs of its products.
const FLOPS: f64 = 2e8;

fn drawn(dtypes: &[DType]) -> impl Strategy<Value = (Vec<usize>, DType)> {
    (prop::collection::vec(size(), 8), prop::sample::select(dtypes.to_vec()))
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_every_case_on_drawn_shapes() {
    on_drawn_shapes(Place::Cuda(0), 16, &DTYPES);
}

/// That the shapes are legal shows without a GPU.
#[test]
fn every_case_takes_drawn_shapes() {
    on_drawn_shapes(Place::Cpu, 4, &[DType::F32]);
}

/// Every operation in every type on all-ones, then in types drawn with shapes; outputs are poisoned beforehand.
fn on_drawn_shapes(place: Place, rounds: u32, dtypes: &[DType]) {
    let bench = Bench::open(place).unwrap();
    let mut failures = Vec::new();
    for case in cases() {
        let check = |sizes: &Sizes, dtype| against::check_shape(case, &**bench.lane(), sizes, dtype);
        for &dtype in dtypes {
            failures.extend(check(&case.legal(&[1; 8]), dtype).err().map(|e| e.to_string()));
        }
        let config = Config { cases: rounds, failure_persistence: None, ..Config::default() };
        let done = TestRunner::new_with_rng(
            config,
            proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
        )
        .run(&drawn(dtypes), |(mut wanted, dtype)| {
            let limited = |wanted: &[usize]| {
                let mut wanted = wanted.to_vec();
                // The weight of one choice is 1 whatever the logits. What terms of order one leave of its gradient, 1e-7, is
                // more than 1e-5 of the losses' gradients, which are all that is left.
                if let ("choose_experts_backward", Some(k)) = (case.name, case.sizes.iter().position(|s| s.name == "k"))
                {
                    wanted[k] = wanted[k].max(2);
                    wanted[1] = wanted[1].max(2);
                }
                let sizes = case.legal(&wanted);
                let elements: usize = (case.args)(&sizes).iter().map(|arg| arg.shape.elements()).sum();
                (elements <= ELEMENTS && (case.flops)(&sizes) <= FLOPS).then_some(sizes)
            };
            let sizes = loop {
                match limited(&wanted) {
                    Some(sizes) => break sizes,
                    None => {
                        let largest = (0..wanted.len()).max_by_key(|&i| wanted[i]).unwrap();
                        // From an edge not onto another one: odd.
                        wanted[largest] = (wanted[largest] / 2) | 1;
                    }
                }
            };
            check(&sizes, dtype).map(|_| ()).map_err(|e| TestCaseError::fail(e.to_string()))
        });
        failures.extend(done.err().map(|e| e.to_string()));
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
