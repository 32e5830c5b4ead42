//! Elementwise operations, softmax, row sums and norms.

use super::Cpu;
use super::util::{Num, Real, expect, float_type, for_rows, for_rows2, in_place, input, max, output, sum, sum_blocks};
use crate::device::MathKernels;
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
        check_binary("add", a, b, out)?;
        float_type!("add", a.dtype(), T => binary::<T>("add", a, b, out, |x, y| x + y))
    }

    fn mul(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        check_binary("mul", a, b, out)?;
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

/// Fails unless the tensors have `first`'s shape and dtype.
pub(super) fn same(op: &str, first: &Tensor, others: &[&Tensor]) -> Result<()> {
    others.iter().try_for_each(|t| expect(op, "a tensor", t, first.shape(), first.dtype()))
}

/// Fails unless `out` has x's type or the one it accumulates in.
fn same_or_acc(op: &str, x: &Tensor, out: &Tensor) -> Result<()> {
    let own = x.dtype();
    if out.dtype() != own && out.dtype() != own.accumulate() {
        shape_err!("{op}: {own} into {}: the output has the input's type, or {}", out.dtype(), own.accumulate());
    }
    Ok(())
}

/// Fails if an output shares memory with an input.
pub(super) fn apart(op: &str, input: &Tensor, out: &Tensor) -> Result<()> {
    if input.overlaps(out) {
        shape_err!("{op}: the output shares memory with an input of shape {}", input.shape());
    }
    Ok(())
}

fn check_binary(op: &str, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
    if !a.shape().ends_with(b.shape()) || a.shape() != out.shape() || a.dtype() != b.dtype() || a.dtype() != out.dtype()
    {
        shape_err!("{op}: {a:?} and {b:?} into {out:?}: the second has the first's shape or its last dimensions");
    }
    Ok(())
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
