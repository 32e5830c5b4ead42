//! stub

use super::Cpu;
use crate::device::*;
use crate::error::Result;
use crate::tensor::Tensor;

impl GateKernels for Cpu {
    fn top_k(
        &self,
        scores: &Tensor,
        bias: Option<&Tensor>,
        groups: Option<ExpertGroups>,
        experts: &Tensor,
    ) -> Result<()> {
        todo!()
    }
    fn gather_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        todo!()
    }
    fn scatter_cols(&self, x: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        todo!()
    }
    fn count_experts(&self, experts: &Tensor, loads: &Tensor) -> Result<()> {
        todo!()
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
        todo!()
    }
    fn expert_choice(
        &self,
        probs: &Tensor,
        groups: usize,
        capacity: usize,
        tokens: &Tensor,
        weights: &Tensor,
    ) -> Result<()> {
        todo!()
    }
    fn expert_choice_backward(&self, tokens: &Tensor, d_weights: &Tensor, d_probs: &Tensor) -> Result<()> {
        todo!()
    }
    fn balance_loss(
        &self,
        probs: &Tensor,
        experts: &Tensor,
        first_only: bool,
        loss: &Tensor,
        fraction: &Tensor,
    ) -> Result<()> {
        todo!()
    }
    fn balance_loss_backward(&self, fraction: &Tensor, d_loss: &Tensor, d_probs: &Tensor) -> Result<()> {
        todo!()
    }
    fn z_loss(&self, logits: &Tensor, lse: &Tensor, loss: &Tensor) -> Result<()> {
        todo!()
    }
    fn z_loss_backward(&self, logits: &Tensor, lse: &Tensor, d_loss: &Tensor, d_logits: &Tensor) -> Result<()> {
        todo!()
    }
    fn mean_entropy(&self, probs: &Tensor, out: &Tensor) -> Result<()> {
        todo!()
    }
    fn add_gate_noise(&self, clean: &Tensor, raw: &Tensor, noise: &Tensor, out: &Tensor) -> Result<()> {
        todo!()
    }
    fn add_gate_noise_backward(&self, raw: &Tensor, noise: &Tensor, d_out: &Tensor, d_raw: &Tensor) -> Result<()> {
        todo!()
    }
    fn update_bias(&self, bias: &Tensor, loads: &Tensor, gamma: f64) -> Result<()> {
        todo!()
    }
}
