#!/usr/bin/env python3
"""Joins the rows of `fsmoe bench layer --json` and of peers.py in one table, and one plot.

    python3 scripts/compare.py ours.jsonl peers.jsonl [--plot layers.svg] [--pass forward]

The table is Markdown: a line per shape, load, capacity factor, type, gate and expert, a column per implementation (and per
order, where there are rows of several) with its best mode's median
in milliseconds and its efficiency, three times the dense cuBLAS forward of the same useful FLOPs over its time (once for
`--pass forward`). The fastest is bold. The plot (PNG or SVG, by its name; needs matplotlib) has the efficiencies.
"""

import argparse
import json
import sys


def read(paths):
    """The layers' rows of JSON-lines files; other lines of the same runs are passed over."""
    rows = []
    for path in paths:
        try:
            file = open(path)
        except OSError as error:
            raise SystemExit(f"{path}: {error.strerror}")
        with file:
            for number, line in enumerate(file, 1):
                if not line.strip().startswith("{"):
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SystemExit(f"{path}: line {number}: {error}")
                if row.get("bench") == "layer":
                    rows.append(row)
    if not rows:
        raise SystemExit(f"no rows of layers in {', '.join(paths)}")
    return rows


def key(row):
    """What is compared with each other. The order is an implementation's own affair: see `columns`."""
    return tuple(row[name] for name in ("shape", "load", "capacity_factor", "dtype", "gate", "expert", "device"))


def columns(rows):
    """Each row's column: its implementation, with the order where there are rows of several of that implementation."""
    orders = {}
    for row in rows:
        orders.setdefault(row["impl"], set()).add(row["order"])
    return [f"{row['impl']}, {row['order']}" if len(orders[row["impl"]]) > 1 else row["impl"] for row in rows]


def labels(keys):
    """A name for each key: the shape, and what else differs from the usual or between them."""
    varied = [len({key[n] for key in keys}) > 1 for n in range(7)]

    def label(key):
        shape, _, capacity, dtype, gate, expert, device = key
        parts = [shape] + ([f"f = {capacity}"] if capacity != "*" else [])
        return ", ".join(parts + [part for part, n in ((dtype, 3), (gate, 4), (expert, 5), (device, 6)) if varied[n]])

    return [label(key) for key in keys]


def join(rows, pass_):
    """{key: {column: row of the best mode}}, and the columns, ours first; both in the order of the rows."""
    joined, impls = {}, []
    for row, column in zip(rows, columns(rows)):
        if column not in impls:
            impls.append(column)
        if row["pass"] != pass_:
            continue
        found = joined.setdefault(key(row), {})
        best = found.get(column)
        if best is None or ("median_ms" in row and row["median_ms"] < best.get("median_ms", float("inf"))):
            found[column] = row
    impls.sort(key=lambda column: column.split(", ")[0] != "fsmoe")
    return joined, impls


def cell(row, fastest):
    if row is None:
        return "–"
    if "median_ms" not in row:
        return "failed"
    text = f"{row['median_ms']:.4g} ms, {row['efficiency']:.3f}"
    return f"**{text}**" if row["median_ms"] == fastest else text


def table(rows, pass_="forward+backward"):
    joined, impls = join(rows, pass_)
    lines = [
        f"| {pass_} | load | dense × {1 if pass_ == 'forward' else 3} | floor | " + " | ".join(impls) + " |",
        "|---|---|---|---|" + "---|" * len(impls),
    ]
    for label, (_, load, *_), found in zip(labels(list(joined)), joined, joined.values()):
        timed = [row for row in found.values() if "median_ms" in row]
        if not timed:
            continue
        reference = next((row for row in timed if row["impl"] == "fsmoe"), timed[0])
        times = 1 if pass_ == "forward" else 3
        fastest = min(row["median_ms"] for row in timed)
        cells = [cell(found.get(impl), fastest) for impl in impls]
        dense, floor = f"{times * reference['dense_ms']:.4g} ms", f"{reference['floor_ms']:.4g} ms"
        lines.append(f"| {label} | {load} | {dense} | {floor} | " + " | ".join(cells) + " |")
    failures = [f"- {r['impl']}, {r['shape']}, {r['mode']}: {r['error']}" for r in rows if "error" in r]
    return "\n".join(lines + (["", "Failed:", "", *failures] if failures else [])) + "\n"


def plot(rows, path, pass_="forward+backward"):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(f"--plot {path}: it needs matplotlib, which this Python does not have")

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    joined, impls = join(rows, pass_)
    joined = {where: found for where, found in joined.items() if any("median_ms" in row for row in found.values())}
    width = 0.8 / len(impls)
    colours = ["#d66024", "#2654a8", "#6f9bd8", "#8a8f98", "#b9c3d0", "#4c6b58"]
    figure, axes = plt.subplots(figsize=(max(7, 1.9 * len(joined)), 4.2))
    for i, impl in enumerate(impls):
        heights = [found.get(impl, {}).get("efficiency", 0) for found in joined.values()]
        bars = axes.bar([n + (i - (len(impls) - 1) / 2) * width for n in range(len(joined))], heights, width * 0.92,
                        label=impl, color=colours[i % len(colours)])  # fmt: skip
        axes.bar_label(bars, [f"{h:.2f}" if h else "" for h in heights], fontsize=7, padding=1)
    axes.axhline(1, color="#3c3c44", linewidth=0.8)
    names = [
        label.replace(", ", "\n") + ("" if where[1] == "uniform" else f"\n{where[1]}")
        for label, where in zip(labels(list(joined)), joined)
    ]
    axes.set_xticks(range(len(joined)), names, fontsize=8)
    axes.set_ylabel(f"share of the dense cuBLAS time, {pass_}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=len(impls), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    figure.tight_layout()
    figure.savefig(path, dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--pass", dest="pass_", choices=["forward", "forward+backward"], help="by default both tables")
    args = parser.parse_args()
    rows = read(args.files)
    for pass_ in [args.pass_] if args.pass_ else ["forward+backward", "forward"]:
        sys.stdout.write(table(rows, pass_) + "\n")
    if args.plot:
        plot(rows, args.plot, args.pass_ or "forward+backward")


if __name__ == "__main__":
    main()
