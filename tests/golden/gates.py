"""Golden values for every gate: routing, losses, outputs and gradients, in float64.

Written from the papers with NumPy alone; gradients of L = sum(y * dy) + 0.01 * balance + 0.001 * z come from complex
steps (f(v + ih).imag / h is exact to rounding), so nothing here shares a derivation with the engine.

    python3 tests/golden/gates.py [OUTDIR]        # writes gate_*.safetensors beside this file, or to OUTDIR
"""
import json
import math
import os
import sys

import numpy as np
from safetensors.numpy import save

OUT = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
M, E, H = 12, 8, 10
BALANCE, Z = 0.01, 0.001


def softmax(v, axis=-1):
    # The maximum of the real part: a constant shift, so complex steps pass through.
    e = np.exp(v - v.real.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def erf(v):
    """The error function of nearly real numbers: erf(a + ib) = erf(a) + ib * erf'(a) for tiny b."""
    a = np.vectorize(math.erf)(v.real)
    return a + 1j * v.imag * 2 / math.sqrt(math.pi) * np.exp(-v.real**2) if np.iscomplexobj(v) else a


def gelu(v):
    return v * 0.5 * (1 + erf(v / math.sqrt(2)))


def ffn(rows, w1, w2):
    """One expert: rows (n, M), w1 (H, M), w2 (M, H)."""
    return gelu(rows @ w1.T) @ w2.T


def top_k(scores, k):
    """Descending, ties to the lowest index."""
    return np.argsort(-scores.real, axis=-1, kind="stable")[:, :k]


def capacity_of(f, k, tokens):
    return math.ceil(f * k * tokens / E)


def slots_of(experts, capacity, priority=None):
    """All first choices in token order (or by descending priority), then all second choices, and so on."""
    tokens, k = experts.shape
    order = np.arange(tokens) if priority is None else np.argsort(-priority, kind="stable")
    used, slots = np.zeros(E, int), np.full((tokens, k), -1)
    for j in range(k):
        for t in order:
            e = experts[t, j]
            if used[e] < capacity:
                slots[t, j] = used[e]
            used[e] += 1
    return slots


def token_choice(case, v, scores, probs, logits, select, k, f, groups, normalise, scale=1.0, eps=0.0,
                 prioritised=False, ties=False):
    """Everything after a gate's scores. `select` is what choices are made by, `scores` are the weights before
    normalisation, `probs` enter the balance loss."""
    x, tokens = v["x"], len(v["x"])
    per = tokens // groups
    if "experts" not in case:
        case["experts"] = top_k(select, k)
        ranked = -np.sort(-select, axis=-1)
        gaps = ranked[:, :k] - ranked[:, 1 : k + 1]
        assert (gaps[gaps > 0] > 1e-6).all(), f"a choice hangs on {gaps[gaps > 0].min()}"
        assert ties == (gaps == 0).any(), "exact ties are for the case that is about them"
    experts = case["experts"]
    counts = np.stack([np.bincount(experts[g * per : (g + 1) * per].reshape(-1), minlength=E) for g in range(groups)])
    capacity = int(counts.max()) if f is None else capacity_of(f, k, per)
    if "slots" not in case:
        parts = []
        for g in range(groups):
            part = slice(g * per, (g + 1) * per)
            best = np.take_along_axis(scores.real, experts[:, :1], 1)[part, 0] if prioritised else None
            if prioritised:  # Tokens are in a clear order, or alike.
                for a, b in zip(*np.nonzero(abs(best[:, None] - best) < 1e-6)):
                    assert (logits.real[part][a] == logits.real[part][b]).all(), f"the order of {a} and {b} is unclear"
            parts.append(slots_of(experts[part], capacity, best))
        case["slots"] = np.concatenate(parts)
    slots = case["slots"]
    weights = np.take_along_axis(scores, experts, 1)
    if normalise:
        weights = scale * weights / (weights.sum(1, keepdims=True) + eps)
    every_expert = [ffn(x, v["w1"][e], v["w2"][e]) for e in range(E)]
    y = np.zeros(x.shape, np.result_type(weights, every_expert[0]))
    for t in range(tokens):
        for j in range(k):
            if slots[t, j] >= 0:
                y[t] = y[t] + weights[t, j] * every_expert[experts[t, j]][t]
    mean = probs.mean(0)
    first = np.bincount(experts[:, 0], minlength=E) / tokens
    every = np.bincount(experts.reshape(-1), minlength=E) / tokens
    lse = np.log(np.exp(logits).sum(1))
    return {
        "weights": weights, "y": y, "loads": counts, "capacity": capacity, "dropped": int((slots < 0).sum()),
        "balance_first": E * (mean * first).sum(), "balance_all": E * (mean * every).sum(), "z": (lse**2).mean(),
        "probs": probs, "logits": logits,
    }


def run(name, inputs, forward, wanted, settings, count="all", z_weight=Z):
    """Values, and gradients of the loss by complex steps with the routing held fixed."""
    case = {}
    out = forward(inputs, case)

    def loss(values):
        got = forward(values, dict(case))
        total = (got["y"] * inputs["dy"]).sum() + z_weight * got.get("z", 0)
        return total + BALANCE * got["balance_" + count] if "balance_all" in got else total

    tensors = {f"in.{n}": v for n, v in inputs.items()}
    tensors.update(case)
    tensors.update(out)
    for n in wanted:
        g = np.zeros(inputs[n].shape)
        for at in np.ndindex(g.shape):
            stepped = inputs[n].astype(complex)
            stepped[at] += 1e-30j
            g[at] = loss({**inputs, n: stepped}).imag / 1e-30
        tensors[f"grad.{n}"] = g
    tensors = {n: np.atleast_1d(np.asarray(v)) for n, v in tensors.items()}
    tensors = {
        n: np.ascontiguousarray(v, dtype=np.int32 if np.issubdtype(v.dtype, np.integer) else np.float64)
        for n, v in tensors.items()
    }
    settings = {**settings, "count": count, "z_weight": z_weight, "balance_weight": BALANCE}
    data = save(tensors, {k: str(v) for k, v in settings.items()})
    # The header in sorted order, so that the same values make the same bytes.
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    with open(os.path.join(OUT, f"gate_{name}.safetensors"), "wb") as file:
        file.write(data[:8] + header.ljust(size) + data[8 + size :])
    print(name, settings, "dropped", out.get("dropped"))


def base(seed, gate=("w",), tokens=24):
    rng = np.random.default_rng(seed)
    inputs = {"x": rng.normal(size=(tokens, M)), "dy": rng.normal(size=(tokens, M))}
    for n in gate:
        inputs[n] = rng.normal(size=(E, M)) * 0.4
    inputs["w1"] = rng.normal(size=(E, H, M)) * 0.3
    inputs["w2"] = rng.normal(size=(E, M, H)) * 0.3
    return rng, inputs


def top_k_cases():
    for i, (name, k, f, normalise, groups, noise, prioritised, count) in enumerate([
        ("top_k1", 1, 1.0, False, 1, False, False, "first"),
        ("top_k2", 2, 1.0, True, 1, False, False, "all"),
        ("top_k2_raw", 2, 1.25, False, 1, False, False, "first"),
        ("top_k2_noise", 2, 1.0, True, 1, True, False, "all"),
        ("top_k2_prioritised", 2, 0.75, True, 1, False, True, "all"),
        ("top_k2_groups", 2, 1.0, True, 2, False, False, "all"),
        ("top_k3_dropless", 3, None, True, 1, False, False, "all"),
    ]):
        rng, inputs = base(100 + i)
        if noise:
            inputs["w_noise"] = rng.normal(size=(E, M)) * 0.4
            inputs["noise"] = rng.normal(size=(len(inputs["x"]), E))

        def forward(v, case):
            logits = v["x"] @ v["w"].T
            if noise:
                logits = logits + v["noise"] * np.log1p(np.exp(v["x"] @ v["w_noise"].T))
            p = softmax(logits)
            return token_choice(case, v, p, p, logits, p, k, f, groups, normalise, prioritised=prioritised)

        run(name, inputs, forward, ["x", "w"] + ["w_noise"] * noise,
            dict(gate="top-k", k=k, f="*" if f is None else f, normalise=normalise, groups=groups,
                 prioritised=prioritised), count)


def ties_case():
    """Experts and tokens in equal pairs: small whole numbers, so that logits are exact and ties are ties everywhere."""
    rng, inputs = base(110)
    inputs["x"] = rng.integers(-1, 2, size=inputs["x"].shape).astype(float)
    inputs["w"] = rng.integers(-1, 2, size=inputs["w"].shape).astype(float) / 4
    inputs["w"][5:] = inputs["w"][:3]
    inputs["x"][rng.permutation(len(inputs["x"]))[:8]] = inputs["x"][0]

    def forward(v, case):
        logits = v["x"] @ v["w"].T
        p = softmax(logits)
        # Chosen by the exact logits: sums in another order may part equal probabilities, never equal logits.
        return token_choice(case, v, p, p, logits, logits.real, 2, 0.75, 1, True, prioritised=True, ties=True)

    run("top_k2_ties", inputs, forward, ["x", "w"],
        dict(gate="top-k", k=2, f=0.75, normalise=True, groups=1, prioritised=True), "all")


def sigmoid_cases():
    for i, (name, k, f, normalise) in enumerate([("sigmoid1", 1, 1.25, False), ("sigmoid2", 2, 1.0, True)]):
        _, inputs = base(200 + i)

        def forward(v, case):
            logits = v["x"] @ v["w"].T
            s = 1 / (1 + np.exp(-logits))
            return token_choice(case, v, s, s / s.sum(1, keepdims=True), logits, s, k, f, 1, normalise)

        run(name, inputs, forward, ["x", "w"], dict(gate="sigmoid", k=k, f=f, normalise=normalise, groups=1), "all",
            z_weight=0.0)

    deepseek(210, "sigmoid_deepseek", k=3, groups=1, n_group=4, kept=2)
    deepseek(221, "sigmoid_deepseek_groups", k=2, groups=2, n_group=2, kept=1)


def deepseek(seed, name, k, groups, n_group, kept):
    """DeepSeek-V3: selection by biased scores inside the best groups of experts, weights from the unbiased scores."""
    f, routed_scale, gamma = 1.25, 2.5, 0.001
    rng, inputs = base(seed)
    inputs["bias"] = rng.normal(size=E) * 0.2

    def forward(v, case):
        logits = v["x"] @ v["w"].T
        s = 1 / (1 + np.exp(-logits))
        biased = s.real + v["bias"]
        ranked = -np.sort(-biased.reshape(len(s), n_group, E // n_group), axis=-1)
        rank = ranked[:, :, :2].sum(-1)
        best = np.argsort(-rank, axis=-1, kind="stable")[:, :kept]
        gap = -np.diff(-np.sort(-rank, axis=-1), axis=-1)[:, kept - 1].min()
        assert gap > 1e-6, f"a group hangs on {gap}"
        if E // n_group > 2:  # The two best of a group, not all and not the best one, make a difference to some tokens.
            for other in (ranked, ranked[:, :, :1]):
                assert (best != np.argsort(-other.sum(-1), axis=-1, kind="stable")[:, :kept]).any()
        allowed = np.zeros((len(s), n_group), bool)
        np.put_along_axis(allowed, best, True, 1)
        select = np.where(np.repeat(allowed, E // n_group, axis=1), biased, -9.0)
        return token_choice(case, v, s, s / s.sum(1, keepdims=True), logits, select, k, f, groups, True, routed_scale,
                            1e-20)

    loads = forward(inputs, {})["loads"].sum(0)
    inputs["bias_after"] = inputs["bias"] + gamma * np.sign(loads.mean() - loads)
    run(name, inputs, forward, ["x", "w"],
        dict(gate="sigmoid", k=k, f=f, normalise=True, groups=groups, n_group=n_group, kept=kept,
             routed_scale=routed_scale, gamma=gamma), "all", 0.0)


def x_moe_cases():
    for name, log_scale in [("x_moe", math.log(1 / 0.07)), ("x_moe_clamped", math.log(150.0))]:
        rng, inputs = base(300, gate=())
        inputs["projection"] = rng.normal(size=(4, M)) * 0.4
        inputs["embeddings"] = rng.normal(size=(E, 4))
        inputs["log_scale"] = np.array([log_scale])

        def unit(a):
            return a / np.sqrt((a * a).sum(1, keepdims=True))

        def forward(v, case):
            scale = np.exp(v["log_scale"])[0]
            scale = scale if scale.real < 100 else 100.0
            logits = scale * (unit(v["x"] @ v["projection"].T) @ unit(v["embeddings"]).T)
            p = softmax(logits)
            return token_choice(case, v, p, p, logits, logits.real, 2, 1.0, 1, True)

        run(name, inputs, forward, ["x", "projection", "embeddings", "log_scale"],
            dict(gate="x-moe", k=2, f=1.0, normalise=True, groups=1))


def expert_choice_cases():
    for name, groups, f in [("expert_choice", 1, 1.0), ("expert_choice_groups", 2, 1.0), ("expert_choice_all", 1, 4.5)]:
        rng, inputs = base(400, tokens=8 if f > 4 else 24)
        k = 2
        per = len(inputs["x"]) // groups
        capacity = min(capacity_of(f, k, per), per)
        inputs["rows"] = rng.normal(size=(E, groups * capacity, M))

        def forward(v, case):
            logits = v["x"] @ v["w"].T
            p = softmax(logits)
            if "tokens" not in case:
                case["tokens"] = np.concatenate(
                    [np.argsort(-p.real[g * per : (g + 1) * per], axis=0, kind="stable")[:capacity].T + g * per
                     for g in range(groups)], axis=1)
            chosen = case["tokens"]
            weights = np.stack([p[chosen[e], e] for e in range(E)])
            outs = [ffn(v["x"], v["w1"][e], v["w2"][e]) for e in range(E)]
            y = np.zeros(v["x"].shape, np.result_type(weights, outs[0]))
            for e in range(E):
                for s, t in enumerate(chosen[e]):
                    y[t] = y[t] + weights[e, s] * outs[e][t]
            combined = np.zeros(v["x"].shape, weights.dtype)
            np.add.at(combined, chosen, weights[:, :, None] * v["rows"])
            return {"weights": weights, "y": y, "combined": combined, "capacity": capacity, "probs": p,
                    "logits": logits, "z": (np.log(np.exp(logits).sum(1)) ** 2).mean()}

        run(name, inputs, forward, ["x", "w"], dict(gate="expert-choice", k=k, f=f, groups=groups))


def soft_cases():
    for name, groups in [("soft", 1), ("soft_groups", 2)]:
        rng, inputs = base(500, gate=())
        slots = 3
        inputs["phi"] = rng.normal(size=(E * slots, M)) * 0.4
        per = len(inputs["x"]) // groups

        def forward(v, case):
            logits = v["x"] @ v["phi"].T
            combine = softmax(logits)
            dispatch = np.concatenate([softmax(logits[g * per : (g + 1) * per], axis=0) for g in range(groups)])
            ys = []
            for g in range(groups):
                part = slice(g * per, (g + 1) * per)
                rows = dispatch[part].T @ v["x"][part]
                out = [ffn(rows[e * slots : (e + 1) * slots], v["w1"][e], v["w2"][e]) for e in range(E)]
                ys.append(combine[part] @ np.concatenate(out))
            return {"dispatch": dispatch, "combine": combine, "y": np.concatenate(ys), "logits": logits}

        run(name, inputs, forward, ["x", "phi"], dict(gate="soft", slots=slots, groups=groups), z_weight=0.0)


top_k_cases()
ties_case()
sigmoid_cases()
x_moe_cases()
expert_choice_cases()
soft_cases()
