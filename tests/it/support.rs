//! What tests share: fixed inputs, and the comparison of gradients with finite differences.

use fsmoe::Result;
use fsmoe::autograd::{Parameter, ReduceGroup, Tape, Var};
use fsmoe::device::Lane;
use fsmoe::tensor::{DType, Shape, Tensor};

/// Gradients agree when max|a − b| / max|b| is below this, per tensor.
pub(crate) const TOLERANCE: f64 = 1e-6;

/// What differences give for a gradient that is zero, from rounding: no smaller error counts.
const NOISE: f64 = 1e-11;

/// At most about this many elements of one tensor are perturbed.
const PROBES: usize = 400;

/// The step of the central differences, relative to elements above one. The stencil's error is h⁴·f⁽⁵⁾/30 and rounding
/// adds about 1e-16·f/h: both near 1e-12 here, and a selection's margin needs to exceed no more than 2h.
const STEP: f64 = 1e-4;

/// `n` numbers, uniform in (−1, 1), the same for the same seed (SplitMix64: independent of the generator under test).
pub(crate) fn uniform(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0xd134_2543_de82_ef95);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..n).map(|_| ((next() >> 11) as f64 + 0.5) / (1u64 << 52) as f64 - 1.0).collect()
}

/// An f64 tensor of `shape`, elements uniform in (−1, 1).
pub(crate) fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    Tensor::from_slice(&uniform(seed, shape.elements()), shape).unwrap()
}

/// A parameter with the value of `t`.
pub(crate) fn parameter(name: &str, t: &Tensor) -> Parameter {
    Parameter::new(&Lane::cpu(), name, t.clone(), ReduceGroup::Replicated, true).unwrap()
}

/// An i32 tensor of one dimension.
pub(crate) fn indices(values: &[i32]) -> Tensor {
    Tensor::from_slice(values, [values.len()]).unwrap()
}

/// The elements of an f64 tensor of any layout.
pub(crate) fn values(t: &Tensor) -> Vec<f64> {
    Lane::cpu().to_host(t).unwrap().to_vec().unwrap()
}

/// Asserts that the gradients of Σ_o w_o·out_o, random w, with respect to all of `leaves` and `params`, are those that
/// finite differences of `f` give: see [`worst_error`].
pub(crate) fn check(
    name: &str,
    leaves: &[Tensor],
    params: &[Parameter],
    f: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>>,
) {
    let (worst, which) = worst_error(leaves, params, f);
    println!("{name}: {worst:.1e}");
    assert!(worst < TOLERANCE, "{name}: the gradient of {which} is off by {worst:.2e} of its largest element");
}

/// The largest error of any gradient, max|a − b| / max|b| with b from finite differences, and whose it is.
///
/// `f` computes outputs (f64) from one variable per tensor of `leaves`, and from whatever parameters it has captured;
/// those named in `params` are compared as well. Leaves and parameters must be contiguous f64; they are perturbed in
/// place and put back. Every backward runs twice, the second time from a gradient that is a strided view, and on
/// parameter gradients that are not zero before, because they are to be added to.
pub(crate) fn worst_error(
    leaves: &[Tensor],
    params: &[Parameter],
    f: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>>,
) -> (f64, String) {
    let lane = Lane::cpu();
    let forward = || {
        let tape = Tape::inference(&lane);
        let vars: Vec<Var> = leaves.iter().map(|t| tape.constant(t.clone())).collect();
        let outputs = f(&tape, &vars).unwrap();
        outputs.iter().flat_map(|o| values(o.value())).collect::<Vec<f64>>()
    };
    let weights = uniform(0x5eed, forward().len());
    let backward = |strided: bool| analytic(&lane, leaves, params, &weights, strided, &f);
    let gradients = [backward(false), backward(true)];

    let mut worst = (0.0, "nothing".to_owned());
    let perturbed = leaves.iter().chain(params.iter().map(Parameter::value));
    for (i, t) in perturbed.enumerate() {
        let probes: Vec<usize> = (0..t.elements()).step_by(t.elements().div_ceil(PROBES) | 1).collect();
        let expected: Vec<f64> = probes.iter().map(|&e| difference(t, e, &weights, forward)).collect();
        let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        for gradient in &gradients {
            // f64::max would pass over a NaN.
            let off = probes.iter().zip(&expected).map(|(&e, b)| (gradient[i][e] - b).abs());
            let off = off.fold(0.0, |m, v| if v > m || v.is_nan() { v } else { m });
            let error = off / largest.max(NOISE / TOLERANCE);
            if error > worst.0 || error.is_nan() {
                let name = i.checked_sub(leaves.len()).map_or(format!("input {i}"), |p| params[p].name().to_owned());
                worst = (error, name);
            }
        }
    }
    worst
}

/// Gradients as the tape gives them, of leaves, then of parameters.
fn analytic(
    lane: &Lane,
    leaves: &[Tensor],
    params: &[Parameter],
    weights: &[f64],
    strided: bool,
    f: &impl Fn(&Tape, &[Var]) -> Result<Vec<Var>>,
) -> Vec<Vec<f64>> {
    const BEFORE: f64 = 0.5;
    for p in params {
        lane.fill(p.grad(), BEFORE).unwrap();
    }
    let tape = Tape::new(lane);
    let vars: Vec<Var> = leaves.iter().map(|t| tape.leaf(t.clone())).collect();
    let outputs = f(&tape, &vars).unwrap();
    let mut from = 0;
    let roots: Vec<(&Var, Tensor)> = outputs
        .iter()
        .map(|o| {
            let (shape, n) = (*o.value().shape(), o.value().elements());
            let weights = &weights[from..from + n];
            from += n;
            let dy = if strided { every_second(weights, shape) } else { Tensor::from_slice(weights, shape).unwrap() };
            (o, dy)
        })
        .collect();
    let grads = tape.backward(&roots).unwrap();
    let of_leaf = |(v, t): (&Var, &Tensor)| grads.get(v).map_or(vec![0.0; t.elements()], values);
    let of_param = |p: &Parameter| values(p.grad()).iter().map(|g| g - BEFORE).collect();
    vars.iter().zip(leaves).map(of_leaf).chain(params.iter().map(of_param)).collect()
}

/// `data` in a view whose elements lie two apart.
fn every_second(data: &[f64], shape: Shape) -> Tensor {
    let wide: Vec<f64> = data.iter().flat_map(|&v| [v, f64::NAN]).collect();
    let wide = Tensor::from_slice(&wide, [data.len(), 2]).unwrap();
    wide.narrow(1, 0, 1).unwrap().reshape(shape).unwrap()
}

/// The derivative of Σ weights·forward() by element `e` of `t`: the central difference of fourth order.
fn difference(t: &Tensor, e: usize, weights: &[f64], forward: impl Fn() -> Vec<f64>) -> f64 {
    let original: Vec<f64> = t.to_vec().unwrap();
    let h = STEP * original[e].abs().max(1.0);
    let at = |steps: f64| {
        let mut moved = original.clone();
        moved[e] += steps * h;
        t.write(&moved).unwrap();
        forward()
    };
    let [far_below, below, above, far_above] = [-2.0, -1.0, 1.0, 2.0].map(at);
    t.write(&original).unwrap();
    // Differences before the sum over outputs: most of a large output cancels exactly.
    let slope = |i: usize| (8.0 * (above[i] - below[i]) - (far_above[i] - far_below[i])) / (12.0 * h);
    (0..weights.len()).map(|i| weights[i] * slope(i)).sum()
}

/// The bits of an f32 or f64 tensor, for comparisons that allow no difference.
pub(crate) fn bits(t: &Tensor) -> Vec<u64> {
    values(&Lane::cpu().cast(t, DType::F64).unwrap()).iter().map(|v| v.to_bits()).collect()
}
