//! Layers as CUDA graphs: with a fixed capacity forward and backward are captured, whatever the gate and the order.

use std::sync::Arc;

use fsmoe::Result;
use fsmoe::autograd::{Init, Parameter, Tape};
use fsmoe::bench::layer::LayerShape;
use fsmoe::device::cuda::Cuda;
use fsmoe::device::{Lane, LaneKind};
use fsmoe::moe::expert::ExpertKind;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::moe::{Capacity, MoeConfig, MoeLayer, StepContext};
use fsmoe::tensor::{DType, Tensor};

use super::layer::config;
use super::support::{assert_as_documented, bytes, gpu};
use crate::support::uniform;

const STEP: StepContext = StepContext { train: true, seed: 7, step: 3, first_token: 0 };

/// A layer on a lane of its own: what another thread issued on it would be captured too.
struct Subject {
    cuda: Cuda,
    lane: Lane,
    layer: MoeLayer,
    parameters: Vec<Parameter>,
    x: Tensor,
    dy: Tensor,
}

impl Subject {
    fn new(config: &MoeConfig, tokens: usize, dtype: DType) -> Self {
        let cuda = gpu().fork().unwrap();
        let lane = Lane::new(Arc::new(cuda.clone()), LaneKind::Compute);
        let layer = MoeLayer::new(&Init::new(&lane, dtype, 11), config).unwrap();
        let [x, dy] = [1, 2].map(|seed| draw(&lane, seed, [tokens, config.hidden], dtype));
        Subject { parameters: layer.parameters(), cuda, lane, layer, x, dy }
    }

    /// y, the auxiliary loss and dx; the parameters' gradients lie in the parameters.
    fn run(&self) -> Result<Vec<Tensor>> {
        self.parameters.iter().for_each(Parameter::zero_grad);
        let tape = Tape::new(&self.lane);
        let x = tape.leaf(self.x.clone());
        let out = self.layer.forward(&tape, &x, STEP)?;
        let one = self.lane.full([1], out.aux_loss.value().dtype(), 1.0)?;
        let grads = tape.backward(&[(&out.y, self.dy.clone()), (&out.aux_loss, one)])?;
        Ok(vec![out.y.value().clone(), out.aux_loss.value().clone(), grads.get(&x).unwrap().clone()])
    }

    /// The bytes of everything that a run gives.
    fn results(&self, outputs: &[Tensor]) -> Vec<Vec<u8>> {
        let grads = self.parameters.iter().map(|p| p.grad().clone());
        outputs.iter().cloned().chain(grads).map(|t| bytes(&self.lane.to_host(&t).unwrap())).collect()
    }
}

fn draw(lane: &Lane, seed: u64, shape: [usize; 2], dtype: DType) -> Tensor {
    let values = Tensor::from_slice(&uniform(seed, shape[0] * shape[1]), shape).unwrap();
    lane.to_device(&Lane::cpu().cast(&values, dtype).unwrap()).unwrap()
}

/// A graph's replays give the bits of eager runs, on the tokens that it was captured with and on others.
pub(super) fn replays_with_the_same_bits(what: &str, config: &MoeConfig, tokens: usize, dtype: DType) {
    let s = Subject::new(config, tokens, dtype);
    let eager = s.results(&s.run().unwrap());
    let (graph, outputs) = s.cuda.capture(&[], || s.run()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let replay = || {
        let grads = s.parameters.iter().map(|p| p.grad().clone());
        outputs.iter().cloned().chain(grads).for_each(|t| s.lane.fill(&t, f64::NAN).unwrap());
        graph.replay().unwrap();
        s.results(&outputs)
    };
    assert!(replay() == eager, "{what}: a replay gives other bits than an eager run");
    s.lane.copy(&draw(&s.lane, 3, [tokens, config.hidden], dtype), &s.x).unwrap();
    let others = replay();
    assert!(others != eager && others == s.results(&s.run().unwrap()), "{what}: on other tokens");
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layers_of_every_order_are_captured() {
    for &gate in GateKind::ALL {
        for &order in OrderKind::ALL {
            for &expert in ExpertKind::ALL {
                // The second's widths are no multiples of 8, which the kernels for Hopper do not take.
                let even = config(gate, order, expert);
                let odd = MoeConfig { hidden: 42, ffn: 37, ..even.clone() };
                for (config, dtype) in
                    [(&even, DType::BF16), (&even, DType::F16), (&even, DType::F32), (&odd, DType::BF16)]
                {
                    if config.validate().is_ok() {
                        let what = format!("{gate}, {order}, {expert}, {dtype}, M = {}", config.hidden);
                        replays_with_the_same_bits(&what, config, 64, dtype);
                    }
                }
            }
        }
    }
}

/// A step takes the blocks that the step before gave back.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layers_allocate_nothing_in_a_steady_state() {
    for &order in OrderKind::ALL {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let s = Subject::new(&config(GateKind::TopK, order, ExpertKind::Mixtral), 64, dtype);
            // The first makes what the second finds; results of a step are still there while the next one runs.
            let mut kept = s.run().unwrap();
            kept = [kept, s.run().unwrap()].concat();
            drop(kept);
            let before = s.cuda.memory();
            for step in 0..5 {
                s.run().unwrap();
                let after = s.cuda.memory();
                assert_eq!(
                    after.driver_allocations, before.driver_allocations,
                    "{order}, {dtype}: step {step} allocates"
                );
                assert_eq!(
                    (after.used, after.reserved),
                    (before.used, before.reserved),
                    "{order}, {dtype}, step {step}"
                );
            }
        }
    }
}

/// Prints what a replay takes, then replays once more for a profiler, which adds up what its kernels take:
/// `scripts/replay.sh`.
fn time(shape: &str, documented_us: f64) {
    let shape: LayerShape = shape.parse().unwrap();
    let config = MoeConfig {
        order: OrderKind::Ragged,
        expert: shape.expert,
        experts: shape.experts,
        top_k: shape.top_k,
        hidden: shape.hidden,
        ffn: shape.ffn,
        capacity: Capacity::Dropless,
        ..MoeConfig::default()
    };
    let s = Subject::new(&config, shape.tokens, DType::BF16);
    s.run().unwrap();
    let (graph, _outputs) = s.cuda.capture(&[], || s.run()).unwrap();
    let mut times: Vec<f64> = (0..24)
        .map(|_| {
            let start = s.cuda.mark(true).unwrap();
            graph.replay().unwrap();
            let end = s.cuda.mark(true).unwrap();
            // A card at work without a pause lowers its clocks; a profiler, which measures kernels one by one, lets it rest.
            std::thread::sleep(std::time::Duration::from_millis(30));
            start.elapsed_ms(&end).unwrap() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let rested = times[times.len() / 2];
    let start = s.cuda.mark(true).unwrap();
    (0..24).for_each(|_| graph.replay().unwrap());
    let in_a_row = start.elapsed_ms(&s.cuda.mark(true).unwrap()).unwrap() * 1e3 / 24.0;
    println!("{}: a replay takes {rested:.1} us, one of 24 in a row {in_a_row:.1} us", shape.name);
    assert_as_documented("microseconds of a replay", rested, documented_us);
    let recording = s.cuda.record_profile().unwrap();
    graph.replay().unwrap();
    s.cuda.synchronize().unwrap();
    drop(recording);
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_time_of_a_replay_gpt2xl() {
    time("gpt2xl_moe_T8k", 3227.0);
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_time_of_a_replay_qwen3() {
    time("qwen3_30b_T16k", 6725.0);
}
