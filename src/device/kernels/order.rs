//! Moving rows: tokens to expert rows and back.
//!
//! A row index names a row of the experts' buffer; −1 stands for "none": a dropped choice, an empty slot.

use super::MemoryKernels;
use crate::device::check::{expect, matrix};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// The row of every choice, and its inverse.
#[derive(Clone, Copy, Debug)]
pub struct RowIndex<'a> {
    /// (T, k) i32: the row of each choice, −1 where its slot is −1.
    pub index: &'a Tensor,
    /// (R) i32: the token in every row, −1 in a row without one.
    pub row_token: &'a Tensor,
    /// (R) i32: the choice t·k + j, of which the row is, and so the number of its weight; −1 in a row without one.
    pub row_weight: &'a Tensor,
}

/// The rows that `choices` choices of `experts` experts take at most, when each expert's rows are padded to a multiple of
/// `align`: what [`OrderKernels::block_index`] needs for any loads.
#[must_use]
pub fn block_rows(choices: usize, experts: usize, align: usize) -> usize {
    // Only experts with a row are padded, and all ends are multiples.
    (choices + experts.min(choices) * (align - 1)) / align * align
}

/// Moving rows.
pub trait OrderKernels: MemoryKernels {
    /// `dst[n] = src[index[n]]`, a row of zeros where the index is −1. src: (R, M), index: (N) i32, dst: (N, M), same
    /// dtype. Any index ≥ R is an error on the CPU.
    fn gather_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()>;

    /// `dst[index[n]] += src[n]`, n ascending, nothing where the index is −1. src: (N, M), dst: (R, M); dst has src's
    /// dtype or acc.
    fn scatter_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()>;

    /// `index[t,j] = starts[g,e] + slots[t,j]` for `e = experts[t,j]` and g the group of token t, −1 where the slot is −1.
    /// experts, slots, index: (T, k) i32; starts: (G, E) i32.
    fn row_index(&self, experts: &Tensor, slots: &Tensor, starts: &Tensor, index: &Tensor) -> Result<()>;

    /// The inverse of an index of (T, k): `row_choice[index[t,j]] = t·k + j` and `row_token[…] = t`, −1 for rows that
    /// nothing names. row_choice, row_token: (R) i32.
    fn invert_index(&self, index: &Tensor, row_choice: &Tensor, row_token: &Tensor) -> Result<()>;

    /// The rows of each token: `rows` lists 0..R ordered by `row_token` (ascending rows inside a token), token t's being
    /// `rows[offsets[t]..offsets[t+1]]`. row_token: (R) i32 without −1; offsets: (T+1) i32; rows: (R) i32.
    fn rows_by_token(&self, row_token: &Tensor, offsets: &Tensor, rows: &Tensor) -> Result<()>;

    /// Weighted sum of each token's rows: `out[t] = Σ_n weights[n]·rows[index[n]]`, n ascending over
    /// `offsets[t]..offsets[t+1]`, or, without offsets, over t·k..(t+1)·k with k = N/T; index −1 adds nothing; without
    /// weights each is 1. rows: (R, M), index: (N) i32, weights: (N) acc, out: (T, M) of rows' dtype.
    fn combine_rows(
        &self,
        rows: &Tensor,
        index: &Tensor,
        offsets: Option<&Tensor>,
        weights: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<()>;

    /// Backward of a weighted sum, row by row, with `t = row_token[r]` and `n = row_weight[r]`:
    /// `d_rows[r] = weights[n]·dy[t]`, `d_weights[n] = dy[t]·rows[r]`; where t is −1, a row of zeros. Weights that no row
    /// names get gradient 0. dy: (T, M); rows, d_rows: (R, M); row_token, row_weight: (R) i32; weights, d_weights: acc.
    fn combine_rows_backward(
        &self,
        dy: &Tensor,
        rows: &Tensor,
        row_token: &Tensor,
        row_weight: &Tensor,
        weights: &Tensor,
        d_rows: &Tensor,
        d_weights: &Tensor,
    ) -> Result<()>;

    /// `out[i] = i`. out: (N) i32.
    fn iota(&self, out: &Tensor) -> Result<()> {
        let n = out.elements();
        expect("iota", "out", out, &[n], DType::I32)?;
        let values: Vec<i32> = (0..n as i32).collect();
        self.upload(&Tensor::from_slice(&values, [n])?, out)
    }

    /// `out[i] = values[index[i]]`, 0 where the index is −1. values: (N) acc, index: (R) i32, out: (R) acc. With
    /// `row_weight` for an index it gives every row its weight; with the rows of choices, every choice its row's value.
    fn gather_scalars(&self, values: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        let (n, rows) = (values.elements(), index.elements());
        expect("gather_scalars", "out", out, &[rows], values.dtype())?;
        self.gather_rows(&values.reshape([n, 1])?, index, &out.reshape([rows, 1])?)
    }

    /// [`OrderKernels::gather_rows`] of the first `limit[0]` rows only: rows from there on are not written. limit: (1) i32.
    fn gather_rows_below(&self, src: &Tensor, index: &Tensor, limit: &Tensor, dst: &Tensor) -> Result<()> {
        let n = read_limit(self, "gather_rows_below", limit, index.elements())?;
        self.gather_rows(src, &index.narrow(0, 0, n)?, &dst.narrow(0, 0, n)?)
    }

    /// Dispatch of token choices: `dst[r] = x[row_token[r]]`, zeros where it is −1, below `limit[0]` where there is a limit.
    /// What [`OrderKernels::gather_rows`] gives for `row_token`, but a backend may go by tokens, whose rows are
    /// `index[t, ..]`, the inverse of `row_token`. x: (T, M), index: (T, k) i32, row_token: (R) i32, limit: (1) i32,
    /// dst: (R, M).
    fn dispatch_rows(
        &self,
        x: &Tensor,
        index: &Tensor,
        row_token: &Tensor,
        limit: Option<&Tensor>,
        dst: &Tensor,
    ) -> Result<()> {
        let (tokens, _) = matrix("dispatch_rows", "x", x)?;
        expect("dispatch_rows", "index", index, &[tokens, index.dim(1)], DType::I32)?;
        match limit {
            Some(limit) => self.gather_rows_below(x, row_token, limit, dst),
            None => self.gather_rows(x, row_token, dst),
        }
    }

    /// [`OrderKernels::combine_rows_backward`] for token choices, where a backend may go by tokens, whose rows are
    /// `rows.index[t, ..]`: `d_rows` as there, below `limit[0]` where there is a limit (rows from there on are not
    /// written, and have no token), `d_weights[t·k + j] = dy[t]·data[index[t,j]]`, 0 where the index is −1. dy: (T, M),
    /// data and d_rows: (R, M), weights and d_weights: (T·k) acc, limit: (1) i32.
    fn combine_choices_backward(
        &self,
        dy: &Tensor,
        data: &Tensor,
        rows: RowIndex<'_>,
        weights: &Tensor,
        limit: Option<&Tensor>,
        d_rows: &Tensor,
        d_weights: &Tensor,
    ) -> Result<()> {
        let n = match limit {
            Some(limit) => read_limit(self, "combine_choices_backward", limit, rows.row_token.elements())?,
            None => rows.row_token.elements(),
        };
        let below = |t: &Tensor| t.narrow(0, 0, n);
        self.combine_rows_backward(
            dy,
            &below(data)?,
            &below(rows.row_token)?,
            &below(rows.row_weight)?,
            weights,
            &below(d_rows)?,
            d_weights,
        )
    }

    /// Rows of the padded layout, `(e·G + g)·capacity + slot`, and their inverse, with R = E·G·capacity rows. experts and
    /// slots: (T, k) i32, of [`GateKernels::assign_slots`](super::GateKernels::assign_slots) with this capacity; loads:
    /// (G, E) i32, what [`GateKernels::count_experts`](super::GateKernels::count_experts) counts.
    fn padded_index(
        &self,
        experts: &Tensor,
        slots: &Tensor,
        loads: &Tensor,
        capacity: usize,
        out: RowIndex<'_>,
    ) -> Result<()> {
        let [_, groups, num_experts] = check_index("padded_index", experts, slots, loads, &out)?;
        let rows = num_experts * groups * capacity;
        expect("padded_index", "row_token", out.row_token, &[rows], DType::I32)?;
        let start = |g: usize, e: usize| (e * groups + g) * capacity;
        let starts: Vec<i32> =
            (0..groups * num_experts).map(|i| start(i / num_experts, i % num_experts) as i32).collect();
        let on_device = self.alloc([groups, num_experts].into(), DType::I32)?;
        self.upload(&Tensor::from_slice(&starts, [groups, num_experts])?, &on_device)?;
        self.row_index(experts, slots, &on_device, out.index)?;
        self.invert_index(out.index, out.row_weight, out.row_token)
    }

    /// Rows sorted by expert, then by group, without empty slots inside, each expert's padded to a multiple of `align`: all
    /// of it in device memory, so that nobody waits for the loads. Inputs as in [`OrderKernels::padded_index`]; writes
    /// - offsets: (E + 1) i32: expert e's rows, padding last, are `offsets[e]..offsets[e+1]`, multiples of `align`;
    /// - starts: (G, E) i32: the first of them that is group g's;
    /// - the index of choices and its inverse, with −1 in padding and from `offsets[E]` on.
    ///
    /// R is at least [`block_rows`] of T·k, E and `align`, the most that any loads take.
    fn block_index(
        &self,
        experts: &Tensor,
        slots: &Tensor,
        loads: &Tensor,
        capacity: usize,
        align: usize,
        offsets: &Tensor,
        starts: &Tensor,
        out: RowIndex<'_>,
    ) -> Result<()> {
        let [_, groups, num_experts] = check_index("block_index", experts, slots, loads, &out)?;
        check_blocks("block_index", experts, loads, align, offsets, starts, &out)?;
        let loads = host_ints(self, loads)?;
        let (mut first, mut ends) = (vec![0; groups * num_experts], vec![0; num_experts + 1]);
        for e in 0..num_experts {
            let mut next = ends[e];
            for g in 0..groups {
                first[g * num_experts + e] = next;
                next += loads[g * num_experts + e].min(capacity as i32);
            }
            ends[e + 1] = (next as usize).next_multiple_of(align) as i32;
        }
        self.upload(&Tensor::from_slice(&ends, [num_experts + 1])?, offsets)?;
        self.upload(&Tensor::from_slice(&first, [groups, num_experts])?, starts)?;
        self.row_index(experts, slots, starts, out.index)?;
        self.invert_index(out.index, out.row_weight, out.row_token)
    }
}

/// The shapes that [`OrderKernels::padded_index`] and [`OrderKernels::block_index`] share; returns (k, G, E).
pub(in crate::device) fn check_index(
    op: &str,
    experts: &Tensor,
    slots: &Tensor,
    loads: &Tensor,
    out: &RowIndex<'_>,
) -> Result<[usize; 3]> {
    let (tokens, k) = matrix(op, "experts", experts)?;
    let (groups, num_experts) = matrix(op, "loads", loads)?;
    expect(op, "experts", experts, &[tokens, k], DType::I32)?;
    expect(op, "slots", slots, &[tokens, k], DType::I32)?;
    expect(op, "loads", loads, &[groups, num_experts], DType::I32)?;
    expect(op, "index", out.index, &[tokens, k], DType::I32)?;
    let rows = out.row_token.elements();
    expect(op, "row_token", out.row_token, &[rows], DType::I32)?;
    expect(op, "row_weight", out.row_weight, &[rows], DType::I32)?;
    if groups == 0 || tokens == 0 || !tokens.is_multiple_of(groups) {
        shape_err!("{op}: {tokens} tokens in {groups} groups: every group takes as many, at least one");
    }
    if i32::try_from(tokens * k).is_err() || i32::try_from(rows).is_err() {
        shape_err!("{op}: {} choices, {rows} rows: they are numbered in 31 bits", tokens * k);
    }
    Ok([k, groups, num_experts])
}

/// What [`OrderKernels::block_index`] demands besides.
pub(in crate::device) fn check_blocks(
    op: &str,
    experts: &Tensor,
    loads: &Tensor,
    align: usize,
    offsets: &Tensor,
    starts: &Tensor,
    out: &RowIndex<'_>,
) -> Result<()> {
    let num_experts = loads.dim(1);
    expect(op, "offsets", offsets, &[num_experts + 1], DType::I32)?;
    expect(op, "starts", starts, loads.shape(), DType::I32)?;
    let (choices, rows) = (experts.elements(), out.row_token.elements());
    if align == 0 || rows < block_rows(choices, num_experts, align) {
        shape_err!(
            "{op}: {rows} rows for {choices} choices of {num_experts} experts, each expert's a multiple of {align}: as many              as block_rows says, and an alignment of at least 1"
        );
    }
    Ok(())
}

fn host_ints<K: OrderKernels + ?Sized>(k: &K, t: &Tensor) -> Result<Vec<i32>> {
    let host = Tensor::host(*t.shape(), t.dtype());
    k.download(t, &host)?;
    host.to_vec()
}

fn read_limit<K: OrderKernels + ?Sized>(k: &K, op: &str, limit: &Tensor, rows: usize) -> Result<usize> {
    expect(op, "limit", limit, &[1], DType::I32)?;
    Ok(host_ints(k, limit)?.first().map_or(0, |&n| usize::try_from(n).unwrap_or(0).min(rows)))
}
