//! What a transformer needs around its MoE layers; attention is in a file of its own.

use super::Cpu;
use super::attention;
use super::math::same;
use super::util::{Num, Real, float_type, for_rows, for_rows2, in_place, input, max, output, sum, sum_blocks};
use crate::device::{AttentionShape, ModelKernels, Rope, check};
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;

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
        check::norm("layer_norm", x, &[y], &[gain, bias], &[mean, rstd])?;
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
        check::norm("layer_norm_backward", x, &[dy, dx], &[gain, d_gain, d_bias], &[mean, rstd])?;
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
        check::norm("rms_norm", x, &[y], &[gain], &[rstd])?;
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
        check::norm("rms_norm_backward", x, &[dy, dx], &[gain, d_gain], &[rstd])?;
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
        let [_, seq, heads, dim] = check::rope(x, y)?;
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

/// [`check::targets`], and the targets in 0..V.
fn check_targets(op: &str, logits: &Tensor, targets: &Tensor, per_row: &[&Tensor]) -> Result<usize> {
    let vocab = check::targets(op, logits, targets, per_row)?;
    if let Some(t) = input::<i32>(targets)?.iter().find(|&&t| t < 0 || t as usize >= vocab) {
        shape_err!("{op}: target {t} for {vocab} classes: targets lie in 0..{vocab}");
    }
    Ok(vocab)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::util::{FLOATS, close, random_tensor as random, same_on_any_thread_count, wide};
    use crate::tensor::DType;

    const EPS: f64 = 1e-5;

    #[test]
    fn norms_of_all_types() {
        for (dtype, bound) in FLOATS {
            for (rows, width) in [(67, 37), (1, 1), (0, 5)] {
                let (x, y) = (random(1, &[rows, width], dtype), random(2, &[rows, width], dtype));
                let (gain, bias) = (random(3, &[width], dtype), random(4, &[width], dtype));
                let stat = || Tensor::host([rows], dtype.accumulate());
                let (mean, rstd) = (stat(), stat());
                let (x64, g, b) = (wide(&x), wide(&gain), wide(&bias));
                let moment =
                    |row: &[f64], centre: f64| row.iter().map(|v| (v - centre).powi(2)).sum::<f64>() / width as f64;
                let (mut layer, mut rms) = (vec![], vec![]);
                for row in x64.chunks(width) {
                    let centre = row.iter().sum::<f64>() / width as f64;
                    let (a, c) = (1.0 / (moment(row, centre) + EPS).sqrt(), 1.0 / (moment(row, 0.0) + EPS).sqrt());
                    layer.extend((0..width).map(|j| (row[j] - centre) * a * g[j] + b[j]));
                    rms.extend((0..width).map(|j| row[j] * c * g[j]));
                }
                Cpu.layer_norm(&x, &gain, &bias, EPS, &y, &mean, &rstd).unwrap();
                close(&y, &layer, bound);
                Cpu.rms_norm(&x, &gain, EPS, &y, &rstd).unwrap();
                close(&y, &rms, bound);
            }
        }
    }

    /// [dx, d_gain, d_bias] of a norm by the chain rule, rows centred on their mean or on 0.
    fn naive_backward(x: &[f64], gain: &[f64], dy: &[f64], centred: bool) -> [Vec<f64>; 3] {
        let n = gain.len();
        let (mut dx, mut d_gain, mut d_bias) = (vec![], vec![0.0; n], vec![0.0; n]);
        for (x, dy) in x.chunks(n).zip(dy.chunks(n)) {
            let mean = if centred { x.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let rstd = 1.0 / (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64 + EPS).sqrt();
            for j in 0..n {
                d_gain[j] += dy[j] * (x[j] - mean) * rstd;
                d_bias[j] += dy[j];
                // ∂y[i]/∂x[j], one entry of the Jacobian at a time.
                let shift = if centred { 1.0 / n as f64 } else { 0.0 };
                let slope = |i: usize| {
                    let same = f64::from(u8::from(i == j));
                    gain[i] * (rstd * (same - shift) - (x[i] - mean) * (x[j] - mean) * rstd.powi(3) / n as f64)
                };
                dx.push((0..n).map(|i| dy[i] * slope(i)).sum());
            }
        }
        [dx, d_gain, d_bias]
    }

    #[test]
    fn norm_gradients_of_all_types_follow_the_chain_rule() {
        for (dtype, bound) in FLOATS {
            for (rows, width) in [(131, 37), (1, 2), (0, 5)] {
                let (x, dy) = (random(1, &[rows, width], dtype), random(2, &[rows, width], dtype));
                let gain = random(3, &[width], dtype);
                let stat = || Tensor::host([rows], dtype.accumulate());
                let (mean, rstd, y) = (stat(), stat(), Tensor::host([rows, width], dtype));
                let zeros = || Tensor::host_zeros([width], dtype);
                let (dx, d_gain, d_bias) = (Tensor::host([rows, width], dtype), zeros(), zeros());
                Cpu.layer_norm(&x, &gain, &gain, EPS, &y, &mean, &rstd).unwrap();
                Cpu.layer_norm_backward(&x, &gain, &mean, &rstd, &dy, &dx, &d_gain, &d_bias).unwrap();
                let want = naive_backward(&wide(&x), &wide(&gain), &wide(&dy), true);
                // Two columns normalise to ±1: what is left of their gradient is rounding.
                if width > 2 {
                    close(&dx, &want[0], 2.0 * bound);
                }
                close(&d_gain, &want[1], 2.0 * bound);
                close(&d_bias, &want[2], 2.0 * bound);
                let d_gain = zeros();
                Cpu.rms_norm(&x, &gain, EPS, &y, &rstd).unwrap();
                Cpu.rms_norm_backward(&x, &gain, &rstd, &dy, &dx, &d_gain).unwrap();
                let want = naive_backward(&wide(&x), &wide(&gain), &wide(&dy), false);
                close(&dx, &want[0], 2.0 * bound);
                close(&d_gain, &want[1], 2.0 * bound);
            }
        }
    }

    #[test]
    fn rope_turns_pairs_and_turns_back() {
        let (b, l, h, d) = (2, 5, 3, 6);
        let rope = Rope { theta: 100.0, first: 7 };
        for (dtype, bound) in FLOATS {
            let x = random(1, &[b, l, h, d], dtype);
            let (y, x64) = (Tensor::host([b, l, h, d], dtype), wide(&x));
            Cpu.rope(&x, rope, false, &y).unwrap();
            let want: Vec<f64> = (0..b * l * h * d)
                .map(|at| {
                    let (i, l) = (at % d, at / (h * d) % l);
                    let (sin, cos) = ((7 + l) as f64 * 100f64.powf(-2.0 * (i % 3) as f64 / 6.0)).sin_cos();
                    if i < 3 { x64[at] * cos - x64[at + 3] * sin } else { x64[at] * cos + x64[at - 3] * sin }
                })
                .collect();
            close(&y, &want, bound);
            Cpu.rope(&y, rope, true, &y).unwrap();
            close(&y, &x64, 2.0 * bound);
        }
        let odd = random(1, &[1, 2, 1, 5], DType::F32);
        assert!(Cpu.rope(&odd, rope, false, &odd).unwrap_err().to_string().contains("width 5"));
    }

    #[test]
    fn cross_entropy_of_all_types_also_in_place() {
        for (dtype, bound) in FLOATS {
            for (n, vocab) in [(9, 43), (1, 1), (0, 4)] {
                let logits = random(1, &[n, vocab], dtype);
                let goal: Vec<i32> = (0..n).map(|i| (i * 7 % vocab) as i32).collect();
                let (targets, acc) = (Tensor::from_slice(&goal, [n]).unwrap(), dtype.accumulate());
                let (loss, lse, d_loss) = (Tensor::host([n], acc), Tensor::host([n], acc), random(2, &[n], acc));
                let (x, d) = (wide(&logits), wide(&d_loss));
                Cpu.cross_entropy(&logits, &targets, &loss, &lse).unwrap();
                let sums: Vec<f64> = x.chunks(vocab).map(|r| r.iter().map(|v| v.exp()).sum::<f64>()).collect();
                let losses: Vec<f64> = (0..n).map(|r| sums[r].ln() - x[r * vocab + goal[r] as usize]).collect();
                // Absolute in the size of the logits: a loss may be 0.
                let error = wide(&loss).iter().zip(losses).fold(0.0_f64, |m, (a, b)| m.max((a - b).abs()));
                assert!(error < if dtype == DType::F64 { 1e-13 } else { 4e-6 }, "{error:e}");
                let grad = Tensor::host([n, vocab], dtype);
                Cpu.cross_entropy_backward(&logits, &targets, &lse, &d_loss, &grad).unwrap();
                let want: Vec<f64> = (0..n * vocab)
                    .map(|i| {
                        let r = i / vocab;
                        d[r] * (x[i].exp() / sums[r] - f64::from(u8::from(i % vocab == goal[r] as usize)))
                    })
                    .collect();
                if vocab > 1 {
                    close(&grad, &want, bound);
                }
                Cpu.cross_entropy_backward(&logits, &targets, &lse, &d_loss, &logits).unwrap();
                assert_eq!(wide(&logits), wide(&grad));
            }
        }
    }

    #[test]
    fn a_target_outside_the_classes_is_named_before_anything_is_written() {
        let (logits, lse) = (random(1, &[2, 3], DType::F32), Tensor::host_zeros([2], DType::F32));
        let before = wide(&logits);
        for bad in [3, -1] {
            let targets = Tensor::from_slice(&[0, bad], [2]).unwrap();
            let e = Cpu.cross_entropy_backward(&logits, &targets, &lse, &lse, &logits).unwrap_err();
            assert!(e.to_string().contains(&format!("target {bad}")) && e.to_string().contains("0..3"), "{e}");
            let loss = Tensor::host_zeros([2], DType::F32);
            assert!(Cpu.cross_entropy(&logits, &targets, &loss, &lse).is_err());
        }
        assert_eq!(wide(&logits), before);
    }

    #[test]
    fn the_thread_count_changes_no_bit() {
        let (x, dy, gain) =
            (random(1, &[700, 65], DType::F32), random(2, &[700, 65], DType::F32), random(3, &[65], DType::F32));
        same_on_any_thread_count(|| {
            let host = |shape: &[usize]| Tensor::host_zeros(shape, DType::F32);
            let (y, mean, rstd, dx) = (host(&[700, 65]), host(&[700]), host(&[700]), host(&[700, 65]));
            let (dg, db) = (host(&[65]), host(&[65]));
            Cpu.layer_norm(&x, &gain, &gain, EPS, &y, &mean, &rstd).unwrap();
            Cpu.layer_norm_backward(&x, &gain, &mean, &rstd, &dy, &dx, &dg, &db).unwrap();
            [y, mean, rstd, dx, dg, db].iter().flat_map(wide).collect()
        });
    }
}
