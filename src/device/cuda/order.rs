//! Moving rows (`kernels/order/`).
//!
//! Indices are read on the device only: one outside its range counts as −1 here, where the CPU returns an error.

use super::args::Args;
use super::backend::{Cuda, THREADS};
use crate::device::check::{expect, matrix};
use crate::device::{OrderKernels, RowIndex, check_blocks, check_index};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// The most blocks that a kernel that walks by the grid is given.
const MAX_BLOCKS: usize = 1 << 20;

/// Loads (G, E) of which every block makes its own layout: no more than a kernel of their own takes to start.
const OWN_LAYOUT: usize = 2048;

impl OrderKernels for Cuda {
    fn gather_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()> {
        self.gather("gather_rows", src, index, None, dst)
    }

    fn scatter_rows(&self, src: &Tensor, index: &Tensor, dst: &Tensor) -> Result<()> {
        const OP: &str = "scatter_rows";
        let (n, width) = matrix(OP, "src", src)?;
        let (count, _) = matrix(OP, "dst", dst)?;
        expect(OP, "index", index, &[n], DType::I32)?;
        let dtype = if dst.dtype() == src.dtype() { src.dtype() } else { src.dtype().accumulate() };
        expect(OP, "dst", dst, &[count, width], dtype)?;
        self.row_major(OP, &[src, index, dst])?;
        let name = format!("scatter_rows_{}_{}", self.suffix(OP, src)?, self.suffix(OP, dst)?);
        if n == 0 || count == 0 || width == 0 {
            return Ok(());
        }
        let list = self.allocate([n].into(), DType::I32)?;
        let keys = self.sort_index(index, count, &list)?;
        let offsets = self.allocate([count + 1].into(), DType::I32)?;
        self.bounds(&keys, count, &offsets)?;
        let args = Args::new().tensor(src).tensor(&list).tensor(&offsets).size(count).size(width).tensor(dst);
        // A warp has 32 vectors of a row, if they are vectors.
        let warps = count * width.div_ceil(32 * 16 / src.dtype().size());
        // SAFETY: the kernel's parameters; the list names rows of src, offsets has an entry per row of dst and one more.
        unsafe { self.launch(&name, blocks(warps * 32), THREADS, 0, args, || format!("{src:?} into {dst:?}")) }
    }

    fn row_index(&self, experts: &Tensor, slots: &Tensor, starts: &Tensor, index: &Tensor) -> Result<()> {
        const OP: &str = "row_index";
        let (tokens, k) = matrix(OP, "experts", experts)?;
        let (groups, num_experts) = matrix(OP, "starts", starts)?;
        for (what, t) in [("experts", experts), ("slots", slots), ("index", index)] {
            expect(OP, what, t, &[tokens, k], DType::I32)?;
        }
        expect(OP, "starts", starts, &[groups, num_experts], DType::I32)?;
        self.row_major(OP, &[experts, slots, starts, index])?;
        if groups == 0 || tokens == 0 || !tokens.is_multiple_of(groups) {
            shape_err!("{OP}: {tokens} tokens in {groups} groups: every group takes as many, at least one");
        }
        let args = Args::new()
            .tensor(experts)
            .tensor(slots)
            .tensor(starts)
            .size(tokens * k)
            .size(tokens / groups * k)
            .int(num_experts as i32)
            .tensor(index);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise("index_rows", tokens * k, args) }
    }

    fn invert_index(&self, index: &Tensor, row_choice: &Tensor, row_token: &Tensor) -> Result<()> {
        const OP: &str = "invert_index";
        let (tokens, k) = matrix(OP, "index", index)?;
        let rows = row_choice.elements();
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "row_choice", row_choice, &[rows], DType::I32)?;
        expect(OP, "row_token", row_token, &[rows], DType::I32)?;
        self.row_major(OP, &[index, row_choice, row_token])?;
        let args = Args::new().tensor(row_choice).tensor(row_token).size(rows);
        // SAFETY: the kernel's parameters; both have `rows` elements.
        unsafe { self.elementwise("index_none", rows, args)? };
        let args =
            Args::new().tensor(index).size(tokens * k).size(k.max(1)).size(rows).tensor(row_choice).tensor(row_token);
        // SAFETY: as above; the kernel writes rows below `rows` only.
        unsafe { self.elementwise("index_invert", tokens * k, args) }
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
        self.row_major(OP, &[row_token, offsets, rows])?;
        let keys = self.sort_index(row_token, tokens, rows)?;
        self.bounds(&keys, tokens, offsets)
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
        weights.map_or(Ok(()), |weights| expect(OP, "weights", weights, &[n], DType::F32))?;
        offsets.map_or(Ok(()), |offsets| expect(OP, "offsets", offsets, &[tokens + 1], DType::I32))?;
        self.row_major(OP, &[rows, index, out])?;
        self.row_major(OP, offsets.as_slice())?;
        self.row_major(OP, weights.as_slice())?;
        let suffix = self.suffix(OP, rows)?;
        if tokens == 0 || width == 0 {
            return Ok(());
        }
        if offsets.is_none() && !n.is_multiple_of(tokens) {
            shape_err!("{OP}: {n} indices for {tokens} tokens: as many for each, or offsets");
        }
        let k = if offsets.is_some() { 0 } else { n / tokens };
        let in_flight = if offsets.is_some() { 4 } else { in_flight(k).min(4) };
        let args = Args::new()
            .tensor(rows)
            .tensor(index)
            .optional(offsets)
            .optional(weights)
            .size(count)
            .size(tokens)
            .int(k as i32)
            .size(width)
            .tensor(out);
        let name = format!("combine_rows_forward_u{in_flight}_{suffix}");
        let threads = tokens * segment_threads(rows, if in_flight == 2 { 1 } else { 2 });
        // SAFETY: the kernel's parameters, of checked shapes; what the index names is checked by the kernel.
        unsafe { self.launch(&name, blocks(threads), THREADS, 0, args, || format!("{rows:?} into {out:?}")) }
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
        let index = RowIndex { index: row_token, row_token, row_weight };
        let (tokens, width, count) = self.check_combine_backward(OP, dy, rows, index, weights, d_rows, d_weights)?;
        let name = format!("combine_rows_backward_{}", self.suffix(OP, dy)?);
        let n = weights.elements();
        let args = Args::new().tensor(d_weights).size(n);
        // SAFETY: the kernel's parameters; d_weights has n elements.
        unsafe { self.elementwise("combine_rows_clear", n, args)? };
        if count == 0 || width == 0 {
            return Ok(());
        }
        let args = Args::new()
            .tensor(dy)
            .tensor(rows)
            .tensor(row_token)
            .tensor(row_weight)
            .tensor(weights)
            .size(tokens)
            .size(n)
            .size(count)
            .size(width)
            .tensor(d_rows)
            .tensor(d_weights);
        // SAFETY: the kernel's parameters, of checked shapes; what the indices name is checked by the kernel.
        unsafe { self.launch(&name, blocks(count * 32), THREADS, 0, args, || format!("{dy:?} to {d_rows:?}")) }
    }

    fn iota(&self, out: &Tensor) -> Result<()> {
        let n = out.elements();
        expect("iota", "out", out, &[n], DType::I32)?;
        self.row_major("iota", &[out])?;
        // SAFETY: the kernel's parameters; out has n elements.
        unsafe { self.elementwise("index_iota", n, Args::new().size(n).tensor(out)) }
    }

    fn gather_scalars(&self, values: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "gather_scalars";
        let (count, n) = (values.elements(), index.elements());
        expect(OP, "values", values, &[count], DType::F32)?;
        expect(OP, "index", index, &[n], DType::I32)?;
        expect(OP, "out", out, &[n], DType::F32)?;
        self.row_major(OP, &[values, index, out])?;
        let args = Args::new().tensor(values).tensor(index).int(count as i32).size(n).tensor(out);
        // SAFETY: the kernel's parameters; what the index names is checked by the kernel.
        unsafe { self.elementwise("index_scalars", n.div_ceil(4), args) }
    }

    fn gather_rows_below(&self, src: &Tensor, index: &Tensor, limit: &Tensor, dst: &Tensor) -> Result<()> {
        self.gather("gather_rows_below", src, index, Some(limit), dst)
    }

    fn dispatch_rows(
        &self,
        x: &Tensor,
        index: &Tensor,
        row_token: &Tensor,
        limit: Option<&Tensor>,
        dst: &Tensor,
    ) -> Result<()> {
        const OP: &str = "dispatch_rows";
        let (tokens, width) = matrix(OP, "x", x)?;
        let (_, k) = matrix(OP, "index", index)?;
        let rows = row_token.elements();
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "row_token", row_token, &[rows], DType::I32)?;
        expect(OP, "dst", dst, &[rows, width], x.dtype())?;
        limit.map_or(Ok(()), |limit| expect(OP, "limit", limit, &[1], DType::I32))?;
        self.row_major(OP, &[x, index, row_token, dst])?;
        self.row_major(OP, limit.as_slice())?;
        let name = format!("dispatch_rows_{}", self.suffix(OP, x)?);
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let token_blocks = if tokens * k == 0 { 0 } else { blocks(tokens * segment_threads(x, 2)) };
        let clear_blocks = clear_blocks(rows);
        let args = Args::new()
            .tensor(x)
            .tensor(index)
            .size(tokens)
            .int(k as i32)
            .size(width)
            .tensor(row_token)
            .optional(limit)
            .size(rows)
            .size(clear_blocks)
            .tensor(dst);
        let shape = || format!("{x:?} to {dst:?}, k = {k}");
        // SAFETY: the kernel's parameters, of checked shapes; what the index names is checked by the kernel.
        unsafe { self.launch(&name, token_blocks + clear_blocks as u32, THREADS, 0, args, shape) }
    }

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
        const OP: &str = "combine_choices_backward";
        let (tokens, width, count) = self.check_combine_backward(OP, dy, data, rows, weights, d_rows, d_weights)?;
        let (_, k) = matrix(OP, "index", rows.index)?;
        expect(OP, "index", rows.index, &[tokens, k], DType::I32)?;
        expect(OP, "weights", weights, &[tokens * k], DType::F32)?;
        limit.map_or(Ok(()), |limit| expect(OP, "limit", limit, &[1], DType::I32))?;
        self.row_major(OP, limit.as_slice())?;
        // Twice as many rows as bytes need, for two are read and one is written with each.
        let name = format!("combine_rows_choices_u{}_{}", in_flight(k), self.suffix(OP, dy)?);
        if count == 0 && tokens * k == 0 {
            return Ok(());
        }
        if count == 0 || width == 0 {
            let args = Args::new().tensor(d_weights).size(tokens * k);
            // SAFETY: the kernel's parameters; d_weights has T·k elements.
            return unsafe { self.elementwise("combine_rows_clear", tokens * k, args) };
        }
        // Four warps to a block, a token to a warp.
        let token_blocks = if k == 0 { 0 } else { tokens.div_ceil(4).min(MAX_BLOCKS) };
        let clear_blocks = clear_blocks(count);
        let args = Args::new()
            .tensor(dy)
            .tensor(data)
            .tensor(rows.index)
            .tensor(weights)
            .size(tokens)
            .int(k as i32)
            .size(width)
            .tensor(rows.row_token)
            .optional(limit)
            .size(count)
            .size(clear_blocks)
            .tensor(d_rows)
            .tensor(d_weights);
        let shape = || format!("{dy:?} to {d_rows:?}, k = {k}");
        // SAFETY: the kernel's parameters, of checked shapes; what the index names is checked by the kernel.
        unsafe { self.launch(&name, (token_blocks + clear_blocks) as u32, 128, 0, args, shape) }
    }

    fn padded_index(
        &self,
        experts: &Tensor,
        slots: &Tensor,
        loads: &Tensor,
        capacity: usize,
        out: RowIndex<'_>,
    ) -> Result<()> {
        const OP: &str = "padded_index";
        let [k, groups, num_experts] = check_index(OP, experts, slots, loads, &out)?;
        let (choices, rows) = (experts.elements(), num_experts * groups * capacity);
        expect(OP, "row_token", out.row_token, &[rows], DType::I32)?;
        self.row_major(OP, &[experts, slots, loads, out.index, out.row_token, out.row_weight])?;
        let args = Args::new()
            .tensor(experts)
            .tensor(slots)
            .tensor(loads)
            .size(choices)
            .size(k.max(1))
            .size((choices / groups).max(1))
            .size(groups)
            .int(num_experts as i32)
            .size(capacity)
            .size(rows)
            .tensor(out.index)
            .tensor(out.row_token)
            .tensor(out.row_weight);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise("index_padded", choices.max(rows), args) }
    }

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
        const OP: &str = "block_index";
        let [k, groups, num_experts] = check_index(OP, experts, slots, loads, &out)?;
        check_blocks(OP, experts, loads, align, offsets, starts, &out)?;
        let (choices, rows) = (experts.elements(), out.row_token.elements());
        let all = [experts, slots, loads, offsets, starts, out.index, out.row_token, out.row_weight];
        self.row_major(OP, &all)?;
        let capacity = capacity.min(i32::MAX as usize) as i32;
        let args = Args::new()
            .tensor(loads)
            .size(groups)
            .int(num_experts as i32)
            .int(capacity)
            .int(align as i32)
            .tensor(offsets)
            .tensor(starts);
        let own = groups * num_experts <= OWN_LAYOUT;
        if !own {
            // SAFETY: the kernel's parameters, of checked shapes; one block of 1024, as it asks.
            unsafe { self.launch("index_layout", 1, 1024, 0, args, || format!("{loads:?}"))? };
        }
        let args = Args::new()
            .tensor(experts)
            .tensor(slots)
            .tensor(loads)
            .tensor(offsets)
            .tensor(starts)
            .int(i32::from(own))
            .size(choices)
            .size(k.max(1))
            .size((choices / groups).max(1))
            .size(groups)
            .int(num_experts as i32)
            .int(capacity)
            .size(align)
            .size(rows)
            .tensor(out.index)
            .tensor(out.row_token)
            .tensor(out.row_weight);
        let (blocks, shared) = (self.blocks(choices.max(rows)), if own { num_experts * (groups + 1) + 1 } else { 0 });
        // SAFETY: as above; it writes rows below `rows` only, and has the shared memory that it asks for.
        unsafe { self.launch("index_blocks", blocks, THREADS, 4 * shared, args, || format!("{experts:?}")) }
    }
}

/// Blocks of [`THREADS`] for `items`, one each.
fn blocks(items: usize) -> u32 {
    items.div_ceil(THREADS as usize).clamp(1, MAX_BLOCKS) as u32
}

/// Blocks that look for empty rows, 32 of `rows` at a time.
fn clear_blocks(rows: usize) -> usize {
    rows.div_ceil(32).clamp(1, 1 << 14)
}

/// Threads for a row cut into segments that a warp has, of `vectors` times 16 bytes for each of its lanes. Rows that are not
/// aligned have shorter segments, which the kernels walk by the grid.
fn segment_threads(rows: &Tensor, vectors: usize) -> usize {
    32 * rows.dim(1).div_ceil(32 * vectors * 16 / rows.dtype().size())
}

/// Rows of a token to have in flight: its k, up to eight.
fn in_flight(k: usize) -> usize {
    k.next_power_of_two().clamp(1, 8)
}

impl Cuda {
    fn gather(&self, op: &str, src: &Tensor, index: &Tensor, limit: Option<&Tensor>, dst: &Tensor) -> Result<()> {
        let (count, width) = matrix(op, "src", src)?;
        let n = index.elements();
        expect(op, "index", index, &[n], DType::I32)?;
        expect(op, "dst", dst, &[n, width], src.dtype())?;
        limit.map_or(Ok(()), |limit| expect(op, "limit", limit, &[1], DType::I32))?;
        self.row_major(op, &[src, index, dst])?;
        self.row_major(op, limit.as_slice())?;
        self.suffix(op, src)?;
        if n == 0 || width == 0 {
            return Ok(());
        }
        // The widest unit that both tensors and their rows are made of.
        let bytes = width * src.dtype().size();
        let divides = |unit: &usize| [bytes, src.ptr() as usize, dst.ptr() as usize].iter().all(|b| b % unit == 0);
        let unit = [16, 4].into_iter().find(divides).unwrap_or(2);
        let units = bytes / unit;
        let args = Args::new().tensor(src).tensor(index).optional(limit).size(count).size(n).size(units).tensor(dst);
        let (name, threads) = (format!("gather_rows_{unit}"), (n * units).div_ceil(4));
        // SAFETY: the kernel's parameters, of checked shapes and alignment; what the index names is checked by the kernel.
        unsafe { self.launch(&name, blocks(threads), THREADS, 0, args, || format!("{src:?} to {dst:?}")) }
    }

    /// The checks that both backwards of a combine share; returns (T, M, R).
    fn check_combine_backward(
        &self,
        op: &str,
        dy: &Tensor,
        rows: &Tensor,
        index: RowIndex<'_>,
        weights: &Tensor,
        d_rows: &Tensor,
        d_weights: &Tensor,
    ) -> Result<(usize, usize, usize)> {
        let (tokens, width) = matrix(op, "dy", dy)?;
        let (count, _) = matrix(op, "rows", rows)?;
        let n = weights.elements();
        expect(op, "rows", rows, &[count, width], dy.dtype())?;
        expect(op, "row_token", index.row_token, &[count], DType::I32)?;
        expect(op, "row_weight", index.row_weight, &[count], DType::I32)?;
        expect(op, "weights", weights, &[n], DType::F32)?;
        expect(op, "d_rows", d_rows, &[count, width], dy.dtype())?;
        expect(op, "d_weights", d_weights, &[n], DType::F32)?;
        let all = [dy, rows, index.index, index.row_token, index.row_weight, weights, d_rows, d_weights];
        self.row_major(op, &all)?;
        Ok((tokens, width, count))
    }
}
