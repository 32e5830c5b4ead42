"""Opens a Mixtral folder that fsmoe saved with transformers and compares logits, in float64.

    python3 tests/golden/hf_load_check.py DIR

DIR/expected_logits.safetensors holds `input_ids` (B, L), any integers, and `logits` (B, L, V) as fsmoe computed them
from the saved weights: in float64 they agree to 1e-9 of the largest logit, in float32 to 1e-4.
"""
import sys

import torch
from hf_models import Float64
from safetensors.torch import load_file
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

folder = sys.argv[1]
expected = load_file(f"{folder}/expected_logits.safetensors")
ids, wanted = expected["input_ids"].long(), expected["logits"]
model, info = MixtralForCausalLM.from_pretrained(
    folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager", local_files_only=True,
    output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad(), Float64():
    model.model.rotary_emb = MixtralRotaryEmbedding(model.config)
    logits = model.eval()(ids).logits
assert logits.dtype == torch.float64 and logits.shape == wanted.shape, (logits.shape, wanted.shape)
error = ((logits - wanted).abs().max() / wanted.abs().max()).item()
limit = 1e-9 if wanted.dtype == torch.float64 else 1e-4
print(f"{sum(p.numel() for p in model.parameters())} parameters, every key used, logits {tuple(logits.shape)},",
      f"off by {error:.1e} of the largest (limit {limit:.0e})")
sys.exit(not error < limit)
