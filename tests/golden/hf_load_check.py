"""Opens a model folder that fsmoe saved with transformers and compares logits.

    python3 tests/golden/hf_load_check.py DIR

DIR/expected_logits.safetensors holds `input_ids` (B, L) int32 and `logits` (B, L, V) as fsmoe computed them.
"""
import sys

import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

folder = sys.argv[1]
expected = load_file(f"{folder}/expected_logits.safetensors")
model, info = MixtralForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
with torch.no_grad():
    logits = model.eval()(expected["input_ids"].long()).logits
want = expected["logits"].float()
error = ((logits - want).abs().max() / want.abs().max()).item()
print(f"{sum(p.numel() for p in model.parameters())} parameters, logits {tuple(logits.shape)}, error {error:.2e}")
assert error < 1e-4
