//! Cases of the comm family.

use super::case::{Arg, Case, Kind::*, Size};
use super::{NO_FIX, NO_FLOPS, NO_SETUP};
use crate::tensor::Tensor;

/// What a rank of eight takes from all of a group: P stretches of N elements.
const STRETCHES: &[Size] =
    &[Size { name: "P", gpu: 8, cpu: 8, checked: 9 }, Size { name: "N", gpu: 8 << 20, cpu: 64 << 10, checked: 5000 }];

pub(super) const CASES: &[Case] = &[
    Case {
        name: "copy_many",
        family: "comm",
        sizes: STRETCHES,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["P"], s["N"]]), Arg::out(Data, [s["P"], s["N"]])],
        setup: NO_SETUP,
        run: |k, s, t| {
            // As an all-to-all has them: the last first.
            let pair = |i| Ok((t[0].index(i)?, t[1].index(i)?));
            k.copy_many(&(0..s["P"]).rev().map(pair).collect::<crate::Result<Vec<(Tensor, Tensor)>>>()?)
        },
        flops: NO_FLOPS,
    },
    Case {
        name: "sum_parts",
        family: "comm",
        sizes: STRETCHES,
        fix: NO_FIX,
        args: |s| vec![Arg::data([s["P"], s["N"]]), Arg::out(Data, [s["N"]])],
        setup: NO_SETUP,
        run: |k, s, t| {
            let parts: Vec<Tensor> = (0..s["P"]).map(|i| t[0].index(i)).collect::<crate::Result<_>>()?;
            k.sum_parts(&parts, &t[1])
        },
        flops: NO_FLOPS,
    },
];
