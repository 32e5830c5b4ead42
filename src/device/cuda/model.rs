//! Norms, rotary positions and cross-entropy; attention is in a file of its own.

use super::args::Args;
use super::attention;
use super::backend::{Cuda, THREADS};
use crate::device::check::{self, apart, in_place, same};
use crate::device::{AttentionShape, ModelKernels, Rope};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Threads of a block of the norms at most (`most_threads` in `kernels/model/norm.cuh`).
const NORM_THREADS: usize = 512;
/// Vectors that a thread of the norms holds in registers: forward, and backward, where there are sums beside them.
const HELD: usize = 4;
const HELD_BACKWARD: usize = 2;
/// Single elements that it holds in the backward where rows are not aligned.
const HELD_SINGLE: usize = 8;
/// Rows that a block of the norms' backward sums at least: a row of sums is twice as wide as its row of data.
const ROWS_PER_BLOCK: usize = 32;

impl ModelKernels for Cuda {
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        eps: f64,
        y: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
    ) -> Result<()> {
        check::norm("layer_norm", x, &[y], &[gain, bias], &[mean, rstd])?;
        self.row_major("layer_norm", &[x, gain, bias, y, mean, rstd])?;
        check::all_apart("layer_norm", &[x, gain, bias], &[y, mean, rstd])?;
        let args = Args::new().tensor(x).tensor(gain).tensor(bias).tensor(y).tensor(mean).tensor(rstd);
        // SAFETY: the kernel's parameters; the shapes were checked, outputs share nothing with inputs.
        unsafe { self.norm_forward("layer_norm", x, eps, args) }
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        mean: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
        d_bias: &Tensor,
    ) -> Result<()> {
        let op = "layer_norm_backward";
        check::norm(op, x, &[dy, dx], &[gain, d_gain, d_bias], &[mean, rstd])?;
        self.row_major(op, &[x, gain, mean, rstd, dy, dx, d_gain, d_bias])?;
        check::all_apart(op, &[x, gain, mean, rstd, dy], &[dx, d_gain, d_bias])?;
        let args = Args::new().tensor(x).tensor(gain).tensor(mean).tensor(rstd).tensor(dy).tensor(dx);
        let rows = [x, dy, dx, gain];
        // SAFETY: the kernel's parameters; the shapes were checked, outputs share nothing with inputs.
        unsafe { self.norm_backward("layer_norm", &rows, args, &[d_gain, d_bias]) }
    }

    fn rms_norm(&self, x: &Tensor, gain: &Tensor, eps: f64, y: &Tensor, rstd: &Tensor) -> Result<()> {
        check::norm("rms_norm", x, &[y], &[gain], &[rstd])?;
        self.row_major("rms_norm", &[x, gain, y, rstd])?;
        check::all_apart("rms_norm", &[x, gain], &[y, rstd])?;
        let args = Args::new().tensor(x).tensor(gain).tensor(y).tensor(rstd);
        // SAFETY: the kernel's parameters; the shapes were checked, outputs share nothing with inputs.
        unsafe { self.norm_forward("rms_norm", x, eps, args) }
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        d_gain: &Tensor,
    ) -> Result<()> {
        let op = "rms_norm_backward";
        check::norm(op, x, &[dy, dx], &[gain, d_gain], &[rstd])?;
        self.row_major(op, &[x, gain, rstd, dy, dx, d_gain])?;
        check::all_apart(op, &[x, gain, rstd, dy], &[dx, d_gain])?;
        let args = Args::new().tensor(x).tensor(gain).tensor(rstd).tensor(dy).tensor(dx);
        // SAFETY: the kernel's parameters; the shapes were checked, outputs share nothing with inputs.
        unsafe { self.norm_backward("rms_norm", &[x, dy, dx, gain], args, &[d_gain]) }
    }

    fn rope(&self, x: &Tensor, rope: Rope, inverse: bool, y: &Tensor) -> Result<()> {
        let [batch, seq, heads, dim] = check::rope(x, y)?;
        self.row_major("rope", &[x, y])?;
        in_place("rope", x, y)?;
        let name = format!("rope_rotate_{}", self.suffix("rope", x)?);
        if x.elements() == 0 {
            return Ok(());
        }
        let width = 16 / x.dtype().size();
        let vector = (dim / 2).is_multiple_of(width) && aligned(&[x, y], dim);
        let items = batch * seq * heads.div_ceil(8) * (dim / 2 / if vector { width } else { 1 });
        let args = Args::new()
            .tensor(x)
            .tensor(y)
            .size(batch * seq)
            .int(int("rope", "L", seq)?)
            .int(int("rope", "H", heads)?)
            .int(int("rope", "D", dim)?)
            .int(int("rope", "the first position", rope.first)?)
            .bits(rope.theta.log2().to_bits())
            .float(if inverse { -1.0 } else { 1.0 });
        // SAFETY: the kernel's parameters; x and y hold (B, L, H, D), and are one or apart.
        unsafe { self.launch(&name, self.blocks(items), THREADS, 0, args, || format!("{x:?}")) }
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
    ) -> Result<()> {
        attention::forward(self, shape, [q, k, v], out, lse)
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        d_out: &Tensor,
        dq: &Tensor,
        dk: &Tensor,
        dv: &Tensor,
    ) -> Result<()> {
        attention::backward(self, shape, [q, k, v, out, d_out], lse, [dq, dk, dv])
    }

    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, loss: &Tensor, lse: &Tensor) -> Result<()> {
        let op = "cross_entropy";
        let cols = int(op, "V", check::targets(op, logits, targets, &[loss, lse])?)?;
        self.row_major(op, &[logits, targets, loss, lse])?;
        check::all_apart(op, &[logits, targets], &[loss, lse])?;
        let name = format!("cross_entropy_forward_{}", self.suffix(op, logits)?);
        let rows = logits.rows().0;
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let team = if cols > 2048 { THREADS } else { 32 };
        let blocks = self.blocks(rows * team as usize);
        let args = Args::new().tensor(logits).tensor(targets).tensor(loss).tensor(lse);
        let args = args.size(rows).int(cols).int(team as i32);
        // SAFETY: the kernel's parameters; the shapes were checked, outputs share nothing with inputs; the kernel reads no
        // logit of a target outside 0..V.
        unsafe { self.launch(&name, blocks, THREADS, 0, args, || format!("{logits:?}")) }
    }

    fn cross_entropy_backward(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        lse: &Tensor,
        d_loss: &Tensor,
        d_logits: &Tensor,
    ) -> Result<()> {
        let op = "cross_entropy_backward";
        let cols = int(op, "V", check::targets(op, logits, targets, &[lse, d_loss])?)?;
        same(op, logits, &[d_logits])?;
        self.row_major(op, &[logits, targets, lse, d_loss, d_logits])?;
        in_place(op, logits, d_logits)?;
        [targets, lse, d_loss].into_iter().try_for_each(|t| apart(op, t, d_logits))?;
        let name = format!("cross_entropy_backward_{}", self.suffix(op, logits)?);
        let rows = logits.rows().0;
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        // Two vectors a thread or more, and of few long rows several blocks each.
        let vectors = (cols as usize).div_ceil(16 / logits.dtype().size());
        let threads = (vectors / 2).next_multiple_of(32).clamp(32, THREADS as usize);
        let all = self.blocks(usize::MAX) as usize;
        let parts = (all / rows).clamp(1, vectors.div_ceil(2 * threads));
        let grid = (rows.min(all * 2) as u32, parts as u32);
        let args = Args::new().tensor(logits).tensor(targets).tensor(lse).tensor(d_loss).tensor(d_logits);
        let args = args.size(rows).int(cols);
        // SAFETY: the kernel's parameters; the shapes were checked, and d_logits is logits or shares nothing with inputs.
        unsafe { self.launch(&name, grid, threads as u32, 0, args, || format!("{logits:?}")) }
    }
}

impl Cuda {
    /// Launches a norm's forward: `args` up to its sizes.
    ///
    /// # Safety
    /// As [`Cuda::launch`].
    unsafe fn norm_forward(&self, op: &str, x: &Tensor, eps: f64, args: Args) -> Result<()> {
        let name = format!("{op}_forward_{}", self.suffix(op, x)?);
        let (rows, width) = x.rows();
        let cols = int(op, "M", width)?;
        if rows == 0 {
            return Ok(());
        }
        let team = team(width.div_ceil(16 / x.dtype().size()), HELD);
        let teams = (THREADS as usize / team).max(1);
        let blocks = rows.div_ceil(teams).min(self.blocks(usize::MAX) as usize) as u32;
        let args = args.size(rows).int(cols).float(eps).int(team as i32);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&name, blocks, (team * teams) as u32, 0, args, || format!("{x:?}")) }
    }

    /// Launches a norm's backward: `args` up to dx. `aligned_rows` are the tensors that the kernel would move in vectors,
    /// x first; `sums` what the gradients of gain, and of bias if there is one, are added to.
    ///
    /// # Safety
    /// As [`Cuda::launch`].
    unsafe fn norm_backward(&self, op: &str, aligned_rows: &[&Tensor], args: Args, sums: &[&Tensor]) -> Result<()> {
        let x = aligned_rows[0];
        let suffix = self.suffix(op, x)?;
        let (rows, width) = x.rows();
        let cols = int(op, "M", width)?;
        if rows == 0 {
            return Ok(());
        }
        let vector = aligned(aligned_rows, width);
        let team = match vector {
            true => team(width.div_ceil(16 / x.dtype().size()), HELD_BACKWARD),
            false => team(width, HELD_SINGLE),
        };
        // A team that cannot hold its row has 512 threads, and the block to itself.
        let teams = (THREADS as usize / team).max(1);
        let most = self.blocks(usize::MAX) as usize;
        let blocks = rows.div_ceil(ROWS_PER_BLOCK.max(teams)).max(rows.div_ceil(teams).min(most / 4)).min(most);
        let partial = self.allocate([blocks, sums.len() * width].into(), DType::F32)?;
        let shared = if teams > 1 { sums.len() * width * size_of::<f32>() } else { 0 };
        let args = args.tensor(&partial).size(rows).int(cols).int(team as i32);
        let name = format!("{op}_backward_{suffix}");
        // SAFETY: the caller's promise; partial has a row of sums per block.
        unsafe { self.launch(&name, blocks as u32, (team * teams) as u32, shared, args, || format!("{x:?}"))? };
        let args =
            sums.iter().fold(Args::new().tensor(&partial).int(blocks as i32).int(cols), |args, t| args.tensor(t));
        let (name, grid) = (format!("{op}_gains_{suffix}"), (sums.len() * width).div_ceil(32) as u32);
        // SAFETY: the kernel's parameters; partial is as large as said, and each sum holds M elements.
        unsafe { self.launch(&name, grid, THREADS, 0, args, || format!("{partial:?}")) }
    }
}

/// Threads for a row of `pieces`, `held` of which a thread can hold: a power of two from a warp on.
fn team(pieces: usize, held: usize) -> usize {
    pieces.div_ceil(held).next_power_of_two().clamp(32, NORM_THREADS)
}

/// Whether rows of `width` elements begin on 16-byte boundaries in all of the tensors: what the kernels ask as well.
fn aligned(tensors: &[&Tensor], width: usize) -> bool {
    tensors.iter().all(|t| (t.ptr() as usize).is_multiple_of(16) && (width * t.dtype().size()).is_multiple_of(16))
}

/// A size that the kernels take in 32 bits.
pub(super) fn int(op: &str, what: &str, size: usize) -> Result<i32> {
    match i32::try_from(size) {
        Ok(size) => Ok(size),
        Err(_) => shape_err!("{op}: {what} is {size}: on a GPU it is at most {}", i32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_holds_its_row_or_has_the_block() {
        for held in [HELD, HELD_BACKWARD, HELD_SINGLE] {
            for pieces in 1..20_000 {
                let team = team(pieces, held);
                assert!(team * held >= pieces || team == NORM_THREADS, "{pieces} pieces, {team} threads");
                assert!(team.is_multiple_of(32) && (team > 256 || 256 % team == 0));
            }
        }
    }
}
