//! Cases of the memory, math and expert families.

use super::case::{Arg, Case, Kind::*, Size, Values::*};
use super::{NO_FIX, NO_FLOPS, NO_SETUP};
use crate::device::Gelu;
use crate::rng::{Counter, Purpose};

/// Rows and columns of an elementwise operation: the experts' hidden rows of Mixtral 8x7B for 8192 tokens.
const HIDDEN_ROWS: &[Size] =
    &[Size { name: "R", gpu: 16384, cpu: 1024, checked: 70 }, Size { name: "H", gpu: 14336, cpu: 512, checked: 300 }];
/// Tokens and their width.
const TOKENS: &[Size] =
    &[Size { name: "T", gpu: 32768, cpu: 1024, checked: 70 }, Size { name: "M", gpu: 4096, cpu: 256, checked: 300 }];
/// Router logits.
const LOGITS: &[Size] =
    &[Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 }, Size { name: "E", gpu: 128, cpu: 32, checked: 200 }];
/// Chosen scores.
const CHOSEN: &[Size] =
    &[Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 }, Size { name: "k", gpu: 8, cpu: 2, checked: 12 }];
/// X-MoE's projected tokens.
const PROJECTED: &[Size] =
    &[Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 }, Size { name: "d", gpu: 256, cpu: 32, checked: 90 }];

pub(super) const CASES: &[Case] = &[
    Case {
        name: "copy",
        family: "memory",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["T"], s["M"]]), Arg::out(Data, [s["T"], s["M"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.copy(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "cast",
        family: "memory",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["T"], s["M"]]), Arg::out(Data, [s["T"], s["M"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.copy(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "fill",
        family: "memory",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| vec![Arg::out(Data, [s["T"], s["M"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.fill(&t[0], 1.5),
        flops: NO_FLOPS,
    },
    Case {
        name: "normal",
        family: "memory",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| vec![Arg::out(Data, [s["T"], s["M"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.normal(Counter { seed: 1, purpose: Purpose::Test, step: 2 }, 3, &t[0]),
        flops: NO_FLOPS,
    },
    Case {
        name: "gemm",
        family: "math",
        sizes: &[
            Size { name: "R", gpu: 16384, cpu: 512, checked: 70 },
            Size { name: "M", gpu: 4096, cpu: 256, checked: 70 },
            Size { name: "H", gpu: 14336, cpu: 512, checked: 70 },
        ],
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["R"], s["M"]]), Arg::data([s["H"], s["M"]]), Arg::out(Data, [s["R"], s["H"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.gemm(1.0, &t[0], &t[1].t()?, 0.0, &t[2]),
        flops: |s| 2.0 * (s["R"] * s["M"] * s["H"]) as f64,
    },
    Case {
        name: "gemm_batched",
        family: "math",
        sizes: &[
            Size { name: "E", gpu: 8, cpu: 4, checked: 5 },
            Size { name: "C", gpu: 2048, cpu: 256, checked: 40 },
            Size { name: "M", gpu: 4096, cpu: 128, checked: 70 },
            Size { name: "H", gpu: 14336, cpu: 256, checked: 70 },
        ],
        fix: NO_FIX,
        args: |s| {
            let (e, c, m, h) = (s["E"], s["C"], s["M"], s["H"]);
            vec![Arg::data([e, c, m]), Arg::data([e, h, m]), Arg::out(Data, [e, c, h])]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.gemm(1.0, &t[0], &t[1].t()?, 0.0, &t[2]),
        flops: |s| 2.0 * (s["E"] * s["C"] * s["M"] * s["H"]) as f64,
    },
    Case {
        name: "add",
        family: "math",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["M"]];
            vec![Arg::data(shape), Arg::data(shape), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.add(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "mul",
        family: "math",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["M"]];
            vec![Arg::data(shape), Arg::data([s["M"]]), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.mul(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "axpby",
        family: "math",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["T"], s["M"]]), Arg::add(Data, [s["T"], s["M"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.axpby(0.5, &t[0], 1.0, &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "sum_rows",
        family: "math",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["T"], s["M"]]), Arg::add(Acc, [s["M"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.sum_rows(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "softmax",
        family: "math",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["T"], s["E"]]), Arg::out(Acc, [s["T"], s["E"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.softmax(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "softmax_backward",
        family: "math",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["E"]];
            vec![Arg::made(Acc, shape), Arg::acc(shape), Arg::out(Acc, shape)]
        },
        setup: |k, _, t| k.softmax(&t[1], &t[0]),
        run: |k, _, t| k.softmax_backward(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "sigmoid",
        family: "math",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["T"], s["E"]]), Arg::out(Acc, [s["T"], s["E"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.sigmoid(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "sigmoid_backward",
        family: "math",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["E"]];
            vec![Arg::acc(shape).of(Uniform(0.0, 1.0)), Arg::acc(shape), Arg::out(Acc, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.sigmoid_backward(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "normalise_sum",
        family: "math",
        sizes: CHOSEN,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["T"], s["k"]]).of(Uniform(0.0, 1.0)), Arg::out(Acc, [s["T"], s["k"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.normalise_sum(&t[0], 2.5, 1e-20, &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "normalise_sum_backward",
        family: "math",
        sizes: CHOSEN,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["k"]];
            // Off zero: the gradient grows with the inverse of the sum.
            let x = Arg::acc(shape).of(Uniform(0.1, 1.0));
            vec![x, Arg::made(Acc, shape), Arg::acc(shape), Arg::out(Acc, shape)]
        },
        setup: |k, _, t| k.normalise_sum(&t[0], 2.5, 1e-20, &t[1]),
        run: |k, _, t| k.normalise_sum_backward(&t[0], &t[1], 2.5, 1e-20, &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "normalise_l2",
        family: "math",
        sizes: PROJECTED,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["d"]];
            vec![Arg::acc(shape), Arg::out(Acc, shape), Arg::out(Acc, [s["T"]])]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.normalise_l2(&t[0], 1e-12, &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "normalise_l2_backward",
        family: "math",
        sizes: PROJECTED,
        fix: |s| {
            // A row of one element has norm |x|, and a gradient of zero that only rounding gives.
            if s.get("d") < 2 {
                s.set("d", 2);
            }
        },
        args: |s| {
            let shape = [s["T"], s["d"]];
            vec![Arg::made(Acc, shape), Arg::made(Acc, [s["T"]]), Arg::acc(shape), Arg::out(Acc, shape)]
        },
        // The rows are those of dy the other way round, so that y and dy are not parallel.
        setup: |k, _, t| {
            let other = k.alloc(*t[2].shape(), t[2].dtype())?;
            k.normal(Counter { seed: 2, purpose: Purpose::Test, step: 9 }, 0, &other)?;
            k.normalise_l2(&other, 1e-12, &t[0], &t[1])
        },
        run: |k, _, t| k.normalise_l2_backward(&t[0], &t[1], 1e-12, &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "dot",
        family: "math",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["E"]];
            // Positive: a sum that cancels has no relative error worth checking.
            let positive = Arg::acc(shape).of(Uniform(0.0, 1.0));
            vec![positive, positive, Arg::add(Acc, [1])]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.dot(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "gelu",
        family: "expert",
        sizes: HIDDEN_ROWS,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["R"], s["H"]]), Arg::out(Data, [s["R"], s["H"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.gelu(Gelu::Erf, &t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "gelu_backward",
        family: "expert",
        sizes: HIDDEN_ROWS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["R"], s["H"]];
            vec![Arg::data(shape), Arg::data(shape), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.gelu_backward(Gelu::Erf, &t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "gelu_tanh",
        family: "expert",
        sizes: HIDDEN_ROWS,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["R"], s["H"]]), Arg::out(Data, [s["R"], s["H"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.gelu(Gelu::Tanh, &t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "gelu_tanh_backward",
        family: "expert",
        sizes: HIDDEN_ROWS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["R"], s["H"]];
            vec![Arg::data(shape), Arg::data(shape), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.gelu_backward(Gelu::Tanh, &t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "swiglu",
        family: "expert",
        sizes: HIDDEN_ROWS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["R"], s["H"]];
            vec![Arg::data(shape), Arg::data(shape), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.swiglu(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "swiglu_backward",
        family: "expert",
        sizes: HIDDEN_ROWS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["R"], s["H"]];
            vec![Arg::data(shape), Arg::data(shape), Arg::data(shape), Arg::out(Data, shape), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.swiglu_backward(&t[0], &t[1], &t[2], &t[3], &t[4]),
        flops: NO_FLOPS,
    },
];
