//! What gates are made of: selection, slot assignment, losses.

use super::Cpu;
use super::order::group_size;
use super::util::{Num, Real, acc_type, expect, float_type, for_rows, in_range, input, matrix, output, sum_blocks};
use crate::device::{ExpertGroups, GateKernels};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};
use num_traits::{Float, One, Zero};
use std::cmp::Ordering;

impl GateKernels for Cpu {
    fn top_k(
        &self,
        scores: &Tensor,
        bias: Option<&Tensor>,
        groups: Option<ExpertGroups>,
        experts: &Tensor,
    ) -> Result<()> {
        const OP: &str = "top_k";
        let (tokens, num_experts) = matrix(OP, "scores", scores)?;
        let (_, k) = matrix(OP, "experts", experts)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        if let Some(bias) = bias {
            expect(OP, "bias", bias, &[num_experts], scores.dtype())?;
        }
        let ExpertGroups { groups, kept } = groups.unwrap_or(ExpertGroups { groups: 1, kept: 1 });
        if groups == 0 || !num_experts.is_multiple_of(groups) || kept == 0 || kept > groups {
            shape_err!("{OP}: {kept} of {groups} groups of {num_experts} experts: groups are equal, 1 to all are kept");
        }
        let size = num_experts / groups;
        if k == 0 || k > kept * size {
            shape_err!("{OP}: k = {k} of {} experts to choose from: k is 1 to that", kept * size);
        }
        acc_type!("top_k", scores.dtype(), A => {
            let scores = input::<A>(scores)?;
            let bias = bias.map(input::<A>).transpose()?;
            for_rows(output::<i32>(experts)?, k, |t, chosen| {
                let scores = &scores[t * num_experts..][..num_experts];
                let biased = |e: usize| (e, scores[e] + bias.map_or(0.0, |b| b[e]));
                let members = |group: usize| (group * size..(group + 1) * size).map(biased);
                let best = if kept == groups {
                    largest(k, (0..num_experts).map(biased))
                } else {
                    let rank = |group| largest(2, members(group)).iter().map(|b| b.1).sum::<A>();
                    let mut usable = largest(kept, (0..groups).map(|group| (group, rank(group))));
                    usable.sort_unstable_by_key(|&(group, _)| group);
                    largest(k, usable.iter().flat_map(|&(group, _)| members(group)))
                };
                for (c, (e, _)) in chosen.iter_mut().zip(best) {
                    *c = e as i32;
                }
            });
        });
        Ok(())
    }

    fn gather_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "gather_cols";
        let (tokens, width) = matrix(OP, "x", x)?;
        let (_, k) = matrix(OP, "index", index)?;
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "out", out, &[tokens, k], x.dtype())?;
        let index = input::<i32>(index)?;
        in_range(OP, "index", index, -1..width as i64)?;
        float_type!("gather_cols", x.dtype(), T => {
            let x = input::<T>(x)?;
            for_rows(output::<T>(out)?, k, |t, row| {
                for (o, &i) in row.iter_mut().zip(&index[t * k..]) {
                    *o = if i < 0 { T::zero() } else { x[t * width + i as usize] };
                }
            });
        });
        Ok(())
    }

    fn scatter_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "scatter_cols";
        let (tokens, k) = matrix(OP, "x", x)?;
        let (_, width) = matrix(OP, "out", out)?;
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "out", out, &[tokens, width], out.dtype())?;
        let index = input::<i32>(index)?;
        in_range(OP, "index", index, -1..width as i64)?;
        float_type!("scatter_cols", x.dtype(), X => {
            let x = input::<X>(x)?;
            float_type!("scatter_cols", out.dtype(), O => {
                for_rows(output::<O>(out)?, width, |t, row| {
                    let (x, index) = (&x[t * k..][..k], &index[t * k..][..k]);
                    // A column's sum is made at its first entry, so that it is rounded once.
                    for j in (0..k).filter(|&j| index[j] >= 0 && !index[..j].contains(&index[j])) {
                        let column = &mut row[index[j] as usize];
                        let mut sum = column.get();
                        for i in (j..k).filter(|&i| index[i] == index[j]) {
                            sum += <O as Num>::Acc::of(x[i].get().f64());
                        }
                        *column = O::put(sum);
                    }
                });
            });
        });
        Ok(())
    }

    fn count_experts(&self, experts: &Tensor, loads: &Tensor) -> Result<()> {
        const OP: &str = "count_experts";
        let (tokens, k) = matrix(OP, "experts", experts)?;
        let (groups, num_experts) = matrix(OP, "loads", loads)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "loads", loads, &[groups, num_experts], DType::I32)?;
        let per_group = group_size(OP, tokens, groups)?;
        let experts = input::<i32>(experts)?;
        in_range(OP, "experts", experts, 0..num_experts as i64)?;
        let loads = output::<i32>(loads)?;
        loads.fill(0);
        for (i, &e) in experts.iter().enumerate() {
            loads[i / (per_group * k) * num_experts + e as usize] += 1;
        }
        Ok(())
    }

    fn assign_slots(
        &self,
        experts: &Tensor,
        priority: Option<&Tensor>,
        num_experts: usize,
        groups: usize,
        capacity: usize,
        slots: &Tensor,
    ) -> Result<()> {
        const OP: &str = "assign_slots";
        let (tokens, k) = matrix(OP, "experts", experts)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "slots", slots, &[tokens, k], DType::I32)?;
        let per_group = group_size(OP, tokens, groups)?;
        let experts = input::<i32>(experts)?;
        in_range(OP, "experts", experts, 0..num_experts as i64)?;
        let mut order: Vec<usize> = (0..tokens).collect();
        if let Some(priority) = priority {
            expect(OP, "priority", priority, &[tokens], priority.dtype())?;
            acc_type!("assign_slots", priority.dtype(), A => {
                let priority = input::<A>(priority)?;
                // Stable, so equal priorities keep token order.
                for_rows(&mut order, per_group, |_, group| group.sort_by(|&s, &t| descending(priority[s], priority[t])));
            });
        }
        for_rows(output::<i32>(slots)?, per_group * k, |g, slots| {
            let mut taken = vec![0; num_experts];
            for j in 0..k {
                for &t in &order[g * per_group..][..per_group] {
                    let next: &mut usize = &mut taken[experts[t * k + j] as usize];
                    let slot = &mut slots[(t - g * per_group) * k + j];
                    *slot = if *next < capacity { *next as i32 } else { -1 };
                    *next += 1;
                }
            }
        });
        Ok(())
    }

    fn expert_choice(
        &self,
        probs: &Tensor,
        groups: usize,
        capacity: usize,
        tokens: &Tensor,
        weights: &Tensor,
    ) -> Result<()> {
        const OP: &str = "expert_choice";
        let (num_tokens, num_experts) = matrix(OP, "probs", probs)?;
        let per_group = group_size(OP, num_tokens, groups)?;
        let width = groups * capacity;
        expect(OP, "tokens", tokens, &[num_experts, width], DType::I32)?;
        expect(OP, "weights", weights, &[num_experts, width], probs.dtype())?;
        if capacity == 0 || capacity > per_group {
            shape_err!("{OP}: capacity {capacity} of {per_group} tokens in a group: an expert takes 1 to all of them");
        }
        acc_type!("expert_choice", probs.dtype(), A => {
            let probs = input::<A>(probs)?;
            let tokens = output::<i32>(tokens)?;
            for_rows(tokens, width, |e, chosen| {
                let p = |t: u32| probs[t as usize * num_experts + e];
                let rank = |&s: &u32, &t: &u32| descending(p(s), p(t)).then(s.cmp(&t));
                for (g, chosen) in chosen.chunks_mut(capacity).enumerate() {
                    let mut group: Vec<u32> = ((g * per_group) as u32..((g + 1) * per_group) as u32).collect();
                    group.select_nth_unstable_by(capacity - 1, rank);
                    group.truncate(capacity);
                    group.sort_unstable_by(rank);
                    for (c, t) in chosen.iter_mut().zip(group) {
                        *c = t as i32;
                    }
                }
            });
            for_rows(output::<A>(weights)?, width, |e, weights| {
                for (w, &t) in weights.iter_mut().zip(&tokens[e * width..]) {
                    *w = probs[t as usize * num_experts + e];
                }
            });
        });
        Ok(())
    }

    fn expert_choice_backward(&self, tokens: &Tensor, d_weights: &Tensor, d_probs: &Tensor) -> Result<()> {
        const OP: &str = "expert_choice_backward";
        let (num_experts, width) = matrix(OP, "tokens", tokens)?;
        let (num_tokens, _) = matrix(OP, "d_probs", d_probs)?;
        expect(OP, "tokens", tokens, &[num_experts, width], DType::I32)?;
        expect(OP, "d_weights", d_weights, &[num_experts, width], d_probs.dtype())?;
        expect(OP, "d_probs", d_probs, &[num_tokens, num_experts], d_probs.dtype())?;
        let tokens = input::<i32>(tokens)?;
        in_range(OP, "tokens", tokens, 0..num_tokens as i64)?;
        acc_type!("expert_choice_backward", d_probs.dtype(), A => {
            let d_probs = output::<A>(d_probs)?;
            for (i, (&t, &d)) in tokens.iter().zip(input::<A>(d_weights)?).enumerate() {
                d_probs[t as usize * num_experts + i / width] += d;
            }
        });
        Ok(())
    }

    fn balance_loss(
        &self,
        probs: &Tensor,
        experts: &Tensor,
        first_only: bool,
        loss: &Tensor,
        fraction: &Tensor,
    ) -> Result<()> {
        const OP: &str = "balance_loss";
        let (tokens, num_experts) = matrix(OP, "probs", probs)?;
        let (_, k) = matrix(OP, "experts", experts)?;
        group_size(OP, tokens, 1)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "loss", loss, &[1], probs.dtype())?;
        expect(OP, "fraction", fraction, &[num_experts], probs.dtype())?;
        let experts = input::<i32>(experts)?;
        in_range(OP, "experts", experts, 0..num_experts as i64)?;
        let mut counts = vec![0_u64; num_experts];
        for &e in experts.iter().step_by(if first_only { k.max(1) } else { 1 }) {
            counts[e as usize] += 1;
        }
        acc_type!("balance_loss", probs.dtype(), A => {
            let probs = input::<A>(probs)?;
            let mut sums = vec![A::zero(); num_experts];
            sum_blocks(tokens, num_experts, &mut sums, |range, partial| {
                for t in range {
                    for (s, p) in partial.iter_mut().zip(&probs[t * num_experts..]) {
                        *s += *p;
                    }
                }
            });
            let (fraction, mut total) = (output::<A>(fraction)?, A::zero());
            for e in 0..num_experts {
                fraction[e] = counts[e] as A / tokens as A;
                total += sums[e] / tokens as A * fraction[e];
            }
            output::<A>(loss)?[0] = num_experts as A * total;
        });
        Ok(())
    }

    fn balance_loss_backward(&self, fraction: &Tensor, d_loss: &Tensor, d_probs: &Tensor) -> Result<()> {
        const OP: &str = "balance_loss_backward";
        let (tokens, num_experts) = matrix(OP, "d_probs", d_probs)?;
        expect(OP, "fraction", fraction, &[num_experts], d_probs.dtype())?;
        expect(OP, "d_loss", d_loss, &[1], d_probs.dtype())?;
        acc_type!("balance_loss_backward", d_probs.dtype(), A => {
            let fraction = input::<A>(fraction)?;
            let scale = input::<A>(d_loss)?[0] * num_experts as A / tokens as A;
            for_rows(output::<A>(d_probs)?, num_experts, |_, row| {
                for (d, f) in row.iter_mut().zip(fraction) {
                    *d += scale * f;
                }
            });
        });
        Ok(())
    }

    fn z_loss(&self, logits: &Tensor, lse: &Tensor, loss: &Tensor) -> Result<()> {
        const OP: &str = "z_loss";
        let (tokens, num_experts) = matrix(OP, "logits", logits)?;
        group_size(OP, tokens, 1)?;
        expect(OP, "lse", lse, &[tokens], logits.dtype())?;
        expect(OP, "loss", loss, &[1], logits.dtype())?;
        acc_type!("z_loss", logits.dtype(), A => {
            let logits = input::<A>(logits)?;
            let lse = output::<A>(lse)?;
            for_rows(lse, 1, |t, lse| {
                let row = &logits[t * num_experts..][..num_experts];
                let max = row.iter().copied().fold(A::NEG_INFINITY, A::max);
                lse[0] = max + row.iter().map(|l| (l - max).exp()).sum::<A>().ln();
            });
            let mut total = [A::zero()];
            sum_blocks(tokens, 1, &mut total, |range, partial| {
                for t in range {
                    partial[0] += lse[t] * lse[t];
                }
            });
            output::<A>(loss)?[0] = total[0] / tokens as A;
        });
        Ok(())
    }

    fn z_loss_backward(&self, logits: &Tensor, lse: &Tensor, d_loss: &Tensor, d_logits: &Tensor) -> Result<()> {
        const OP: &str = "z_loss_backward";
        let (tokens, num_experts) = matrix(OP, "logits", logits)?;
        expect(OP, "lse", lse, &[tokens], logits.dtype())?;
        expect(OP, "d_loss", d_loss, &[1], logits.dtype())?;
        expect(OP, "d_logits", d_logits, &[tokens, num_experts], logits.dtype())?;
        acc_type!("z_loss_backward", logits.dtype(), A => {
            let (logits, lse) = (input::<A>(logits)?, input::<A>(lse)?);
            let scale = input::<A>(d_loss)?[0] * 2.0 / tokens as A;
            for_rows(output::<A>(d_logits)?, num_experts, |t, row| {
                for (d, l) in row.iter_mut().zip(&logits[t * num_experts..]) {
                    *d += scale * lse[t] * (l - lse[t]).exp();
                }
            });
        });
        Ok(())
    }

    fn mean_entropy(&self, probs: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "mean_entropy";
        let (tokens, num_experts) = matrix(OP, "probs", probs)?;
        group_size(OP, tokens, 1)?;
        expect(OP, "out", out, &[1], probs.dtype())?;
        acc_type!("mean_entropy", probs.dtype(), A => {
            let probs = input::<A>(probs)?;
            let mut total = [A::zero()];
            sum_blocks(tokens, 1, &mut total, |range, partial| {
                for t in range {
                    let row = &probs[t * num_experts..][..num_experts];
                    let sum: A = row.iter().sum();
                    // p·ln p goes to 0 with p; a row of zeros counts as certain.
                    partial[0] -= row.iter().filter(|p| **p != 0.0).map(|p| p / sum * (p / sum).ln()).sum::<A>();
                }
            });
            output::<A>(out)?[0] = total[0] / tokens as A;
        });
        Ok(())
    }

    fn add_gate_noise(&self, clean: &Tensor, raw: &Tensor, noise: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "add_gate_noise";
        let (tokens, num_experts) = matrix(OP, "clean", clean)?;
        for (what, t) in [("raw", raw), ("noise", noise), ("out", out)] {
            expect(OP, what, t, &[tokens, num_experts], clean.dtype())?;
        }
        acc_type!("add_gate_noise", clean.dtype(), A => {
            if out.ptr() != clean.ptr() {
                output::<A>(out)?.copy_from_slice(input::<A>(clean)?);
            }
            let (raw, noise) = (input::<A>(raw)?, input::<A>(noise)?);
            for_rows(output::<A>(out)?, num_experts, |t, row| {
                for (e, out) in row.iter_mut().enumerate() {
                    let i = t * num_experts + e;
                    // ln(1 + e^x) without overflow.
                    let softplus = raw[i].max(0.0) + (-raw[i].abs()).exp().ln_1p();
                    *out += noise[i] * softplus;
                }
            });
        });
        Ok(())
    }

    fn add_gate_noise_backward(&self, raw: &Tensor, noise: &Tensor, d_out: &Tensor, d_raw: &Tensor) -> Result<()> {
        const OP: &str = "add_gate_noise_backward";
        let (tokens, num_experts) = matrix(OP, "raw", raw)?;
        for (what, t) in [("noise", noise), ("d_out", d_out), ("d_raw", d_raw)] {
            expect(OP, what, t, &[tokens, num_experts], raw.dtype())?;
        }
        acc_type!("add_gate_noise_backward", raw.dtype(), A => {
            let (raw, noise, d_out) = (input::<A>(raw)?, input::<A>(noise)?, input::<A>(d_out)?);
            for_rows(output::<A>(d_raw)?, num_experts, |t, row| {
                for (e, d) in row.iter_mut().enumerate() {
                    let i = t * num_experts + e;
                    *d = d_out[i] * noise[i] / (A::one() + (-raw[i]).exp());
                }
            });
        });
        Ok(())
    }

    fn update_bias(&self, bias: &Tensor, loads: &Tensor, gamma: f64) -> Result<()> {
        const OP: &str = "update_bias";
        let (groups, num_experts) = matrix(OP, "loads", loads)?;
        expect(OP, "loads", loads, &[groups, num_experts], DType::I32)?;
        expect(OP, "bias", bias, &[num_experts], bias.dtype())?;
        let mut sums = vec![0_i64; num_experts];
        for (i, &load) in input::<i32>(loads)?.iter().enumerate() {
            sums[i % num_experts] += i64::from(load);
        }
        let total: i64 = sums.iter().sum();
        acc_type!("update_bias", bias.dtype(), A => {
            for (b, load) in output::<A>(bias)?.iter_mut().zip(sums) {
                // The sign of mean − load, in whole numbers: an exact mean leaves the bias alone.
                let sign = (total - load * num_experts as i64).signum();
                *b += (gamma * sign as f64) as A;
            }
        });
        Ok(())
    }

    fn clamped_exp(&self, x: &Tensor, max: f64, y: &Tensor) -> Result<()> {
        expect("clamped_exp", "y", y, x.shape(), x.dtype())?;
        acc_type!("clamped_exp", x.dtype(), A => {
            for (y, &x) in output::<A>(y)?.iter_mut().zip(input::<A>(x)?) {
                *y = x.exp().min(max as A);
            }
        });
        Ok(())
    }

    fn clamped_exp_backward(&self, y: &Tensor, max: f64, dy: &Tensor, dx: &Tensor) -> Result<()> {
        expect("clamped_exp_backward", "dy", dy, y.shape(), y.dtype())?;
        expect("clamped_exp_backward", "dx", dx, y.shape(), y.dtype())?;
        acc_type!("clamped_exp_backward", y.dtype(), A => {
            for ((dx, &y), &dy) in output::<A>(dx)?.iter_mut().zip(input::<A>(y)?).zip(input::<A>(dy)?) {
                *dx = if y < max as A { dy * y } else { 0.0 };
            }
        });
        Ok(())
    }
}

/// Largest first; NaN is the smallest of all, so that a diverged gate still gives a valid order.
fn descending<A: Float>(a: A, b: A) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

/// The `k` largest of `(number, value)` pairs, descending; of equals, the one that came first. All pairs if there are
/// fewer. One pass that keeps the k best: k is small beside the number of experts.
fn largest<A: Float>(k: usize, pairs: impl Iterator<Item = (usize, A)>) -> Vec<(usize, A)> {
    let mut best: Vec<(usize, A)> = Vec::with_capacity(k);
    for (i, value) in pairs {
        let beats = |other: &(usize, A)| descending(value, other.1).is_lt();
        if best.len() == k {
            if !best.last().is_some_and(beats) {
                continue;
            }
            best.pop();
        }
        let at = best.iter().rposition(|other| !beats(other)).map_or(0, |p| p + 1);
        best.insert(at, (i, value));
    }
    best
}

#[cfg(test)]
mod tests;
