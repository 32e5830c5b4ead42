//! Cases of the model and optim families.

use super::case::{Arg, Case, Fix, Kind::*, Size, Sizes, Values::*};
use super::{NO_FIX, NO_FLOPS, NO_SETUP};
use crate::device::{AdamW, AttentionShape, Rope};

const TOKENS: &[Size] =
    &[Size { name: "T", gpu: 32768, cpu: 1024, checked: 70 }, Size { name: "M", gpu: 4096, cpu: 256, checked: 300 }];
/// A GPT-2-sized vocabulary.
const VOCAB: &[Size] =
    &[Size { name: "T", gpu: 8192, cpu: 256, checked: 40 }, Size { name: "V", gpu: 50304, cpu: 1024, checked: 500 }];
const HEADS: &[Size] = &[
    Size { name: "B", gpu: 4, cpu: 2, checked: 2 },
    Size { name: "L", gpu: 2048, cpu: 128, checked: 100 },
    Size { name: "Hq", gpu: 32, cpu: 4, checked: 4 },
    Size { name: "Hkv", gpu: 8, cpu: 2, checked: 4 },
    Size { name: "D", gpu: 128, cpu: 32, checked: 64 },
];

/// Heads in equal groups, an even width.
const HEADS_FIT: fn(&mut Fix<'_>) = |s| {
    let heads = s.get("Hq");
    let mut kv = s.get("Hkv").min(heads);
    while !heads.is_multiple_of(kv) {
        kv -= 1;
    }
    s.set("Hkv", kv);
    s.set("D", s.get("D").next_multiple_of(2));
};

fn attention(s: &Sizes) -> AttentionShape {
    AttentionShape { batch: s["B"], seq: s["L"], heads: s["Hq"], kv_heads: s["Hkv"], head_dim: s["D"] }
}

/// Of one of attention's products over the unmasked half.
fn attention_product(s: &Sizes) -> f64 {
    2.0 * (s["B"] * s["Hq"] * s["D"]) as f64 * (s["L"] as f64).powi(2) / 2.0
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "layer_norm",
        family: "model",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| {
            let (rows, width) = ([s["T"], s["M"]], [s["M"]]);
            let (x, y) = (Arg::data(rows), Arg::out(Data, rows));
            vec![x, Arg::data(width), Arg::data(width), y, Arg::out(Acc, [s["T"]]), Arg::out(Acc, [s["T"]])]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.layer_norm(&t[0], &t[1], &t[2], 1e-5, &t[3], &t[4], &t[5]),
        flops: NO_FLOPS,
    },
    Case {
        name: "layer_norm_backward",
        family: "model",
        sizes: TOKENS,
        fix: |s| {
            // With so few elements in a row the gradient is the difference of almost equal numbers.
            if s.get("M") < 4 {
                s.set("M", 4);
            }
        },
        args: |s| {
            let (rows, width, tokens) = ([s["T"], s["M"]], [s["M"]], [s["T"]]);
            vec![
                Arg::data(rows),
                Arg::data(width),
                Arg::made(Acc, tokens),
                Arg::made(Acc, tokens),
                Arg::data(rows),
                Arg::out(Data, rows),
                Arg::add(Data, width),
                Arg::add(Data, width),
            ]
        },
        setup: |k, _, t| {
            let y = k.alloc(*t[0].shape(), t[0].dtype())?;
            k.layer_norm(&t[0], &t[1], &t[1], 1e-5, &y, &t[2], &t[3])
        },
        run: |k, _, t| k.layer_norm_backward(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7]),
        flops: NO_FLOPS,
    },
    Case {
        name: "rms_norm",
        family: "model",
        sizes: TOKENS,
        fix: NO_FIX,
        args: |s| {
            let rows = [s["T"], s["M"]];
            vec![Arg::data(rows), Arg::data([s["M"]]), Arg::out(Data, rows), Arg::out(Acc, [s["T"]])]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.rms_norm(&t[0], &t[1], 1e-5, &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "rms_norm_backward",
        family: "model",
        sizes: TOKENS,
        fix: |s| {
            if s.get("M") < 4 {
                s.set("M", 4);
            }
        },
        args: |s| {
            let (rows, width) = ([s["T"], s["M"]], [s["M"]]);
            vec![
                Arg::data(rows),
                Arg::data(width),
                Arg::made(Acc, [s["T"]]),
                Arg::data(rows),
                Arg::out(Data, rows),
                Arg::add(Data, width),
            ]
        },
        setup: |k, _, t| {
            let y = k.alloc(*t[0].shape(), t[0].dtype())?;
            k.rms_norm(&t[0], &t[1], 1e-5, &y, &t[2])
        },
        run: |k, _, t| k.rms_norm_backward(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5]),
        flops: NO_FLOPS,
    },
    Case {
        name: "rope",
        family: "model",
        sizes: &[
            Size { name: "B", gpu: 4, cpu: 2, checked: 3 },
            Size { name: "L", gpu: 2048, cpu: 128, checked: 40 },
            Size { name: "Hq", gpu: 32, cpu: 4, checked: 4 },
            Size { name: "D", gpu: 128, cpu: 32, checked: 64 },
        ],
        fix: |s| s.set("D", s.get("D").next_multiple_of(2)),
        args: |s| {
            let shape = [s["B"], s["L"], s["Hq"], s["D"]];
            vec![Arg::data(shape), Arg::out(Data, shape)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.rope(&t[0], Rope { theta: 1e4, first: 3 }, false, &t[1]),
        flops: NO_FLOPS,
    },
    Case {
        name: "attention",
        family: "model",
        sizes: HEADS,
        fix: HEADS_FIT,
        args: |s| {
            let tokens = s["B"] * s["L"];
            let (q, kv) = ([tokens, s["Hq"] * s["D"]], [tokens, s["Hkv"] * s["D"]]);
            let lse = Arg::out(Acc, [s["B"], s["Hq"], s["L"]]);
            vec![Arg::data(q), Arg::data(kv), Arg::data(kv), Arg::out(Data, q), lse]
        },
        setup: NO_SETUP,
        run: |k, s, t| k.attention(attention(s), &t[0], &t[1], &t[2], &t[3], &t[4]),
        flops: |s| 2.0 * attention_product(s),
    },
    Case {
        name: "attention_backward",
        family: "model",
        sizes: HEADS,
        fix: |s| {
            HEADS_FIT(s);
            // The gradients of q and k are zero where a token sees itself alone.
            if s.get("L") < 4 {
                s.set("L", 4);
            }
        },
        args: |s| {
            let tokens = s["B"] * s["L"];
            let (q, kv) = ([tokens, s["Hq"] * s["D"]], [tokens, s["Hkv"] * s["D"]]);
            vec![
                Arg::data(q),
                Arg::data(kv),
                Arg::data(kv),
                Arg::made(Data, q),
                Arg::made(Acc, [s["B"], s["Hq"], s["L"]]),
                Arg::data(q),
                Arg::out(Data, q),
                Arg::out(Data, kv),
                Arg::out(Data, kv),
            ]
        },
        setup: |k, s, t| k.attention(attention(s), &t[0], &t[1], &t[2], &t[3], &t[4]),
        run: |k, s, t| {
            k.attention_backward(attention(s), &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7], &t[8])
        },
        flops: |s| 5.0 * attention_product(s),
    },
    Case {
        name: "cross_entropy",
        family: "model",
        sizes: VOCAB,
        fix: NO_FIX,
        args: |s| {
            let tokens = [s["T"]];
            vec![Arg::data([s["T"], s["V"]]), Arg::below(s["V"], tokens), Arg::out(Acc, tokens), Arg::out(Acc, tokens)]
        },
        setup: NO_SETUP,
        run: |k, _, t| k.cross_entropy(&t[0], &t[1], &t[2], &t[3]),
        flops: NO_FLOPS,
    },
    Case {
        name: "cross_entropy_backward",
        family: "model",
        sizes: VOCAB,
        fix: |s| {
            // With one word there is nothing to predict: the gradient is zero but for rounding.
            if s.get("V") < 2 {
                s.set("V", 2);
            }
        },
        args: |s| {
            let (logits, tokens) = ([s["T"], s["V"]], [s["T"]]);
            let targets = Arg::below(s["V"], tokens);
            vec![Arg::data(logits), targets, Arg::made(Acc, tokens), Arg::acc(tokens), Arg::out(Data, logits)]
        },
        setup: |k, _, t| {
            let loss = k.alloc(*t[2].shape(), t[2].dtype())?;
            k.cross_entropy(&t[0], &t[1], &loss, &t[2])
        },
        run: |k, _, t| k.cross_entropy_backward(&t[0], &t[1], &t[2], &t[3], &t[4]),
        flops: NO_FLOPS,
    },
    Case {
        name: "adamw",
        family: "optim",
        sizes: &[Size { name: "N", gpu: 64 << 20, cpu: 1 << 18, checked: 3000 }],
        fix: NO_FIX,
        args: |s| {
            let n = [s["N"]];
            let (weight, m) = (Arg::add(Acc, n), Arg::add(Acc, n));
            vec![Arg::acc([1]).of(Uniform(0.5, 1.0)), weight, m, Arg::add(Acc, n).of(Uniform(0.1, 1.0)), Arg::data(n)]
        },
        setup: NO_SETUP,
        run: |k, _, t| {
            let settings = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3 };
            k.adamw(settings, &t[0], &t[1], &t[2], &t[3], &t[4])
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "square_sum",
        family: "optim",
        sizes: &[Size { name: "N", gpu: 64 << 20, cpu: 1 << 18, checked: 3000 }],
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["N"]]), Arg::add(Acc, [1]).of(Uniform(0.0, 1.0))],
        setup: NO_SETUP,
        // The gradient norm's sum of squares.
        run: |k, _, t| k.dot(&t[0], &t[0], &t[1]),
        flops: NO_FLOPS,
    },
];
