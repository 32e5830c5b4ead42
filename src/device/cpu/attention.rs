//! Causal attention in blocks of queries: a block sees only the keys up to its last query, so half the square is never
//! computed.

use super::Cpu;
use super::gemm::{Matrix, Sizes, product};
use super::util::{Real, Shared, acc_type, input, max, output, sum};
use crate::device::{AttentionShape, MemoryKernels, check};
use crate::error::Result;
use crate::tensor::Tensor;
use gemm::Parallelism;
use rayon::prelude::*;
use std::borrow::Cow;

/// Queries handled at a time.
const QUERIES: usize = 64;

pub(super) fn forward(s: AttentionShape, q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, lse: &Tensor) -> Result<()> {
    check::attention("attention", s, &[q, out], &[k, v], lse)?;
    check::all_apart("attention", &[q, k, v], &[out, lse])?;
    let [q, k, v] = [wide(q)?, wide(k)?, wide(v)?];
    let wide_out = wide_output(out);
    acc_type!("attention", q.dtype(), A => {
        let (q, k, v) = (input::<A>(&q)?, input::<A>(&k)?, input::<A>(&v)?);
        let to = Shared(output::<A>(&wide_out)?.as_mut_ptr());
        // A task is one head of one sequence; it writes its own columns of the output.
        output::<A>(lse)?.par_chunks_mut(s.seq).enumerate().for_each_init(
            || vec![0.0 as A; QUERIES * s.seq],
            |scores, (task, lse)| {
                let (b, h) = (task / s.heads, task % s.heads);
                for first in (0..s.seq).step_by(QUERIES) {
                    let block = Block::new(s, b, h, first);
                    block.scores(q, k, scores);
                    for (i, row) in scores.chunks_mut(block.keys).take(block.queries).enumerate() {
                        let (seen, hidden) = row.split_at_mut(first + i + 1);
                        let most = max(seen);
                        seen.iter_mut().for_each(|v| *v = (*v - most).fast_exp());
                        let total = sum([seen], |[v]| v);
                        let scale = 1.0 / total;
                        seen.iter_mut().for_each(|v| *v *= scale);
                        hidden.fill(0.0);
                        lse[first + i] = most + total.ln();
                    }
                    // out = P·V
                    block.by_keys(scores, v, to);
                }
            },
        );
    });
    narrow(&wide_out, out)
}

pub(super) fn backward(
    s: AttentionShape,
    [q, k, v, out, d_out]: [&Tensor; 5],
    lse: &Tensor,
    [dq, dk, dv]: [&Tensor; 3],
) -> Result<()> {
    check::attention("attention_backward", s, &[q, out, d_out, dq], &[k, v, dk, dv], lse)?;
    check::all_apart("attention_backward", &[q, k, v, out, d_out, lse], &[dq, dk, dv])?;
    let [q, k, v, out, d_out] = [wide(q)?, wide(k)?, wide(v)?, wide(out)?, wide(d_out)?];
    let (wide_dq, wide_dk, wide_dv) = (wide_output(dq), wide_output(dk), wide_output(dv));
    let group = s.heads / s.kv_heads;
    let scratch = QUERIES * s.seq;
    acc_type!("attention_backward", q.dtype(), A => {
        let (q, k, v) = (input::<A>(&q)?, input::<A>(&k)?, input::<A>(&v)?);
        let (out, d_out, lse) = (input::<A>(&out)?, input::<A>(&d_out)?, input::<A>(lse)?);
        let [to_dq, to_dk, to_dv] = [
            Shared(output::<A>(&wide_dq)?.as_mut_ptr()),
            Shared(output::<A>(&wide_dk)?.as_mut_ptr()),
            Shared(output::<A>(&wide_dv)?.as_mut_ptr()),
        ];
        let scale = 1.0 / (s.head_dim as A).sqrt();
        // A task is one key head of one sequence with all its query heads, which it sums in order.
        (0..s.batch * s.kv_heads).into_par_iter().for_each_init(
            || (vec![0.0 as A; scratch], vec![0.0 as A; scratch]),
            |(p, dp), task| {
                let (b, kv_head) = (task / s.kv_heads, task % s.kv_heads);
                // The last block sees all keys: it comes first, and writes what the others add to.
                let mut keep = 0.0;
                for h in kv_head * group..(kv_head + 1) * group {
                    for first in (0..s.seq).step_by(QUERIES).rev() {
                        let block = Block::new(s, b, h, first);
                        block.scores(q, k, p);
                        // dP = dO·Vᵀ
                        block.by_width(1.0, d_out, v, dp);
                        let rows = p.chunks_mut(block.keys).zip(dp.chunks_mut(block.keys)).take(block.queries);
                        for (i, (p, dp)) in rows.enumerate() {
                            let at = block.q_at + i * block.q_row;
                            let inner = sum([&out[at..][..s.head_dim], &d_out[at..][..s.head_dim]], |[o, d]| o * d);
                            let lse = lse[(b * s.heads + h) * s.seq + first + i];
                            let seen = first + i + 1;
                            for (p, dp) in p[..seen].iter_mut().zip(&mut dp[..seen]) {
                                *p = (*p - lse).fast_exp();
                                *dp = *p * (*dp - inner) * scale;
                            }
                            p[seen..].fill(0.0);
                            dp[seen..].fill(0.0);
                        }
                        // dQ = dS·K, dK += dSᵀ·Q, dV += Pᵀ·dO
                        block.by_keys(dp, k, to_dq);
                        block.transposed(dp, q, keep, to_dk);
                        block.transposed(p, d_out, keep, to_dv);
                        keep = 1.0;
                    }
                }
            },
        );
    });
    [(&wide_dq, dq), (&wide_dk, dk), (&wide_dv, dv)].into_iter().try_for_each(|(from, to)| narrow(from, to))
}

/// Some queries of one head, and the keys they may see.
struct Block {
    queries: usize,
    keys: usize,
    dim: usize,
    /// Where the block's first query, and the head's first key, lie, and the distance between rows.
    q_at: usize,
    q_row: usize,
    kv_at: usize,
    kv_row: usize,
}

impl Block {
    fn new(s: AttentionShape, batch: usize, head: usize, first: usize) -> Self {
        let queries = QUERIES.min(s.seq - first);
        let (q_row, kv_row) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let kv_head = head / (s.heads / s.kv_heads);
        Block {
            queries,
            keys: first + queries,
            dim: s.head_dim,
            q_at: (batch * s.seq + first) * q_row + head * s.head_dim,
            q_row,
            kv_at: batch * s.seq * kv_row + kv_head * s.head_dim,
            kv_row,
        }
    }

    /// `out` (queries, keys) = Q·Kᵀ/√D.
    fn scores<A: Real>(&self, q: &[A], k: &[A], out: &mut [A]) {
        self.by_width(A::one() / A::of(self.dim as f64).sqrt(), q, k, out);
    }

    /// `out` (queries, keys) = alpha·a·bᵀ, a (queries, D) laid as q, b (keys, D) as k.
    fn by_width<A: Real>(&self, alpha: A, a: &[A], b: &[A], out: &mut [A]) {
        let sizes = Sizes { m: self.queries, k: self.dim, n: self.keys };
        let a = Matrix { at: a[self.q_at..].as_ptr(), row: self.q_row, col: 1 };
        let b = Matrix { at: b[self.kv_at..].as_ptr(), row: 1, col: self.kv_row };
        let c = Matrix { at: out[..self.queries * self.keys].as_mut_ptr(), row: self.keys, col: 1 };
        // SAFETY: a block's rows and columns lie inside q and k, whose sizes were checked; `out` is a buffer of its own.
        unsafe { product(sizes, alpha, a, b, A::zero(), c, Parallelism::None) }
    }

    /// The block's rows of `out` (queries, D), laid as q, = w·b, w (queries, keys), b (keys, D) laid as k.
    fn by_keys<A: Real>(&self, w: &[A], b: &[A], out: Shared<A>) {
        let sizes = Sizes { m: self.queries, k: self.keys, n: self.dim };
        let w = Matrix { at: w[..self.queries * self.keys].as_ptr(), row: self.keys, col: 1 };
        let b = Matrix { at: b[self.kv_at..].as_ptr(), row: self.kv_row, col: 1 };
        let c = Matrix { at: out.at(self.q_at), row: self.q_row, col: 1 };
        // SAFETY: as in `by_width`; these rows of this query head are one task's, and no input is an output (checked).
        unsafe { product(sizes, A::one(), w, b, A::zero(), c, Parallelism::None) }
    }

    /// The keys' rows of `out` (keys, D), laid as k, = keep·out + wᵀ·a, w (queries, keys), a (queries, D) laid as q.
    fn transposed<A: Real>(&self, w: &[A], a: &[A], keep: A, out: Shared<A>) {
        let sizes = Sizes { m: self.keys, k: self.queries, n: self.dim };
        let w = Matrix { at: w[..self.queries * self.keys].as_ptr(), row: 1, col: self.keys };
        let a = Matrix { at: a[self.q_at..].as_ptr(), row: self.q_row, col: 1 };
        let c = Matrix { at: out.at(self.kv_at), row: self.kv_row, col: 1 };
        // SAFETY: as in `by_keys`, for a key head.
        unsafe { product(sizes, A::one(), w, a, keep, c, Parallelism::None) }
    }
}

/// An input in the accumulation type; its own memory where it has that type.
fn wide(t: &Tensor) -> Result<Cow<'_, Tensor>> {
    if t.dtype() == t.dtype().accumulate() {
        return Ok(Cow::Borrowed(t));
    }
    let wide = Tensor::host(*t.shape(), t.dtype().accumulate());
    Cpu.copy(t, &wide)?;
    Ok(Cow::Owned(wide))
}

/// Where to compute an output; [`narrow`] brings it home.
fn wide_output(t: &Tensor) -> Tensor {
    if t.dtype() == t.dtype().accumulate() { t.clone() } else { Tensor::host(*t.shape(), t.dtype().accumulate()) }
}

fn narrow(from: &Tensor, to: &Tensor) -> Result<()> {
    if from.dtype() == to.dtype() { Ok(()) } else { Cpu.copy(from, to) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ModelKernels;
    use crate::device::cpu::util::{FLOATS, close, random_tensor as random, same_on_any_thread_count, wide};
    use crate::tensor::DType;

    /// [out, lse, dq, dk, dv], by the definition.
    fn naive(s: AttentionShape, [q, k, v, d_out]: [&[f64]; 4]) -> [Vec<f64>; 5] {
        let (hq, hk, d) = (s.heads, s.kv_heads, s.head_dim);
        let mut all = [q.len(), s.batch * hq * s.seq, q.len(), k.len(), k.len()].map(|n| vec![0.0; n]);
        let [out, lse, dq, dk, dv] = &mut all;
        for (b, h, i) in (0..s.batch).flat_map(|b| (0..hq).flat_map(move |h| (0..s.seq).map(move |i| (b, h, i)))) {
            let at = |l: usize| ((b * s.seq + l) * hq + h) * d;
            let kat = |l: usize| ((b * s.seq + l) * hk + h / (hq / hk)) * d;
            let dot = |x: &[f64], a: usize, y: &[f64], c: usize| (0..d).map(|e| x[a + e] * y[c + e]).sum::<f64>();
            let root = (d as f64).sqrt();
            let scores: Vec<f64> = (0..=i).map(|j| dot(q, at(i), k, kat(j)) / root).collect();
            let log = scores.iter().map(|v| v.exp()).sum::<f64>().ln();
            lse[(b * hq + h) * s.seq + i] = log;
            let p: Vec<f64> = scores.iter().map(|v| (v - log).exp()).collect();
            let dp: Vec<f64> = (0..=i).map(|j| dot(d_out, at(i), v, kat(j))).collect();
            let inner: f64 = p.iter().zip(&dp).map(|(a, b)| a * b).sum();
            for j in 0..=i {
                let ds = p[j] * (dp[j] - inner) / root;
                for e in 0..d {
                    out[at(i) + e] += p[j] * v[kat(j) + e];
                    dq[at(i) + e] += ds * k[kat(j) + e];
                    dk[kat(j) + e] += ds * q[at(i) + e];
                    dv[kat(j) + e] += p[j] * d_out[at(i) + e];
                }
            }
        }
        all
    }

    fn run(s: AttentionShape, dtype: DType) -> ([Tensor; 4], [Tensor; 5]) {
        let (tokens, wq, wk) = (s.batch * s.seq, s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let inputs = [(1, wq), (2, wk), (3, wk), (4, wq)].map(|(seed, w)| random(seed, &[tokens, w], dtype));
        let nan = |shape: &[usize], dtype| {
            let t = Tensor::host(shape, dtype);
            Cpu.fill(&t, f64::NAN).unwrap();
            t
        };
        let lse = nan(&[s.batch, s.heads, s.seq], dtype.accumulate());
        let [dq, out] = [(); 2].map(|()| nan(&[tokens, wq], dtype));
        let [dk, dv] = [(); 2].map(|()| nan(&[tokens, wk], dtype));
        let [q, k, v, d_out] = &inputs;
        Cpu.attention(s, q, k, v, &out, &lse).unwrap();
        Cpu.attention_backward(s, q, k, v, &out, &lse, d_out, &dq, &dk, &dv).unwrap();
        (inputs, [out, lse, dq, dk, dv])
    }

    #[test]
    fn agrees_with_the_definition() {
        // One block, several with a ragged one, grouped heads, one token, no sequence.
        for (batch, seq, heads, kv_heads, head_dim) in
            [(2, 13, 2, 2, 5), (1, 2 * QUERIES + 3, 4, 2, 6), (3, 1, 3, 1, 1), (0, 4, 2, 1, 2), (1, QUERIES, 6, 2, 8)]
        {
            let s = AttentionShape { batch, seq, heads, kv_heads, head_dim };
            for (dtype, bound) in FLOATS {
                let (inputs, got) = run(s, dtype);
                let [q, k, v, d] = inputs.each_ref().map(wide);
                for (got, want) in got.iter().zip(naive(s, [&q, &k, &v, &d])) {
                    if want.iter().all(|v| v.abs() < 1e-12) {
                        // One token has nothing to choose from: the gradients of its scores are 0.
                        assert!(wide(got).iter().all(|v| v.abs() <= bound), "{got:?}");
                    } else {
                        close(got, &want, 3.0 * bound);
                    }
                }
            }
        }
    }

    #[test]
    fn the_thread_count_changes_no_bit() {
        let s = AttentionShape { batch: 3, seq: 150, heads: 4, kv_heads: 2, head_dim: 16 };
        same_on_any_thread_count(|| run(s, DType::F32).1.iter().flat_map(wide).collect());
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let t = Tensor::host([6, 8], DType::F32);
        let (out, lse) = (Tensor::host([6, 8], DType::F32), Tensor::host([2, 2, 3], DType::F32));
        let s = AttentionShape { batch: 2, seq: 3, heads: 2, kv_heads: 2, head_dim: 4 };
        assert!(Cpu.attention(s, &t, &t, &t, &out, &lse).is_ok());
        for bad in
            [AttentionShape { heads: 0, ..s }, AttentionShape { kv_heads: 3, ..s }, AttentionShape { seq: 4, ..s }]
        {
            assert!(Cpu.attention(bad, &t, &t, &t, &out, &lse).is_err(), "{bad:?}");
        }
        assert!(Cpu.attention(s, &t, &t, &t, &t, &lse).is_err(), "the output is an input");
    }
}
