#!/usr/bin/env python3
"""Times other implementations of an MoE layer on one GPU, by the rules of `fsmoe bench layer` and with its rows.

    python3 scripts/peers.py > peers.jsonl
    python3 scripts/peers.py --shape qwen3_30b_T16k --impl sonicmoe,torch --load zipf > zipf.jsonl
    fsmoe bench layer --json > ours.jsonl
    python3 scripts/compare.py ours.jsonl peers.jsonl --plot layers.svg

What is timed: the whole layer, router included, on fresh random tokens, forward, and forward + backward with the
gradients of the tokens, the router and the experts. Nothing is dropped, except with `--capacity-factor 1`, which only
Tutel has. What is compared takes turns with the dense cuBLAS products of the same useful FLOPs; the L2 cache is
overwritten before each time; times are the device's. Eager times come first, for every shape; replays of captured
graphs after all of them, because a capture that fails can leave a library unable to go on.

Implementations: torch (its grouped matrix product, torch._grouped_mm), scattermoe, sonicmoe, tutel. What does not import
gives a row that says so.
"""

import argparse
import gc
import json
import sys
import time

SHAPES = {  # T, M, H, E, k, expert
    "mixtral8x7b_T8k": (8192, 4096, 14336, 8, 2, "mixtral"),
    "gpt2xl_moe_T8k": (8192, 1600, 6400, 8, 2, "gpt"),
    "sonic_default": (32768, 4096, 1024, 128, 8, "mixtral"),
    "qwen3_30b_T16k": (16384, 2048, 768, 128, 8, "mixtral"),
    "tutel_hello_bf16": (8192, 2048, 2048, 2, 2, "gpt"),
}
TOKEN_SETS, TOKEN_STD, INIT_STD, BOOST = 3, 0.2, 0.02, 4.0
WARM_UP, FEWEST, MOST = 3, 7, 500
FLUSH_BYTES = 256 << 20


# ----------------------------------------------------------------------------------------------------------------------
# Router loads: the same arithmetic as in src/bench/loads.rs, so that all are given the same loads.


def scattered(n):
    """0..n in the order of a multiplicative hash."""
    return sorted(range(n), key=lambda i: i * 2654435761 % 2**32)


def zipf(experts):
    """1/rank for every expert."""
    weights = [0.0] * experts
    for rank, e in enumerate(scattered(experts)):
        weights[e] = 1.0 / (rank + 1)
    return weights


def apportion(weights, total, cap):
    """`total` in parts as `weights`, none above `cap`."""
    loads = [0] * len(weights)
    free = [e for e, w in enumerate(weights) if w > 0]
    left = total
    while True:
        scale = left / max(sum_in_order(weights[e] for e in free), sys.float_info.min)
        over = [e for e in free if weights[e] * scale > cap]
        if not over:
            break
        for e in over:
            loads[e] = cap
            left -= min(cap, left)
            free.remove(e)
    for e in free:
        loads[e] = min(int(weights[e] * scale), cap)
        left -= min(loads[e], left)
    free.sort(key=lambda e: (-(weights[e] * scale % 1.0), e))
    for e in free + free:
        if left > 0 and loads[e] < cap:
            loads[e] += 1
            left -= 1
    return loads


def sum_in_order(numbers):
    """Python's own sum compensates for rounding from 3.12 on."""
    total = 0.0
    for x in numbers:
        total += x
    return total


def deal(loads, tokens, k):
    """The k experts of every token, so that experts have exactly these loads."""
    order = scattered(tokens)
    assignment = [[0] * k for _ in range(tokens)]
    n = 0
    for e, load in enumerate(loads):
        for _ in range(load):
            assignment[order[n % tokens]][n // tokens] = e
            n += 1
    return assignment


def assignment_of(load, tokens, k, experts):
    """The experts of every token; None where the router is left alone."""
    if load == "uniform":
        return None
    if load == "zipf":
        return deal(apportion(zipf(experts), tokens * k, tokens), tokens, k)
    with open(load) as file:
        recording = json.load(file)
    if "loads" in recording:
        if len(recording["loads"]) != experts:
            raise SystemExit(f"{load}: loads of {len(recording['loads'])} experts, the layer has {experts}")
        return deal(apportion(recording["loads"], tokens * k, tokens), tokens, k)
    rows = recording["assignment"]
    if any(len(set(row)) != k or len(row) != k or not all(0 <= e < experts for e in row) for row in rows):
        raise SystemExit(f"{load}: every token has k = {k} different experts of 0..{experts}")
    return [rows[t % len(rows)] for t in range(tokens)]


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def parse_shape(text):
    if text in SHAPES:
        return text, SHAPES[text]
    parts = [p.strip() for p in text.split(",")]
    if len(parts) == 6 and parts[5] in ("gpt", "mixtral") and all(p.isdigit() for p in parts[:5]):
        return text, (*map(int, parts[:5]), parts[5])
    raise SystemExit(f"unknown shape {text!r}: it is one of {', '.join(SHAPES)}, or T,M,H,E,k,expert by hand")


def row(impl, device, name, shape, capacity, load, pass_, mode, **rest):
    """A row as `fsmoe bench layer --json` writes it."""
    T, M, H, E, k, expert = shape
    return {
        "bench": "layer", "impl": impl, "device": device, "shape": name, "T": T, "M": M, "H": H, "E": E, "k": k,
        "expert": expert, "dtype": "bf16", "gate": "top-k", "order": "tutel" if impl == "tutel" else "ragged",
        "capacity_factor": capacity, "load": load, "pass": pass_, "mode": mode, **rest,
    }  # fmt: skip


def quantile(times, q):
    at = q * (len(times) - 1)
    below, above = times[int(at)], times[min(int(at) + 1, len(times) - 1)]
    return below + (above - below) * (at % 1.0)


def spread(times):
    times = sorted(times)
    return {
        "median_ms": quantile(times, 0.5),
        "p10_ms": quantile(times, 0.1),
        "p90_ms": quantile(times, 0.9),
        "repeats": len(times),
    }


def matrices(expert):
    return 2 if expert == "gpt" else 3


def figures(times, dense_ms, shape, pass_, ceiling, peak, imbalance):
    """A row's figures from its times: as src/bench/layer.rs has them."""
    T, M, H, E, k, expert = shape
    passes = 1 if pass_ == "forward" else 3
    flops = passes * 2.0 * T * k * M * H * matrices(expert)
    weights, tokens = E * matrices(expert) * M * H + E * M, T * M
    num_bytes = 2.0 * (2 * tokens + weights if pass_ == "forward" else 4 * tokens + 2 * weights)
    figures = spread(times)
    median = figures["median_ms"]
    floor = max(num_bytes / ceiling["copy_bytes_per_s"], flops / ceiling["gemm_flops_per_s"]) * 1e3
    return figures | {
        "flops": flops,
        "bytes": num_bytes,
        "tflops": flops / median / 1e9,
        "dense_ms": dense_ms,
        "efficiency": passes * dense_ms / median,
        "floor_ms": floor,
        "peak_bytes": peak,
        "load_max_over_mean": imbalance,
        "dropped": 0,
    }


def emit(value):
    print(json.dumps(value), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The implementations. Each gives forward(x), its parameters, and the router's weight (E, M).


def torch_grouped(torch, shape):
    T, M, H, E, k, expert = shape
    F = torch.nn.functional
    glu = expert == "mixtral"

    def parameter(*size):
        return (torch.randn(*size, device="cuda", dtype=torch.bfloat16) * INIT_STD).requires_grad_()

    router, w1, w2 = parameter(E, M), parameter(E, M, (2 if glu else 1) * H), parameter(E, H, M)
    ones = torch.ones(T * k, device="cuda", dtype=torch.int32)

    def forward(x):
        probs = F.softmax(F.linear(x, router).float(), -1)
        weights, experts = probs.topk(k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        # Not bincount, which waits for the device.
        loads = torch.zeros(E, device="cuda", dtype=torch.int32).scatter_add_(0, flat, ones)
        ends = loads.cumsum(0, dtype=torch.int32)
        token = order // k
        h = torch._grouped_mm(x[token], w1, ends)
        if glu:
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h)
        y = torch._grouped_mm(h, w2, ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(x).index_add(0, token, y)

    return forward, [router, w1, w2], router


def scattermoe(torch, shape):
    from scattermoe.mlp import GLUMLP, MLP

    T, M, H, E, k, expert = shape
    F = torch.nn.functional
    router = (torch.randn(E, M, device="cuda", dtype=torch.bfloat16) * INIT_STD).requires_grad_()
    mlp = GLUMLP(M, H, E, k, activation=torch.nn.SiLU()) if expert == "mixtral" else MLP(M, H, E, k, activation=torch.nn.GELU())
    mlp = mlp.to("cuda", torch.bfloat16)

    def forward(x):
        weights, experts = F.softmax(F.linear(x, router).float(), -1).topk(k, -1)
        return mlp(x, (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts)

    return forward, [router, *mlp.parameters()], router


def sonicmoe(torch, shape):
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    T, M, H, E, k, expert = shape
    activation = ActivationType.SWIGLU if expert == "mixtral" else ActivationType.GELU
    layer = MoE(
        num_experts=E, num_experts_per_tok=k, hidden_size=M, intermediate_size=H, activation_function=activation,
        add_bias=False, std=INIT_STD,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    return lambda x: layer(x)[0], list(layer.parameters()), layer.router.weight


def tutel(torch, shape, capacity):
    from tutel import moe, system

    T, M, H, E, k, expert = shape
    if not torch.distributed.is_initialized():
        system.init_data_model_parallel(backend="nccl")
    experts = {"type": "llama_ffn" if expert == "mixtral" else "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H}
    if expert == "gpt":
        experts["activation_fn"] = lambda v: torch.nn.functional.gelu(v)
    torch.set_default_dtype(torch.bfloat16)
    try:
        # 0: as many rows as the largest load needs.
        gate = {"type": "top", "k": k, "capacity_factor": 0.0 if capacity == "*" else float(capacity)}
        layer = moe.moe_layer(gate_type=gate, experts=experts, model_dim=M).to("cuda")
    finally:
        torch.set_default_dtype(torch.float32)
    router = next(p for p in layer.parameters() if tuple(p.shape) == (E, M))
    return lambda x: layer(x), list(layer.parameters()), router


IMPLS = {"sonicmoe": sonicmoe, "torch": torch_grouped, "scattermoe": scattermoe, "tutel": tutel}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


class Clock:
    """Times pieces of work in turn, round after round."""

    def __init__(self, torch, budget_ms):
        self.torch, self.budget_ms = torch, budget_ms
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def time(self, works):
        """works: (prepare(round), run) pairs. Returns the times of each, in ms."""
        for n in range(WARM_UP):
            for prepare, run in works:
                prepare(n)
                run()
        self.torch.cuda.synchronize()
        begun = time.time()
        self.round(works, 0)
        self.torch.cuda.synchronize()
        rounds = int(self.budget_ms / 1e3 / max(time.time() - begun, 1e-9))
        rounds = min(max(rounds, FEWEST), MOST)
        marks = [self.round(works, n) for n in range(rounds)]
        self.torch.cuda.synchronize()
        return [[marks[n][w][0].elapsed_time(marks[n][w][1]) for n in range(rounds)] for w in range(len(works))]

    def round(self, works, n):
        marks = []
        for prepare, run in works:
            prepare(n)
            self.flush.zero_()
            start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            marks.append((start, stop))
        return marks


def measure_ceiling(torch, clock, device):
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    src = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    dst = torch.empty_like(src)
    nothing = lambda n: None  # noqa: E731
    gemm, copy = clock.time([(nothing, lambda: a @ b), (nothing, lambda: dst.copy_(src))])
    return {
        "bench": "ceiling",
        "device": device,
        "dtype": "bf16",
        "copy_bytes_per_s": 2 * 4 * src.numel() / quantile(sorted(copy), 0.5) * 1e3,
        "gemm_flops_per_s": 2 * 8192**3 / quantile(sorted(gemm), 0.5) * 1e3,
    }


class Subject:
    """One implementation at one shape."""

    def __init__(self, torch, impl, shape, capacity, load):
        T, M, H, E, k, expert = shape
        torch.manual_seed(0)
        self.torch, self.shape = torch, shape
        self.before = torch.cuda.memory_allocated()
        make = IMPLS[impl]
        self.forward_of, self.parameters, router = make(torch, shape, capacity) if impl == "tutel" else make(torch, shape)

        def random():
            return TOKEN_STD * torch.randn(T, M, device="cuda", dtype=torch.bfloat16)

        self.tokens, self.dy = [random() for _ in range(TOKEN_SETS)], random()
        assignment = assignment_of(load, T, k, E)
        with torch.no_grad():
            if assignment is not None:
                router.add_(torch.eye(E, M, device="cuda", dtype=router.dtype))
                index = torch.tensor(assignment, device="cuda")
                for x in self.tokens:
                    x.scatter_add_(1, index, torch.full((T, k), BOOST, device="cuda", dtype=x.dtype))
            chosen = torch.nn.functional.linear(self.tokens[0].float(), router.float()).topk(k, -1).indices
            self.imbalance = (chosen.flatten().bincount(minlength=E).max() * E / (T * k)).item()
        self.x = self.tokens[0].clone().requires_grad_()

    def prepare(self, n):
        with self.torch.no_grad():
            self.x.copy_(self.tokens[n % TOKEN_SETS])

    def forward(self):
        with self.torch.no_grad():
            self.forward_of(self.x)

    def both(self):
        self.x.grad = None
        for p in self.parameters:
            p.grad = None
        self.forward_of(self.x).backward(self.dy)

    def check(self):
        """All gradients are there; returns the most bytes in tensors that a forward + backward took."""
        torch = self.torch
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.both()
        torch.cuda.synchronize()
        for what in (self.x, *self.parameters):
            if what.grad is None or not torch.isfinite(what.grad).all() or not what.grad.any():
                raise RuntimeError(f"a gradient of shape {tuple(what.shape)} is missing, zero or not finite")
        sets = sum(t.numel() * t.element_size() for t in self.tokens)
        return torch.cuda.max_memory_allocated() - self.before - sets

    def graph(self, run):
        """A replay of `run`, captured."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def dense(torch, shape):
    """The products alone of all T·k rows, with one expert's matrices, forward."""
    T, M, H, E, k, expert = shape
    up = H if expert == "gpt" else 2 * H

    def random(*size):
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    xx, w1, hh, w2 = random(T * k, M), random(M, up), random(T * k, H), random(H, M)
    return lambda: (xx @ w1, hh @ w2)


def measure(torch, clock, args, ceiling, device, name, shape, impl, mode):
    def rows(pass_, **rest):
        return row(impl, device, name, shape, args.capacity_factor, args.load, pass_, mode, **rest)

    try:
        subject = Subject(torch, impl, shape, args.capacity_factor, args.load)
        for n in range(TOKEN_SETS):
            subject.prepare(n)
            subject.both()
        peak = subject.check()
        runs = [("forward", subject.forward), ("forward+backward", subject.both)]
        if mode == "graph":
            runs = [(pass_, subject.graph(run)) for pass_, run in runs]
        works = [(lambda n: None, dense(torch, shape))] + [(subject.prepare, run) for _, run in runs]
        times = clock.time(works)
        dense_ms = quantile(sorted(times[0]), 0.5)
        for (pass_, _), measured in zip(runs, times[1:]):
            emit(rows(pass_, **figures(measured, dense_ms, shape, pass_, ceiling, peak, subject.imbalance)))
    except Exception as error:  # noqa: BLE001: whatever a peer raises is its row's
        emit(rows("forward+backward", error=f"{type(error).__name__}: {error}"[:400]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="as for fsmoe bench layer; several times for several")
    parser.add_argument("--impl", default=",".join(IMPLS), help="with commas between; by default all")
    parser.add_argument("--load", default="uniform", help="uniform, zipf, or a JSON file as for fsmoe bench layer")
    parser.add_argument("--capacity-factor", default="*", help="*, nothing dropped, or a number: then only Tutel runs")
    parser.add_argument("--time", type=float, default=1500, help="milliseconds to measure for, per shape and mode")
    parser.add_argument("--modes", default="eager,graph", help="eager, graph, or both")
    parser.add_argument("--stop-after", type=float, default=480, help="seconds after which nothing new is begun")
    args = parser.parse_args()
    shapes = [parse_shape(text) for text in args.shape or SHAPES]
    impls = args.impl.split(",")
    if unknown := [impl for impl in impls if impl not in IMPLS]:
        raise SystemExit(f"unknown implementation {unknown[0]!r}: it is one of {', '.join(IMPLS)}")
    if args.capacity_factor != "*":
        impls = [impl for impl in impls if impl == "tutel"]

    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"peers.py: it needs PyTorch: {error}")
    if not torch.cuda.is_available():
        raise SystemExit("peers.py: no GPU that torch can use")
    begun, device = time.time(), torch.cuda.get_device_name()
    clock = Clock(torch, args.time)
    ceiling = measure_ceiling(torch, clock, device)
    emit(ceiling)
    for mode in args.modes.split(","):
        for name, shape in shapes:
            for impl in impls:
                if time.time() - begun > args.stop_after:
                    print(f"peers.py: stopped before {name} {impl} {mode}, {args.stop_after:.0f} s are over", file=sys.stderr)
                    return
                measure(torch, clock, args, ceiling, device, name, shape, impl, mode)
                # What the subject held, graphs and cycles included, is room for the next.
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
