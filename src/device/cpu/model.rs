//! What a transformer needs around its MoE layers; attention is in a file of its own.

use super::Cpu;
use super::attention;
use super::math::same;
use super::util::{Num, Real, expect, float_type, for_rows, for_rows2, in_place, input, max, output, sum, sum_blocks};
use crate::device::{AttentionShape, ModelKernels, Rope};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

impl ModelKernels for Cpu {
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        eps: f64,
        y: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
    ) -> Result<()> {
        check_norm("layer_norm", x, &[y], &[gain, bias], &[mean, rstd])?;
        let width = x.rows().1;
        float_type!("layer_norm", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let (x, gain, bias) = (input::<T>(x)?, input::<T>(gain)?, input::<T>(bias)?);
            for_rows2(width, output::<A>(mean)?, 1, output::<A>(rstd)?, 1, |r, mean, rstd| {
                let x = &x[r * width..][..width];
                mean[0] = sum([x], |[x]| x) / width as A;
                let mean = mean[0];
                let var = sum([x], |[x]| (x - mean) * (x - mean)) / width as A;
                rstd[0] = 1.0 / (var + eps as A).sqrt();
            });
            let (mean, rstd) = (input::<A>(mean)?, input::<A>(rstd)?);
            for_rows(output::<T>(y)?, width, |r, y| {
                let (x, mean, rstd) = (&x[r * width..][..width], mean[r], rstd[r]);
                for (((y, x), g), b) in y.iter_mut().zip(x).zip(gain).zip(bias) {
                    *y = T::put((x.get() - mean) * rstd * g.get() + b.get());
                }
            });
        });
        Ok(())
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
        d_bias: &Tensor,
    ) -> Result<()> {
        check_norm("layer_norm_backward", x, &[dy, dx], &[gain, d_gain, d_bias], &[mean, rstd])?;
        let (rows, width) = x.rows();
        float_type!("layer_norm_backward", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let (x, gain, dy) = (input::<T>(x)?, input::<T>(gain)?, input::<T>(dy)?);
            let (mean, rstd) = (input::<A>(mean)?, input::<A>(rstd)?);
            for_rows(output::<T>(dx)?, width, |r, dx| {
                let (x, dy) = (&x[r * width..][..width], &dy[r * width..][..width]);
                let (mean, rstd) = (mean[r], rstd[r]);
                let flat = sum([dy, gain], |[dy, g]| dy * g) / width as A;
                let inner = sum([dy, gain, x], |[dy, g, x]| dy * g * ((x - mean) * rstd)) / width as A;
                for (((dx, x), dy), g) in dx.iter_mut().zip(x).zip(dy).zip(gain) {
                    let hat = (x.get() - mean) * rstd;
                    *dx = T::put(rstd * (dy.get() * g.get() - flat - hat * inner));
                }
            });
            // Gain in the first half of a partial, bias in the second.
            let mut total = vec![0.0 as A; 2 * width];
            sum_blocks(rows, 2 * width, &mut total, |range, partial| {
                let (pg, pb) = partial.split_at_mut(width);
                for r in range {
                    let (x, dy) = (&x[r * width..][..width], &dy[r * width..][..width]);
                    let (mean, rstd) = (mean[r], rstd[r]);
                    for (((pg, pb), x), dy) in pg.iter_mut().zip(pb.iter_mut()).zip(x).zip(dy) {
                        *pg += dy.get() * ((x.get() - mean) * rstd);
                        *pb += dy.get();
                    }
                }
            });
            accumulate::<T>(d_gain, &total[..width])?;
            accumulate::<T>(d_bias, &total[width..])?;
        });
        Ok(())
    }

    fn rms_norm(&self, x: &Tensor, gain: &Tensor, eps: f64, y: &Tensor, rstd: &Tensor) -> Result<()> {
        check_norm("rms_norm", x, &[y], &[gain], &[rstd])?;
        let width = x.rows().1;
        float_type!("rms_norm", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let (x, gain) = (input::<T>(x)?, input::<T>(gain)?);
            for_rows2(width, output::<T>(y)?, width, output::<A>(rstd)?, 1, |r, y, rstd| {
                let x = &x[r * width..][..width];
                let square = sum([x], |[x]| x * x) / width as A;
                let scale = 1.0 / (square + eps as A).sqrt();
                rstd[0] = scale;
                for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                    *y = T::put(x.get() * scale * g.get());
                }
            });
        });
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
    ) -> Result<()> {
        check_norm("rms_norm_backward", x, &[dy, dx], &[gain, d_gain], &[rstd])?;
        let (rows, width) = x.rows();
        float_type!("rms_norm_backward", x.dtype(), T => {
            type A = <T as Num>::Acc;
            let (x, gain, rstd, dy) = (input::<T>(x)?, input::<T>(gain)?, input::<A>(rstd)?, input::<T>(dy)?);
            for_rows(output::<T>(dx)?, width, |r, dx| {
                let (x, dy, rstd) = (&x[r * width..][..width], &dy[r * width..][..width], rstd[r]);
                let inner = sum([dy, gain, x], |[dy, g, x]| dy * g * x);
                let back = inner * rstd * rstd / width as A;
                for (((dx, x), dy), g) in dx.iter_mut().zip(x).zip(dy).zip(gain) {
                    *dx = T::put(rstd * (dy.get() * g.get() - x.get() * back));
                }
            });
            let mut total = vec![0.0 as A; width];
            sum_blocks(rows, width, &mut total, |range, partial| {
                for r in range {
                    let (x, dy, rstd) = (&x[r * width..][..width], &dy[r * width..][..width], rstd[r]);
                    for ((p, x), dy) in partial.iter_mut().zip(x).zip(dy) {
                        *p += dy.get() * x.get() * rstd;
                    }
                }
            });
            accumulate::<T>(d_gain, &total)?;
        });
        Ok(())
    }

    fn rope(&self, x: &Tensor, rope: Rope, inverse: bool, y: &Tensor) -> Result<()> {
        same("rope", x, &[y])?;
        let &[_, seq, heads, dim] = x.shape().dims() else {
            shape_err!("rope of {}: it takes (B, L, H, D)", x.shape());
        };
        if dim % 2 != 0 {
            shape_err!("rope: a head of width {dim}; the width must be even");
        }
        let half = dim / 2;
        float_type!("rope", x.dtype(), T => {
            type A = <T as Num>::Acc;
            // One table for all sequences and heads: sines and cosines cost more than the rest.
            let mut table = Vec::with_capacity(seq * half);
            let turns: Vec<f64> = (0..half).map(|i| rope.theta.powf(-2.0 * i as f64 / dim as f64)).collect();
            for l in 0..seq {
                for turn in &turns {
                    let (sin, cos) = ((rope.first + l) as f64 * turn).sin_cos();
                    table.push(((if inverse { -sin } else { sin }) as A, cos as A));
                }
            }
            if !in_place("rope", x, y)? {
                output::<T>(y)?.copy_from_slice(input::<T>(x)?);
            }
            for_rows(output::<T>(y)?, dim, |r, head| {
                let l = r / heads % seq;
                let (first, second) = head.split_at_mut(half);
                for ((a, b), (sin, cos)) in first.iter_mut().zip(second).zip(&table[l * half..][..half]) {
                    let (u, v) = (a.get(), b.get());
                    *a = T::put(u * cos - v * sin);
                    *b = T::put(v * cos + u * sin);
                }
            });
        });
        Ok(())
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
    ) -> Result<()> {
        attention::forward(shape, q, k, v, out, lse)
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        d_out: &Tensor,
        dq: &Tensor,
        dk: &Tensor,
        dv: &Tensor,
    ) -> Result<()> {
        attention::backward(shape, [q, k, v, out, d_out], lse, [dq, dk, dv])
    }

    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, loss: &Tensor, lse: &Tensor) -> Result<()> {
        let vocab = check_targets("cross_entropy", logits, targets, &[loss, lse])?;
        float_type!("cross_entropy", logits.dtype(), T => {
            type A = <T as Num>::Acc;
            let (logits, targets) = (input::<T>(logits)?, input::<i32>(targets)?);
            for_rows2(vocab, output::<A>(loss)?, 1, output::<A>(lse)?, 1, |n, loss, lse| {
                let x = &logits[n * vocab..][..vocab];
                let most = max(x);
                lse[0] = most + sum([x], |[x]| (x - most).fast_exp()).ln();
                loss[0] = lse[0] - x[targets[n] as usize].get();
            });
        });
        Ok(())
    }

    fn cross_entropy_backward(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        lse: &Tensor,
        d_loss: &Tensor,
        d_logits: &Tensor,
    ) -> Result<()> {
        let vocab = check_targets("cross_entropy_backward", logits, targets, &[lse, d_loss])?;
        same("cross_entropy_backward", logits, &[d_logits])?;
        float_type!("cross_entropy_backward", logits.dtype(), T => {
            type A = <T as Num>::Acc;
            let (targets, lse, d_loss) = (input::<i32>(targets)?, input::<A>(lse)?, input::<A>(d_loss)?);
            if !in_place("cross_entropy_backward", logits, d_logits)? {
                output::<T>(d_logits)?.copy_from_slice(input::<T>(logits)?);
            }
            for_rows(output::<T>(d_logits)?, vocab, |n, row| {
                let (target, d, lse) = (targets[n] as usize, d_loss[n], lse[n]);
                let at_target = d * ((row[target].get() - lse).fast_exp() - 1.0);
                row.iter_mut().for_each(|v| *v = T::put(d * (v.get() - lse).fast_exp()));
                row[target] = T::put(at_target);
            });
        });
        Ok(())
    }
}

/// `t += sums`.
fn accumulate<T: Num>(t: &Tensor, sums: &[T::Acc]) -> Result<()> {
    output::<T>(t)?.iter_mut().zip(sums).for_each(|(t, s)| *t = T::put(t.get() + *s));
    Ok(())
}

/// Fails unless x and `rows` are rows of one shape and dtype, `widths` vectors as wide, `stats` one acc per row.
fn check_norm(op: &str, x: &Tensor, rows: &[&Tensor], widths: &[&Tensor], stats: &[&Tensor]) -> Result<()> {
    let (n, width) = x.rows();
    if width == 0 {
        shape_err!("{op} of {}: rows are empty", x.shape());
    }
    same(op, x, rows)?;
    widths.iter().try_for_each(|t| expect(op, "a gain or bias", t, &[width], x.dtype()))?;
    stats.iter().try_for_each(|t| expect(op, "a row statistic", t, &[n], x.dtype().accumulate()))
}

/// Fails unless logits are (N, V), targets (N) in 0..V, and `per_row` one acc per row; returns V.
fn check_targets(op: &str, logits: &Tensor, targets: &Tensor, per_row: &[&Tensor]) -> Result<usize> {
    let (n, vocab) = logits.rows();
    expect(op, "targets", targets, &[n], DType::I32)?;
    per_row.iter().try_for_each(|t| expect(op, "a loss or lse", t, &[n], logits.dtype().accumulate()))?;
    if let Some(t) = input::<i32>(targets)?.iter().find(|&&t| t < 0 || t as usize >= vocab) {
        shape_err!("{op}: target {t} for {vocab} classes: targets lie in 0..{vocab}");
    }
    Ok(vocab)
}
