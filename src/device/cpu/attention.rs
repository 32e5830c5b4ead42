//! Causal attention in blocks of queries: a block sees only the keys up to its last query, so half the square is never
//! computed.

use super::gemm::{Matrix, Sizes, product};
use super::util::{Real, acc_type, expect, input, output};
use super::{Cpu, math};
use crate::device::{AttentionShape, MemoryKernels};
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;
use gemm::Parallelism;
use rayon::prelude::*;
use std::borrow::Cow;

/// Queries handled at a time.
const QUERIES: usize = 64;

pub(super) fn forward(s: AttentionShape, q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, lse: &Tensor) -> Result<()> {
    check("attention", s, &[q, out], &[k, v], lse)?;
    let [q, k, v] = [wide(q)?, wide(k)?, wide(v)?];
    let wide_out = wide_output(out);
    acc_type!("attention", q.dtype(), A => {
        let (q, k, v) = (input::<A>(&q)?, input::<A>(&k)?, input::<A>(&v)?);
        let sizes = Strides::new(s);
        output::<A>(&wide_out)?
            .par_chunks_mut(sizes.q_batch)
            .zip(output::<A>(lse)?.par_chunks_mut(s.heads * s.seq))
            .enumerate()
            .for_each(|(b, (out, lse))| {
                let (k, v) = (&k[b * sizes.kv_batch..][..sizes.kv_batch], &v[b * sizes.kv_batch..][..sizes.kv_batch]);
                let q = &q[b * sizes.q_batch..][..sizes.q_batch];
                let mut scores = vec![0.0 as A; QUERIES * s.seq];
                for h in 0..s.heads {
                    for first in (0..s.seq).step_by(QUERIES) {
                        let block = Block::new(s, h, first);
                        block.scores(q, k, &mut scores);
                        for (i, row) in scores.chunks_mut(block.keys).take(block.queries).enumerate() {
                            let (seen, hidden) = row.split_at_mut(first + i + 1);
                            let max = seen.iter().fold(A::NEG_INFINITY, |m, v| m.max(*v));
                            seen.iter_mut().for_each(|v| *v = (*v - max).fast_exp());
                            let sum = seen.iter().sum::<A>();
                            seen.iter_mut().for_each(|v| *v /= sum);
                            hidden.fill(0.0);
                            lse[h * s.seq + first + i] = max + sum.ln();
                        }
                        // out = P·V
                        block.by_keys(&scores, v, out, block.kv_at, block.q_at);
                    }
                }
            });
    });
    narrow(&wide_out, out)
}

pub(super) fn backward(
    s: AttentionShape,
    [q, k, v, out, d_out]: [&Tensor; 5],
    lse: &Tensor,
    [dq, dk, dv]: [&Tensor; 3],
) -> Result<()> {
    check("attention_backward", s, &[q, out, d_out, dq], &[k, v, dk, dv], lse)?;
    let [q, k, v, out, d_out] = [wide(q)?, wide(k)?, wide(v)?, wide(out)?, wide(d_out)?];
    let (wide_dq, wide_dk, wide_dv) = (wide_output(dq), wide_output(dk), wide_output(dv));
    acc_type!("attention_backward", q.dtype(), A => {
        let (q, k, v) = (input::<A>(&q)?, input::<A>(&k)?, input::<A>(&v)?);
        let (out, d_out, lse) = (input::<A>(&out)?, input::<A>(&d_out)?, input::<A>(lse)?);
        let sizes = Strides::new(s);
        output::<A>(&wide_dq)?
            .par_chunks_mut(sizes.q_batch)
            .zip(output::<A>(&wide_dk)?.par_chunks_mut(sizes.kv_batch))
            .zip(output::<A>(&wide_dv)?.par_chunks_mut(sizes.kv_batch))
            .enumerate()
            .for_each(|(b, ((dq, dk), dv))| {
                let (k, v) = (&k[b * sizes.kv_batch..][..sizes.kv_batch], &v[b * sizes.kv_batch..][..sizes.kv_batch]);
                let at = b * sizes.q_batch..(b + 1) * sizes.q_batch;
                let (q, out, d_out) = (&q[at.clone()], &out[at.clone()], &d_out[at]);
                dk.fill(0.0);
                dv.fill(0.0);
                let (mut p, mut dp) = (vec![0.0 as A; QUERIES * s.seq], vec![0.0 as A; QUERIES * s.seq]);
                for h in 0..s.heads {
                    for first in (0..s.seq).step_by(QUERIES) {
                        let block = Block::new(s, h, first);
                        block.scores(q, k, &mut p);
                        // dP = dO·Vᵀ
                        block.by_width(1.0, d_out, v, &mut dp);
                        for i in 0..block.queries {
                            let at = block.q_at + i * block.q_row;
                            let (o, d_o) = (&out[at..][..s.head_dim], &d_out[at..][..s.head_dim]);
                            let inner: A = o.iter().zip(d_o).map(|(a, b)| a * b).sum();
                            let lse = lse[(b * s.heads + h) * s.seq + first + i];
                            let row = i * block.keys..(i + 1) * block.keys;
                            let (p, dp) = (&mut p[row.clone()], &mut dp[row]);
                            let seen = first + i + 1;
                            for (p, dp) in p[..seen].iter_mut().zip(&mut dp[..seen]) {
                                *p = (*p - lse).fast_exp();
                                *dp = *p * (*dp - inner);
                            }
                            p[seen..].fill(0.0);
                            dp[seen..].fill(0.0);
                        }
                        let scale = 1.0 / (s.head_dim as A).sqrt();
                        // dQ = dS·K, dK += dSᵀ·Q, dV += Pᵀ·dO
                        dp[..block.queries * block.keys].iter_mut().for_each(|v| *v *= scale);
                        block.by_keys(&dp, k, dq, block.kv_at, block.q_at);
                        block.add_transposed(&dp, q, dk);
                        block.add_transposed(&p, d_out, dv);
                    }
                }
            });
    });
    [(&wide_dq, dq), (&wide_dk, dk), (&wide_dv, dv)].into_iter().try_for_each(|(from, to)| narrow(from, to))
}

/// Elements of one sequence.
struct Strides {
    q_batch: usize,
    kv_batch: usize,
}

impl Strides {
    fn new(s: AttentionShape) -> Self {
        Strides { q_batch: s.seq * s.heads * s.head_dim, kv_batch: s.seq * s.kv_heads * s.head_dim }
    }
}

/// Some queries of one head, and the keys they may see.
struct Block {
    queries: usize,
    keys: usize,
    dim: usize,
    /// Where the block's first query, and the head's first key, lie in a sequence, and the distance between rows.
    q_at: usize,
    q_row: usize,
    kv_at: usize,
    kv_row: usize,
}

impl Block {
    fn new(s: AttentionShape, head: usize, first: usize) -> Self {
        let queries = QUERIES.min(s.seq - first);
        let (q_row, kv_row) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let kv_head = head / (s.heads / s.kv_heads);
        Block {
            queries,
            keys: first + queries,
            dim: s.head_dim,
            q_at: first * q_row + head * s.head_dim,
            q_row,
            kv_at: kv_head * s.head_dim,
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
        // SAFETY: rows of a block lie inside one sequence, whose slice this is; `out` is a buffer of its own.
        unsafe { product(sizes, alpha, a, b, A::zero(), c, Parallelism::None) }
    }

    /// `out[out_at..]` (queries, D) = w·b, w (queries, keys), b (keys, D) laid as k at `b_at`, out laid as q.
    fn by_keys<A: Real>(&self, w: &[A], b: &[A], out: &mut [A], b_at: usize, out_at: usize) {
        let sizes = Sizes { m: self.queries, k: self.keys, n: self.dim };
        let w = Matrix { at: w[..self.queries * self.keys].as_ptr(), row: self.keys, col: 1 };
        let b = Matrix { at: b[b_at..].as_ptr(), row: self.kv_row, col: 1 };
        let c = Matrix { at: out[out_at..].as_mut_ptr(), row: self.q_row, col: 1 };
        // SAFETY: as in `by_width`.
        unsafe { product(sizes, A::one(), w, b, A::zero(), c, Parallelism::None) }
    }

    /// `out` (keys, D), laid as k, += wᵀ·a, w (queries, keys), a (queries, D) laid as q.
    fn add_transposed<A: Real>(&self, w: &[A], a: &[A], out: &mut [A]) {
        let sizes = Sizes { m: self.keys, k: self.queries, n: self.dim };
        let w = Matrix { at: w[..self.queries * self.keys].as_ptr(), row: 1, col: self.keys };
        let a = Matrix { at: a[self.q_at..].as_ptr(), row: self.q_row, col: 1 };
        let c = Matrix { at: out[self.kv_at..].as_mut_ptr(), row: self.kv_row, col: 1 };
        // SAFETY: as in `by_width`.
        unsafe { product(sizes, A::one(), w, a, A::one(), c, Parallelism::None) }
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

fn check(op: &str, s: AttentionShape, like_q: &[&Tensor], like_k: &[&Tensor], lse: &Tensor) -> Result<()> {
    if s.kv_heads == 0 || !s.heads.is_multiple_of(s.kv_heads) || s.head_dim == 0 || s.seq == 0 {
        shape_err!("{op}: {s:?}: key heads divide query heads, and no size is 0");
    }
    let dtype = like_q[0].dtype();
    let (tokens, q, kv) = (s.batch * s.seq, s.heads * s.head_dim, s.kv_heads * s.head_dim);
    like_q.iter().try_for_each(|t| expect(op, "a query tensor", t, &[tokens, q], dtype))?;
    like_k.iter().try_for_each(|t| expect(op, "a key or value tensor", t, &[tokens, kv], dtype))?;
    expect(op, "lse", lse, &[s.batch, s.heads, s.seq], dtype.accumulate())?;
    math::same(op, like_q[0], like_q)
}
