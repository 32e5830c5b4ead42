//! Experts choose tokens (`kernels/gate/expert_choice.cu`).

use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST_SHARED;

use super::super::CudaError;
use super::super::args::Args;
use super::super::backend::Cuda;
use super::group_size;
use crate::device::check::{expect, matrix};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// What a block always has of shared memory: a histogram of 256 digits per warp.
const HISTOGRAM: usize = 32 << 10;
/// Left to the kernel's own variables.
const RESERVED: usize = 1 << 10;

impl Cuda {
    pub(super) fn choose_tokens(
        &self,
        probs: &Tensor,
        groups: usize,
        capacity: usize,
        tokens: &Tensor,
        weights: &Tensor,
    ) -> Result<()> {
        const OP: &str = "expert_choice";
        let (num_tokens, num_experts) = matrix(OP, "probs", probs)?;
        let per_group = group_size(OP, num_tokens, groups)?;
        let width = groups * capacity;
        expect(OP, "probs", probs, &[num_tokens, num_experts], DType::F32)?;
        expect(OP, "tokens", tokens, &[num_experts, width], DType::I32)?;
        expect(OP, "weights", weights, &[num_experts, width], DType::F32)?;
        self.row_major(OP, &[probs, tokens, weights])?;
        if capacity == 0 || capacity > per_group {
            shape_err!("{OP}: capacity {capacity} of {per_group} tokens in a group: an expert takes 1 to all of them");
        }
        if num_experts == 0 {
            return Ok(());
        }
        let keys = self.allocate([num_experts, num_tokens].into(), DType::I32)?;
        let args = Args::new().tensor(probs).size(num_tokens).int(num_experts as i32).tensor(&keys);
        let grid = (num_tokens.div_ceil(32) as u32, num_experts.div_ceil(32) as u32);
        // SAFETY: the kernel's parameters; a block per 32 by 32 elements of probs.
        unsafe { self.launch("expert_choice_keys", grid, 256, 0, args, || format!("{probs:?}"))? };

        let most = self
            .context()
            .attribute(MOST_SHARED)
            .map_err(CudaError::driver("asking for the shared memory of a block"))?;
        let mut left = usize::try_from(most).unwrap_or(0).saturating_sub(HISTOGRAM + RESERVED);
        let mut take = |bytes: usize| {
            let fits = bytes <= left;
            left -= if fits { bytes } else { 0 };
            if fits { bytes } else { 0 }
        };
        let (keys_shared, lists_shared) = (take(4 * per_group), take(16 * capacity));
        let lists = match lists_shared {
            0 => Some(self.allocate([num_experts * groups, 4, capacity].into(), DType::I32)?),
            _ => None,
        };
        let args = Args::new()
            .tensor(&keys)
            .tensor(probs)
            .size(num_tokens)
            .size(per_group)
            .int(num_experts as i32)
            .int(groups as i32)
            .int(capacity as i32)
            .int(i32::from(keys_shared > 0))
            .int(i32::from(lists_shared > 0))
            .optional(lists.as_ref())
            .tensor(tokens)
            .tensor(weights);
        let (blocks, shared) = ((num_experts * groups) as u32, HISTOGRAM + keys_shared + lists_shared);
        let shape = || format!("{probs:?}, {groups} groups, capacity {capacity}");
        // SAFETY: the kernel's parameters; a block of 1024 per expert and group, with the shared memory that the flags say
        // or lists for every block.
        unsafe { self.launch("expert_choice_select", blocks, 1024, shared, args, shape) }
    }

    pub(super) fn choose_tokens_backward(&self, tokens: &Tensor, d_weights: &Tensor, d_probs: &Tensor) -> Result<()> {
        const OP: &str = "expert_choice_backward";
        let (num_experts, width) = matrix(OP, "tokens", tokens)?;
        let (num_tokens, _) = matrix(OP, "d_probs", d_probs)?;
        expect(OP, "tokens", tokens, &[num_experts, width], DType::I32)?;
        expect(OP, "d_weights", d_weights, &[num_experts, width], DType::F32)?;
        expect(OP, "d_probs", d_probs, &[num_tokens, num_experts], DType::F32)?;
        self.row_major(OP, &[tokens, d_weights, d_probs])?;
        let n = tokens.elements();
        let args =
            Args::new().tensor(tokens).tensor(d_weights).size(width).size(n).int(num_experts as i32).tensor(d_probs);
        // SAFETY: the kernel's parameters, of checked shapes.
        unsafe { self.elementwise("expert_choice_backward", n, args) }
    }
}
