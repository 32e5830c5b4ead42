//! Tokens choose experts, fused (`kernels/gate/choose.cu`).

use super::super::args::Args;
use super::super::backend::{Cuda, THREADS};
use super::slots::{Losses, Tiling};
use super::{Selection, group_size};
use crate::device::check::expect;
use crate::device::{ChoiceRule, Chosen, ChosenGrad, SUM_EPS, Score, Slots};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Warps of a block of `choose_forward`.
const WARPS: usize = 16;

impl Cuda {
    pub(super) fn choose(
        &self,
        rule: &ChoiceRule,
        logits: &Tensor,
        bias: Option<&Tensor>,
        out: &Chosen<'_>,
    ) -> Result<()> {
        const OP: &str = "choose_experts";
        let [tokens, num_experts, k, groups] = ChoiceRule::check(OP, logits, bias, out)?;
        expect(OP, "logits", logits, &[tokens, num_experts], DType::F32)?;
        let all = [logits, out.experts, out.weights, out.loads, out.balance_loss, out.fraction, out.entropy];
        self.row_major(OP, &all)?;
        for t in [bias, out.best, out.z_loss, out.slots.map(|s| s.slots)].into_iter().flatten() {
            self.row_major(OP, &[t])?;
        }
        let selection = Selection::new(OP, num_experts, k, rule.expert_groups)?;
        let tiling = Tiling::new(group_size(OP, tokens, groups)?, groups);
        let means = Some((out.z_loss, out.entropy));
        let losses =
            Losses::new(self, tiling, num_experts, rule.balance_first_only, out.balance_loss, out.fraction, means)?;
        let counts = self.counts(num_experts, k, tiling)?;
        let args = Args::new()
            .tensor(logits)
            .optional(bias)
            .size(tiling.tokens)
            .int(num_experts as i32)
            .int(k as i32)
            .int(selection.groups as i32)
            .int(selection.kept as i32)
            .int(i32::from(rule.normalise))
            .float(rule.scale)
            .float(SUM_EPS)
            .int(tiling.tile as i32)
            .int(tiling.tiles as i32)
            .tensor(out.experts)
            .tensor(out.weights)
            .optional(out.best)
            .tensor(&counts)
            .tensor(&losses.columns)
            .tensor(&losses.sums)
            .tensor(&losses.ticket);
        let score = match rule.score {
            Score::Softmax => "softmax",
            Score::Sigmoid => "sigmoid",
        };
        let (name, shared) = (format!("choose_forward_{score}_v{}", selection.values), 4 * num_experts * (k + WARPS));
        let shape = || format!("{logits:?}, k = {k}");
        // SAFETY: the kernel's parameters; a block of 16 warps per tile, tensors of the shapes it takes, shared memory as it
        // asks.
        unsafe { self.launch(&name, tiling.blocks(), 32 * WARPS as u32, shared, args, shape)? };
        self.scan_counts(&counts, k, num_experts, tiling, out.loads, Some(&losses))?;
        let Some(Slots { capacity, slots }) = out.slots else { return Ok(()) };
        match out.best {
            // The counts are of tokens in their order, which is then not the order of slots.
            Some(best) => {
                let order = self.sort_descending(best, groups)?;
                self.slots_in_order(OP, out.experts, Some(&order), num_experts, tiling, capacity, slots)
            }
            None => self.assign_from_counts(OP, out.experts, None, &counts, num_experts, tiling, capacity, slots),
        }
    }

    pub(super) fn choose_backward(
        &self,
        rule: &ChoiceRule,
        logits: &Tensor,
        given: &ChosenGrad<'_>,
        d_logits: &Tensor,
    ) -> Result<()> {
        const OP: &str = "choose_experts_backward";
        let [tokens, num_experts, k] = ChoiceRule::check_backward(OP, logits, given, d_logits)?;
        expect(OP, "logits", logits, &[tokens, num_experts], DType::F32)?;
        self.row_major(OP, &[logits, given.experts, given.fraction, given.d_weights, given.d_balance, d_logits])?;
        self.row_major(OP, given.d_z.as_slice())?;
        let selection = Selection::new(OP, num_experts, k, None)?;
        let name = format!("choose_backward_v{}_{}", selection.values, self.suffix(OP, d_logits)?);
        if tokens == 0 {
            return Ok(());
        }
        let args = Args::new()
            .tensor(logits)
            .tensor(given.experts)
            .tensor(given.d_weights)
            .tensor(given.fraction)
            .tensor(given.d_balance)
            .optional(given.d_z)
            .size(tokens)
            .int(num_experts as i32)
            .int(k as i32)
            .int(i32::from(rule.score == Score::Sigmoid))
            .int(i32::from(rule.normalise))
            .float(rule.scale)
            .float(SUM_EPS)
            .tensor(d_logits);
        // SAFETY: the kernel's parameters, of checked shapes; a warp walks rows by the grid.
        unsafe { self.launch(&name, self.blocks(tokens * 32), THREADS, 0, args, || format!("{logits:?}, k = {k}")) }
    }
}
