//! The three matrix products of a linear map per expert, on evenly split and on ragged rows.
//!
//! Rows x: (R, K) and y: (R, N), weights w: (E, N, K), as Hugging Face has them: [out, in] for each expert.

use super::super::RowSplit;
use crate::device::Lane;
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;
use std::ops::Range;

/// Fails unless rows of shape `data` can go through `experts` experts of width `hidden`.
pub(super) fn check(data: &Tensor, split: &RowSplit, experts: usize, hidden: usize) -> Result<()> {
    let rows = if experts == 0 { 0 } else { split.range(experts - 1).end };
    if split.experts() != experts || data.shape().dims() != [rows, hidden] {
        shape_err!(
            "rows of shape {} split {split:?} for {experts} experts of width {hidden}: one range of rows per expert",
            data.shape()
        );
    }
    Ok(())
}

/// `y = x·wᵀ`.
pub(super) fn linear(lane: &Lane, split: &RowSplit, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let y = lane.empty([x.dim(0), w.dim(1)], x.dtype())?;
    for part in Part::all(split) {
        lane.gemm(1.0, &part.rows(x)?, &part.weight(w)?.t()?, 0.0, &part.rows(&y)?)?;
    }
    Ok(y)
}

/// `dx = dy·w + beta·dx`.
pub(super) fn linear_data(
    lane: &Lane,
    split: &RowSplit,
    dy: &Tensor,
    w: &Tensor,
    beta: f64,
    dx: &Tensor,
) -> Result<()> {
    for part in Part::all(split) {
        lane.gemm(1.0, &part.rows(dy)?, &part.weight(w)?, beta, &part.rows(dx)?)?;
    }
    Ok(())
}

/// `dw += dyᵀ·x`.
pub(super) fn linear_weight(lane: &Lane, split: &RowSplit, dy: &Tensor, x: &Tensor, dw: &Tensor) -> Result<()> {
    for part in Part::all(split) {
        lane.gemm(1.0, &part.rows(dy)?.t()?, &part.rows(x)?, 1.0, &part.weight(dw)?)?;
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
    /// Even rows in one batch; ragged ones expert by expert, those without rows left out.
    fn all(split: &RowSplit) -> Vec<Part> {
        match *split {
            RowSplit::Even { experts, each } => vec![Part::Batch { experts, each }],
            RowSplit::Ragged(_) => (0..split.experts())
                .map(|expert| Part::One { expert, rows: split.range(expert) })
                .filter(|part| !matches!(part, Part::One { rows, .. } if rows.is_empty()))
                .collect(),
        }
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
