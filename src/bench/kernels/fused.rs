//! Cases of the operations that fuse several: choices of experts, grouped products, layouts of rows.

use super::case::{Arg, Case, Fix, Kind::*, Size, Sizes, Values::*};
use super::gate::{K_UP_TO_E, ROWS, chosen, new, rows};
use super::{NO_FLOPS, NO_SETUP};
use crate::device::{
    ChoiceRule, Chosen, ChosenGrad, Gelu, Kernels, RowIndex, RowWeights, Score, Segments, Slots, block_rows,
};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// From router logits to a routing: 32,768 tokens that choose 8 of 128 experts.
const CHOICE: &[Size] = &[
    Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 },
    Size { name: "E", gpu: 128, cpu: 32, checked: 200 },
    Size { name: "k", gpu: 8, cpu: 2, checked: 9 },
];

/// The experts' products of Mixtral 8x7B for 8192 tokens, evenly loaded: C rows for each of E.
const EXPERTS: &[Size] = &[
    Size { name: "E", gpu: 8, cpu: 4, checked: 5 },
    Size { name: "C", gpu: 2048, cpu: 128, checked: 200 },
    Size { name: "M", gpu: 4096, cpu: 64, checked: 70 },
    Size { name: "H", gpu: 14336, cpu: 96, checked: 70 },
];

const ANY: fn(&mut Fix<'_>) = |_| ();

/// Top-k softmax with weights that sum to one.
const RULE: ChoiceRule =
    ChoiceRule { score: Score::Softmax, expert_groups: None, normalise: true, scale: 1.0, balance_first_only: false };

/// A capacity factor of 1.
fn capacity(s: &Sizes) -> usize {
    (s["T"] * s["k"]).div_ceil(s["E"])
}

/// C rows for each expert: with their bounds on the device where the backend has products for that, which take no fewer
/// rows than whole blocks. The bounds are the case's last tensor.
fn segments<'a>(k: &dyn Kernels, s: &Sizes, t: &'a [Tensor]) -> Segments<'a> {
    let bounds = &t[t.len() - 1];
    match k.row_block(t[0].dtype(), s["M"], s["H"]) {
        Some(block) if s["C"].is_multiple_of(block) => Segments::Device { offsets: bounds, counts: None },
        _ => Segments::Even { experts: s["E"], each: s["C"] },
    }
}

/// The bounds for [`segments`]: (E + 1) i32.
fn bounds(k: &dyn Kernels, s: &Sizes, t: &[Tensor]) -> Result<()> {
    let bounds: Vec<i32> = (0..=s["E"]).map(|e| (e * s["C"]) as i32).collect();
    k.upload(&Tensor::from_slice(&bounds, [s["E"] + 1])?, &t[t.len() - 1])
}

/// Whole blocks of rows and widths of whole vectors where there is more than a little of them: what the fast products
/// take. Less than that checks the others.
const BLOCKS: fn(&mut Fix<'_>) = |s| {
    for (size, block) in [("C", 128), ("M", 8), ("H", 8)] {
        if s.get(size) > block / 2 {
            s.set(size, s.get(size).next_multiple_of(block));
        }
    }
};

/// One of the experts' products over all rows.
fn product(s: &Sizes) -> f64 {
    2.0 * (s["E"] * s["C"] * s["M"] * s["H"]) as f64
}

/// Experts, slots of so much capacity, and loads, as a gate leaves them.
fn routed(k: &dyn Kernels, s: &Sizes, capacity: usize, [experts, slots, loads]: [&Tensor; 3]) -> Result<()> {
    chosen(k, s, experts)?;
    k.assign_slots(experts, None, s["E"], 1, capacity, slots)?;
    k.count_experts(experts, loads)
}

/// [`rows`] and its inverse.
fn index(k: &dyn Kernels, s: &Sizes, [index, row_token, row_weight]: [&Tensor; 3]) -> Result<()> {
    rows(k, s, index)?;
    k.invert_index(index, row_weight, row_token)
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "choose_experts",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| {
            let choices = [s["T"], s["k"]];
            vec![
                Arg::acc([s["T"], s["E"]]),
                Arg::out(Int, choices),
                Arg::out(Acc, choices),
                Arg::out(Int, choices),
                Arg::out(Int, [1, s["E"]]),
                Arg::out(Acc, [1]),
                Arg::out(Acc, [s["E"]]),
                Arg::out(Acc, [1]),
                Arg::out(Acc, [1]),
            ]
        },
        setup: NO_SETUP,
        run: |k, s, t| {
            let out = Chosen {
                experts: &t[1],
                weights: &t[2],
                best: None,
                slots: Some(Slots { capacity: capacity(s), slots: &t[3] }),
                loads: &t[4],
                balance_loss: &t[5],
                fraction: &t[6],
                z_loss: Some(&t[7]),
                entropy: &t[8],
            };
            k.choose_experts(&RULE, &t[0], None, &out)
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "choose_experts_backward",
        family: "gate",
        sizes: CHOICE,
        fix: |s| {
            s.set("E", s.get("E").max(2));
            K_UP_TO_E(s);
        },
        args: |s| {
            let choices = [s["T"], s["k"]];
            vec![
                Arg::acc([s["T"], s["E"]]),
                Arg::made(Int, choices),
                Arg::made(Acc, choices),
                Arg::made(Acc, [s["E"]]),
                Arg::acc(choices),
                Arg::acc([1]),
                Arg::acc([1]),
                Arg::out(Data, [s["T"], s["E"]]),
            ]
        },
        setup: |k, s, t| {
            let one = || new(k, [1], t[0].dtype());
            let out = Chosen {
                experts: &t[1],
                weights: &t[2],
                best: None,
                slots: None,
                loads: &new(k, [1, s["E"]], DType::I32)?,
                balance_loss: &one()?,
                fraction: &t[3],
                z_loss: None,
                entropy: &one()?,
            };
            k.choose_experts(&RULE, &t[0], None, &out)
        },
        run: |k, _, t| {
            let given = ChosenGrad {
                experts: &t[1],
                weights: &t[2],
                fraction: &t[3],
                d_weights: &t[4],
                d_balance: &t[5],
                d_z: Some(&t[6]),
            };
            k.choose_experts_backward(&RULE, &t[0], &given, &t[7])
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "padded_index",
        family: "order",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| {
            let (choices, rows) = ([s["T"], s["k"]], [s["E"] * capacity(s)]);
            vec![
                Arg::made(Int, choices),
                Arg::made(Int, choices),
                Arg::made(Int, [1, s["E"]]),
                Arg::out(Int, choices),
                Arg::out(Int, rows),
                Arg::out(Int, rows),
            ]
        },
        setup: |k, s, t| routed(k, s, capacity(s), [&t[0], &t[1], &t[2]]),
        run: |k, s, t| {
            let out = RowIndex { index: &t[3], row_token: &t[4], row_weight: &t[5] };
            k.padded_index(&t[0], &t[1], &t[2], capacity(s), out)
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "block_index",
        family: "order",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| {
            let (choices, rows) = ([s["T"], s["k"]], [block_rows(s["T"] * s["k"], s["E"], 128)]);
            vec![
                Arg::made(Int, choices),
                Arg::made(Int, choices),
                Arg::made(Int, [1, s["E"]]),
                Arg::out(Int, [s["E"] + 1]),
                Arg::out(Int, [1, s["E"]]),
                Arg::out(Int, choices),
                Arg::out(Int, rows),
                Arg::out(Int, rows),
            ]
        },
        setup: |k, s, t| routed(k, s, s["T"], [&t[0], &t[1], &t[2]]),
        run: |k, s, t| {
            let out = RowIndex { index: &t[5], row_token: &t[6], row_weight: &t[7] };
            k.block_index(&t[0], &t[1], &t[2], s["T"], 128, &t[3], &t[4], out)
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "dispatch_rows",
        family: "order",
        sizes: ROWS,
        fix: K_UP_TO_E,
        args: |s| {
            let rows = s["T"] * s["k"];
            vec![
                Arg::data([s["T"], s["M"]]),
                Arg::made(Int, [s["T"], s["k"]]),
                Arg::made(Int, [rows]),
                Arg::out(Data, [rows, s["M"]]),
            ]
        },
        setup: |k, s, t| index(k, s, [&t[1], &t[2], &new(k, *t[2].shape(), DType::I32)?]),
        run: |k, _, t| k.dispatch_rows(&t[0], &t[1], &t[2], None, &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "combine_choices_backward",
        family: "order",
        sizes: ROWS,
        fix: K_UP_TO_E,
        args: |s| {
            let (n, rows) = (s["T"] * s["k"], [s["T"] * s["k"], s["M"]]);
            vec![
                Arg::data([s["T"], s["M"]]),
                Arg::data(rows),
                Arg::made(Int, [s["T"], s["k"]]),
                Arg::made(Int, [n]),
                Arg::made(Int, [n]),
                Arg::acc([n]).of(Uniform(0.0, 1.0)),
                Arg::out(Data, rows),
                Arg::out(Acc, [n]),
            ]
        },
        setup: |k, s, t| index(k, s, [&t[2], &t[3], &t[4]]),
        run: |k, _, t| {
            let rows = RowIndex { index: &t[2], row_token: &t[3], row_weight: &t[4] };
            k.combine_choices_backward(&t[0], &t[1], rows, &t[5], None, &t[6], &t[7])
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "gelu_backward_weighted",
        family: "expert",
        sizes: EXPERTS,
        fix: ANY,
        args: |s| {
            let (r, rows) = ([s["E"] * s["C"]], [s["E"] * s["C"], s["H"]]);
            let weights = Arg::acc(r).of(Uniform(0.0, 1.0));
            vec![
                Arg::data(rows),
                Arg::data(rows),
                weights,
                Arg::out(Acc, r),
                Arg::out(Data, rows),
                Arg::out(Data, rows),
            ]
        },
        setup: NO_SETUP,
        run: |k, _, t| {
            let weights = Some(RowWeights { weights: &t[2], d_weights: &t[3] });
            k.gelu_backward_weighted(Gelu::Erf, &t[0], &t[1], weights, &t[4], &t[5])
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "swiglu_backward_weighted",
        family: "expert",
        sizes: EXPERTS,
        fix: ANY,
        args: |s| {
            let (r, rows) = ([s["E"] * s["C"]], [s["E"] * s["C"], s["H"]]);
            let (input, output) = (Arg::data(rows), Arg::out(Data, rows));
            let weights = Arg::acc(r).of(Uniform(0.0, 1.0));
            vec![input, input, input, weights, Arg::out(Acc, r), output, output, output]
        },
        setup: NO_SETUP,
        run: |k, _, t| {
            let weights = Some(RowWeights { weights: &t[3], d_weights: &t[4] });
            k.swiglu_backward_weighted(&t[0], &t[1], &t[2], weights, &t[5], &t[6], &t[7])
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "grouped_linear",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            vec![
                Arg::data([r, h]),
                Arg::data([e, m, h]),
                Arg::out(Data, [r, m]),
                Arg::made(Int, [e + 1]),
                Arg::made(Int, [e + 1]),
            ]
        },
        setup: bounds,
        run: |k, s, t| k.grouped_linear(segments(k, s, t), &t[0], &t[1], &t[2]),
        flops: product,
    },
    Case {
        name: "grouped_linear_data",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            let (dy, w) = (Arg::data([r, h]), Arg::data([e, h, m]));
            vec![dy, w, dy, w, Arg::out(Data, [r, m]), Arg::made(Int, [e + 1]), Arg::made(Int, [e + 1])]
        },
        setup: bounds,
        run: |k, s, t| k.grouped_linear_data(segments(k, s, t), &[(&t[0], &t[1]), (&t[2], &t[3])], &t[4]),
        flops: |s| 2.0 * product(s),
    },
    Case {
        name: "grouped_linear_weight",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            vec![
                Arg::data([r, h]),
                Arg::data([r, m]),
                Arg::out(Data, [e, h, m]),
                Arg::made(Int, [e + 1]),
                Arg::made(Int, [e + 1]),
            ]
        },
        setup: bounds,
        run: |k, s, t| k.grouped_linear_weight(segments(k, s, t), &[(&t[0], &t[2], 0.0)], &t[1]),
        flops: product,
    },
    Case {
        name: "grouped_gelu",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            vec![
                Arg::data([r, m]),
                Arg::data([e, h, m]),
                Arg::out(Data, [r, h]),
                Arg::out(Data, [r, h]),
                Arg::made(Int, [e + 1]),
                Arg::made(Int, [e + 1]),
            ]
        },
        setup: bounds,
        run: |k, s, t| k.grouped_gelu(Gelu::Erf, segments(k, s, t), &t[0], &t[1], &t[2], &t[3]),
        flops: product,
    },
    Case {
        name: "grouped_swiglu",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            let (w, rows) = (Arg::data([e, h, m]), Arg::out(Data, [r, h]));
            vec![Arg::data([r, m]), w, w, rows, rows, rows, Arg::made(Int, [e + 1]), Arg::made(Int, [e + 1])]
        },
        setup: bounds,
        run: |k, s, t| k.grouped_swiglu(segments(k, s, t), &t[0], &t[1], &t[2], &t[3], &t[4], &t[5]),
        flops: |s| 2.0 * product(s),
    },
    Case {
        name: "grouped_gelu_backward",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            let (hidden, weights) = ([r, h], Arg::acc([r]).of(Uniform(0.0, 1.0)));
            let out = Arg::out(Data, hidden);
            vec![
                Arg::data([r, m]),
                Arg::data([e, m, h]),
                Arg::data(hidden),
                weights,
                Arg::out(Acc, [r]),
                out,
                out,
                Arg::made(Int, [e + 1]),
                Arg::made(Int, [e + 1]),
            ]
        },
        setup: bounds,
        run: |k, s, t| {
            let weights = Some(RowWeights { weights: &t[3], d_weights: &t[4] });
            k.grouped_gelu_backward(Gelu::Erf, segments(k, s, t), &t[0], &t[1], &t[2], weights, &t[5], &t[6])
        },
        flops: product,
    },
    Case {
        name: "grouped_swiglu_backward",
        family: "grouped",
        sizes: EXPERTS,
        fix: BLOCKS,
        args: |s| {
            let (e, r, m, h) = (s["E"], s["E"] * s["C"], s["M"], s["H"]);
            let (hidden, weights) = ([r, h], Arg::acc([r]).of(Uniform(0.0, 1.0)));
            let (input, out) = (Arg::data(hidden), Arg::out(Data, hidden));
            vec![
                Arg::data([r, m]),
                Arg::data([e, m, h]),
                input,
                input,
                weights,
                Arg::out(Acc, [r]),
                out,
                out,
                out,
                Arg::made(Int, [e + 1]),
                Arg::made(Int, [e + 1]),
            ]
        },
        setup: bounds,
        run: |k, s, t| {
            let weights = Some(RowWeights { weights: &t[4], d_weights: &t[5] });
            k.grouped_swiglu_backward(segments(k, s, t), &t[0], &t[1], &t[2], &t[3], weights, &t[6], &t[7], &t[8])
        },
        flops: product,
    },
];
