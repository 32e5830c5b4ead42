//! The matrix products of all experts at once, with what touches the same rows.

use super::{ExpertKernels, Gelu, MathKernels, MemoryKernels};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};
use std::ops::Range;

/// How rows of one buffer are divided among experts, expert by expert.
#[derive(Clone, Copy, Debug)]
pub enum Segments<'a> {
    /// As many for every expert.
    Even {
        /// E.
        experts: usize,
        /// Rows of each.
        each: usize,
    },
    /// Expert e's rows are `offsets[e]..offsets[e + 1]`; E + 1 entries.
    Host(&'a [usize]),
    /// As `Host`, on the device, where nobody waits for them. Every segment is a multiple of [`GroupedKernels::row_block`]
    /// rows, of which those that no token has are the last, and zero; rows from `offsets[E]` on hold nothing and are
    /// neither read nor written.
    Device {
        /// (E + 1) i32.
        offsets: &'a Tensor,
        /// (E) i32: how many of an expert's rows a token has, where that is known: a backend may leave out the others.
        counts: Option<&'a Tensor>,
    },
}

impl Segments<'_> {
    /// E.
    pub fn experts(&self) -> usize {
        match self {
            Segments::Even { experts, .. } => *experts,
            Segments::Host(offsets) => offsets.len().saturating_sub(1),
            Segments::Device { offsets, .. } => offsets.elements().saturating_sub(1),
        }
    }
}

/// The combine weights of rows, and their gradient.
#[derive(Clone, Copy, Debug)]
pub struct RowWeights<'a> {
    /// (R) acc; 0 for rows that no token has.
    pub weights: &'a Tensor,
    /// (R) acc, written.
    pub d_weights: &'a Tensor,
}

/// The matrix products of all experts at once, with what touches the same rows.
///
/// Rows are x: (R, K), weights w: (E, N, K), as Hugging Face has them: \[out, in\] for each expert. The methods' own bodies
/// are the specification: products expert by expert, then the activation. A backend overrides them to fuse.
///
/// The backward of an FFN's inner part takes the gradient of the *unweighted* output, dy, and, where the output was
/// multiplied by a weight per row (the combine of an MoE layer), these weights: with a the activation's output and
/// g = dy·w its gradient before weights, the weights' gradient is `d_weights[r] = g[r]·a[r]`, so the experts' output need
/// not be kept; and with `act[r] = weights[r]·a[r]`, written for it, w's gradient is dyᵀ·act (as SonicMoE does,
/// Guo et al. 2025).
pub trait GroupedKernels: MemoryKernels + MathKernels + ExpertKernels {
    /// The number of rows that segments are padded to for products by [`Segments::Device`], where this backend has fast
    /// ones for `dtype`, model width `m` and inner width `h`; none: it has no use for such segments.
    fn row_block(&self, _dtype: DType, _m: usize, _h: usize) -> Option<usize> {
        None
    }

    /// `y = x·wᵀ` for every expert's rows. x: (R, K), w: (E, N, K), y: (R, N).
    fn grouped_linear(&self, segments: Segments<'_>, x: &Tensor, w: &Tensor, y: &Tensor) -> Result<()> {
        compose::linear(self, segments, x, w, y)
    }

    /// `dx = Σ dy·w` over the pairs (dy, w), one to two. dy: (R, N), w: (E, N, K), dx: (R, K).
    fn grouped_linear_data(&self, segments: Segments<'_>, pairs: &[(&Tensor, &Tensor)], dx: &Tensor) -> Result<()> {
        compose::linear_data(self, segments, pairs, dx)
    }

    /// `dw = dyᵀ·x + beta·dw` for each (dy, dw, beta), one to two; an expert without rows gets `beta·dw`. dy: (R, N),
    /// x: (R, K), dw: (E, N, K).
    fn grouped_linear_weight(
        &self,
        segments: Segments<'_>,
        pairs: &[(&Tensor, &Tensor, f64)],
        x: &Tensor,
    ) -> Result<()> {
        compose::linear_weight(self, segments, pairs, x)
    }

    /// `pre = x·wᵀ`, `act = gelu(pre)`. x: (R, M), w: (E, H, M), pre, act: (R, H).
    fn grouped_gelu(
        &self,
        form: Gelu,
        segments: Segments<'_>,
        x: &Tensor,
        w: &Tensor,
        pre: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        compose::gelu(self, form, segments, x, w, pre, act)
    }

    /// `gate = x·w_gateᵀ`, `up = x·w_upᵀ`, `act = silu(gate)·up`. x: (R, M), both w: (E, H, M), the rest (R, H).
    fn grouped_swiglu(
        &self,
        segments: Segments<'_>,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        compose::swiglu(self, segments, x, w_gate, w_up, gate, up, act)
    }

    /// The backward of `gelu` between two products: `d_pre = weights·(dy·w)·gelu'(pre)` and `act = weights·gelu(pre)`,
    /// weights all one where there are none. dy: (R, M), w: (E, M, H), pre, d_pre, act: (R, H).
    fn grouped_gelu_backward(
        &self,
        form: Gelu,
        segments: Segments<'_>,
        dy: &Tensor,
        w: &Tensor,
        pre: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_pre: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        compose::gelu_backward(self, form, segments, dy, w, pre, weights, d_pre, act)
    }

    /// The backward of SwiGLU between the products: the gradients of gate and up, and `act = weights·silu(gate)·up`, as
    /// in [`GroupedKernels::grouped_gelu_backward`]. dy: (R, M), w: (E, M, H), the rest (R, H).
    fn grouped_swiglu_backward(
        &self,
        segments: Segments<'_>,
        dy: &Tensor,
        w: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_gate: &Tensor,
        d_up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        compose::swiglu_backward(self, segments, dy, w, gate, up, weights, d_gate, d_up, act)
    }
}

/// The grouped operations out of single ones: the specification, and what a backend falls back to.
pub(in crate::device) mod compose {
    use super::*;

    pub(in crate::device) fn linear<K: GroupedKernels + ?Sized>(
        k: &K,
        segments: Segments<'_>,
        x: &Tensor,
        w: &Tensor,
        y: &Tensor,
    ) -> Result<()> {
        check("grouped_linear", segments, &[x, y], w)?;
        for part in Part::all(k, segments)? {
            k.gemm(1.0, &part.rows(x)?, &part.weight(w)?.t()?, 0.0, &part.rows(y)?)?;
        }
        Ok(())
    }

    pub(in crate::device) fn linear_data<K: GroupedKernels + ?Sized>(
        k: &K,
        segments: Segments<'_>,
        pairs: &[(&Tensor, &Tensor)],
        dx: &Tensor,
    ) -> Result<()> {
        for (n, (dy, w)) in pairs.iter().enumerate() {
            check("grouped_linear_data", segments, &[dx, dy], w)?;
            for part in Part::all(k, segments)? {
                let beta = if n == 0 { 0.0 } else { 1.0 };
                k.gemm(1.0, &part.rows(dy)?, &part.weight(w)?, beta, &part.rows(dx)?)?;
            }
        }
        Ok(())
    }

    pub(in crate::device) fn linear_weight<K: GroupedKernels + ?Sized>(
        k: &K,
        segments: Segments<'_>,
        pairs: &[(&Tensor, &Tensor, f64)],
        x: &Tensor,
    ) -> Result<()> {
        for (dy, dw, beta) in pairs {
            check("grouped_linear_weight", segments, &[x, dy], dw)?;
            for part in Part::every(k, segments)? {
                // Of no rows the product is zero: a GEMM with an inner dimension of 0 leaves beta·dw.
                k.gemm(1.0, &part.rows(dy)?.t()?, &part.rows(x)?, *beta, &part.weight(dw)?)?;
            }
        }
        Ok(())
    }

    pub(in crate::device) fn gelu<K: GroupedKernels + ?Sized>(
        k: &K,
        form: Gelu,
        segments: Segments<'_>,
        x: &Tensor,
        w: &Tensor,
        pre: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        k.grouped_linear(segments, x, w, pre)?;
        k.gelu(form, pre, act)
    }

    pub(in crate::device) fn swiglu<K: GroupedKernels + ?Sized>(
        k: &K,
        segments: Segments<'_>,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        k.grouped_linear(segments, x, w_gate, gate)?;
        k.grouped_linear(segments, x, w_up, up)?;
        k.swiglu(gate, up, act)
    }

    pub(in crate::device) fn gelu_backward<K: GroupedKernels + ?Sized>(
        k: &K,
        form: Gelu,
        segments: Segments<'_>,
        dy: &Tensor,
        w: &Tensor,
        pre: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_pre: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        let d_act = k.alloc(*pre.shape(), pre.dtype())?;
        k.grouped_linear_data(segments, &[(dy, w)], &d_act)?;
        k.gelu_backward_weighted(form, pre, &d_act, weights, d_pre, act)
    }

    pub(in crate::device) fn swiglu_backward<K: GroupedKernels + ?Sized>(
        k: &K,
        segments: Segments<'_>,
        dy: &Tensor,
        w: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_gate: &Tensor,
        d_up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        let d_act = k.alloc(*gate.shape(), gate.dtype())?;
        k.grouped_linear_data(segments, &[(dy, w)], &d_act)?;
        k.swiglu_backward_weighted(gate, up, &d_act, weights, d_gate, d_up, act)
    }

    /// Fails unless the rows (R, K) and (R, N) go with weights (E, N, K).
    pub(in crate::device) fn check(op: &str, segments: Segments<'_>, [x, y]: &[&Tensor; 2], w: &Tensor) -> Result<()> {
        let rows = match segments {
            Segments::Even { experts, each } => Some(experts * each),
            Segments::Host(offsets) => offsets.last().copied(),
            Segments::Device { .. } => None,
        };
        let fits = w.rank() == 3
            && x.rank() == 2
            && y.rank() == 2
            && x.dim(0) == y.dim(0)
            && rows.is_none_or(|rows| rows == x.dim(0))
            && w.shape().dims() == [segments.experts(), y.dim(1), x.dim(1)];
        if !fits {
            shape_err!(
                "{op} of rows {} and {} with weights {} and rows split {segments:?}: it takes (R, K) and (R, N), R all \
                 experts' rows, with (E, N, K)",
                x.shape(),
                y.shape(),
                w.shape()
            );
        }
        Ok(())
    }

    /// What one call of a matrix product covers.
    enum Part {
        /// All experts, as a batch.
        Batch { experts: usize, each: usize },
        /// One expert and its rows.
        One { expert: usize, rows: Range<usize> },
    }

    impl Part {
        /// Even rows in one batch; others expert by expert.
        fn every<K: GroupedKernels + ?Sized>(k: &K, segments: Segments<'_>) -> Result<Vec<Part>> {
            let each = |offsets: &[usize]| {
                offsets.windows(2).enumerate().map(|(expert, w)| Part::One { expert, rows: w[0]..w[1] }).collect()
            };
            Ok(match segments {
                Segments::Even { experts, each } => vec![Part::Batch { experts, each }],
                Segments::Host(offsets) => each(offsets),
                Segments::Device { offsets, .. } => {
                    let host = Tensor::host(*offsets.shape(), DType::I32);
                    k.download(offsets, &host)?;
                    each(&host.to_vec::<i32>()?.into_iter().map(|o| o as usize).collect::<Vec<_>>())
                }
            })
        }

        /// As `every`, without the experts that have no rows.
        fn all<K: GroupedKernels + ?Sized>(k: &K, segments: Segments<'_>) -> Result<Vec<Part>> {
            let mut parts = Self::every(k, segments)?;
            parts.retain(|part| !matches!(part, Part::One { rows, .. } if rows.is_empty()));
            Ok(parts)
        }

        /// This part of t: (R, N).
        fn rows(&self, t: &Tensor) -> Result<Tensor> {
            match self {
                Part::Batch { experts, each } => t.reshape([*experts, *each, t.dim(1)]),
                Part::One { rows, .. } => t.narrow(0, rows.start, rows.len()),
            }
        }

        /// This part of w: (E, N, K).
        fn weight(&self, w: &Tensor) -> Result<Tensor> {
            match self {
                Part::Batch { .. } => Ok(w.clone()),
                Part::One { expert, .. } => w.index(*expert),
            }
        }
    }
}
