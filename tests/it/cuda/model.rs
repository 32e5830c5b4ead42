//! Norms, rotary positions, attention and cross-entropy.

use fsmoe::device::cpu::Cpu;
use fsmoe::device::{AttentionShape, Lane, ModelKernels, Rope};
use fsmoe::tensor::{DType, Shape, Tensor};

use super::support::{DTYPES, In, Out, acc, assert_close, compare, data, down, gpu, int, tolerance, uniform, up, wide};

fn random(seed: u64, n: usize) -> Vec<f64> {
    uniform(seed, n, -1.0, 1.0)
}

/// Values for a tensor that begins one element later than its memory, off every vector's boundary.
fn late(seed: u64, n: usize) -> In {
    data([n + 1], random(seed, n + 1))
}

/// The tensor in what [`late`] made.
fn tail(t: &Tensor, shape: impl Into<Shape>) -> Tensor {
    t.narrow(0, 1, t.elements() - 1).unwrap().reshape(shape).unwrap()
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms

const EPS: f64 = 1e-5;
/// Rows in a warp, in several, in a block; wider than registers; in vectors and not; one block and many.
const ROWS: [(usize, usize); 12] = [
    // Of two, a row's gradient all but vanishes.
    (1, 3),
    (131, 37),
    (5, 128),
    (1001, 64),
    (64, 768),
    (33, 1600),
    (70, 2047),
    (7, 4096),
    (3, 8200),
    (2, 20_000),
    (300, 256),
    (0, 5),
];

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_layer_norm_forward_and_backward() {
    for dtype in DTYPES {
        for (r, m) in ROWS {
            compare!(
                &format!("layer_norm of {r} rows of {m}"),
                dtype,
                [data([r, m], random(1, r * m)), data([m], random(2, m)), data([m], random(3, m))],
                [Out::Data([r, m].into()), Out::Acc([r].into()), Out::Acc([r].into())],
                |k, i, o| k.layer_norm(&i[0], &i[1], &i[2], EPS, &o[0], &o[1], &o[2])
            );
            let [mean, rstd] = statistics(dtype, &random(1, r * m), m, true);
            compare!(
                &format!("layer_norm_backward of {r} rows of {m}"),
                dtype,
                [
                    data([r, m], random(1, r * m)),
                    data([m], random(2, m)),
                    acc([r], mean),
                    acc([r], rstd),
                    data([r, m], random(4, r * m)),
                ],
                [Out::Data([r, m].into()), Out::Add(data([m], random(5, m))), Out::Add(data([m], random(6, m)))],
                |k, i, o| k.layer_norm_backward(&i[0], &i[1], &i[2], &i[3], &i[4], &o[0], &o[1], &o[2])
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_rms_norm_forward_and_backward() {
    for dtype in DTYPES {
        for (r, m) in ROWS {
            compare!(
                &format!("rms_norm of {r} rows of {m}"),
                dtype,
                [data([r, m], random(1, r * m)), data([m], random(2, m))],
                [Out::Data([r, m].into()), Out::Acc([r].into())],
                |k, i, o| k.rms_norm(&i[0], &i[1], EPS, &o[0], &o[1])
            );
            let [_, rstd] = statistics(dtype, &random(1, r * m), m, false);
            compare!(
                &format!("rms_norm_backward of {r} rows of {m}"),
                dtype,
                [
                    data([r, m], random(1, r * m)),
                    data([m], random(2, m)),
                    acc([r], rstd),
                    data([r, m], random(4, r * m)),
                ],
                [Out::Data([r, m].into()), Out::Add(data([m], random(5, m)))],
                |k, i, o| k.rms_norm_backward(&i[0], &i[1], &i[2], &i[3], &o[0], &o[1])
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_norms_off_the_boundary() {
    for dtype in DTYPES {
        for (r, m) in [(5, 64), (40, 128), (3, 2048), (2, 6000)] {
            let [mean, rstd] = statistics(dtype, &random(1, r * m + 1)[1..], m, true);
            compare!(
                &format!("norms of {r} rows of {m}, off the boundary"),
                dtype,
                [late(1, r * m), late(2, m), late(3, m), late(4, r * m), acc([r], mean), acc([r], rstd)],
                [
                    Out::Data([r, m].into()),
                    Out::Acc([r].into()),
                    Out::Acc([r].into()),
                    Out::Data([r, m].into()),
                    Out::Add(data([m], random(5, m))),
                    Out::Add(data([m], random(6, m))),
                ],
                |k, i, o| {
                    let (x, gain, bias) = (tail(&i[0], [r, m]), tail(&i[1], [m]), tail(&i[2], [m]));
                    k.layer_norm(&x, &gain, &bias, EPS, &o[0], &o[1], &o[2])?;
                    let dy = tail(&i[3], [r, m]);
                    k.layer_norm_backward(&x, &gain, &i[4], &i[5], &dy, &o[3], &o[4], &o[5])
                }
            );
        }
    }
}

/// Mean and rstd of rows whose values are first rounded.
fn statistics(dtype: DType, x: &[f64], m: usize, centred: bool) -> [Vec<f64>; 2] {
    let r = x.len() / m;
    let x = rounded(dtype, x, [r, m]);
    let (y, mean, rstd) = (zeros([r, m]), zeros([r]), zeros([r]));
    let gain = zeros([m]);
    if centred {
        Cpu.layer_norm(&x, &gain, &gain, EPS, &y, &mean, &rstd).unwrap();
    } else {
        Cpu.rms_norm(&x, &gain, EPS, &y, &rstd).unwrap();
    }
    [wide(&mean), wide(&rstd)]
}

fn zeros(shape: impl Into<Shape>) -> Tensor {
    Tensor::host_zeros(shape, DType::F64)
}

/// Values as the kernels get them, in f64.
fn rounded(dtype: DType, values: &[f64], shape: impl Into<Shape>) -> Tensor {
    let t = Lane::cpu().cast(&Tensor::from_slice(values, shape).unwrap(), dtype).unwrap();
    Lane::cpu().cast(&t, DType::F64).unwrap()
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotary positions

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_rope_turns_and_turns_back() {
    for dtype in DTYPES {
        for ([b, l, h, d], first, theta) in [
            ([2, 5, 3, 8], 0, 1e4),
            ([1, 7, 9, 64], 100, 1e4),
            ([1, 3, 20, 6], 1, 1e6),
            ([2, 129, 8, 128], 0, 1e6),
            ([1, 2, 1, 2], 0, 1e4),
            ([1, 3, 2, 96], 1_000_000, 1e4),
            ([0, 3, 2, 4], 0, 1e4),
        ] {
            let rope = Rope { theta, first };
            let n = b * l * h * d;
            compare!(
                &format!("rope of ({b}, {l}, {h}, {d}) from {first} on"),
                dtype,
                [data([b, l, h, d], random(1, n)), late(2, n)],
                [
                    Out::Data([b, l, h, d].into()),
                    Out::Data([b, l, h, d].into()),
                    Out::Add(data([b, l, h, d], random(3, n))),
                    Out::Data([b, l, h, d].into()),
                ],
                |k, i, o| {
                    k.rope(&i[0], rope, false, &o[0])?;
                    k.rope(&i[0], rope, true, &o[1])?;
                    k.rope(&o[2], rope, false, &o[2])?;
                    k.rope(&tail(&i[1], [b, l, h, d]), rope, true, &o[3])
                }
            );
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

/// B, L, Hq, Hkv, D: every width of the kernels, filled and not; tiles whole and ragged; one head and groups.
const SHAPES: [[usize; 5]; 12] = [
    [2, 2, 2, 1, 16],
    [1, 70, 2, 2, 32],
    [2, 131, 4, 2, 20],
    [1, 200, 6, 2, 64],
    [3, 64, 3, 3, 48],
    [1, 65, 1, 1, 33],
    [2, 129, 4, 1, 80],
    [1, 257, 2, 1, 128],
    [1, 100, 2, 1, 200],
    [1, 97, 2, 2, 256],
    [1, 1000, 2, 1, 64],
    [1, 600, 4, 1, 128],
];

fn shape([batch, seq, heads, kv_heads, head_dim]: [usize; 5]) -> (AttentionShape, [usize; 2], [usize; 2]) {
    let tokens = batch * seq;
    let shape = AttentionShape { batch, seq, heads, kv_heads, head_dim };
    (shape, [tokens, heads * head_dim], [tokens, kv_heads * head_dim])
}

/// Queries and keys spread so that some keys matter much more than others.
fn operands(q: [usize; 2], k: [usize; 2]) -> [Vec<f64>; 3] {
    let (q, k) = (q[0] * q[1], k[0] * k[1]);
    [uniform(1, q, -2.0, 2.0), uniform(2, k, -2.0, 2.0), uniform(3, k, -1.0, 1.0)]
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_attention_forward() {
    for dtype in DTYPES {
        for sizes in SHAPES.into_iter().chain([[2, 1, 2, 1, 16], [5, 1, 3, 3, 100], [0, 3, 2, 1, 8]]) {
            let (s, q, k) = shape(sizes);
            let [q_values, k_values, v_values] = operands(q, k);
            compare!(
                &format!("attention of {s:?}"),
                dtype,
                [data(q, q_values), data(k, k_values), data(k, v_values)],
                [Out::Data(q.into()), Out::Acc([s.batch, s.heads, s.seq].into())],
                |kernels, i, o| kernels.attention(s, &i[0], &i[1], &i[2], &o[0], &o[1])
            );
        }
    }
}

/// out and lse of an attention of rounded operands.
fn attended(dtype: DType, s: AttentionShape, operands: &[Vec<f64>; 3], q: [usize; 2], k: [usize; 2]) -> [Vec<f64>; 2] {
    let [q_in, k_in, v_in] = [(0, q), (1, k), (2, k)].map(|(n, shape)| rounded(dtype, &operands[n], shape));
    let (out, lse) = (zeros(q), zeros([s.batch, s.heads, s.seq]));
    Cpu.attention(s, &q_in, &k_in, &v_in, &out, &lse).unwrap();
    [wide(&out), wide(&lse)]
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_attention_backward() {
    for dtype in DTYPES {
        for sizes in SHAPES {
            let (s, q, k) = shape(sizes);
            let values = operands(q, k);
            let [out, lse] = attended(dtype, s, &values, q, k);
            let [q_values, k_values, v_values] = values;
            compare!(
                &format!("attention_backward of {s:?}"),
                dtype,
                [
                    data(q, q_values),
                    data(k, k_values),
                    data(k, v_values),
                    data(q, out),
                    acc([s.batch, s.heads, s.seq], lse),
                    data(q, random(4, q[0] * q[1])),
                ],
                [Out::Data(q.into()), Out::Data(k.into()), Out::Data(k.into())],
                |kernels, i, o| kernels
                    .attention_backward(s, &i[0], &i[1], &i[2], &i[3], &i[4], &i[5], &o[0], &o[1], &o[2])
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_attention_off_the_boundary() {
    for dtype in DTYPES {
        for sizes in [[2, 70, 4, 2, 64], [1, 40, 2, 1, 128]] {
            let (s, q, k) = shape(sizes);
            let (nq, nk) = (q[0] * q[1], k[0] * k[1]);
            let values = [random(1, nq + 1), random(2, nk + 1), random(3, nk + 1)].map(|v| v[1..].to_vec());
            let [_, lse] = attended(dtype, s, &values, q, k);
            compare!(
                &format!("attention of {s:?}, off the boundary"),
                dtype,
                [late(1, nq), late(2, nk), late(3, nk), late(4, nq), acc([s.batch, s.heads, s.seq], lse), late(5, nq)],
                [
                    Out::Data(q.into()),
                    Out::Acc([s.batch, s.heads, s.seq].into()),
                    Out::Data(q.into()),
                    Out::Data(k.into()),
                    Out::Data(k.into()),
                ],
                |kernels, i, o| {
                    let (q_in, k_in, v_in) = (tail(&i[0], q), tail(&i[1], k), tail(&i[2], k));
                    kernels.attention(s, &q_in, &k_in, &v_in, &o[0], &o[1])?;
                    let (out, d_out) = (tail(&i[3], q), tail(&i[5], q));
                    kernels.attention_backward(s, &q_in, &k_in, &v_in, &out, &i[4], &d_out, &o[2], &o[3], &o[4])
                }
            );
        }
    }
}

/// A query that sees only its own key passes it nothing: what is left is rounding.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_attention_of_one_token_gives_no_gradient_to_query_and_key() {
    for dtype in DTYPES {
        let (s, q, k) = shape([3, 1, 4, 2, 24]);
        let on = |seed, shape: [usize; 2]| {
            up(&Lane::cpu().cast(&rounded(dtype, &random(seed, shape[0] * shape[1]), shape), dtype).unwrap())
        };
        let (q_in, k_in, v_in, d_out) = (on(1, q), on(2, k), on(3, k), on(4, q));
        let lane = gpu();
        let empty = |shape: [usize; 2]| up(&Tensor::host_zeros(shape, dtype));
        let (out, lse) = (empty(q), up(&Tensor::host_zeros([3, 4, 1], DType::F32)));
        lane.attention(s, &q_in, &k_in, &v_in, &out, &lse).unwrap();
        let (dq, dk, dv) = (empty(q), empty(k), empty(k));
        lane.attention_backward(s, &q_in, &k_in, &v_in, &out, &lse, &d_out, &dq, &dk, &dv).unwrap();
        for grad in [dq, dk] {
            assert!(wide(&down(&grad)).iter().all(|v| v.abs() < tolerance(dtype)), "{dtype}");
        }
        // Two query heads share a key head: its value gets the sum of their gradients.
        let d_out = wide(&down(&d_out));
        let sums: Vec<f64> =
            (0..3 * 48).map(|i| i / 48 * 96 + i % 48 / 24 * 48 + i % 24).map(|at| d_out[at] + d_out[at + 24]).collect();
        assert_close("dv", &down(&dv), &Tensor::from_slice(&sums, k).unwrap(), tolerance(dtype));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_attention_refuses_what_it_cannot_do() {
    let (s, q, k) = shape([1, 2, 1, 1, 257]);
    let t = |shape: [usize; 2]| up(&Tensor::host_zeros(shape, DType::F32));
    let lse = up(&Tensor::host_zeros([1, 1, 2], DType::F32));
    let error = gpu().attention(s, &t(q), &t(k), &t(k), &t(q), &lse).unwrap_err().to_string();
    assert!(error.contains("257") && error.contains("256"), "{error}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Cross-entropy

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_cross_entropy_forward_and_backward() {
    for dtype in DTYPES {
        for (n, v) in [(1, 2), (5, 256), (300, 256), (7, 1001), (33, 2049), (9, 50_257), (2, 262_144), (0, 10)] {
            let logits = || uniform(1, n * v, -4.0, 4.0);
            let targets: Vec<i32> = uniform(2, n, 0.0, v as f64).iter().map(|t| *t as i32).collect();
            compare!(
                &format!("cross_entropy of {n} rows of {v}"),
                dtype,
                [data([n, v], logits()), int([n], targets.clone())],
                [Out::Acc([n].into()), Out::Acc([n].into())],
                |k, i, o| k.cross_entropy(&i[0], &i[1], &o[0], &o[1])
            );
            let lse = log_sums(dtype, &logits(), n, v);
            compare!(
                &format!("cross_entropy_backward of {n} rows of {v}"),
                dtype,
                [data([n, v], logits()), int([n], targets.clone()), acc([n], lse), acc([n], random(3, n))],
                [Out::Data([n, v].into()), Out::Add(data([n, v], logits()))],
                |k, i, o| {
                    k.cross_entropy_backward(&i[0], &i[1], &i[2], &i[3], &o[0])?;
                    k.cross_entropy_backward(&o[1], &i[1], &i[2], &i[3], &o[1])
                }
            );
        }
    }
}

fn log_sums(dtype: DType, logits: &[f64], n: usize, v: usize) -> Vec<f64> {
    let x = rounded(dtype, logits, [n, v]);
    let (loss, lse) = (zeros([n]), zeros([n]));
    Cpu.cross_entropy(&x, &Tensor::from_slice(&vec![0; n], [n]).unwrap(), &loss, &lse).unwrap();
    wide(&lse)
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_cross_entropy_is_no_number_where_a_logit_or_a_target_is_none() {
    let (n, v) = (3, 300);
    let mut values = vec![0.5_f32; n * v];
    values[v + 7] = f32::NAN;
    let logits = up(&Tensor::from_slice(&values, [n, v]).unwrap());
    let targets = up(&Tensor::from_slice(&[0, 0, v as i32], [n]).unwrap());
    let (loss, lse) = (up(&Tensor::host_zeros([n], DType::F32)), up(&Tensor::host_zeros([n], DType::F32)));
    gpu().cross_entropy(&logits, &targets, &loss, &lse).unwrap();
    let loss = wide(&down(&loss));
    assert!((loss[0] - (v as f64).ln()).abs() < 1e-5 && loss[1].is_nan() && loss[2].is_nan(), "{loss:?}");
}
