//! Matrix products, elementwise operations, softmax, sums and norms.

use fsmoe::device::cpu::Cpu;
use fsmoe::device::{MathKernels, MemoryKernels};
use fsmoe::tensor::{DType, Layout, Tensor};

use super::support::{DTYPES, Out, acc, compare, data, down, gpu, uniform, up};

/// The last two dimensions exchanged, if asked.
fn turn(t: &Tensor, turned: bool) -> Tensor {
    if turned { t.t().unwrap() } else { t.clone() }
}

fn swapped(lead: &[usize], rows: usize, cols: usize, turned: bool) -> Vec<usize> {
    let [rows, cols] = if turned { [cols, rows] } else { [rows, cols] };
    [lead, &[rows, cols]].concat()
}

fn random(seed: u64, shape: &[usize]) -> Vec<f64> {
    uniform(seed, shape.iter().product(), -1.0, 1.0)
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gemm_takes_every_transposition_and_size() {
    let sizes = [(1, 1, 1), (13, 37, 9), (1, 300, 7), (65, 1, 3), (7, 5, 1), (128, 64, 96), (257, 1023, 130)];
    for dtype in DTYPES {
        for (m, k, n) in sizes {
            for turns in 0..8 {
                let [ta, tb, tc] = [turns & 1 != 0, turns & 2 != 0, turns & 4 != 0];
                let (a, b, c) = (swapped(&[], m, k, ta), swapped(&[], k, n, tb), swapped(&[], m, n, tc));
                let (x, y) = (random(1, &a), random(2, &b));
                compare!(
                    &format!("gemm {m}x{k}x{n}, transposed {ta} {tb} {tc}"),
                    dtype,
                    [data(&a[..], x), data(&b[..], y)],
                    [
                        Out::Data(c[..].into()),
                        Out::Acc(c[..].into()),
                        Out::Add(data(&c[..], random(3, &c))),
                        Out::Add(acc(&c[..], random(4, &c))),
                    ],
                    |k, i, o| {
                        let (a, b) = (turn(&i[0], ta), turn(&i[1], tb));
                        k.gemm(1.0, &a, &b, 0.0, &turn(&o[0], tc))?;
                        k.gemm(1.0, &a, &b, 0.0, &turn(&o[1], tc))?;
                        k.gemm(-0.5, &a, &b, 2.0, &turn(&o[2], tc))?;
                        k.gemm(0.5, &a, &b, 1.0, &turn(&o[3], tc))
                    }
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gemm_takes_batches_however_they_lie() {
    let (m, k, n) = (9, 33, 20);
    for dtype in DTYPES {
        for lead in [&[1][..], &[5], &[2, 3], &[3, 1, 4]] {
            let shape = |rows: usize, cols: usize| [lead, &[rows, cols]].concat();
            let (a, b, c) = (shape(m, k), shape(k, n), shape(m, n));
            for (shared_a, shared_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let a = if shared_a { vec![m, k] } else { a.clone() };
                let b = if shared_b { vec![k, n] } else { b.clone() };
                compare!(
                    &format!("gemm of batches {lead:?}, one a: {shared_a}, one b: {shared_b}"),
                    dtype,
                    [data(&a[..], random(1, &a)), data(&b[..], random(2, &b))],
                    [Out::Data(c[..].into()), Out::Add(acc(&c[..], random(3, &c)))],
                    |k, i, o| {
                        k.gemm(1.0, &i[0], &i[1], 0.0, &o[0])?;
                        k.gemm(1.0, &i[0], &i[1], 1.0, &o[1])
                    }
                );
            }
        }
        // Heads: (B, L, H, D) seen as (B, H, L, D), whose batches do not follow each other.
        let (batch, length, heads, width) = (2, 17, 3, 8);
        let rows = [batch, length, heads, width];
        let scores = [batch, heads, length, length];
        compare!(
            "gemm of heads",
            dtype,
            [data(rows, random(1, &rows)), data(rows, random(2, &rows)), data(scores, random(5, &scores))],
            [Out::Data(scores.into()), Out::Data(rows.into())],
            |k, i, o| {
                let head = |t: &Tensor| t.transpose(1, 2).unwrap();
                k.gemm(0.3, &head(&i[0]), &head(&i[1]).t()?, 0.0, &o[0])?;
                k.gemm(1.0, &i[2], &head(&i[1]), 0.0, &head(&o[1]))
            }
        );
        // Strides that no BLAS takes, a matrix repeated by a stride of 0, one row per batch, odd addresses.
        let wide = [6, 10, 14];
        compare!(
            "gemm of odd layouts",
            dtype,
            [data(wide, random(1, &wide)), data([1 + 14 * 5], random(2, &[71])), data([6, 1, 10], random(3, &[60]))],
            [Out::Data([6, 10, 5].into()), Out::Data([6, 5, 5].into()), Out::Data([6, 1, 14].into())],
            |k, i, o| {
                let view = |t: &Tensor, shape: [usize; 3], strides: [usize; 3], offset: usize| {
                    let layout = Layout::strided(shape.into(), &strides, offset).unwrap();
                    Tensor::new(t.storage().clone(), layout, t.dtype()).unwrap()
                };
                let repeated = view(&i[1], [6, 14, 5], [0, 5, 1], 1);
                k.gemm(1.0, &i[0], &repeated, 0.0, &o[0])?;
                let gaps = view(&i[0], [6, 5, 7], [140, 28, 2], 0);
                let b = view(&i[0], [6, 7, 5], [140, 3, 2], 1);
                k.gemm(1.0, &gaps, &b, 0.0, &o[1])?;
                k.gemm(1.0, &i[2], &i[0].index(0)?, 0.0, &o[2])
            }
        );
        compare!(
            "gemm into every other column",
            dtype,
            [data([7, 6], random(1, &[42])), data([6, 5], random(2, &[30]))],
            [Out::Add(data([7, 5, 2], random(3, &[70])))],
            |k, i, o| {
                let c = o[0].narrow(2, 1, 1)?.reshape([7, 5])?;
                k.gemm(1.0, &i[0], &i[1], 1.0, &c)
            }
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gemm_of_nothing_scales() {
    for dtype in DTYPES {
        for shape in [[3, 4], [0, 4], [3, 0]] {
            let [m, n] = shape;
            compare!(
                "gemm with no inner dimension",
                dtype,
                [data([m, 0], vec![]), data([0, n], vec![])],
                [Out::Data(shape.into()), Out::Add(data(shape, random(1, &shape)))],
                |k, i, o| {
                    k.gemm(1.0, &i[0], &i[1], 0.0, &o[0])?;
                    k.gemm(1.0, &i[0], &i[1], 3.0, &o[1])
                }
            );
        }
    }
    let t = |shape: [usize; 2], dtype| up(&Tensor::host_zeros(shape, dtype));
    let (a, c) = (t([2, 3], DType::F32), t([2, 2], DType::F32));
    let error = gpu().gemm(1.0, &a, &t([2, 2], DType::F32), 0.0, &c).unwrap_err().to_string();
    assert!(error.contains("(2, 3)") && error.contains("(m, k) by (k, n)"), "{error}");
    let error = gpu().gemm(1.0, &t([2, 3], DType::F64), &t([3, 2], DType::F64), 0.0, &t([2, 2], DType::F64));
    assert!(error.unwrap_err().to_string().contains("take bf16, f16 and f32"));
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_elementwise_of_any_size_and_alignment() {
    let shapes: [(&[usize], &[usize]); 8] = [
        (&[1], &[1]),
        (&[7, 333], &[333]),
        (&[7, 336], &[336]),
        (&[4, 5, 24], &[5, 24]),
        (&[3, 1001], &[3, 1001]),
        (&[129, 8], &[]),
        (&[40, 3], &[3]),
        (&[0, 5], &[5]),
    ];
    for dtype in DTYPES {
        for (shape, b_shape) in shapes {
            let (n, width): (usize, usize) = (shape.iter().product(), b_shape.iter().product());
            for offset in [0, 1] {
                compare!(
                    &format!("add and mul of {shape:?} and {b_shape:?} from element {offset}"),
                    dtype,
                    [
                        data([n + offset], random(1, &[n + offset])),
                        data([width + offset], random(2, &[width + offset]))
                    ],
                    [
                        Out::Data([n].into()),
                        Out::Data([n].into()),
                        Out::Add(data([n], random(3, &[n]))),
                        Out::Add(data([n], random(4, &[n])))
                    ],
                    |k, i, o| {
                        let a = i[0].narrow(0, offset, n)?.reshape(shape)?;
                        let b = i[1].narrow(0, offset, width)?.reshape(b_shape)?;
                        k.add(&a, &b, &o[0].reshape(shape)?)?;
                        k.mul(&a, &b, &o[1].reshape(shape)?)?;
                        let place = o[2].reshape(shape)?;
                        k.add(&place, &b, &place)?;
                        let place = o[3].reshape(shape)?;
                        k.mul(&place, &b, &place)
                    }
                );
            }
        }
        for n in [0, 1, 7, 8, 4099] {
            for offset in [0, 1] {
                compare!(
                    &format!("axpby and sigmoid of {n} from element {offset}"),
                    dtype,
                    [data([n + offset], random(1, &[n + offset])), acc([n], random(2, &[n]))],
                    [
                        Out::Add(data([n], random(3, &[n]))),
                        Out::Add(acc([n], random(4, &[n]))),
                        Out::Data([n].into()),
                        Out::Acc([n].into()),
                        Out::Data([n].into()),
                        Out::Data([n].into())
                    ],
                    |k, i, o| {
                        let x = i[0].narrow(0, offset, n)?;
                        k.axpby(0.5, &x, -2.0, &o[0])?;
                        k.axpby(0.5, &x, 1.0, &o[1])?;
                        k.axpby(2.0, &i[1], 0.0, &o[2])?;
                        k.axpby(2.0, &x, 0.0, &o[3])?;
                        k.sigmoid(&x, &o[4])?;
                        k.sigmoid_backward(&x, &i[0].narrow(0, 0, n)?, &o[5])
                    }
                );
            }
        }
        let far = vec![0.0, -0.0, 30.0, -30.0, 3e4, -3e4, 88.0, -88.0];
        compare!("sigmoid far from zero", dtype, [data([8], far)], [Out::Data([8].into())], |k, i, o| k
            .sigmoid(&i[0], &o[0]));
    }
}

/// Rows and widths: a warp's and a block's, in vectors and not.
const ROWS: [(usize, usize); 14] = [
    (1, 1),
    (0, 5),
    (5, 2),
    (33, 8),
    (9, 33),
    (70, 64),
    (17, 128),
    (3, 1000),
    (5, 1023),
    (4, 1024),
    (3, 1025),
    (2, 4096),
    (2, 50_257),
    (1300, 1032),
];

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_softmax_of_any_width() {
    for dtype in DTYPES {
        for (rows, cols) in ROWS {
            let n = rows * cols;
            compare!(
                &format!("softmax of ({rows}, {cols})"),
                dtype,
                [data([rows, cols], uniform(1, n, -8.0, 8.0)), data([n + 1], random(2, &[n + 1]))],
                [Out::Data([rows, cols].into()), Out::Acc([rows, cols].into()), Out::Data([rows, cols].into())],
                |k, i, o| {
                    k.softmax(&i[0], &o[0])?;
                    k.softmax(&i[0], &o[1])?;
                    // A gradient off the 16-byte boundary.
                    k.softmax_backward(&i[0], &i[1].narrow(0, 1, n)?.reshape([rows, cols])?, &o[2])
                }
            );
        }
        let minus = f64::NEG_INFINITY;
        let masked = vec![minus, minus, 1.0, 2.0, minus, 3.0, 0.5, minus, 0.0];
        compare!(
            "softmax of masked rows",
            dtype,
            [data([3, 3], masked.clone()), data([1, 9], masked)],
            [Out::Data([3, 3].into()), Out::Acc([1, 9].into())],
            |k, i, o| {
                k.softmax(&i[0], &o[0])?;
                k.softmax(&i[1], &o[1])
            }
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_normalisation_of_rows() {
    for dtype in DTYPES {
        for (rows, cols) in ROWS {
            let (n, shape) = (rows * cols, [rows, cols]);
            let mut x = uniform(1, n, 0.1, 1.0);
            // A row of zeros, whose norm is the floor.
            x.iter_mut().take(if rows > 1 { cols } else { 0 }).for_each(|v| *v = 0.0);
            let (y, dy) = (uniform(2, n, 0.0, 1.0), random(3, &[n]));
            let norm: Vec<f64> = (0..rows).map(|r| if r == 0 { 0.5 } else { 1.0 + r as f64 * 0.01 }).collect();
            compare!(
                &format!("norms of ({rows}, {cols})"),
                dtype,
                [data(shape, x), data(shape, y), data(shape, dy), acc([rows], norm)],
                [
                    Out::Data(shape.into()),
                    Out::Data(shape.into()),
                    Out::Data(shape.into()),
                    Out::Acc([rows].into()),
                    Out::Data(shape.into())
                ],
                |k, i, o| {
                    k.normalise_sum(&i[0], 2.5, 1e-2, &o[0])?;
                    k.normalise_sum_backward(&i[1], &i[0], 2.5, 1e-2, &i[2], &o[1])?;
                    k.normalise_l2(&i[0], 1e-3, &o[2], &o[3])?;
                    k.normalise_l2_backward(&i[1], &i[3], 0.5, &i[2], &o[4])
                }
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_sums_of_rows_and_dots() {
    let shapes = [
        (1, 1),
        (0, 3),
        (7, 5),
        (65_537, 1),
        (30_000, 3),
        (3000, 1001),
        (257, 4096),
        (20_000, 64),
        (5, 100_000),
        (513, 40),
    ];
    for dtype in DTYPES {
        for (rows, cols) in shapes {
            // Positive: sums of signed values would be small beside their terms.
            let x = uniform(1, rows * cols + 1, 0.0, 1.0);
            compare!(
                &format!("sum_rows of ({rows}, {cols})"),
                dtype,
                [data([rows * cols + 1], x)],
                [Out::Add(acc([cols], random(2, &[cols]))), Out::Add(acc([cols], random(2, &[cols])))],
                |k, i, o| {
                    k.sum_rows(&i[0].narrow(0, 0, rows * cols)?.reshape([rows, cols])?, &o[0])?;
                    k.sum_rows(&i[0].narrow(0, 1, rows * cols)?.reshape([rows, cols])?, &o[1])
                }
            );
        }
        compare!(
            "sum_rows into the data's type",
            dtype,
            [data([100, 48], uniform(1, 4800, 0.0, 1.0))],
            [Out::Add(data([48], random(2, &[48])))],
            |k, i, o| k.sum_rows(&i[0], &o[0])
        );
        for n in [0, 1, 7, 8191, 8192, 100_003, 3_000_001] {
            compare!(
                &format!("dot of {n}"),
                dtype,
                [data([n + 1], uniform(1, n + 1, 0.0, 1.0)), data([n], uniform(2, n, 0.0, 1.0))],
                [Out::Add(acc([1], vec![0.25])), Out::Add(acc([1], vec![0.0])), Out::Add(acc([1], vec![1.0]))],
                |k, i, o| {
                    k.dot(&i[0].narrow(0, 0, n)?, &i[1], &o[0])?;
                    k.dot(&i[0].narrow(0, 1, n)?, &i[1], &o[1])?;
                    k.dot(&i[1], &i[1], &o[2])
                }
            );
        }
    }
}

/// Where a sum's terms lie must not change its order.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_sums_do_not_depend_on_alignment() {
    let (rows, cols) = (2000, 64);
    let host = Tensor::host([rows * cols + 8], DType::BF16);
    Cpu.copy(&Tensor::from_slice(&random(1, &[rows * cols + 8]), [rows * cols + 8]).unwrap(), &host).unwrap();
    let sums = |offset: usize| {
        let x = Tensor::host([rows * cols + 8], DType::BF16);
        Cpu.copy(&host.narrow(0, 0, rows * cols).unwrap(), &x.narrow(0, offset, rows * cols).unwrap()).unwrap();
        let x = up(&x).narrow(0, offset, rows * cols).unwrap();
        let [sum, dot] = [cols, 1].map(|n| up(&Tensor::host_zeros([n], DType::F32)));
        gpu().sum_rows(&x.reshape([rows, cols]).unwrap(), &sum).unwrap();
        gpu().dot(&x, &x, &dot).unwrap();
        [sum, dot].map(|t| down(&t).to_vec::<f32>().unwrap())
    };
    assert_eq!(sums(0), sums(3));
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_refuses_operands_that_break_a_rule() {
    let gpu = gpu();
    let t = |shape: [usize; 2], dtype| up(&Tensor::host_zeros(shape, dtype));
    let (a, b) = (t([4, 4], DType::F32), t([4, 4], DType::F32));
    let fails = |result: fsmoe::Result<()>, words: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    fails(gpu.add(&a.t().unwrap(), &b, &a), "contiguous");
    fails(gpu.add(&b, &a, &a), "shares memory");
    fails(gpu.axpby(1.0, &a, 1.0, &a), "shares memory");
    fails(gpu.softmax(&a, &t([4, 4], DType::BF16)), "the output has the input's type, or f32");
    fails(gpu.sum_rows(&a, &t([1, 3], DType::F32)), "rows of 4 into (1, 3)");
    fails(gpu.sigmoid(&t([1, 1], DType::F64), &t([1, 1], DType::F64)), "take bf16, f16 and f32");
    fails(gpu.dot(&a, &b, &t([1, 1], DType::F32)), "out is f32 (1, 1), expected f32 (1)");
    fails(gpu.normalise_l2(&t([4, 0], DType::F32), 1e-3, &t([4, 0], DType::F32), &a), "rows are empty");
    fails(gpu.add(&a, &Tensor::host([4, 4], DType::F32), &b), "is not on cuda:0");
}
