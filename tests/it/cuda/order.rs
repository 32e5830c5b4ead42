//! Moving rows, on the GPU and on the CPU.

use fsmoe::device::cpu::Cpu;
use fsmoe::device::{GateKernels, OrderKernels, RowIndex, block_rows};
use fsmoe::tensor::{DType, Tensor};

use super::support::{DTYPES, Out, acc, compare, data, int, uniform};

const F32: DType = DType::F32;

/// `n` numbers out of −1..`end`.
fn indices(seed: u64, n: usize, end: usize) -> Vec<i32> {
    uniform(seed, n, -1.0, end as f64).into_iter().map(|v| (v.floor() as i32).min(end as i32 - 1)).collect()
}

fn floats(seed: u64, n: usize) -> Vec<f64> {
    uniform(seed, n, -1.0, 1.0)
}

/// Numbers of rows from and to, and widths: one element, no whole vector, some vectors, many.
const SHAPES: [[usize; 3]; 8] =
    [[1, 1, 1], [5, 9, 3], [40, 33, 8], [7, 300, 1], [64, 100, 20], [100, 64, 264], [9, 20, 1024], [3, 5, 1003]];

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_rows_are_gathered_and_scattered() {
    for [count, n, width] in SHAPES {
        for dtype in DTYPES {
            let what = format!("{n} rows of {count} x {width}");
            compare!(
                &what,
                dtype,
                [data([count, width], floats(1, count * width)), int([n], indices(2, n, count))],
                [Out::Data([n, width].into())],
                |order, i, o| order.gather_rows(&i[0], &i[1], &o[0])
            );
            for limit in [0, n / 2, n] {
                compare!(
                    &format!("{what}, below {limit}"),
                    dtype,
                    [
                        data([count, width], floats(1, count * width)),
                        int([n], indices(2, n, count)),
                        int([1], vec![limit as i32]),
                    ],
                    [Out::Add(data([n, width], floats(3, n * width)))],
                    |order, i, o| order.gather_rows_below(&i[0], &i[1], &i[2], &o[0])
                );
            }
            compare!(
                &format!("{what}, scattered"),
                dtype,
                [data([n, width], floats(4, n * width)), int([n], indices(5, n, count))],
                [
                    Out::Add(data([count, width], floats(6, count * width))),
                    Out::Add(acc([count, width], floats(7, count * width))),
                ],
                |order, i, o| {
                    order.scatter_rows(&i[0], &i[1], &o[0])?;
                    order.scatter_rows(&i[0], &i[1], &o[1])
                }
            );
        }
    }
}

/// As an embedding's gradient has it: many destinations, some with hundreds of rows, most with none.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_rows_are_scattered_to_many_places() {
    let (n, count, width) = (3000, 70_000, 16);
    let index: Vec<i32> = indices(8, n, count).iter().map(|i| if i % 4 == 0 { 65_537 } else { *i }).collect();
    compare!(
        "an embedding's gradient",
        F32,
        [data([n, width], floats(9, n * width)), int([n], index)],
        [Out::Add(data([count, width], floats(10, count * width)))],
        |order, i, o| order.scatter_rows(&i[0], &i[1], &o[0])
    );
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_rows_are_listed_by_token() {
    for (n, tokens) in [(1, 1), (5, 4), (0, 3), (1000, 37), (700, 70_000), (3000, 300)] {
        let row_token: Vec<i32> = indices(11, n, tokens).iter().map(|i| i.max(&0)).copied().collect();
        compare!(
            &format!("{n} rows of {tokens} tokens"),
            F32,
            [int([n], row_token)],
            [Out::Int([tokens + 1].into()), Out::Int([n].into())],
            |order, i, o| order.rows_by_token(&i[0], &o[0], &o[1])
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_scalars_are_gathered() {
    for (count, n) in [(1, 1), (1, 5), (300, 1027), (4, 0), (9, 4096)] {
        compare!(
            &format!("{n} of {count} scalars"),
            F32,
            [acc([count], floats(12, count)), int([n], indices(13, n, count))],
            [Out::Acc([n].into()), Out::Int([n].into())],
            |order, i, o| {
                order.gather_scalars(&i[0], &i[1], &o[0])?;
                order.iota(&o[1])
            }
        );
    }
}

/// A token choice with drops: its shape, and what a gate gives of it.
struct Choice {
    tokens: usize,
    experts: usize,
    k: usize,
    groups: usize,
    capacity: usize,
    chosen: Vec<i32>,
    slots: Vec<i32>,
    loads: Vec<i32>,
}

impl Choice {
    fn new(seed: u64, [tokens, experts, k, groups]: [usize; 4], capacity: usize) -> Self {
        let ints = |shape: [usize; 2]| Tensor::host(shape, DType::I32);
        let scores = Tensor::from_slice(&uniform(seed, tokens * experts, 0.0, 1.0), [tokens, experts]).unwrap();
        let (chosen, slots, loads) = (ints([tokens, k]), ints([tokens, k]), ints([groups, experts]));
        Cpu.top_k(&scores, None, None, &chosen).unwrap();
        Cpu.assign_slots(&chosen, None, experts, groups, capacity, &slots).unwrap();
        Cpu.count_experts(&chosen, &loads).unwrap();
        let [chosen, slots, loads] = [chosen, slots, loads].map(|t| t.to_vec().unwrap());
        Choice { tokens, experts, k, groups, capacity, chosen, slots, loads }
    }

    fn what(&self) -> String {
        let Choice { tokens, experts, k, groups, capacity, .. } = self;
        format!("{tokens} x {k} of {experts} in {groups} groups, {capacity} each")
    }

    /// The index of blocks: offsets, index, row_token, row_weight.
    fn blocks(&self, align: usize) -> [Vec<i32>; 4] {
        let ints = |n: usize| Tensor::host([n], DType::I32);
        let shaped = |v: &[i32], shape: [usize; 2]| Tensor::from_slice(v, shape).unwrap();
        let rows = block_rows(self.tokens * self.k, self.experts, align);
        let (offsets, starts) = (ints(self.experts + 1), Tensor::host([self.groups, self.experts], DType::I32));
        let (index, row_token, row_weight) = (Tensor::host([self.tokens, self.k], DType::I32), ints(rows), ints(rows));
        Cpu.block_index(
            &shaped(&self.chosen, [self.tokens, self.k]),
            &shaped(&self.slots, [self.tokens, self.k]),
            &shaped(&self.loads, [self.groups, self.experts]),
            self.capacity,
            align,
            &offsets,
            &starts,
            RowIndex { index: &index, row_token: &row_token, row_weight: &row_weight },
        )
        .unwrap();
        [offsets, index, row_token, row_weight].map(|t| t.to_vec().unwrap())
    }
}

fn choices() -> Vec<Choice> {
    vec![
        Choice::new(14, [1, 1, 1, 1], 1),
        Choice::new(15, [12, 4, 2, 3], 2),
        Choice::new(16, [100, 128, 8, 1], 100),
        Choice::new(17, [257, 5, 3, 1], 90),
        Choice::new(18, [60, 30, 1, 2], 30),
        Choice::new(19, [90, 20, 16, 2], 45),
        Choice::new(20, [11, 1024, 5, 1], 11),
    ]
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_indices_of_padded_and_block_layouts_are_the_same() {
    for c in choices() {
        let (tokens, k, e, groups, capacity) = (c.tokens, c.k, c.experts, c.groups, c.capacity);
        let inputs = || {
            vec![
                int([tokens, k], c.chosen.clone()),
                int([tokens, k], c.slots.clone()),
                int([groups, e], c.loads.clone()),
            ]
        };
        let rows = e * groups * capacity;
        let ints = |n: usize| Out::Int([n].into());
        let index = || Out::Int([tokens, k].into());
        compare!(&c.what(), F32, inputs(), [index(), ints(rows), ints(rows)], |order, i, o| {
            let out = RowIndex { index: &o[0], row_token: &o[1], row_weight: &o[2] };
            order.padded_index(&i[0], &i[1], &i[2], capacity, out)
        });
        for align in [1, 8, 128] {
            for more in [0, 1000] {
                let rows = block_rows(tokens * k, e, align) + more;
                let out = [index(), ints(rows), ints(rows), ints(e + 1), Out::Int([groups, e].into())];
                compare!(&format!("{}, aligned to {align}", c.what()), F32, inputs(), out, |order, i, o| {
                    let out = RowIndex { index: &o[0], row_token: &o[1], row_weight: &o[2] };
                    order.block_index(&i[0], &i[1], &i[2], capacity, align, &o[3], &o[4], out)
                });
            }
        }
        // In parts, from starts that leave rows between.
        let starts: Vec<i32> = (0..groups * e).map(|i| ((i % e * groups + i / e) * (capacity + 1)) as i32).collect();
        let mut parts = inputs();
        parts.push(int([groups, e], starts));
        let rows = groups * e * (capacity + 1);
        compare!(&format!("{}, in parts", c.what()), F32, parts, [index(), ints(rows), ints(rows)], |order, i, o| {
            order.row_index(&i[0], &i[1], &i[3], &o[0])?;
            order.invert_index(&o[0], &o[1], &o[2])
        });
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_choices_are_dispatched_and_combined() {
    for c in choices() {
        let (tokens, k) = (c.tokens, c.k);
        for (align, width) in [(1, 1), (8, 3), (128, 40), (8, 264)] {
            let [offsets, index, row_token, row_weight] = c.blocks(align);
            let rows = row_token.len();
            let limit = offsets[c.experts];
            let inputs = || {
                vec![
                    data([tokens, width], floats(21, tokens * width)),
                    data([rows, width], floats(22, rows * width)),
                    int([tokens, k], index.clone()),
                    int([rows], row_token.clone()),
                    int([rows], row_weight.clone()),
                    acc([tokens * k], floats(23, tokens * k)),
                    int([1], vec![limit]),
                ]
            };
            for dtype in DTYPES {
                let what = format!("{}, aligned to {align}, {width} wide", c.what());
                let kept = || Out::Add(data([rows, width], floats(24, rows * width)));
                let all = || Out::Data([rows, width].into());
                compare!(&what, dtype, inputs(), [all(), kept()], |order, i, o| {
                    order.dispatch_rows(&i[0], &i[2], &i[3], None, &o[0])?;
                    order.dispatch_rows(&i[0], &i[2], &i[3], Some(&i[6]), &o[1])
                });
                let out = || Out::Data([tokens, width].into());
                compare!(&what, dtype, inputs(), [out(), out()], |order, i, o| {
                    let index = i[2].reshape([tokens * k])?;
                    order.combine_rows(&i[1], &index, None, Some(&i[5]), &o[0])?;
                    order.combine_rows(&i[1], &index, None, None, &o[1])
                });
                let weights = || Out::Acc([tokens * k].into());
                let outputs = [all(), weights(), kept(), weights(), all(), weights()];
                compare!(&format!("{what}, backward"), dtype, inputs(), outputs, |order, i, o| {
                    let by = RowIndex { index: &i[2], row_token: &i[3], row_weight: &i[4] };
                    order.combine_choices_backward(&i[0], &i[1], by, &i[5], None, &o[0], &o[1])?;
                    order.combine_choices_backward(&i[0], &i[1], by, &i[5], Some(&i[6]), &o[2], &o[3])?;
                    order.combine_rows_backward(&i[0], &i[1], &i[3], &i[4], &i[5], &o[4], &o[5])
                });
            }
        }
    }
}

/// Expert choice: a token has any number of rows, also none.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_lists_of_rows_are_combined() {
    for (tokens, n, width) in [(1, 3, 1), (9, 40, 24), (64, 0, 5), (30, 300, 200)] {
        let row_token: Vec<i32> = indices(25, n, tokens).iter().map(|i| *i.max(&0)).collect();
        let (offsets, list) = (Tensor::host([tokens + 1], DType::I32), Tensor::host([n], DType::I32));
        Cpu.rows_by_token(&Tensor::from_slice(&row_token, [n]).unwrap(), &offsets, &list).unwrap();
        let mut list: Vec<i32> = list.to_vec().unwrap();
        list.iter_mut().step_by(5).for_each(|row| *row = -1);
        for dtype in DTYPES {
            compare!(
                &format!("{n} rows of {tokens} x {width}"),
                dtype,
                [
                    data([n, width], floats(26, n * width)),
                    int([n], list.clone()),
                    int([tokens + 1], offsets.to_vec().unwrap()),
                    acc([n], floats(27, n)),
                ],
                [Out::Data([tokens, width].into()), Out::Data([tokens, width].into())],
                |order, i, o| {
                    order.combine_rows(&i[0], &i[1], Some(&i[2]), Some(&i[3]), &o[0])?;
                    order.combine_rows(&i[0], &i[1], Some(&i[2]), None, &o[1])
                }
            );
        }
    }
}

/// Whole numbers from zero, for lengths that fill no block, one and more.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_iota_counts() {
    iota();
}

pub(super) fn iota() {
    for n in [0, 1, 255, 257, 2000] {
        compare!(&format!("iota of {n}"), DType::F32, [], [Out::Int([n].into())], |order, _i, o| order.iota(&o[0]));
    }
}
