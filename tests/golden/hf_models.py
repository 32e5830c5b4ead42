"""Golden values from Hugging Face transformers, in float64.

    python3 tests/golden/hf_models.py OUTDIR

Writes hf_mixtral_block.safetensors, hf_gpt2_block.safetensors (`in.x`, `in.dy`, `in.NAME` for every weight,
`y`, `grad.x` and `grad.NAME` for L = sum(y * dy)), the folder hf_tiny_mixtral/ as save_pretrained writes it, and
hf_tiny_mixtral_logits.safetensors.
"""
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# transformers computes routers, norms and softmaxes in float32 whatever the model's type; here they are to be exact.
FLOAT32 = torch.float32
torch.Tensor.float = torch.Tensor.double
torch.float32 = torch.float = torch.float64

from transformers import GPT2Config, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRotaryEmbedding

OUT = Path(sys.argv[1])
torch.set_default_dtype(torch.float64)
torch.manual_seed(20260101)
B, L, M = 2, 10, 32
MASK = torch.full((L, L), float("-inf")).triu(1)[None, None]


def randomise(module, std):
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, std=std)
        if "norm" in name or "ln_" in name:
            p.data += 1.0 * name.endswith("weight")


def stacked(name, t):
    """The published Mixtral names, the matrices of all experts stacked: (E, out, in)."""
    name = name.replace("mlp.", "block_sparse_moe.")
    if name.endswith("experts.gate_up_proj"):
        half = t.shape[1] // 2
        return [(name.replace("gate_up_proj", "w1"), t[:, :half]), (name.replace("gate_up_proj", "w3"), t[:, half:])]
    return [(name.replace("experts.down_proj", "experts.w2"), t)]


def block(path, module, call, names, metadata):
    x = torch.randn(B, L, M, requires_grad=True)
    out = call(x)
    out = out[0] if isinstance(out, tuple) else out
    dout = torch.randn(B, L, M)
    (out * dout).sum().backward()
    tensors = {"in.x": x, "in.dy": dout, "y": out, "grad.x": x.grad}
    for name, p in module.named_parameters():
        for n, t in names(name, p):
            tensors[f"in.{n}"] = t
        for n, t in names(name, p.grad):
            tensors[f"grad.{n}"] = t
    tensors = {n: t.detach().clone().contiguous() for n, t in tensors.items()}
    assert all(t.dtype == torch.float64 for t in tensors.values())
    save_file(tensors, path, {k: str(v) for k, v in metadata.items()})
    print(path.name, {n: tuple(t.shape) for n, t in tensors.items()})


def mixtral_block():
    config = MixtralConfig(hidden_size=M, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                           num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, max_position_embeddings=64,
                           rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="eager")
    config._attn_implementation = "eager"
    layer = MixtralDecoderLayer(config, 0)
    randomise(layer, 0.2)
    rotary = MixtralRotaryEmbedding(config)
    position_ids = torch.arange(L)[None].expand(B, L)

    def call(x):
        return layer(x, position_embeddings=rotary(x, position_ids), attention_mask=MASK, position_ids=position_ids)

    block(OUT / "hf_mixtral_block.safetensors", layer, call, stacked,
          dict(heads=4, kv_heads=2, top_k=2, rope_theta=10000.0))


def gpt2_block():
    config = GPT2Config(n_embd=M, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
                        activation_function="gelu_new", layer_norm_epsilon=1e-5)
    config._attn_implementation = "eager"
    layer = GPT2Block(config, 0)
    randomise(layer, 0.2)
    block(OUT / "hf_gpt2_block.safetensors", layer, lambda x: layer(x, attention_mask=MASK),
          lambda n, t: [(n, t)], dict(heads=4, kv_heads=4))


def tiny_mixtral():
    config = MixtralConfig(vocab_size=64, hidden_size=M, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                           max_position_embeddings=64, initializer_range=0.2, router_aux_loss_coef=0.02,
                           rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config._attn_implementation = "eager"
    model = MixtralForCausalLM(config).eval()
    # The weights are float32 numbers, so that the files hold exactly what the logits are computed from.
    for p in model.parameters():
        p.data = p.data.to(FLOAT32).to(torch.float64)
    folder = OUT / "hf_tiny_mixtral"
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        out = model(ids, labels=ids, output_router_logits=True)
        plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))
    save_file({"ids": ids.int(), "logits": out.logits.double().contiguous(), "loss": plain.reshape(1),
               "aux_loss": out.aux_loss.double().reshape(1)}, OUT / "hf_tiny_mixtral_logits.safetensors")
    model.to(FLOAT32).save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1, shards
    names = [n for s in shards for n in safe_open(s, "pt").keys()]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names, names
    assert str(safe_open(shards[0], "pt").get_slice(names[0]).get_dtype()) == "F32"
    print(folder.name, [s.name for s in shards], len(names), "tensors, loss", plain.item(), "aux", out.aux_loss.item())


OUT.mkdir(parents=True, exist_ok=True)
mixtral_block()
gpt2_block()
tiny_mixtral()
