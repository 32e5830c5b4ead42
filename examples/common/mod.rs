//! What the examples share: a small regression that an MoE layer is trained on.

use fsmoe::Result;
use fsmoe::autograd::Tape;
use fsmoe::device::{AdamW, Gelu, Lane};
use fsmoe::moe::{MoeLayer, StepContext};
use fsmoe::rng::{Counter, Purpose};
use fsmoe::tensor::{DType, Shape, Tensor};

const TOKENS: usize = 256;
const STEPS: u64 = 300;

/// Fits `layer` to a fixed nonlinear function of random tokens with AdamW, prints the loss before and after, and fails
/// unless it has fallen to less than a tenth.
pub(crate) fn train(name: &str, layer: &MoeLayer) -> Result<()> {
    let lane = Lane::cpu();
    let width = layer.config().hidden;
    let x = normal(&lane, 1, [TOKENS, width])?;
    let target = target(&lane, &x)?;

    // Parameters are f32 here, so AdamW works on them directly; 16-bit ones would need f32 copies.
    let parameters = layer.parameters();
    let zeros = || parameters.iter().map(|p| lane.zeros(*p.value().shape(), DType::F32)).collect::<Result<Vec<_>>>();
    let (m, v) = (zeros()?, zeros()?);
    let one = lane.full([1], DType::F32, 1.0)?;

    let (mut first, mut last) = (0.0, 0.0);
    for step in 1..=STEPS {
        // Forward. The tape records the layer as one node.
        let tape = Tape::new(&lane);
        let context = StepContext { train: true, seed: 1, step, first_token: 0 };
        let out = layer.forward(&tape, &tape.constant(x.clone()), context)?;

        // The loss is the mean square of y − target, plus the layer's own auxiliary loss.
        let diff = lane.empty_like(&target)?;
        lane.copy(out.y.value(), &diff)?;
        lane.axpby(-1.0, &target, 1.0, &diff)?;
        let sum = lane.zeros([1], DType::F32)?;
        lane.dot(&diff, &diff, &sum)?;
        last = lane.scalar(&sum)? / diff.elements() as f64;
        if step == 1 {
            first = last;
        }

        // Backward, from both outputs.
        let dy = lane.empty_like(&diff)?;
        lane.axpby(2.0 / diff.elements() as f64, &diff, 0.0, &dy)?;
        tape.backward(&[(&out.y, dy), (&out.aux_loss, one.clone())])?;

        let adamw = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, step };
        for (i, p) in parameters.iter().enumerate() {
            lane.adamw(adamw, &one, p.value(), &m[i], &v[i], p.grad())?;
            p.zero_grad();
        }
        layer.after_step(&lane)?;
    }
    println!("{name}: loss {first:.4} before, {last:.4} after {STEPS} steps");
    assert!(last < first / 10.0, "{name} did not learn");
    Ok(())
}

/// gelu(x·A)·B with fixed random A and B.
fn target(lane: &Lane, x: &Tensor) -> Result<Tensor> {
    let (tokens, width) = x.rows();
    let inner = 2 * width;
    let hidden = lane.empty([tokens, inner], DType::F32)?;
    lane.gemm(1.0 / (width as f64).sqrt(), x, &normal(lane, 2, [width, inner])?, 0.0, &hidden)?;
    let act = lane.empty_like(&hidden)?;
    lane.gelu(Gelu::Erf, &hidden, &act)?;
    let y = lane.empty_like(x)?;
    lane.gemm(1.0 / (inner as f64).sqrt(), &act, &normal(lane, 3, [inner, width])?, 0.0, &y)?;
    Ok(y)
}

fn normal(lane: &Lane, seed: u64, shape: impl Into<Shape>) -> Result<Tensor> {
    let t = lane.empty(shape, DType::F32)?;
    lane.normal(Counter { seed, purpose: Purpose::Data, step: 0 }, 0, &t)?;
    Ok(t)
}
