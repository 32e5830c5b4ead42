//! The backward of activations whose results had a weight per row, and grouped products put together from single ones.

use fsmoe::device::{ExpertKernels, Gelu, GroupedKernels, RowWeights, Segments};

use super::support::{DTYPES, Out, acc, compare, data};
use crate::support::uniform;

const FORMS: [Gelu; 2] = [Gelu::Erf, Gelu::Tanh];

/// `n` values in (−4, 4).
fn values(seed: u64, n: usize) -> Vec<f64> {
    uniform(seed, n).iter().map(|v| 4.0 * v).collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_weighted_activations() {
    for (seed, (rows, cols)) in
        [(1, 1), (1, 8), (5, 7), (33, 264), (130, 1024), (9, 1031), (17, 4096)].into_iter().enumerate()
    {
        let (n, seed) = (rows * cols, seed as u64 * 10);
        let inputs = || [0, 1, 2].map(|i| data([rows, cols], values(seed + i, n)));
        let out = || Out::Data([rows, cols].into());
        for dtype in DTYPES {
            for form in FORMS {
                let [x, dy, _] = inputs();
                let weights = acc([rows], uniform(seed + 5, rows));
                compare!(
                    &format!("gelu_backward_weighted {form:?} ({rows}, {cols})"),
                    dtype,
                    [x, dy, weights],
                    [out(), out(), Out::Acc([rows].into())],
                    |k, i, o| {
                        let weights = RowWeights { weights: &i[2], d_weights: &o[2] };
                        k.gelu_backward_weighted(form, &i[0], &i[1], Some(weights), &o[0], &o[1])
                    }
                );
                let [x, dy, _] = inputs();
                compare!("gelu_backward_weighted, no weights", dtype, [x, dy], [out(), out()], |k, i, o| {
                    k.gelu_backward_weighted(form, &i[0], &i[1], None, &o[0], &o[1])
                });
            }
            let [gate, up, dy] = inputs();
            let weights = acc([rows], uniform(seed + 5, rows));
            compare!(
                &format!("swiglu_backward_weighted ({rows}, {cols})"),
                dtype,
                [gate, up, dy, weights],
                [out(), out(), out(), Out::Acc([rows].into())],
                |k, i, o| {
                    let weights = RowWeights { weights: &i[3], d_weights: &o[3] };
                    k.swiglu_backward_weighted(&i[0], &i[1], &i[2], Some(weights), &o[0], &o[1], &o[2])
                }
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_grouped_products() {
    let (e, m, h) = (3, 40, 24);
    let offsets = [0, 7, 7, 20];
    for segments in [Segments::Even { experts: e, each: 6 }, Segments::Host(&offsets)] {
        let rows = if let Segments::Host(o) = segments { o[e] } else { 18 };
        let x = |seed, cols: usize| data([rows, cols], uniform(seed, rows * cols));
        let w = |seed, n: usize, k: usize| data([e, n, k], uniform(seed, e * n * k));
        let out = |cols: usize| Out::Data([rows, cols].into());
        let weights = || acc([rows], uniform(9, rows));
        for dtype in DTYPES {
            compare!(
                "grouped_swiglu",
                dtype,
                [x(1, m), w(2, h, m), w(3, h, m)],
                [out(h), out(h), out(h)],
                |k, i, o| { k.grouped_swiglu(segments, &i[0], &i[1], &i[2], &o[0], &o[1], &o[2]) }
            );
            compare!("grouped_gelu", dtype, [x(1, m), w(2, h, m)], [out(h), out(h)], |k, i, o| {
                k.grouped_gelu(Gelu::Erf, segments, &i[0], &i[1], &o[0], &o[1])
            });
            compare!("grouped_linear", dtype, [x(1, h), w(2, m, h)], [out(m)], |k, i, o| {
                k.grouped_linear(segments, &i[0], &i[1], &o[0])
            });
            compare!("grouped_linear_data", dtype, [x(1, h), w(2, h, m), x(3, h), w(4, h, m)], [out(m)], |k, i, o| k
                .grouped_linear_data(segments, &[(&i[0], &i[1]), (&i[2], &i[3])], &o[0]));
            let dw = |seed| Out::Add(w(seed, h, m));
            compare!("grouped_linear_weight", dtype, [x(1, h), x(2, h), x(3, m)], [dw(4), dw(5)], |k, i, o| {
                k.grouped_linear_weight(segments, &[(&i[0], &o[0], 1.0), (&i[1], &o[1], 0.0)], &i[2])
            });
            compare!(
                "grouped_swiglu_backward",
                dtype,
                [x(1, m), w(2, m, h), x(3, h), x(4, h), weights()],
                [out(h), out(h), out(h), Out::Rounded([rows].into())],
                |k, i, o| {
                    let weights = RowWeights { weights: &i[4], d_weights: &o[3] };
                    let (dy, w, gate, up) = (&i[0], &i[1], &i[2], &i[3]);
                    k.grouped_swiglu_backward(segments, dy, w, gate, up, Some(weights), &o[0], &o[1], &o[2])
                }
            );
            compare!(
                "grouped_gelu_backward",
                dtype,
                [x(1, m), w(2, m, h), x(3, h), weights()],
                [out(h), out(h), Out::Rounded([rows].into())],
                |k, i, o| {
                    let weights = RowWeights { weights: &i[3], d_weights: &o[2] };
                    k.grouped_gelu_backward(Gelu::Tanh, segments, &i[0], &i[1], &i[2], Some(weights), &o[0], &o[1])
                }
            );
        }
    }
}
