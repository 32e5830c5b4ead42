//! What operations demand of their arguments, the same on every backend: errors name the operation, the value and the rule.

use super::{AdamW, AttentionShape, RowWeights};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Fails unless `t` has this shape and dtype.
pub(super) fn expect(op: &str, what: &str, t: &Tensor, shape: &[usize], dtype: DType) -> Result<()> {
    if t.shape().dims() != shape || t.dtype() != dtype {
        shape_err!(
            "{op}: {what} is {} {}, expected {dtype} {}",
            t.dtype(),
            t.shape(),
            crate::tensor::Shape::new(shape)
        );
    }
    Ok(())
}

/// Fails unless the tensors have `first`'s shape and dtype.
pub(super) fn same(op: &str, first: &Tensor, others: &[&Tensor]) -> Result<()> {
    others.iter().try_for_each(|t| expect(op, "a tensor", t, first.shape(), first.dtype()))
}

/// Fails unless `out` has x's type or the one it accumulates in.
pub(super) fn same_or_acc(op: &str, x: &Tensor, out: &Tensor) -> Result<()> {
    let own = x.dtype();
    if out.dtype() != own && out.dtype() != own.accumulate() {
        shape_err!("{op}: {own} into {}: the output has the input's type, or {}", out.dtype(), own.accumulate());
    }
    Ok(())
}

/// The two dimensions of a matrix.
pub(super) fn matrix(op: &str, what: &str, t: &Tensor) -> Result<(usize, usize)> {
    match *t.shape().dims() {
        [rows, cols] => Ok((rows, cols)),
        _ => shape_err!("{op}: {what} has shape {}, expected two dimensions", t.shape()),
    }
}

/// Fails if an output shares memory with an input.
pub(super) fn apart(op: &str, input: &Tensor, out: &Tensor) -> Result<()> {
    if input.overlaps(out) {
        shape_err!("{op}: the output shares memory with an input of shape {}", input.shape());
    }
    Ok(())
}

/// Whether `out` is `a` itself; fails where it is another view of a's memory, which no order of writes makes right.
pub(super) fn in_place(op: &str, a: &Tensor, out: &Tensor) -> Result<bool> {
    let same = a.ptr() == out.ptr() && a.shape() == out.shape() && a.is_contiguous() && out.is_contiguous();
    if !same && a.overlaps(out) {
        shape_err!("{op}: the output shares memory with an input of shape {} without being that input", a.shape());
    }
    Ok(same)
}

/// Fails unless inputs and outputs are rows (R, H) of one shape and dtype, the weights and their gradient (R) acc, and the
/// outputs apart from each other and from everything else.
pub(super) fn weighted(
    op: &str,
    inputs: &[&Tensor],
    weights: Option<RowWeights<'_>>,
    outputs: &[&Tensor],
) -> Result<()> {
    same(op, inputs[0], &inputs[1..])?;
    same(op, inputs[0], outputs)?;
    let (rows, _) = matrix(op, "rows", inputs[0])?;
    let mut read = inputs.to_vec();
    if let Some(RowWeights { weights, d_weights }) = weights {
        let acc = inputs[0].dtype().accumulate();
        expect(op, "the rows' weights", weights, &[rows], acc)?;
        expect(op, "the gradient of the rows' weights", d_weights, &[rows], acc)?;
        apart(op, weights, d_weights)?;
        read.push(weights);
    }
    for (n, out) in outputs.iter().enumerate() {
        read.iter().chain(&outputs[..n]).try_for_each(|t| apart(op, t, out))?;
    }
    Ok(())
}

/// Fails where two indices of an output name one element: threads would write it at once.
pub(super) fn distinct(op: &str, out: &Tensor) -> Result<()> {
    let mut dims: Vec<(usize, usize)> =
        out.layout().strides().iter().copied().zip(out.shape().iter().copied()).filter(|d| d.1 > 1).collect();
    dims.sort_unstable();
    let mut reach = 1;
    for (stride, size) in dims {
        if stride < reach && out.elements() > 0 {
            shape_err!("{op}: output {} has strides {:?}: its elements overlap", out.shape(), out.layout().strides());
        }
        reach += stride * (size - 1);
    }
    Ok(())
}

/// Fails unless the tensors are rows of `like`'s shape and dtype: contiguous, or (R, H) with unit stride inside a row.
pub(super) fn strided_rows(op: &str, like: &Tensor, others: &[&Tensor]) -> Result<()> {
    same(op, like, others)?;
    for t in others {
        if !t.is_contiguous() && (t.rank() != 2 || t.layout().strides()[1] != 1 || t.layout().strides()[0] < t.dim(1)) {
            shape_err!("{op}: strides {:?} of {}: rows must be contiguous", t.layout().strides(), t.shape());
        }
    }
    Ok(())
}

/// Whether two matrices are different columns of one wider buffer.
pub(super) fn side_by_side(a: &Tensor, b: &Tensor) -> bool {
    let between = (a.ptr() as usize).abs_diff(b.ptr() as usize) / a.dtype().size();
    match (a.layout().strides(), a.dim(1)) {
        (&[stride, _], width) => {
            a.layout().strides() == b.layout().strides() && width <= between && between + width <= stride
        }
        _ => false,
    }
}

/// The shapes and types of [`add`](super::MathKernels::add) and its like: b has the first operand's shape or its last
/// dimensions.
pub(super) fn binary(op: &str, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
    if !a.shape().ends_with(b.shape()) || a.shape() != out.shape() || a.dtype() != b.dtype() || a.dtype() != out.dtype()
    {
        shape_err!("{op}: {a:?} and {b:?} into {out:?}: the second has the first's shape or its last dimensions");
    }
    Ok(())
}

/// The sizes (m, k, n) of [`gemm`](super::MathKernels::gemm).
pub(super) fn gemm(a: &Tensor, b: &Tensor, c: &Tensor) -> Result<[usize; 3]> {
    let wrong = |why: &str| -> Result<[usize; 3]> {
        shape_err!(
            "gemm: {} {} by {} {} into {} {}: {why}",
            a.dtype(),
            a.shape(),
            b.dtype(),
            b.shape(),
            c.dtype(),
            c.shape()
        )
    };
    distinct("gemm", c)?;
    if a.rank() < 2 || b.rank() < 2 || c.rank() < 2 {
        return wrong("each needs two dimensions or more");
    }
    let tail = |t: &Tensor| (t.dim(t.rank() - 2), t.dim(t.rank() - 1));
    let ((m, k), (k2, n)) = (tail(a), tail(b));
    if k != k2 || tail(c) != (m, n) {
        return wrong("(m, k) by (k, n) gives (m, n)");
    }
    let lead = |t: &Tensor| t.shape()[..t.rank() - 2].to_vec();
    if [a, b].iter().any(|t| t.rank() > 2 && lead(t) != lead(c)) {
        return wrong("leading dimensions are the result's, or absent");
    }
    if a.dtype() != b.dtype()
        || !a.dtype().is_float()
        || (c.dtype() != a.dtype() && c.dtype() != a.dtype().accumulate())
    {
        return wrong("operands share a float type; the result has it, or the type it accumulates in");
    }
    if c.overlaps(a) || c.overlaps(b) {
        return wrong("the result shares memory with an operand");
    }
    Ok([m, k, n])
}

/// Fails unless x and `rows` are rows of one shape and dtype, `widths` vectors as wide, `stats` one acc per row.
pub(super) fn norm(op: &str, x: &Tensor, rows: &[&Tensor], widths: &[&Tensor], stats: &[&Tensor]) -> Result<()> {
    let (n, width) = x.rows();
    if width == 0 {
        shape_err!("{op} of {}: rows are empty", x.shape());
    }
    same(op, x, rows)?;
    widths.iter().try_for_each(|t| expect(op, "a gain or bias", t, &[width], x.dtype()))?;
    stats.iter().try_for_each(|t| expect(op, "a row statistic", t, &[n], x.dtype().accumulate()))
}

/// The sizes (B·L, H, D) and L of x, (B, L, H, D), for [`rope`](super::ModelKernels::rope).
pub(super) fn rope(x: &Tensor, y: &Tensor) -> Result<[usize; 4]> {
    same("rope", x, &[y])?;
    let &[batch, seq, heads, dim] = x.shape().dims() else {
        shape_err!("rope of {}: it takes (B, L, H, D)", x.shape());
    };
    if dim % 2 != 0 {
        shape_err!("rope: a head of width {dim}; the width must be even");
    }
    Ok([batch, seq, heads, dim])
}

/// Fails unless the tensors have the shapes and types of an attention of these sizes.
pub(super) fn attention(
    op: &str,
    s: AttentionShape,
    like_q: &[&Tensor],
    like_k: &[&Tensor],
    lse: &Tensor,
) -> Result<()> {
    if s.heads == 0 || s.kv_heads == 0 || !s.heads.is_multiple_of(s.kv_heads) || s.head_dim == 0 || s.seq == 0 {
        shape_err!("{op}: {s:?}: key heads divide query heads, and no size is 0");
    }
    let dtype = like_q[0].dtype();
    let (tokens, q, kv) = (s.batch * s.seq, s.heads * s.head_dim, s.kv_heads * s.head_dim);
    like_q.iter().try_for_each(|t| expect(op, "a query tensor", t, &[tokens, q], dtype))?;
    like_k.iter().try_for_each(|t| expect(op, "a key or value tensor", t, &[tokens, kv], dtype))?;
    expect(op, "lse", lse, &[s.batch, s.heads, s.seq], dtype.accumulate())
}

/// Fails if one of `outputs` shares memory with an input or with another output.
pub(super) fn all_apart(op: &str, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    for (n, out) in outputs.iter().enumerate() {
        inputs.iter().chain(&outputs[..n]).try_for_each(|t| apart(op, t, out))?;
    }
    Ok(())
}

/// Fails unless logits are (N, V), targets (N) and `per_row` one acc per row; returns V.
pub(super) fn targets(op: &str, logits: &Tensor, targets: &Tensor, per_row: &[&Tensor]) -> Result<usize> {
    let (n, vocab) = logits.rows();
    expect(op, "targets", targets, &[n], DType::I32)?;
    per_row.iter().try_for_each(|t| expect(op, "a loss or lse", t, &[n], logits.dtype().accumulate()))?;
    Ok(vocab)
}

/// Fails unless the tensors are those of an AdamW step.
pub(super) fn adamw(
    settings: AdamW,
    grad_scale: &Tensor,
    weight: &Tensor,
    m: &Tensor,
    v: &Tensor,
    grad: &Tensor,
) -> Result<()> {
    same("adamw", weight, &[m, v])?;
    expect("adamw", "grad_scale", grad_scale, &[1], weight.dtype())?;
    if grad.shape() != weight.shape() {
        shape_err!("adamw: a gradient of {} for a weight of {}", grad.shape(), weight.shape());
    }
    if settings.step == 0 {
        shape_err!("adamw: step 0: steps count from 1");
    }
    Ok(())
}
