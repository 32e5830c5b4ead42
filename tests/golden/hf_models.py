"""Golden values from Hugging Face transformers, in float64 throughout.

    python3 tests/golden/hf_models.py [OUTDIR]        # torch, transformers 5, numpy, safetensors; no network

A block's file holds `in.x` (B, L, M), `in.dy`, `in.NAME` for every parameter, `y`, `grad.x` and `grad.NAME`, gradients
of L = sum(y * dy). Names are those of the published checkpoints, without the layer's prefix, except that the experts of
a Mixtral block are stacked: `block_sparse_moe.experts.w1` is (E, H, M), `w2` (E, M, H), `w3` (E, H, M), row e of each
being `block_sparse_moe.experts.{e}.w1.weight` and so on. hf_tiny_mixtral/ has the published names to the letter.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save as serialize
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRotaryEmbedding

OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
EPS, THETA = 1e-5, 10000.0
# The blocks are half the size of the tiny model, so that their files, which hold gradients too, stay small.
B, L, M, H, HEADS, KV_HEADS, EXPERTS, TOP_K = 2, 10, 16, 24, 4, 2, 4, 2
VOCAB, TINY_M, TINY_H, LAYERS = 64, 32, 48, 2


class Float64(TorchFunctionMode):
    """Computes in float64 where the models ask for float32: transformers' norms, routers, attention softmax, rotary
    embedding and balance loss do so whatever the weights' type, which would leave errors of 1e-7 in every value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = lambda v: torch.float64 if v is torch.float32 else v
        out = func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float32), f"{func} made float32"
        return out


def randomise(module, seed):
    """Matrices of a size that keeps activations near one, gains near one, biases that are not zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * (0.1 if p.dim() == 1 else 0.25) + gain
    return g


def named(name, t):
    """(name, tensor) pairs under the published names, experts stacked, from transformers' own in memory."""
    name = name.replace("mlp.gate.", "block_sparse_moe.gate.").replace("mlp.experts.", "block_sparse_moe.experts.")
    stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
    if name.endswith("experts.gate_up_proj"):
        return zip((stem + "w1", stem + "w3"), t.chunk(2, dim=1))
    return [(stem + "w2" if name.endswith("experts.down_proj") else name, t)]


def save(file, tensors, metadata):
    arrays = {n: np.ascontiguousarray(t.detach().numpy()) for n, t in tensors.items()}
    assert all(a.dtype in (np.float64, np.int32) and np.isfinite(a).all() for a in arrays.values())
    data = serialize(arrays, {k: str(v) for k, v in metadata.items()} | {"transformers": transformers.__version__})
    # The header in sorted order, so that the same values make the same bytes.
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    (OUT / file).write_bytes(data[:8] + header.ljust(size) + data[8 + size :])
    print(file, (OUT / file).stat().st_size, "bytes", {n: a.shape for n, a in arrays.items()}, metadata)


def save_block(file, module, run, seed, metadata, extra=lambda: {}):
    g = randomise(module, seed)
    x = torch.randn(B, L, M, generator=g, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(B, L, M, generator=g, dtype=torch.float64)
    with Float64():
        y = run(x)
        (y * dy).sum().backward()
    # Autograd against the forward alone: the change of L along a random direction in x and all parameters.
    leaves = [x, *module.parameters()]
    away = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in leaves]
    slope = sum((p.grad * d).sum() for p, d in zip(leaves, away)).item()
    ends, here = [], [p.detach().clone() for p in leaves]
    with torch.no_grad(), Float64():
        for h in (1e-6, -1e-6, 0.0):
            for p, at, d in zip(leaves, here, away):
                p.copy_(at + h * d)
            ends.append((run(x) * dy).sum().item())
    measured = (ends[0] - ends[1]) / 2e-6
    assert abs(measured - slope) < 1e-6 * abs(slope), (measured, slope)
    with torch.no_grad():
        stock = run(x)
        print(f"{file}: transformers' float32 steps would move it by {(stock - y).abs().max() / y.abs().max():.1e}")
    tensors = {"in.x": x, "in.dy": dy, "y": y, "grad.x": x.grad}
    for name, p in module.named_parameters():
        tensors |= {f"in.{n}": t for n, t in named(name, p)} | {f"grad.{n}": t for n, t in named(name, p.grad)}
    save(file, tensors | extra(), metadata)


def causal_mask():
    return torch.full((L, L), float("-inf"), dtype=torch.float64).triu(1)[None, None]


def check_gap(logits):
    """No token's choice of experts may hang on rounding."""
    top = logits.topk(TOP_K + 1).values
    gap = (top[..., TOP_K - 1] - top[..., TOP_K]).min().item()
    assert gap > 1e-3, f"a choice of experts hangs on {gap}"


def mixtral_config(**more):
    config = MixtralConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_local_experts=EXPERTS,
                           num_experts_per_tok=TOP_K, rms_norm_eps=EPS, max_position_embeddings=64, sliding_window=None,
                           rope_parameters={"rope_type": "default", "rope_theta": THETA}, attn_implementation="eager",
                           **more)
    config._experts_implementation = "eager"  # The default, a grouped matrix product, takes no float64.
    return config


def mixtral_block():
    config = mixtral_config(hidden_size=M, intermediate_size=H)
    layer = MixtralDecoderLayer(config, 0).double()
    positions, seen = torch.arange(L)[None], []
    layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with Float64():
        rotary = MixtralRotaryEmbedding(config)

    def run(x):
        return layer(x, position_embeddings=rotary(x, positions), attention_mask=causal_mask())

    def router_logits():
        check_gap(seen[0])
        return {"router_logits": seen[0]}

    save_block("hf_mixtral_block.safetensors", layer, run, 1,
               dict(heads=HEADS, kv_heads=KV_HEADS, ffn=H, experts=EXPERTS, top_k=TOP_K, eps=EPS, rope_theta=THETA),
               router_logits)


def gpt2_block():
    config = GPT2Config(n_embd=M, n_head=HEADS, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
                        activation_function="gelu_new", layer_norm_epsilon=EPS, attn_implementation="eager")
    layer = GPT2Block(config, 0).double()
    save_block("hf_gpt2_block.safetensors", layer, lambda x: layer(x, attention_mask=causal_mask()), 2,
               dict(heads=HEADS, kv_heads=HEADS, ffn=4 * M, eps=EPS, activation="gelu_new"))


def tiny_mixtral():
    config = mixtral_config(vocab_size=VOCAB, hidden_size=TINY_M, intermediate_size=TINY_H, num_hidden_layers=LAYERS,
                            bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    model = MixtralForCausalLM(config)
    g = randomise(model, 3)
    model.float()
    folder = OUT / "hf_tiny_mixtral"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    check_folder(folder, model)

    ids = torch.randint(0, VOCAB, (2, 12), generator=g)
    # Loaded again, so that the values are of what is on disk.
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                experts_implementation="eager").double().eval()
    with torch.no_grad():
        stock = model(ids).logits
    with torch.no_grad(), Float64():
        model.model.rotary_emb = MixtralRotaryEmbedding(model.config)
        out = model(ids, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    layers = torch.stack(out.router_logits)
    check_gap(layers)
    # transformers pools the tokens of all layers before it multiplies; also for each layer, as an engine may sum those.
    mean = layers.softmax(-1).mean(1)
    chosen = torch.nn.functional.one_hot(layers.topk(TOP_K).indices, EXPERTS).sum(2).double().mean(1)
    pooled = EXPERTS * (mean.mean(0) * chosen.mean(0)).sum()
    assert abs(pooled - out.aux_loss) < 1e-12, (pooled, out.aux_loss)
    moved = (stock - out.logits).abs().max() / stock.abs().max()
    print(f"{folder.name}: transformers' float32 steps would move logits by {moved:.1e}")
    save("hf_tiny_mixtral_logits.safetensors",
         {"ids": ids.int(), "logits": out.logits, "loss": loss.reshape(1), "aux_loss": out.aux_loss.reshape(1),
          "aux_loss_layers": EXPERTS * (mean * chosen).sum(1), "router_logits": layers},
         dict(eps=EPS, rope_theta=THETA, top_k=TOP_K))


def check_folder(folder, model):
    """Two shards or more, an index that agrees with them, float32, the published names and values."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1, "not split"
    shards = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "np") as f:
            shards |= {n: (shard.name, f.get_tensor(n)) for n in f.keys()}
    assert {n: s for n, (s, _) in shards.items()} == index
    expected = {}
    for name, p in model.named_parameters():
        for n, t in named(name, p.detach()):
            if ".experts." in n:
                stem, w = n.rsplit(".", 1)
                expected |= {f"{stem}.{e}.{w}.weight": t[e] for e in range(EXPERTS)}
            else:
                expected[n] = t
    assert set(expected) == set(shards), set(expected) ^ set(shards)
    for n, t in expected.items():
        a = shards[n][1]
        assert a.dtype == np.float32 and (a == t.numpy()).all(), n
    print(folder.name, sorted((p.name, p.stat().st_size) for p in folder.iterdir()), len(shards), "tensors")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    mixtral_block()
    gpt2_block()
    tiny_mixtral()
