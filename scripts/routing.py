#!/usr/bin/env python3
"""Times in PyTorch what `cargo test -- --ignored cuda_times_of_routing --nocapture` prints of fsmoe: routing, from the
router's fp32 logits to who takes which row.

    python3 scripts/routing.py

One line of JSON per operation and mode, `eager` as it is written below and `graph` replayed from a CUDA graph; times are
the device's, medians of repeats.
"""

import json
import statistics

try:
    import torch
except ImportError as error:
    raise SystemExit(f"routing.py: it needs PyTorch: {error}")

WARM_UP, REPEATS = 5, 50


def complete_routing(logits, k):
    """Top-k softmax: experts, normalised weights, slots in the order of choices, the rows' index and its inverse, loads,
    balance loss, z-loss and mean entropy."""
    tokens, experts = logits.shape
    lse = torch.logsumexp(logits, -1)
    probs = (logits - lse[:, None]).exp()
    best, chosen = probs.topk(k, -1)
    weights = best / best.sum(-1, keepdim=True)
    # Slots: first choices of all tokens, then second choices, and so on, which is a stable sort of the choices by rank.
    by_rank = chosen.t().reshape(-1)
    order = by_rank.argsort(stable=True)
    loads = torch.zeros(experts, dtype=torch.int64, device=logits.device).scatter_add_(0, by_rank, torch.ones_like(by_rank))
    starts = loads.cumsum(0) - loads
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=logits.device))
    slots = (rows - starts[by_rank]).view(k, tokens).t()
    index = rows.view(k, tokens).t()
    row_token = order % tokens
    row_weight = (order % tokens) * k + order // tokens
    fraction = loads.float() / tokens
    balance = experts * (probs.mean(0) * fraction).sum()
    z = lse.square().mean()
    entropy = -(probs * (logits - lse[:, None])).sum(-1).mean()
    return chosen, weights, slots, index, row_token, row_weight, loads, balance, z, entropy


def expert_choice(logits, capacity):
    """Every expert's `capacity` most probable tokens, with their probabilities."""
    return logits.softmax(-1).t().topk(capacity, -1)


def x_moe(x, project, embeddings, scale):
    """X-MoE's logits: cosine between a projection of x and the experts' embeddings, times a scale."""
    projected = torch.nn.functional.normalize(torch.nn.functional.linear(x, project).float(), dim=-1)
    return scale.exp().clamp(max=100.0) * projected @ torch.nn.functional.normalize(embeddings.float(), dim=-1).t()


def median_us(run):
    times = []
    for n in range(WARM_UP + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if n >= WARM_UP:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def report(what, run):
    row = {"bench": "routing", "impl": "torch", "device": torch.cuda.get_device_name(), "what": what}
    print(json.dumps({**row, "mode": "eager", "median_us": round(median_us(run), 1)}), flush=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    print(json.dumps({**row, "mode": "graph", "median_us": round(median_us(graph.replay), 1)}), flush=True)


def main():
    torch.manual_seed(0)
    for tokens, experts, k in [(32768, 128, 8), (16384, 128, 8), (8192, 8, 2)]:
        logits = torch.randn(tokens, experts, device="cuda")
        shape = f"({tokens}, {experts}), k = {k}"
        report(f"{shape}: the complete routing", lambda: complete_routing(logits, k))
        capacity = tokens * k // experts
        report(f"{shape}: expert choice, C = {capacity}", lambda: expert_choice(logits, capacity))
    x = torch.randn(32768, 4096, device="cuda", dtype=torch.bfloat16)
    project = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    embeddings = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    scale = torch.zeros((), device="cuda")
    report("(32768, 4096) to 64, E = 128: X-MoE's logits", lambda: x_moe(x, project, embeddings, scale))
    report("... and the complete routing, k = 8", lambda: complete_routing(x_moe(x, project, embeddings, scale), 8))


if __name__ == "__main__":
    main()
