//! Elementwise operations, softmax, row sums and norms.

use super::Cpu;
use super::util::{Num, Real, expect, float_type, for_rows, for_rows2, in_place, input, max, output, sum, sum_blocks};
use crate::device::MathKernels;
use crate::device::check;
use crate::device::check::same_or_acc;
pub(super) use crate::device::check::{apart, same};
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// Elements that an elementwise loop takes at a time: long enough to vectorise, short enough to share among threads.
pub(super) const PIECE: usize = 1024;

impl MathKernels for Cpu {
    fn gemm(&self, alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()> {
        super::gemm::gemm(alpha, a, b, beta, c)
    }

    fn add(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        check::binary("add", a, b, out)?;
        float_type!("add", a.dtype(), T => binary::<T>("add", a, b, out, |x, y| x + y))
    }

    fn mul(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        check::binary("mul", a, b, out)?;
        float_type!("mul", a.dtype(), T => binary::<T>("mul", a, b, out, |x, y| x * y))
    }

    fn axpby(&self, alpha: f64, x: &Tensor, beta: f64, y: &Tensor) -> Result<()> {
        if x.shape() != y.shape() {
            shape_err!("axpby: x is {}, y is {}", x.shape(), y.shape());
        }
        apart("axpby", x, y)?;
        float_type!("axpby", x.dtype(), X => float_type!("axpby", y.dtype(), Y => {
            type A = <Y as Num>::Acc;
            let (alpha, beta) = (alpha as A, beta as A);
            let x = input::<X>(x)?;
            for_rows(output::<Y>(y)?, PIECE, |r, y| {
                let x = &x[r * PIECE..][..y.len()];
                // Two loops: with beta 0, y may hold anything, NaN included.
                if beta == 0.0 {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = Y::put(alpha * x.get() as A));
                } else {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = Y::put(alpha * x.get() as A + beta * y.get()));
                }
            });
        }));
        Ok(())
    }

    fn sum_rows(&self, x: &Tensor, out: &Tensor) -> Result<()> {
        let (rows, width) = x.rows();
        if out.elements() != width {
            shape_err!("sum_rows: rows of {width} into {}", out.shape());
        }
        same_or_acc("sum_rows", x, out)?;
        if width == 0 {
            return Ok(());
        }
        float_type!("sum_rows", x.dtype(), T => float_type!("sum_rows", out.dtype(), O => {
            type A = <T as Num>::Acc;
            let x = input::<T>(x)?;
            let mut total = vec![0.0 as A; width];
            sum_blocks(rows, width, &mut total, |range, partial| {
                for row in x[range.start * width..range.end * width].chunks(width) {
                    partial.iter_mut().zip(row).for_each(|(p, v)| *p += v.get());
                }
            });
            for (o, t) in output::<O>(out)?.iter_mut().zip(total) {
                *o = O::put(o.get() + <O as Num>::Acc::of(t.f64()));
            }
        }));
        Ok(())
    }

    fn softmax(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        if x.shape() != y.shape() {
            shape_err!("softmax: x is {}, y is {}", x.shape(), y.shape());
        }
        same_or_acc("softmax", x, y)?;
        apart("softmax", x, y)?;
        let width = x.rows().1;
        float_type!("softmax", x.dtype(), X => float_type!("softmax", y.dtype(), Y => {
            let x = input::<X>(x)?;
            for_rows(output::<Y>(y)?, width, |r, y| {
                let x = &x[r * width..][..width];
                let most = max(x);
                // Exponentials are computed twice: kept in a 16-bit y they would be rounded twice.
                let scale = 1.0 / sum([x], |[x]| (x - most).fast_exp());
                for (y, x) in y.iter_mut().zip(x) {
                    *y = Y::put(<Y as Num>::Acc::of(((x.get() - most).fast_exp() * scale).f64()));
                }
            });
        }));
        Ok(())
    }

    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        same("softmax_backward", y, &[dy, dx])?;
        let width = y.rows().1;
        float_type!("softmax_backward", y.dtype(), T => {
            let (y, dy) = (input::<T>(y)?, input::<T>(dy)?);
            for_rows(output::<T>(dx)?, width, |r, dx| {
                let (y, dy) = (&y[r * width..][..width], &dy[r * width..][..width]);
                let inner = sum([y, dy], |[y, dy]| y * dy);
                for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = T::put(y.get() * (dy.get() - inner));
                }
            });
        });
        Ok(())
    }

    fn sigmoid(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        same("sigmoid", x, &[y])?;
        float_type!("sigmoid", x.dtype(), T => {
            let x = input::<T>(x)?;
            for_rows(output::<T>(y)?, PIECE, |r, y| {
                y.iter_mut().zip(&x[r * PIECE..]).for_each(|(y, x)| *y = T::put(x.get().sigmoid()));
            });
        });
        Ok(())
    }

    fn sigmoid_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        same("sigmoid_backward", y, &[dy, dx])?;
        float_type!("sigmoid_backward", y.dtype(), T => {
            let (y, dy) = (input::<T>(y)?, input::<T>(dy)?);
            for_rows(output::<T>(dx)?, PIECE, |r, dx| {
                let (y, dy) = (&y[r * PIECE..][..dx.len()], &dy[r * PIECE..][..dx.len()]);
                for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = T::put(dy.get() * y.get() * (1.0 - y.get()));
                }
            });
        });
        Ok(())
    }

    fn normalise_sum(&self, x: &Tensor, scale: f64, eps: f64, y: &Tensor) -> Result<()> {
        same("normalise_sum", x, &[y])?;
        let width = x.rows().1;
        float_type!("normalise_sum", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let x = input::<T>(x)?;
            for_rows(output::<T>(y)?, width, |r, y| {
                let x = &x[r * width..][..width];
                let factor = scale as A / (sum([x], |[x]| x) + eps as A);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = T::put(x.get() * factor));
            });
        });
        Ok(())
    }

    fn normalise_sum_backward(
        &self,
        x: &Tensor,
        y: &Tensor,
        scale: f64,
        eps: f64,
        dy: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        same("normalise_sum_backward", x, &[y, dy, dx])?;
        let width = x.rows().1;
        float_type!("normalise_sum_backward", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let (x, y, dy) = (input::<T>(x)?, input::<T>(y)?, input::<T>(dy)?);
            for_rows(output::<T>(dx)?, width, |r, dx| {
                let at = r * width..(r + 1) * width;
                let (x, y, dy) = (&x[at.clone()], &y[at.clone()], &dy[at]);
                // y = scale·x/S: dx = (scale·dy − Σ dy·y)/S.
                let total = sum([x], |[x]| x) + eps as A;
                let inner = sum([y, dy], |[y, dy]| y * dy);
                dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = T::put((scale as A * dy.get() - inner) / total));
            });
        });
        Ok(())
    }

    fn normalise_l2(&self, x: &Tensor, eps: f64, y: &Tensor, norm: &Tensor) -> Result<()> {
        same("normalise_l2", x, &[y])?;
        let (rows, width) = x.rows();
        if width == 0 {
            shape_err!("normalise_l2 of {}: rows are empty", x.shape());
        }
        expect("normalise_l2", "norm", norm, &[rows], x.dtype().accumulate())?;
        float_type!("normalise_l2", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let x = input::<T>(x)?;
            for_rows2(width, output::<T>(y)?, width, output::<A>(norm)?, 1, |r, y, norm| {
                let x = &x[r * width..][..width];
                let length = sum([x], |[x]| x * x).sqrt().max(eps as A);
                norm[0] = length;
                y.iter_mut().zip(x).for_each(|(y, x)| *y = T::put(x.get() / length));
            });
        });
        Ok(())
    }

    fn normalise_l2_backward(&self, y: &Tensor, norm: &Tensor, eps: f64, dy: &Tensor, dx: &Tensor) -> Result<()> {
        same("normalise_l2_backward", y, &[dy, dx])?;
        let (rows, width) = y.rows();
        expect("normalise_l2_backward", "norm", norm, &[rows], y.dtype().accumulate())?;
        float_type!("normalise_l2_backward", y.dtype(), T => {
            type A = <T as Num>::Acc;
            let (y, norm, dy) = (input::<T>(y)?, input::<A>(norm)?, input::<T>(dy)?);
            for_rows(output::<T>(dx)?, width, |r, dx| {
                let (y, dy) = (&y[r * width..][..width], &dy[r * width..][..width]);
                let inner = sum([y, dy], |[y, dy]| y * dy);
                // At the floor the norm is a constant.
                let inner = if norm[r] > eps as A { inner } else { 0.0 };
                for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = T::put((dy.get() - y.get() * inner) / norm[r]);
                }
            });
        });
        Ok(())
    }

    fn dot(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        same("dot", a, &[b])?;
        expect("dot", "out", out, &[1], a.dtype().accumulate())?;
        float_type!("dot", a.dtype(), T => {
            type A = <T as Num>::Acc;
            let (a, b) = (input::<T>(a)?, input::<T>(b)?);
            // In blocks of a fixed size, so that the order does not depend on threads.
            let pairs = a.par_chunks(8192).zip(b.par_chunks(8192)).with_min_len(2);
            let partials: Vec<A> = pairs.map(|(a, b)| sum([a, b], |[a, b]| a * b)).collect();
            output::<A>(out)?[0] += partials.iter().sum::<A>();
        });
        Ok(())
    }
}

/// `out[i] = f(a[i], b[i mod |b|])`, out possibly a itself.
fn binary<T: Num>(
    op: &str,
    a: &Tensor,
    b: &Tensor,
    out: &Tensor,
    f: impl Fn(T::Acc, T::Acc) -> T::Acc + Sync + Send,
) -> Result<()> {
    let (in_place, width) = (in_place(op, a, out)?, b.elements());
    apart(op, b, out)?;
    let b = input::<T>(b)?;
    let out = output::<T>(out)?;
    if width == 0 {
        return Ok(());
    }
    // Rows as long as b, or pieces of them where b is as large as a.
    let piece = if width == out.len() { width.min(4096) } else { width };
    let b_at = |r: usize, len: usize| &b[r * piece % width..][..len];
    if in_place {
        for_rows(out, piece, |r, o| {
            let b = b_at(r, o.len());
            o.iter_mut().zip(b).for_each(|(o, b)| *o = T::put(f(o.get(), b.get())));
        });
    } else {
        let a = input::<T>(a)?;
        for_rows(out, piece, |r, o| {
            let (a, b) = (&a[r * piece..][..o.len()], b_at(r, o.len()));
            o.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = T::put(f(a.get(), b.get())));
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MemoryKernels;
    use crate::device::cpu::util::{FLOATS, close, random_tensor as random, same_on_any_thread_count, wide};
    use crate::tensor::DType;

    fn map2(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        a.iter().zip(b.iter().cycle()).map(|(a, b)| f(*a, *b)).collect()
    }

    #[test]
    fn elementwise_of_all_types_also_repeated_and_in_place() {
        for (dtype, bound) in FLOATS {
            for b_shape in [&[7, 333][..], &[333], &[]] {
                let (a, b, out) = (random(1, &[7, 333], dtype), random(2, b_shape, dtype), random(3, &[7, 333], dtype));
                let (sum, product) =
                    (map2(&wide(&a), &wide(&b), |a, b| a + b), map2(&wide(&a), &wide(&b), |a, b| a * b));
                Cpu.add(&a, &b, &out).unwrap();
                close(&out, &sum, bound);
                Cpu.mul(&a, &b, &out).unwrap();
                close(&out, &product, bound);
                Cpu.mul(&a, &b, &a).unwrap();
                assert_eq!(wide(&a), wide(&out));
            }
            let (x, y) = (random(1, &[1, 2050], DType::F32), random(2, &[1, 2050], dtype));
            let want = map2(&wide(&x), &wide(&y), |x, y| 0.5 * x - 2.0 * y);
            Cpu.axpby(0.5, &x, -2.0, &y).unwrap();
            close(&y, &want, bound.max(2e-6));
            Cpu.fill(&y, f64::NAN).unwrap();
            Cpu.axpby(2.0, &x, 0.0, &y).unwrap();
            close(&y, &map2(&wide(&x), &[2.0], |x, two| two * x), bound.max(2e-6));
        }
    }

    #[test]
    fn another_view_of_the_same_memory_is_refused() {
        let square = random(1, &[4, 4], DType::F32);
        let other = random(2, &[4, 4], DType::F32);
        let e = Cpu.add(&square.t().unwrap(), &other, &square).unwrap_err();
        assert!(e.to_string().contains("add") && e.to_string().contains("shares memory"), "{e}");
        assert!(Cpu.add(&other, &square, &square).is_err(), "only the first operand may be the output");
        assert!(Cpu.axpby(1.0, &square, 1.0, &square).is_err());
        assert!(Cpu.softmax(&square, &square).is_err());
        assert!(Cpu.softmax(&square, &Tensor::host([4, 4], DType::BF16)).is_err(), "neither its type nor acc");
    }

    #[test]
    fn softmax_and_its_backward() {
        for (dtype, bound) in FLOATS {
            for (rows, width) in [(5, 33), (1, 1), (0, 4), (9, 8)] {
                let (x, dy) = (random(1, &[rows, width], dtype), random(2, &[rows, width], dtype));
                let (y, acc) = (Tensor::host([rows, width], dtype), Tensor::host([rows, width], dtype.accumulate()));
                Cpu.softmax(&x, &y).unwrap();
                Cpu.softmax(&x, &acc).unwrap();
                let mut want = wide(&x);
                for row in want.chunks_mut(width) {
                    let total: f64 = row.iter().map(|v| v.exp()).sum();
                    row.iter_mut().for_each(|v| *v = v.exp() / total);
                }
                close(&y, &want, bound);
                close(&acc, &want, if dtype == DType::F64 { 1e-13 } else { 2e-6 });
                let (y64, dy64, dx) = (wide(&y), wide(&dy), Tensor::host([rows, width], dtype));
                Cpu.softmax_backward(&y, &dy, &dx).unwrap();
                let mut want = y64.clone();
                for (r, row) in want.chunks_mut(width).enumerate() {
                    let at = r * width..(r + 1) * width;
                    let inner: f64 = y64[at.clone()].iter().zip(&dy64[at.clone()]).map(|(a, b)| a * b).sum();
                    row.iter_mut().zip(&dy64[at]).for_each(|(y, dy)| *y *= dy - inner);
                }
                close(&dx, &want, bound);
            }
        }
        let far = Tensor::from_slice(&[1e30_f32, -1e30, 1e30, f32::NEG_INFINITY], [1, 4]).unwrap();
        let y = Tensor::host([1, 4], DType::F32);
        Cpu.softmax(&far, &y).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [0.5, 0.0, 0.5, 0.0]);
    }

    #[test]
    fn sigmoid_and_its_backward() {
        for (dtype, bound) in FLOATS {
            let (x, dy) = (random(1, &[2, 1031], dtype), random(2, &[2, 1031], dtype));
            let (y, dx) = (Tensor::host([2, 1031], dtype), Tensor::host([2, 1031], dtype));
            Cpu.sigmoid(&x, &y).unwrap();
            close(&y, &map2(&wide(&x), &[0.0], |x, _| 1.0 / (1.0 + (-x).exp())), bound);
            Cpu.sigmoid_backward(&y, &dy, &dx).unwrap();
            close(&dx, &map2(&wide(&y), &wide(&dy), |y, dy| dy * y * (1.0 - y)), bound);
        }
    }

    #[test]
    fn sums_of_rows_and_dots_add_to_what_is_there() {
        for (dtype, bound) in FLOATS {
            for (rows, width) in [(131, 19), (0, 3), (1, 1), (4, 0)] {
                let (x, y) = (random(1, &[rows, width], dtype), random(2, &[rows, width], dtype));
                let acc = dtype.accumulate();
                let (out, dot) = (random(3, &[width], acc), random(4, &[1], acc));
                let (mut sums, mut total, mut size) = (wide(&out), wide(&dot), 1.0);
                for (i, (a, b)) in wide(&x).into_iter().zip(wide(&y)).enumerate() {
                    sums[i % width] += a;
                    total[0] += a * b;
                    size += (a * b).abs();
                }
                Cpu.sum_rows(&x, &out).unwrap();
                Cpu.dot(&x, &y, &dot).unwrap();
                // The inputs are exact, and the sums are kept in acc: 16-bit types are as close as f32.
                close(&out, &sums, bound.min(5e-6));
                // Terms cancel: the error is in proportion to their sizes.
                let unit = if acc == DType::F64 { 1e-15 } else { 1e-7 };
                assert!((wide(&dot)[0] - total[0]).abs() <= unit * size, "{dot:?} {total:?}");
            }
        }
    }

    #[test]
    fn normalised_rows() {
        let (rows, width, scale, eps) = (5, 21, 2.5, 1e-3);
        for (dtype, bound) in FLOATS {
            let make = |seed| random(seed, &[rows, width], dtype);
            let (x, dy, y, dx) = (make(1), make(2), make(3), make(4));
            Cpu.mul(&x, &x, &y).unwrap();
            Cpu.copy(&y, &x).unwrap(); // not negative
            let (x64, dy64) = (wide(&x), wide(&dy));
            let dot =
                |a: &[f64], b: &[f64], r: usize| -> f64 { (r * width..(r + 1) * width).map(|i| a[i] * b[i]).sum() };
            let ones = vec![1.0; rows * width];
            Cpu.normalise_sum(&x, scale, eps, &y).unwrap();
            let by_sum = |i: usize| scale * x64[i] / (dot(&x64, &ones, i / width) + eps);
            close(&y, &(0..rows * width).map(by_sum).collect::<Vec<_>>(), bound);
            Cpu.normalise_sum_backward(&x, &y, scale, eps, &dy, &dx).unwrap();
            let y64 = wide(&y);
            let back = |i: usize| {
                let r = i / width;
                (scale * dy64[i] - dot(&y64, &dy64, r)) / (dot(&x64, &ones, r) + eps)
            };
            close(&dx, &(0..rows * width).map(back).collect::<Vec<_>>(), bound);

            let norm = Tensor::host([rows], dtype.accumulate());
            // Below the floor in the second half of the cases.
            for eps in [1e-3, 1e3] {
                Cpu.normalise_l2(&x, eps, &y, &norm).unwrap();
                let norms: Vec<f64> = (0..rows).map(|r| dot(&x64, &x64, r).sqrt().max(eps)).collect();
                close(&norm, &norms, bound.min(2e-6));
                close(&y, &(0..rows * width).map(|i| x64[i] / norms[i / width]).collect::<Vec<_>>(), bound);
                Cpu.normalise_l2_backward(&y, &norm, eps, &dy, &dx).unwrap();
                let y64 = wide(&y);
                let back = |i: usize| {
                    let inner = if norms[i / width] > eps { dot(&y64, &dy64, i / width) } else { 0.0 };
                    (dy64[i] - y64[i] * inner) / norms[i / width]
                };
                close(&dx, &(0..rows * width).map(back).collect::<Vec<_>>(), bound);
            }
        }
    }

    #[test]
    fn the_thread_count_changes_no_bit() {
        let (x, y) = (random(1, &[700, 65], DType::F32), random(2, &[700, 65], DType::F32));
        same_on_any_thread_count(|| {
            let (out, sums, dot) =
                (random(3, &[700, 65], DType::F32), random(4, &[65], DType::F32), random(5, &[1], DType::F32));
            Cpu.softmax(&x, &out).unwrap();
            Cpu.sum_rows(&x, &sums).unwrap();
            Cpu.dot(&x, &y, &dot).unwrap();
            [wide(&out), wide(&sums), wide(&dot)].concat()
        });
    }
}
