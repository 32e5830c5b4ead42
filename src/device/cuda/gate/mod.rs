//! What gates are made of: selection, slot assignment, losses (`kernels/gate/`).

mod choose;
mod expert_choice;
mod slots;

use super::args::Args;
use super::backend::{Cuda, THREADS};
use crate::device::check::{expect, matrix};
use crate::device::{ChoiceRule, Chosen, ChosenGrad, ExpertGroups, GateKernels, MemoryKernels};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};
use slots::{Losses, Tiling};

/// The widest row that a warp holds in registers.
const MAX_EXPERTS: usize = 1024;
/// Choices per token that a warp has lanes for.
const MAX_CHOICES: usize = 32;

impl GateKernels for Cuda {
    fn top_k(
        &self,
        scores: &Tensor,
        bias: Option<&Tensor>,
        groups: Option<ExpertGroups>,
        experts: &Tensor,
    ) -> Result<()> {
        const OP: &str = "top_k";
        let (tokens, num_experts) = matrix(OP, "scores", scores)?;
        let (_, k) = matrix(OP, "experts", experts)?;
        expect(OP, "scores", scores, &[tokens, num_experts], DType::F32)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        bias.map_or(Ok(()), |bias| expect(OP, "bias", bias, &[num_experts], DType::F32))?;
        self.row_major(OP, &[scores, experts])?;
        self.row_major(OP, bias.as_slice())?;
        let choice = Selection::new(OP, num_experts, k, groups)?;
        if tokens == 0 {
            return Ok(());
        }
        let warps = THREADS as usize / 32;
        let shared = if choice.kept < choice.groups { warps * num_experts * 4 } else { 0 };
        let args = Args::new()
            .tensor(scores)
            .optional(bias)
            .tensor(experts)
            .size(tokens)
            .int(num_experts as i32)
            .int(k as i32)
            .int(choice.groups as i32)
            .int(choice.kept as i32);
        let name = format!("top_k_v{}", choice.values);
        // SAFETY: the kernel's parameters; the shapes are checked, and a warp has its row of shared memory.
        unsafe {
            self.launch(&name, self.blocks(tokens * 32), THREADS, shared, args, || format!("{scores:?}, k = {k}"))
        }
    }

    fn gather_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "gather_cols";
        let (tokens, width) = matrix(OP, "x", x)?;
        let (_, k) = matrix(OP, "index", index)?;
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "out", out, &[tokens, k], x.dtype())?;
        self.row_major(OP, &[x, index, out])?;
        let name = format!("cols_gather_{}", self.suffix(OP, x)?);
        let args = Args::new().tensor(x).tensor(index).size(tokens).int(k as i32).size(width).tensor(out);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise(&name, tokens * k, args) }
    }

    fn scatter_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "scatter_cols";
        let (tokens, k) = matrix(OP, "x", x)?;
        let (_, width) = matrix(OP, "out", out)?;
        expect(OP, "index", index, &[tokens, k], DType::I32)?;
        expect(OP, "out", out, &[tokens, width], out.dtype())?;
        self.row_major(OP, &[x, index, out])?;
        let name = format!("cols_scatter_{}_{}", self.suffix(OP, x)?, self.suffix(OP, out)?);
        let args = Args::new().tensor(x).tensor(index).size(tokens).int(k as i32).size(width).tensor(out);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise(&name, tokens * k, args) }
    }

    fn count_experts(&self, experts: &Tensor, loads: &Tensor) -> Result<()> {
        const OP: &str = "count_experts";
        let (tokens, k) = matrix(OP, "experts", experts)?;
        let (groups, num_experts) = matrix(OP, "loads", loads)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "loads", loads, &[groups, num_experts], DType::I32)?;
        self.row_major(OP, &[experts, loads])?;
        if num_experts == 0 {
            return Ok(());
        }
        if k == 0 {
            return self.fill(loads, 0.0);
        }
        // Which choice it is does not matter: as many tokens of one choice.
        let tiling = Tiling::new(group_size(OP, tokens, groups)? * k, groups);
        let counts = self.count_choices(OP, experts, None, num_experts, 1, tiling)?;
        self.scan_counts(&counts, 1, num_experts, tiling, loads, None)
    }

    fn assign_slots(
        &self,
        experts: &Tensor,
        priority: Option<&Tensor>,
        num_experts: usize,
        groups: usize,
        capacity: usize,
        slots: &Tensor,
    ) -> Result<()> {
        const OP: &str = "assign_slots";
        let (tokens, k) = matrix(OP, "experts", experts)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "slots", slots, &[tokens, k], DType::I32)?;
        priority.map_or(Ok(()), |t| expect(OP, "priority", t, &[tokens], DType::F32))?;
        self.row_major(OP, &[experts, slots])?;
        self.row_major(OP, priority.as_slice())?;
        let tiling = Tiling::new(group_size(OP, tokens, groups)?, groups);
        let order = priority.map(|priority| self.sort_descending(priority, groups)).transpose()?;
        self.slots_in_order(OP, experts, order.as_ref(), num_experts, tiling, capacity, slots)
    }

    fn expert_choice(
        &self,
        probs: &Tensor,
        groups: usize,
        capacity: usize,
        tokens: &Tensor,
        weights: &Tensor,
    ) -> Result<()> {
        self.choose_tokens(probs, groups, capacity, tokens, weights)
    }

    fn expert_choice_backward(&self, tokens: &Tensor, d_weights: &Tensor, d_probs: &Tensor) -> Result<()> {
        self.choose_tokens_backward(tokens, d_weights, d_probs)
    }

    fn balance_loss(
        &self,
        probs: &Tensor,
        experts: &Tensor,
        first_only: bool,
        loss: &Tensor,
        fraction: &Tensor,
    ) -> Result<()> {
        const OP: &str = "balance_loss";
        let (tokens, num_experts) = matrix(OP, "probs", probs)?;
        let (_, k) = matrix(OP, "experts", experts)?;
        expect(OP, "probs", probs, &[tokens, num_experts], DType::F32)?;
        expect(OP, "experts", experts, &[tokens, k], DType::I32)?;
        expect(OP, "loss", loss, &[1], DType::F32)?;
        expect(OP, "fraction", fraction, &[num_experts], DType::F32)?;
        self.row_major(OP, &[probs, experts, loss, fraction])?;
        if k == 0 || num_experts == 0 {
            shape_err!("{OP}: {k} choices of {num_experts} experts: at least one of each");
        }
        let tiling = Tiling::new(group_size(OP, tokens, 1)?, 1);
        let losses = Losses::new(self, tiling, num_experts, first_only, loss, fraction, None)?;
        let args = Args::new()
            .tensor(probs)
            .size(tokens)
            .int(num_experts as i32)
            .int(tiling.tile as i32)
            .tensor(&losses.columns)
            .tensor(&losses.ticket);
        // SAFETY: the kernel's parameters; columns has a row per tile.
        unsafe { self.launch("losses_columns", tiling.blocks(), 256, 0, args, || format!("{probs:?}"))? };
        let counts = self.count_choices(OP, experts, None, num_experts, k, tiling)?;
        let loads = self.allocate([1, num_experts].into(), DType::I32)?;
        self.scan_counts(&counts, k, num_experts, tiling, &loads, Some(&losses))
    }

    fn balance_loss_backward(&self, fraction: &Tensor, d_loss: &Tensor, d_probs: &Tensor) -> Result<()> {
        const OP: &str = "balance_loss_backward";
        let (tokens, num_experts) = matrix(OP, "d_probs", d_probs)?;
        expect(OP, "d_probs", d_probs, &[tokens, num_experts], DType::F32)?;
        expect(OP, "fraction", fraction, &[num_experts], DType::F32)?;
        expect(OP, "d_loss", d_loss, &[1], DType::F32)?;
        self.row_major(OP, &[fraction, d_loss, d_probs])?;
        let args = Args::new().tensor(fraction).tensor(d_loss).size(tokens).int(num_experts as i32).tensor(d_probs);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise("losses_balance_backward", tokens * num_experts, args) }
    }

    fn z_loss(&self, logits: &Tensor, lse: &Tensor, loss: &Tensor) -> Result<()> {
        const OP: &str = "z_loss";
        let (tokens, num_experts) = matrix(OP, "logits", logits)?;
        expect(OP, "logits", logits, &[tokens, num_experts], DType::F32)?;
        expect(OP, "lse", lse, &[tokens], DType::F32)?;
        expect(OP, "loss", loss, &[1], DType::F32)?;
        self.row_major(OP, &[logits, lse, loss])?;
        self.mean_of_rows(OP, "losses_z", logits, Some(lse), loss)
    }

    fn z_loss_backward(&self, logits: &Tensor, lse: &Tensor, d_loss: &Tensor, d_logits: &Tensor) -> Result<()> {
        const OP: &str = "z_loss_backward";
        let (tokens, num_experts) = matrix(OP, "logits", logits)?;
        expect(OP, "logits", logits, &[tokens, num_experts], DType::F32)?;
        expect(OP, "lse", lse, &[tokens], DType::F32)?;
        expect(OP, "d_loss", d_loss, &[1], DType::F32)?;
        expect(OP, "d_logits", d_logits, &[tokens, num_experts], DType::F32)?;
        self.row_major(OP, &[logits, lse, d_loss, d_logits])?;
        let args =
            Args::new().tensor(logits).tensor(lse).tensor(d_loss).size(tokens).int(num_experts as i32).tensor(d_logits);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise("losses_z_backward", tokens * num_experts, args) }
    }

    fn mean_entropy(&self, probs: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "mean_entropy";
        let (tokens, num_experts) = matrix(OP, "probs", probs)?;
        expect(OP, "probs", probs, &[tokens, num_experts], DType::F32)?;
        expect(OP, "out", out, &[1], DType::F32)?;
        self.row_major(OP, &[probs, out])?;
        self.mean_of_rows(OP, "losses_entropy", probs, None, out)
    }

    fn add_gate_noise(&self, clean: &Tensor, raw: &Tensor, noise: &Tensor, out: &Tensor) -> Result<()> {
        const OP: &str = "add_gate_noise";
        let (tokens, num_experts) = matrix(OP, "clean", clean)?;
        for (what, t) in [("clean", clean), ("raw", raw), ("noise", noise), ("out", out)] {
            expect(OP, what, t, &[tokens, num_experts], DType::F32)?;
        }
        self.row_major(OP, &[clean, raw, noise, out])?;
        let n = clean.elements();
        let args = Args::new().tensor(clean).tensor(raw).tensor(noise).size(n).tensor(out);
        // SAFETY: the kernel's parameters, of one shape; it allows out to be clean.
        unsafe { self.elementwise("noise_forward", n, args) }
    }

    fn add_gate_noise_backward(&self, raw: &Tensor, noise: &Tensor, d_out: &Tensor, d_raw: &Tensor) -> Result<()> {
        const OP: &str = "add_gate_noise_backward";
        let (tokens, num_experts) = matrix(OP, "raw", raw)?;
        for (what, t) in [("raw", raw), ("noise", noise), ("d_out", d_out), ("d_raw", d_raw)] {
            expect(OP, what, t, &[tokens, num_experts], DType::F32)?;
        }
        self.row_major(OP, &[raw, noise, d_out, d_raw])?;
        let n = raw.elements();
        let args = Args::new().tensor(raw).tensor(noise).tensor(d_out).size(n).tensor(d_raw);
        // SAFETY: the kernel's parameters, of one shape.
        unsafe { self.elementwise("noise_backward", n, args) }
    }

    fn update_bias(&self, bias: &Tensor, loads: &Tensor, gamma: f64) -> Result<()> {
        const OP: &str = "update_bias";
        let (groups, num_experts) = matrix(OP, "loads", loads)?;
        expect(OP, "loads", loads, &[groups, num_experts], DType::I32)?;
        expect(OP, "bias", bias, &[num_experts], DType::F32)?;
        self.row_major(OP, &[bias, loads])?;
        if num_experts == 0 {
            return Ok(());
        }
        let args = Args::new().tensor(bias).tensor(loads).size(groups).size(num_experts).float(gamma);
        // SAFETY: the kernel's parameters, of checked shapes; one block, as it asks.
        unsafe { self.launch("bias_update", 1, 1024, 0, args, || format!("{loads:?}")) }
    }

    fn clamped_exp(&self, x: &Tensor, max: f64, y: &Tensor) -> Result<()> {
        const OP: &str = "clamped_exp";
        expect(OP, "x", x, x.shape(), DType::F32)?;
        expect(OP, "y", y, x.shape(), DType::F32)?;
        self.row_major(OP, &[x, y])?;
        let args = Args::new().tensor(x).float(max).size(x.elements()).tensor(y);
        // SAFETY: the kernel's parameters, of one shape.
        unsafe { self.elementwise("noise_scale", x.elements(), args) }
    }

    fn clamped_exp_backward(&self, y: &Tensor, max: f64, dy: &Tensor, dx: &Tensor) -> Result<()> {
        const OP: &str = "clamped_exp_backward";
        expect(OP, "y", y, y.shape(), DType::F32)?;
        expect(OP, "dy", dy, y.shape(), DType::F32)?;
        expect(OP, "dx", dx, y.shape(), DType::F32)?;
        self.row_major(OP, &[y, dy, dx])?;
        let args = Args::new().tensor(y).float(max).tensor(dy).size(y.elements()).tensor(dx);
        // SAFETY: the kernel's parameters, of one shape.
        unsafe { self.elementwise("noise_scale_backward", y.elements(), args) }
    }

    fn choose_experts(
        &self,
        rule: &ChoiceRule,
        logits: &Tensor,
        bias: Option<&Tensor>,
        out: &Chosen<'_>,
    ) -> Result<()> {
        self.choose(rule, logits, bias, out)
    }

    fn choose_experts_backward(
        &self,
        rule: &ChoiceRule,
        logits: &Tensor,
        given: &ChosenGrad<'_>,
        d_logits: &Tensor,
    ) -> Result<()> {
        self.choose_backward(rule, logits, given, d_logits)
    }
}

/// A selection's sizes, checked.
struct Selection {
    /// Values of a row that a lane holds: the number in the kernels' names.
    values: usize,
    groups: usize,
    kept: usize,
}

impl Selection {
    fn new(op: &str, experts: usize, k: usize, groups: Option<ExpertGroups>) -> Result<Self> {
        let ExpertGroups { groups, kept } = groups.unwrap_or(ExpertGroups { groups: 1, kept: 1 });
        if groups == 0 || !experts.is_multiple_of(groups) || kept == 0 || kept > groups {
            shape_err!("{op}: {kept} of {groups} groups of {experts} experts: groups are equal, 1 to all are kept");
        }
        let usable = kept * (experts / groups);
        if k == 0 || k > usable {
            shape_err!("{op}: k = {k} of {usable} experts to choose from: k is 1 to that");
        }
        if experts > MAX_EXPERTS || k > MAX_CHOICES {
            shape_err!(
                "{op}: k = {k} of {experts} experts: a GPU chooses up to {MAX_CHOICES} of up to {MAX_EXPERTS} experts"
            );
        }
        Ok(Selection { values: experts.div_ceil(32).next_power_of_two(), groups, kept })
    }
}

/// The tokens of each routing group.
fn group_size(op: &str, tokens: usize, groups: usize) -> Result<usize> {
    if groups == 0 || tokens == 0 || !tokens.is_multiple_of(groups) {
        shape_err!("{op}: {tokens} tokens in {groups} groups: every group takes as many, at least one");
    }
    Ok(tokens / groups)
}

impl Cuda {
    /// Launches a kernel that walks `n` elements with any grid.
    ///
    /// # Safety
    /// As for [`Cuda::launch`].
    pub(super) unsafe fn elementwise(&self, name: &str, n: usize, args: Args) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch(name, self.blocks(n), THREADS, 0, args, || format!("{n} elements")) }
    }

    /// The mean over rows of what `kernel` makes of each, into `out`; it may write a value per row, too.
    fn mean_of_rows(&self, op: &str, kernel: &str, x: &Tensor, rows: Option<&Tensor>, out: &Tensor) -> Result<()> {
        let (tokens, width) = (x.dim(0), x.dim(1));
        let tiling = Tiling::new(group_size(op, tokens, 1)?, 1);
        let sums = self.allocate([tiling.all()].into(), DType::F32)?;
        let args = Args::new().tensor(x).size(tokens).int(width as i32).int(tiling.tile as i32);
        let args = match rows {
            Some(rows) => args.tensor(rows),
            None => args,
        };
        // SAFETY: the kernel's parameters; sums has an entry per tile.
        unsafe { self.launch(kernel, tiling.blocks(), 512, 0, args.tensor(&sums), || format!("{x:?}"))? };
        let args = Args::new().tensor(&sums).size(tiling.all()).size(tokens).tensor(out);
        // SAFETY: as above; out has one element.
        unsafe { self.launch("losses_mean", 1, 256, 0, args, || format!("{sums:?}")) }
    }
}
