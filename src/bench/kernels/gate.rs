//! Cases of the gate and order families.

use super::case::{Arg, Case, Fix, Kind::*, Size, Sizes, Values::*};
use super::{NO_FIX, NO_FLOPS, NO_SETUP};
use crate::device::Kernels;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Router logits.
const LOGITS: &[Size] =
    &[Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 }, Size { name: "E", gpu: 128, cpu: 32, checked: 200 }];
/// The same, and what a token chooses.
const CHOICE: &[Size] = &[
    Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 },
    Size { name: "E", gpu: 128, cpu: 32, checked: 200 },
    Size { name: "k", gpu: 8, cpu: 2, checked: 9 },
];
/// Experts that choose C tokens each.
const EXPERT_CHOICE: &[Size] = &[
    Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 },
    Size { name: "E", gpu: 128, cpu: 32, checked: 60 },
    Size { name: "C", gpu: 2048, cpu: 64, checked: 60 },
];
/// Rows of tokens: Mixtral 8x7B for 8192 tokens.
pub(super) const ROWS: &[Size] = &[
    Size { name: "T", gpu: 8192, cpu: 1024, checked: 60 },
    Size { name: "M", gpu: 4096, cpu: 128, checked: 200 },
    Size { name: "E", gpu: 8, cpu: 8, checked: 20 },
    Size { name: "k", gpu: 2, cpu: 2, checked: 4 },
];

pub(super) const K_UP_TO_E: fn(&mut Fix<'_>) = |s| s.at_most("k", s.get("E"));
const C_UP_TO_T: fn(&mut Fix<'_>) = |s| s.at_most("C", s.get("T"));

/// A new tensor on the device.
pub(super) fn new(k: &dyn Kernels, shape: impl Into<crate::tensor::Shape>, dtype: DType) -> Result<Tensor> {
    k.alloc(shape.into(), dtype)
}

/// Random scores: (T, E).
fn scores(k: &dyn Kernels, s: &Sizes, dtype: DType) -> Result<Tensor> {
    use crate::rng::{Counter, Purpose};
    let scores = new(k, [s["T"], s["E"]], dtype)?;
    k.normal(Counter { seed: 3, purpose: Purpose::Test, step: 5 }, 0, &scores)?;
    Ok(scores)
}

/// The k best experts of random scores, into experts: (T, k).
pub(super) fn chosen(k: &dyn Kernels, s: &Sizes, experts: &Tensor) -> Result<()> {
    k.top_k(&scores(k, s, DType::F32)?, None, None, experts)
}

/// Where each expert's rows begin when the choices lie sorted by expert: (1, E) i32.
fn starts(k: &dyn Kernels, s: &Sizes, experts: &Tensor) -> Result<Tensor> {
    let loads = new(k, [1, s["E"]], DType::I32)?;
    k.count_experts(experts, &loads)?;
    let host = Tensor::host([1, s["E"]], DType::I32);
    k.download(&loads, &host)?;
    let before = |sum: &mut i32, load: i32| {
        *sum += load;
        Some(*sum - load)
    };
    let starts: Vec<i32> = host.to_vec::<i32>()?.into_iter().scan(0, before).collect();
    k.upload(&Tensor::from_slice(&starts, [1, s["E"]])?, &loads)?;
    Ok(loads)
}

/// The row of every choice, (T, k), all choices sorted by expert: nothing dropped, nothing padded.
pub(super) fn rows(k: &dyn Kernels, s: &Sizes, index: &Tensor) -> Result<()> {
    let (experts, slots) = (new(k, [s["T"], s["k"]], DType::I32)?, new(k, [s["T"], s["k"]], DType::I32)?);
    chosen(k, s, &experts)?;
    k.assign_slots(&experts, None, s["E"], 1, s["T"], &slots)?;
    k.row_index(&experts, &slots, &starts(k, s, &experts)?, index)
}

/// The inverse of [`rows`], into row_choice and row_token: (T·k) each.
fn inverse(k: &dyn Kernels, s: &Sizes, row_choice: &Tensor, row_token: &Tensor) -> Result<()> {
    let index = new(k, [s["T"], s["k"]], DType::I32)?;
    rows(k, s, &index)?;
    k.invert_index(&index, row_choice, row_token)
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "top_k",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| vec![Arg::acc([s["T"], s["E"]]), Arg::out(Int, [s["T"], s["k"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.top_k(&t[0], None, None, &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "gather_cols",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| vec![Arg::acc([s["T"], s["E"]]), Arg::made(Int, [s["T"], s["k"]]), Arg::out(Acc, [s["T"], s["k"]])],
        setup: |k, s, t| chosen(k, s, &t[1]),
        run: |k, _, t| k.gather_cols(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "scatter_cols",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| vec![Arg::acc([s["T"], s["k"]]), Arg::made(Int, [s["T"], s["k"]]), Arg::add(Acc, [s["T"], s["E"]])],
        setup: |k, s, t| chosen(k, s, &t[1]),
        run: |k, _, t| k.scatter_cols(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "count_experts",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| vec![Arg::made(Int, [s["T"], s["k"]]), Arg::out(Int, [1, s["E"]])],
        setup: |k, s, t| chosen(k, s, &t[0]),
        run: |k, _, t| k.count_experts(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "assign_slots",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| vec![Arg::made(Int, [s["T"], s["k"]]), Arg::out(Int, [s["T"], s["k"]])],
        setup: |k, s, t| chosen(k, s, &t[0]),
        // A capacity factor of 1: some choices find no slot.
        run: |k, s, t| k.assign_slots(&t[0], None, s["E"], 1, (s["T"] * s["k"]).div_ceil(s["E"]), &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "assign_slots_prioritised",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| vec![Arg::made(Int, [s["T"], s["k"]]), Arg::acc([s["T"]]), Arg::out(Int, [s["T"], s["k"]])],
        setup: |k, s, t| chosen(k, s, &t[0]),
        run: |k, s, t| k.assign_slots(&t[0], Some(&t[1]), s["E"], 1, (s["T"] * s["k"]).div_ceil(s["E"]), &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "expert_choice",
        family: "gate",
        sizes: EXPERT_CHOICE,
        fix: C_UP_TO_T,
        args: |s| {
            let slots = [s["E"], s["C"]];
            vec![Arg::made(Acc, [s["T"], s["E"]]), Arg::out(Int, slots), Arg::out(Acc, slots)]
        },
        setup: |k, s, t| k.softmax(&scores(k, s, t[0].dtype())?, &t[0]),
        run: |k, s, t| k.expert_choice(&t[0], 1, s["C"], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "expert_choice_backward",
        family: "gate",
        sizes: EXPERT_CHOICE,
        fix: C_UP_TO_T,
        args: |s| {
            let slots = [s["E"], s["C"]];
            vec![Arg::made(Int, slots), Arg::acc(slots), Arg::add(Acc, [s["T"], s["E"]])]
        },
        setup: |k, s, t| {
            let weights = new(k, *t[0].shape(), t[1].dtype())?;
            k.expert_choice(&scores(k, s, t[1].dtype())?, 1, s["C"], &t[0], &weights)
        },
        run: |k, _, t| k.expert_choice_backward(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "balance_loss",
        family: "gate",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| {
            let (probs, experts) = (Arg::made(Acc, [s["T"], s["E"]]), Arg::made(Int, [s["T"], s["k"]]));
            vec![probs, experts, Arg::out(Acc, [1]), Arg::out(Acc, [s["E"]])]
        },
        setup: |k, s, t| {
            k.softmax(&scores(k, s, t[0].dtype())?, &t[0])?;
            chosen(k, s, &t[1])
        },
        run: |k, _, t| k.balance_loss(&t[0], &t[1], false, &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "balance_loss_backward",
        family: "gate",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["E"]]).of(Uniform(0.0, 1.0)), Arg::acc([1]), Arg::add(Acc, [s["T"], s["E"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.balance_loss_backward(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "z_loss",
        family: "gate",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["T"], s["E"]]), Arg::out(Acc, [s["T"]]), Arg::out(Acc, [1])],
        setup: NO_SETUP,
        run: |k, _, t| k.z_loss(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "z_loss_backward",
        family: "gate",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["E"]];
            vec![Arg::acc(shape), Arg::made(Acc, [s["T"]]), Arg::acc([1]), Arg::add(Acc, shape)]
        },
        setup: |k, _, t| k.z_loss(&t[0], &t[1], &new(k, [1], t[1].dtype())?),
        run: |k, _, t| k.z_loss_backward(&t[0], &t[1], &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "mean_entropy",
        family: "gate",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| vec![Arg::acc([s["T"], s["E"]]).of(Uniform(0.01, 1.0)), Arg::out(Acc, [1])],
        setup: NO_SETUP,
        run: |k, _, t| k.mean_entropy(&t[0], &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "add_gate_noise",
        family: "gate",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["E"]];
            vec![Arg::acc(shape), Arg::acc(shape), Arg::acc(shape), Arg::out(Acc, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.add_gate_noise(&t[0], &t[1], &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "add_gate_noise_backward",
        family: "gate",
        sizes: LOGITS,
        fix: NO_FIX,
        args: |s| {
            let shape = [s["T"], s["E"]];
            vec![Arg::acc(shape), Arg::acc(shape), Arg::acc(shape), Arg::out(Acc, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.add_gate_noise_backward(&t[0], &t[1], &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "update_bias",
        family: "gate",
        sizes: &[Size { name: "G", gpu: 8, cpu: 8, checked: 9 }, Size { name: "E", gpu: 128, cpu: 32, checked: 200 }],
        fix: NO_FIX,
        args: |s| vec![Arg::add(Acc, [s["E"]]), Arg::below(100, [s["G"], s["E"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.update_bias(&t[0], &t[1], 0.001),
        flops: NO_FLOPS,
    },
    Case {
        name: "gather_rows",
        family: "order",
        sizes: ROWS,
        fix: K_UP_TO_E,
        args: |s| {
            let rows = s["T"] * s["k"];
            vec![Arg::data([s["T"], s["M"]]), Arg::made(Int, [rows]), Arg::out(Data, [rows, s["M"]])]
        },
        setup: |k, s, t| inverse(k, s, &new(k, *t[1].shape(), DType::I32)?, &t[1]),
        run: |k, _, t| k.gather_rows(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "scatter_rows",
        family: "order",
        sizes: ROWS,
        fix: K_UP_TO_E,
        args: |s| {
            let rows = s["T"] * s["k"];
            vec![Arg::data([rows, s["M"]]), Arg::made(Int, [rows]), Arg::add(Acc, [s["T"], s["M"]])]
        },
        setup: |k, s, t| inverse(k, s, &new(k, *t[1].shape(), DType::I32)?, &t[1]),
        run: |k, _, t| k.scatter_rows(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "row_index",
        family: "order",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| {
            let choices = [s["T"], s["k"]];
            vec![Arg::made(Int, choices), Arg::made(Int, choices), Arg::made(Int, [1, s["E"]]), Arg::out(Int, choices)]
        },
        setup: |k, s, t| {
            chosen(k, s, &t[0])?;
            k.assign_slots(&t[0], None, s["E"], 1, s["T"], &t[1])?;
            k.copy(&starts(k, s, &t[0])?, &t[2])
        },
        run: |k, _, t| k.row_index(&t[0], &t[1], &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "invert_index",
        family: "order",
        sizes: CHOICE,
        fix: K_UP_TO_E,
        args: |s| {
            let rows = [s["T"] * s["k"]];
            vec![Arg::made(Int, [s["T"], s["k"]]), Arg::out(Int, rows), Arg::out(Int, rows)]
        },
        setup: |k, s, t| rows(k, s, &t[0]),
        run: |k, _, t| k.invert_index(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "rows_by_token",
        family: "order",
        sizes: &[
            Size { name: "T", gpu: 32768, cpu: 1024, checked: 90 },
            Size { name: "R", gpu: 262_144, cpu: 2048, checked: 300 },
        ],
        fix: NO_FIX,
        args: |s| vec![Arg::below(s["T"], [s["R"]]), Arg::out(Int, [s["T"] + 1]), Arg::out(Int, [s["R"]])],
        setup: NO_SETUP,
        run: |k, _, t| k.rows_by_token(&t[0], &t[1], &t[2]),
        flops: NO_FLOPS,
    },
    Case {
        name: "combine_rows",
        family: "order",
        sizes: ROWS,
        fix: K_UP_TO_E,
        args: |s| {
            let rows = s["T"] * s["k"];
            vec![
                Arg::data([rows, s["M"]]),
                Arg::made(Int, [rows]),
                Arg::acc([rows]).of(Uniform(0.0, 1.0)),
                Arg::out(Data, [s["T"], s["M"]]),
            ]
        },
        setup: |k, s, t| rows(k, s, &t[1].reshape([s["T"], s["k"]])?),
        run: |k, _, t| k.combine_rows(&t[0], &t[1], None, Some(&t[2]), &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "combine_rows_backward",
        family: "order",
        sizes: ROWS,
        fix: K_UP_TO_E,
        args: |s| {
            let (n, rows) = (s["T"] * s["k"], [s["T"] * s["k"], s["M"]]);
            vec![
                Arg::data([s["T"], s["M"]]),
                Arg::data(rows),
                Arg::made(Int, [n]),
                Arg::made(Int, [n]),
                Arg::acc([n]).of(Uniform(0.0, 1.0)),
                Arg::out(Data, rows),
                Arg::out(Acc, [n]),
            ]
        },
        setup: |k, s, t| inverse(k, s, &t[3], &t[2]),
        run: |k, _, t| k.combine_rows_backward(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6]),
        flops: NO_FLOPS,
    },
];
