//! Moving rows.

use super::Cpu;
use super::util::{Num, Real, expect, float_type, for_rows, in_range, input, matrix, output};
use crate::device::OrderKernels;
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};
use num_traits::Zero;
use rayon::prelude::*;

impl OrderKernels for Cpu {
    fn gather_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()> {
        const OP: &str = "gather_rows";
        let (count, width) = matrix(OP, "src", src)?;
        let n = index.elements();
        expect(OP, "index", index, &[n], DType::I32)?;
        expect(OP, "dst", dst, &[n, width], src.dtype())?;
        let index = input::<i32>(index)?;
        in_range(OP, "index", index, -1..count as i64)?;
        float_type!("gather_rows", src.dtype(), T => {
            let src = input::<T>(src)?;
            for_rows(output::<T>(dst)?, width, |n, row| match usize::try_from(index[n]) {
                Ok(i) => row.copy_from_slice(&src[i * width..][..width]),
                Err(_) => row.fill(T::zero()),
            });
        });
        Ok(())
    }

    fn scatter_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()> {
        const OP: &str = "scatter_rows";
        let (n, width) = matrix(OP, "src", src)?;
        let (count, _) = matrix(OP, "dst", dst)?;
        expect(OP, "index", index, &[n], DType::I32)?;
        let dtype = if dst.dtype() == src.dtype() { src.dtype() } else { src.dtype().accumulate() };
        expect(OP, "dst", dst, &[count, width], dtype)?;
        let index = input::<i32>(index)?;
        in_range(OP, "index", index, -1..count as i64)?;
        let (offsets, sources) = by_destination(index, count);
        float_type!("scatter_rows", src.dtype(), S => {
            let src = input::<S>(src)?;
            float_type!("scatter_rows", dst.dtype(), D => {
                for_rows(output::<D>(dst)?, width, |r, row| {
                    let sources = &sources[offsets[r] as usize..offsets[r + 1] as usize];
                    if sources.is_empty() {
                        return;
                    }
                    let mut sum: Vec<_> = row.iter().map(|d| d.get()).collect();
                    for &n in sources {
                        for (s, v) in sum.iter_mut().zip(&src[n as usize * width..]) {
                            *s += <D as Num>::Acc::of(v.get().f64());
                        }
                    }
                    for (d, s) in row.iter_mut().zip(sum) {
                        *d = D::put(s);
                    }
                });
            });
        });
        Ok(())
    }

    fn row_index(&self, experts: &Tensor, slots: &Tensor, starts: &Tensor, index: &Tensor) -> Result<()> {
        const OP: &str = "row_index";
        let (tokens, k) = matrix(OP, "experts", experts)?;
        let (groups, num_experts) = matrix(OP, "starts", starts)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "slots", slots, &[tokens, k], DType::I32)?;
        expect(OP, "starts", starts, &[groups, num_experts], DType::I32)?;
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        let per_group = group_size(OP, tokens, groups)?;
        let (experts, slots, starts) = (input::<i32>(experts)?, input::<i32>(slots)?, input::<i32>(starts)?);
        in_range(OP, "experts", experts, 0..num_experts as i64)?;
        in_range(OP, "slots", slots, -1..i64::from(i32::MAX))?;
        for_rows(output::<i32>(index)?, k, |t, row| {
            let starts = &starts[t / per_group * num_experts..][..num_experts];
            for (j, index) in row.iter_mut().enumerate() {
                let slot = slots[t * k + j];
                *index = if slot < 0 { -1 } else { starts[experts[t * k + j] as usize] + slot };
            }
        });
        Ok(())
    }

    fn invert_index(&self, index: &Tensor, row_choice: &Tensor, row_token: &Tensor) -> Result<()> {
        const OP: &str = "invert_index";
        let (tokens, k) = matrix(OP, "index", index)?;
        let rows = row_choice.elements();
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "row_choice", row_choice, &[rows], DType::I32)?;
        expect(OP, "row_token", row_token, &[rows], DType::I32)?;
        let index = input::<i32>(index)?;
        in_range(OP, "index", index, -1..rows as i64)?;
        let (row_choice, row_token) = (output::<i32>(row_choice)?, output::<i32>(row_token)?);
        row_choice.fill(-1);
        row_token.fill(-1);
        for (choice, &row) in index.iter().enumerate().filter(|(_, row)| **row >= 0) {
            let row = row as usize;
            if row_choice[row] >= 0 {
                shape_err!(
                    "{OP}: index names row {row} twice, at {} and {choice}: a row has one choice",
                    row_choice[row]
                );
            }
            row_choice[row] = choice as i32;
            row_token[row] = (choice / k) as i32;
        }
        Ok(())
    }

    fn rows_by_token(&self, row_token: &Tensor, offsets: &Tensor, rows: &Tensor) -> Result<()> {
        const OP: &str = "rows_by_token";
        let n = row_token.elements();
        let Some(tokens) = offsets.elements().checked_sub(1) else {
            shape_err!("{OP}: offsets has no elements, expected one more than there are tokens");
        };
        expect(OP, "row_token", row_token, &[n], DType::I32)?;
        expect(OP, "offsets", offsets, &[tokens + 1], DType::I32)?;
        expect(OP, "rows", rows, &[n], DType::I32)?;
        let row_token = input::<i32>(row_token)?;
        in_range(OP, "row_token", row_token, 0..tokens as i64)?;
        let (by_token, list) = by_destination(row_token, tokens);
        output::<i32>(offsets)?.copy_from_slice(&by_token);
        output::<i32>(rows)?.copy_from_slice(&list);
        Ok(())
    }

    fn combine_rows(
        &self,
        rows: &Tensor,
        index: &Tensor,
        offsets: Option<&Tensor>,
        weights: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<()> {
        const OP: &str = "combine_rows";
        let (count, width) = matrix(OP, "rows", rows)?;
        let (tokens, _) = matrix(OP, "out", out)?;
        let n = index.elements();
        expect(OP, "index", index, &[n], DType::I32)?;
        expect(OP, "out", out, &[tokens, width], rows.dtype())?;
        if let Some(weights) = weights {
            expect(OP, "weights", weights, &[n], rows.dtype().accumulate())?;
        }
        let index = input::<i32>(index)?;
        in_range(OP, "index", index, -1..count as i64)?;
        let offsets = match offsets {
            Some(offsets) => {
                expect(OP, "offsets", offsets, &[tokens + 1], DType::I32)?;
                let offsets = input::<i32>(offsets)?;
                in_range(OP, "offsets", offsets, 0..n as i64 + 1)?;
                if let Some(t) = offsets.windows(2).position(|w| w[0] > w[1]) {
                    shape_err!("{OP}: offsets fall from {} to {} at {t}: they ascend", offsets[t], offsets[t + 1]);
                }
                Some(offsets)
            }
            None if tokens == 0 || n.is_multiple_of(tokens) => None,
            None => shape_err!("{OP}: {n} indices for {tokens} tokens: as many for each, or offsets"),
        };
        let range = |t: usize| match offsets {
            Some(offsets) => offsets[t] as usize..offsets[t + 1] as usize,
            None => t * (n / tokens)..(t + 1) * (n / tokens),
        };
        float_type!("combine_rows", rows.dtype(), T => {
            type A = <T as Num>::Acc;
            let rows = input::<T>(rows)?;
            let weights = weights.map(input::<A>).transpose()?;
            for_rows(output::<T>(out)?, width, |t, out| {
                let mut sum = vec![A::zero(); width];
                for n in range(t).filter(|&n| index[n] >= 0) {
                    let weight = weights.map_or(1.0, |w| w[n]);
                    for (s, v) in sum.iter_mut().zip(&rows[index[n] as usize * width..][..width]) {
                        *s += weight * v.get();
                    }
                }
                for (o, s) in out.iter_mut().zip(sum) {
                    *o = T::put(s);
                }
            });
        });
        Ok(())
    }

    fn combine_rows_backward(
        &self,
        dy: &Tensor,
        rows: &Tensor,
        row_token: &Tensor,
        row_weight: &Tensor,
        weights: &Tensor,
        d_rows: &Tensor,
        d_weights: &Tensor,
    ) -> Result<()> {
        const OP: &str = "combine_rows_backward";
        let (tokens, width) = matrix(OP, "dy", dy)?;
        let (count, _) = matrix(OP, "rows", rows)?;
        let n = weights.elements();
        let (dtype, acc) = (dy.dtype(), dy.dtype().accumulate());
        expect(OP, "rows", rows, &[count, width], dtype)?;
        expect(OP, "row_token", row_token, &[count], DType::I32)?;
        expect(OP, "row_weight", row_weight, &[count], DType::I32)?;
        expect(OP, "weights", weights, &[n], acc)?;
        expect(OP, "d_rows", d_rows, &[count, width], dtype)?;
        expect(OP, "d_weights", d_weights, &[n], acc)?;
        let (row_token, row_weight) = (input::<i32>(row_token)?, input::<i32>(row_weight)?);
        in_range(OP, "row_token", row_token, -1..tokens as i64)?;
        in_range(OP, "row_weight", row_weight, -1..n as i64)?;
        if let Some(r) = (0..count).find(|&r| row_token[r] >= 0 && row_weight[r] < 0) {
            shape_err!("{OP}: row {r} of token {} names no weight", row_token[r]);
        }
        float_type!("combine_rows_backward", dtype, T => {
            type A = <T as Num>::Acc;
            let (dy, rows, weights) = (input::<T>(dy)?, input::<T>(rows)?, input::<A>(weights)?);
            let mut dots = vec![A::zero(); count];
            output::<T>(d_rows)?
                .par_chunks_mut(width.max(1))
                .zip(&mut dots)
                .with_min_len(4096 / width.max(1) + 1)
                .enumerate()
                .for_each(|(r, (d_row, dot))| {
                    if row_token[r] < 0 {
                        return d_row.fill(T::zero());
                    }
                    let (dy, row) = (&dy[row_token[r] as usize * width..][..width], &rows[r * width..][..width]);
                    let weight = weights[row_weight[r] as usize];
                    for (d, y) in d_row.iter_mut().zip(dy) {
                        *d = T::put(weight * y.get());
                    }
                    *dot = dy.iter().zip(row).map(|(y, v)| y.get() * v.get()).sum();
                });
            let d_weights = output::<A>(d_weights)?;
            d_weights.fill(A::zero());
            for r in (0..count).filter(|&r| row_token[r] >= 0) {
                d_weights[row_weight[r] as usize] = dots[r];
            }
        });
        Ok(())
    }
}

/// The tokens of each routing group.
pub(super) fn group_size(op: &str, tokens: usize, groups: usize) -> Result<usize> {
    if groups == 0 || tokens == 0 || !tokens.is_multiple_of(groups) {
        shape_err!("{op}: {tokens} tokens in {groups} groups: every group takes as many, at least one");
    }
    Ok(tokens / groups)
}

/// Which entries of `index` name each of `0..count`, ascending: `entries[offsets[i]..offsets[i+1]]` name i. −1 names none.
fn by_destination(index: &[i32], count: usize) -> (Vec<i32>, Vec<i32>) {
    let mut offsets = vec![0; count + 1];
    for &i in index.iter().filter(|i| **i >= 0) {
        offsets[i as usize + 1] += 1;
    }
    for i in 0..count {
        offsets[i + 1] += offsets[i];
    }
    let mut next = offsets.clone();
    let mut entries = vec![0; offsets[count] as usize];
    for (n, &i) in index.iter().enumerate().filter(|(_, i)| **i >= 0) {
        entries[next[i as usize] as usize] = n as i32;
        next[i as usize] += 1;
    }
    (offsets, entries)
}

#[cfg(test)]
mod tests;
