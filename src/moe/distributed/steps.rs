//! What happens to a piece of rows at its experts' rank: hooks and experts, forward and backward.

use super::cut::Cut;
use super::journey::Steps;
use crate::device::Lane;
use crate::error::{Error, Result};
use crate::moe::layer::{hook_backward, hook_forward};
use crate::moe::{Expert, Hooks, Rows, Saved};
use crate::tensor::Tensor;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a piece leaves behind on its way, for the backward.
#[derive(Default)]
pub(super) struct Piece {
    after_dispatch: Option<Saved>,
    before_combine: Option<Saved>,
    computed: Option<Computed>,
    /// The gradient of the experts' output, and what their data gradient left.
    backward: Option<(Tensor, Saved)>,
}

struct Computed {
    rows: Rows,
    saved: Saved,
}

fn of(pieces: &[Mutex<Piece>], piece: usize) -> MutexGuard<'_, Piece> {
    pieces[piece].lock().unwrap_or_else(PoisonError::into_inner)
}

fn missing(piece: usize, what: &str) -> Error {
    Error::Config(format!("piece {piece} comes back without its {what}: a graph has a backward stage too early"))
}

/// Tokens.
pub(super) struct Forward<'a> {
    pub(super) expert: &'a dyn Expert,
    pub(super) hooks: &'a Hooks,
    pub(super) cut: &'a Cut,
    pub(super) pieces: &'a [Mutex<Piece>],
}

impl Steps for Forward<'_> {
    fn arrive(&self, lane: &Lane, piece: usize, rows: Tensor) -> Result<Tensor> {
        let (rows, saved) = hook_forward(&self.hooks.after_dispatch, lane, &rows)?;
        of(self.pieces, piece).after_dispatch = saved;
        Ok(rows)
    }

    fn compute(&self, lane: &Lane, piece: usize, rows: Tensor) -> Result<Tensor> {
        let rows = Rows { data: rows, split: self.cut.split(piece) };
        let (out, saved) = self.expert.forward(lane, &rows)?;
        of(self.pieces, piece).computed = Some(Computed { rows, saved });
        Ok(out)
    }

    fn finish(&self, _lane: &Lane, piece: usize) -> Result<()> {
        Err(missing(piece, "gradient"))
    }

    fn leave(&self, lane: &Lane, piece: usize, rows: Tensor) -> Result<Tensor> {
        let (rows, saved) = hook_forward(&self.hooks.before_combine, lane, &rows)?;
        of(self.pieces, piece).before_combine = saved;
        Ok(rows)
    }

    fn happens(&self) -> [bool; 2] {
        [self.hooks.after_dispatch.is_some(), self.hooks.before_combine.is_some()]
    }
}

/// Gradients: of what left, when they arrive.
pub(super) struct Backward<'a> {
    pub(super) expert: &'a dyn Expert,
    pub(super) hooks: &'a Hooks,
    pub(super) pieces: &'a [Mutex<Piece>],
}

impl Steps for Backward<'_> {
    fn arrive(&self, lane: &Lane, piece: usize, d: Tensor) -> Result<Tensor> {
        hook_backward(&self.hooks.before_combine, lane, &of(self.pieces, piece).before_combine, d)
    }

    fn compute(&self, lane: &Lane, piece: usize, d: Tensor) -> Result<Tensor> {
        let mut state = of(self.pieces, piece);
        let Computed { rows, saved } = state.computed.as_ref().ok_or_else(|| missing(piece, "rows"))?;
        let (d_rows, left) = self.expert.backward_data(lane, rows, saved, &d)?;
        state.backward = Some((d, left));
        Ok(d_rows)
    }

    fn finish(&self, lane: &Lane, piece: usize) -> Result<()> {
        let mut state = of(self.pieces, piece);
        // A piece without rows has no gradient.
        let Some((d, left)) = state.backward.take() else { return Ok(()) };
        let Computed { rows, saved } = state.computed.as_ref().ok_or_else(|| missing(piece, "rows"))?;
        self.expert.backward_weights(lane, rows, saved, &d, &left)
    }

    fn leave(&self, lane: &Lane, piece: usize, d: Tensor) -> Result<Tensor> {
        hook_backward(&self.hooks.after_dispatch, lane, &of(self.pieces, piece).after_dispatch, d)
    }

    fn happens(&self) -> [bool; 2] {
        [self.hooks.before_combine.is_some(), self.hooks.after_dispatch.is_some()]
    }
}
