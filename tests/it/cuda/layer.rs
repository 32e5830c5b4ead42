//! The whole MoE layer on the GPU, per gate, order and expert, against the same in f64 on the CPU.

use std::sync::Arc;

use fsmoe::autograd::{Init, Tape};
use fsmoe::device::{Lane, LaneKind};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Assignment, Capacity, MoeConfig, MoeLayer, MoeOutput, StepContext};
use fsmoe::tensor::{DType, Tensor};

use super::support::{assert_close, bytes, gpu};
use crate::support::uniform;

const STEP: StepContext = StepContext { train: true, seed: 7, step: 3, first_token: 0 };

fn lane() -> Lane {
    Lane::new(Arc::new(gpu()), LaneKind::Compute)
}

/// Two of six experts in two routing groups, with a capacity that drops, and both losses weighted.
pub(super) fn config(gate: GateKind, order: OrderKind, expert: ExpertKind) -> MoeConfig {
    MoeConfig {
        gate,
        order,
        expert,
        experts: 6,
        top_k: 2,
        hidden: 48,
        ffn: 40,
        capacity: Capacity::Factor(0.8),
        groups: 2,
        balance_weight: 0.3,
        z_weight: 0.2,
        x_moe_dim: 8,
        soft_slots: 2,
        init_std: 0.3,
        ..MoeConfig::default()
    }
}

/// A layer on the GPU in `dtype`, and one on the CPU in f64 with the same parameters.
fn layers(config: &MoeConfig, dtype: DType) -> (MoeLayer, MoeLayer) {
    let (cpu, gpu) = (Lane::cpu(), lane());
    let on_gpu = MoeLayer::new(&Init::new(&gpu, dtype, 11), config).unwrap();
    let on_cpu = MoeLayer::new(&Init::new(&cpu, DType::F64, 11), config).unwrap();
    for (right, tested) in on_cpu.parameters().iter().zip(on_gpu.parameters()) {
        cpu.copy(&gpu.to_host(tested.value()).unwrap(), right.value()).unwrap();
    }
    (on_gpu, on_cpu)
}

/// What a forward and a backward give: y, the loss, x's gradient and the parameters'; and the decisions.
fn results(lane: &Lane, layer: &MoeLayer, x: &Tensor, dy: &Tensor) -> (Vec<(String, Tensor)>, Vec<i32>) {
    layer.parameters().iter().for_each(|p| p.zero_grad());
    let tape = Tape::new(lane);
    let x = tape.leaf(lane.to_device(x).unwrap());
    let MoeOutput { y, aux_loss, routing } = layer.forward(&tape, &x, STEP).unwrap();
    let one = lane.full([1], aux_loss.value().dtype(), 1.0).unwrap();
    let grads = tape.backward(&[(&y, lane.to_device(dy).unwrap()), (&aux_loss, one)]).unwrap();
    let host = |t: &Tensor| lane.to_host(t).unwrap();
    let mut all = vec![
        ("y".to_owned(), host(y.value())),
        ("the loss".to_owned(), host(aux_loss.value())),
        ("dx".to_owned(), host(grads.get(&x).unwrap())),
    ];
    all.extend(layer.parameters().iter().map(|p| (format!("the gradient of {}", p.name()), host(p.grad()))));
    let ints = |t: &Tensor| host(t).to_vec::<i32>().unwrap();
    let decisions = match &routing.assignment {
        Assignment::TokenChoice { experts, slots, .. } => [ints(experts), ints(slots)].concat(),
        Assignment::ExpertChoice { tokens, .. } => ints(tokens),
        Assignment::Dense { .. } => Vec::new(),
    };
    (all, decisions)
}

/// Compares on tokens of which none is so near a tie that rounding decides; those of some seeds are.
pub(super) fn compare(what: &str, config: &MoeConfig, tokens: usize, dtype: DType) {
    let (cpu, gpu) = (Lane::cpu(), lane());
    let (on_gpu, on_cpu) = layers(config, dtype);
    let tolerance = if dtype == DType::F32 { 2e-5 } else { 3e-2 };
    for seed in 0..8 {
        let draw = |seed| Tensor::from_slice(&uniform(seed, tokens * config.hidden), [tokens, config.hidden]).unwrap();
        let [x, dy] = [draw(2 * seed), draw(2 * seed + 1)].map(|t| cpu.cast(&t, dtype).unwrap());
        let wide = |t: &Tensor| cpu.cast(t, DType::F64).unwrap();
        let (right, decided) = results(&cpu, &on_cpu, &wide(&x), &wide(&dy));
        let (got, decisions) = results(&gpu, &on_gpu, &x, &dy);
        if decisions != decided {
            continue;
        }
        for ((name, got), (_, right)) in got.iter().zip(&right) {
            assert_close(&format!("{what}, {dtype}: {name}"), got, right, tolerance);
        }
        let (again, _) = results(&gpu, &on_gpu, &x, &dy);
        for ((name, a), (_, b)) in got.iter().zip(&again) {
            let bits = |t: &Tensor| cpu.cast(t, DType::F64).unwrap().to_vec::<f64>().unwrap();
            assert_eq!(bits(a), bits(b), "{what}, {dtype}: {name} differs between two runs");
        }
        return;
    }
    panic!("{what}, {dtype}: on eight inputs GPU and CPU route differently");
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layers_per_gate_order_and_expert() {
    for &gate in GateKind::ALL {
        for &order in OrderKind::ALL {
            for &expert in ExpertKind::ALL {
                let config = config(gate, order, expert);
                if config.validate().is_ok() {
                    for dtype in [DType::F32, DType::BF16] {
                        compare(&format!("{gate}, {order}, {expert}"), &config, 64, dtype);
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layers_that_drop_nothing() {
    for order in [OrderKind::Tutel, OrderKind::Ragged] {
        for expert in [ExpertKind::Gpt, ExpertKind::Mixtral] {
            for (experts, hidden, ffn, tokens) in [(6, 48, 40, 64), (1, 64, 128, 130), (16, 256, 384, 600)] {
                let config = MoeConfig {
                    experts,
                    top_k: 2.min(experts),
                    hidden,
                    ffn,
                    capacity: Capacity::Dropless,
                    init_std: 0.1,
                    ..config(GateKind::TopK, order, expert)
                };
                for dtype in [DType::F32, DType::BF16, DType::F16] {
                    compare(&format!("{order}, {expert}, E {experts}, dropless"), &config, tokens, dtype);
                }
            }
        }
    }
}

/// Three layers in a row: what a tape holds of them is where recomputation saves memory.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_recomputed_activations_save_memory_and_change_nothing() {
    for order in [OrderKind::Tutel, OrderKind::Ragged] {
        for expert in [ExpertKind::Gpt, ExpertKind::Mixtral] {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let run = |recompute| {
                    let cuda = gpu().fork().unwrap();
                    let lane = Lane::new(Arc::new(cuda.clone()), LaneKind::Compute);
                    let config = MoeConfig {
                        experts: 8,
                        hidden: 128,
                        ffn: 512,
                        capacity: Capacity::Factor(1.0),
                        groups: 1,
                        recompute,
                        init_std: 0.1,
                        ..config(GateKind::TopK, order, expert)
                    };
                    let layers: Vec<MoeLayer> =
                        (0..3).map(|seed| MoeLayer::new(&Init::new(&lane, dtype, seed), &config).unwrap()).collect();
                    let draw = |seed| {
                        let values = Tensor::from_slice(&uniform(seed, 2048 * 128), [2048, 128]).unwrap();
                        lane.to_device(&Lane::cpu().cast(&values, dtype).unwrap()).unwrap()
                    };
                    let (x, dy) = (draw(1), draw(2));
                    cuda.reset_peak();
                    let tape = Tape::new(&lane);
                    let x = tape.leaf(x);
                    let y = layers.iter().fold(x.clone(), |y, layer| layer.forward(&tape, &y, STEP).unwrap().y);
                    let grads = tape.backward(&[(&y, dy)]).unwrap();
                    let peak = cuda.memory().peak;
                    let parameters = layers.iter().flat_map(MoeLayer::parameters).map(|p| p.grad().clone());
                    let all = [y.value().clone(), grads.get(&x).unwrap().clone()].into_iter().chain(parameters);
                    (all.map(|t| bytes(&lane.to_host(&t).unwrap())).collect::<Vec<_>>(), peak)
                };
                let ((kept, most), (again, least)) = (run(false), run(true));
                let what = format!("{order}, {expert}, {dtype}");
                assert!(kept == again, "{what}: recomputation changes bits");
                // Of each layer but the one whose backward runs a matrix (T·k, H) at the least.
                let saved = 2 * 2048 * 2 * 512 * dtype.size();
                assert!(least + saved / 2 < most, "{what}: {least} bytes at most with recomputation, {most} without");
                println!("{what}: {:.1} MiB, {:.1} recomputed", most as f64 / 1048576.0, least as f64 / 1048576.0);
            }
        }
    }
}
