//! AdamW, clipping, and operations over many tensors.

use fsmoe::device::{AdamW, AdamWItem, OptimKernels};
use fsmoe::tensor::{DType, Tensor};

use super::support::{DTYPES, In, Out, acc, compare, data, down, gpu, uniform, up, wide};

const SETTINGS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 7 };

fn random(seed: u64, n: usize) -> Vec<f64> {
    uniform(seed, n, -1.0, 1.0)
}

/// Weight, first and second moment of `n` elements.
fn state(seed: u64, n: usize) -> [Out; 3] {
    [random(seed, n), random(seed + 1, n), uniform(seed + 2, n, 0.01, 1.0)].map(|v| Out::Add(acc([n], v)))
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_adamw_of_one_tensor() {
    for dtype in DTYPES {
        for n in [0, 1, 3, 1000, 16_384, 100_003] {
            for (scale, step) in [(0.25, 1), (1.0, 100_000), (0.0, 3)] {
                compare!(
                    &format!("adamw of {n} elements, scale {scale}, step {step}"),
                    dtype,
                    [data([n], random(4, n)), acc([1], vec![scale])],
                    state(1, n),
                    |k, i, o| k.adamw(AdamW { step, ..SETTINGS }, &i[1], &o[0], &o[1], &o[2], &i[0])
                );
            }
        }
    }
}

/// More tensors than one launch takes, small and large, one off its boundary.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_adamw_of_many_tensors_is_that_of_each() {
    let sizes: Vec<usize> = (0..70).map(|i| [1, 5, 16_384, 40_000, 7, 0, 20_001][i % 7]).collect();
    DTYPES.into_iter().for_each(|dtype| adamw_of_many(&sizes, dtype));
}

pub(super) fn adamw_of_many(sizes: &[usize], dtype: DType) {
    let mut inputs = vec![acc([1], vec![0.5])];
    inputs.extend(sizes.iter().enumerate().map(|(i, n)| data([n + 1], random(i as u64, n + 1))));
    let mut outputs = vec![Out::Acc([AdamW::SCALARS].into())];
    for (i, n) in sizes.iter().enumerate() {
        outputs.extend(state(1000 + 10 * i as u64, *n));
        outputs.push(Out::Data([*n].into()));
    }
    compare!("adamw of many tensors", dtype, inputs, outputs, |k, i, o| {
        k.adamw_scalars(SETTINGS, &o[0])?;
        let grads: Vec<Tensor> = (0..sizes.len())
            .map(|n| i[n + 1].narrow(0, usize::from(n % 7 == 6), sizes[n]))
            .collect::<fsmoe::Result<_>>()?;
        let items: Vec<AdamWItem<'_>> = (0..sizes.len())
            .map(|n| AdamWItem {
                weight_decay: if n % 3 == 0 { 0.0 } else { 0.1 },
                weight: &o[4 * n + 1],
                m: &o[4 * n + 2],
                v: &o[4 * n + 3],
                grad: &grads[n],
                copy: Some(&o[4 * n + 4]),
            })
            .collect();
        k.adamw_many(SETTINGS, &o[0], &i[0], &items)
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_adamw_takes_gradients_of_several_types_and_no_copies() {
    let n = 5000;
    let tensor = |seed, dtype: DType| {
        let t = Tensor::from_slice(&random(seed, n), [n]).unwrap();
        fsmoe::device::Lane::cpu().cast(&t, dtype).unwrap()
    };
    let lane = gpu();
    let run = |many: bool| {
        let state: Vec<[Tensor; 3]> =
            (0..3).map(|i| [10 * i, 10 * i + 1, 10 * i + 2].map(|s| up(&tensor(s, DType::F32)))).collect();
        for [_, _, v] in &state {
            fsmoe::device::MemoryKernels::fill(&lane, v, 0.5).unwrap();
        }
        let grads = [(DType::F32, 1), (DType::BF16, 2), (DType::F16, 3)].map(|(d, s)| up(&tensor(100 + s, d)));
        let scale = up(&Tensor::from_slice(&[0.5_f32], [1]).unwrap());
        let item = |n: usize| AdamWItem {
            weight_decay: 0.1,
            weight: &state[n][0],
            m: &state[n][1],
            v: &state[n][2],
            grad: &grads[n],
            copy: None,
        };
        if many {
            let scalars = up(&Tensor::host_zeros([AdamW::SCALARS], DType::F32));
            lane.adamw_scalars(SETTINGS, &scalars).unwrap();
            lane.adamw_many(SETTINGS, &scalars, &scale, &[item(0), item(1), item(2)]).unwrap();
        } else {
            for n in 0..3 {
                lane.adamw(SETTINGS, &scale, item(n).weight, item(n).m, item(n).v, item(n).grad).unwrap();
            }
        }
        state.iter().flatten().flat_map(|t| wide(&down(t))).collect::<Vec<_>>()
    };
    assert!(run(true) == run(false));
}

/// What a captured step computes with is in device memory: the same graph does step after step.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_a_captured_adamw_takes_each_steps_numbers() {
    // Of its own: what other tests issue meanwhile is no part of the graph.
    let (lane, n) = (gpu().fork().unwrap(), 10_000);
    let tensor = |seed: u64, low: f64| {
        let values: Vec<f32> = uniform(seed, n, low, 1.0).iter().map(|v| *v as f32).collect();
        up(&Tensor::from_slice(&values, [n]).unwrap())
    };
    let grad = tensor(4, -1.0);
    let scale = up(&Tensor::from_slice(&[0.5_f32], [1]).unwrap());
    let settings = |step: u64| AdamW { step, lr: 1e-3 * step as f64, ..SETTINGS };
    let run = |captured: bool| {
        let (weight, m, v) = (tensor(1, -1.0), tensor(2, -1.0), tensor(3, 0.01));
        let scalars = up(&Tensor::host_zeros([AdamW::SCALARS], DType::F32));
        let update = |step| {
            let (weight, m, v, grad) = (&weight, &m, &v, &grad);
            let item = AdamWItem { weight_decay: 0.1, weight, m, v, grad, copy: None };
            lane.adamw_many(settings(step), &scalars, &scale, &[item])
        };
        gpu().synchronize().unwrap();
        let graph = captured.then(|| lane.capture(&[], || update(1)).unwrap().0);
        for step in 1..4 {
            lane.adamw_scalars(settings(step), &scalars).unwrap();
            match &graph {
                Some(graph) => graph.replay().unwrap(),
                None => update(step).unwrap(),
            }
        }
        lane.synchronize().unwrap();
        [weight, m, v].map(|t| wide(&down(&t)))
    };
    assert!(run(false) == run(true));
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_sums_of_squares_of_many_tensors() {
    let sizes: Vec<usize> = (0..140).map(|i| [3, 0, 16_384, 1, 33_333, 17, 1000][i % 7]).collect();
    DTYPES.into_iter().for_each(|dtype| squares_of_many(&sizes, dtype));
}

pub(super) fn squares_of_many(sizes: &[usize], dtype: DType) {
    let inputs: Vec<In> = sizes.iter().enumerate().map(|(i, n)| data([n + 1], random(i as u64, n + 1))).collect();
    compare!("sum of squares", dtype, inputs, [Out::Add(acc([1], vec![3.0]))], |k, i, o| {
        // Every fifth off its boundary.
        let views: Vec<Tensor> = (0..sizes.len())
            .map(|n| i[n].narrow(0, usize::from(n % 5 == 0), sizes[n]))
            .collect::<fsmoe::Result<_>>()?;
        k.sum_squares_many(&views.iter().collect::<Vec<_>>(), &o[0])
    });
    compare!("no squares", dtype, [data([0], vec![])], [Out::Add(acc([1], vec![3.0]))], |k, i, o| {
        k.sum_squares_many(&[&i[0]], &o[0])
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_clip_scale() {
    clip_scales();
}

/// Norms below and above the limit, zero, and none.
pub(super) fn clip_scales() {
    for (sum, pre, most) in [(16.0, 0.5, 1.0), (16.0, 0.5, 3.0), (0.0, 1.0, 1.0)] {
        compare!(
            "clip_scale",
            DType::F32,
            [acc([1], vec![sum])],
            [Out::Acc([1].into()), Out::Acc([1].into())],
            |k, i, o| k.clip_scale(&i[0], pre, most, &o[0], &o[1])
        );
    }
    for sum in [f32::NAN, f32::INFINITY] {
        let one = |v: f32| up(&Tensor::from_slice(&[v], [1]).unwrap());
        let (norm, scale) = (one(7.0), one(7.0));
        gpu().clip_scale(&one(sum), 0.5, 1.0, &norm, &scale).unwrap();
        assert!(!wide(&down(&norm))[0].is_finite());
        assert_eq!(wide(&down(&scale)), [0.0]);
    }
}
