#!/usr/bin/env python3
"""Writes the contracts of the kernels into docs/kernels.md, from the kernels' own headers and parameter lists.

    scripts/kernel-docs.py            (needs g++ and the CUDA headers: CUDA_HOME, or scripts/install-cuda.sh)

A kernel file says in its first comment what its entry points do and how they are launched; this copies that, and puts
the entry points with their parameters below it, as the preprocessor sees them.
"""

import glob
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGE = os.path.join(ROOT, "docs", "kernels.md")
MARK = "<!-- From here on written by scripts/kernel-docs.py. -->"
DTYPES = ("bf16", "f16", "f32")


def headers():
    home = os.environ.get("CUDA_HOME")
    found = ([home + "/include"] if home else []) + glob.glob(ROOT + "/.cuda/lib/*/site-packages/nvidia/cu13/include")
    found += ["/usr/local/cuda/include"]
    for folder in found:
        if os.path.isfile(folder + "/cuda_bf16.h"):
            return folder
    sys.exit("kernel-docs: no CUDA headers; set CUDA_HOME or run scripts/install-cuda.sh")


def entry_points(path, include):
    """(name, parameters) of every entry point."""
    command = ["g++", "-E", "-P", "-x", "c++", "-std=c++17", "-DFSMOE_DOCS", "-I" + ROOT + "/kernels", "-I" + include, path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\s+", " ", text)
    # What stands between the linkage and the name: attributes, in brackets of their own.
    found = re.findall(r'extern "C" (?:(?!extern "C")[^{;])*?\b(\w+)\(((?:[^()]|\([^()]*\))*)\) ?\{', text)
    return [(name, parameters.replace("fsmoe::", "").strip()) for name, parameters in found]


def family(name):
    """A name without what tells the members of its family apart, and that."""
    parts = name.split("_")
    cut = len(parts)
    while cut > 1 and (parts[cut - 1] in DTYPES or re.fullmatch(r"[vu]?\d+", parts[cut - 1]) or re.fullmatch(r"b\d+", parts[cut - 1])):
        cut -= 1
    return "_".join(parts[:cut]), "_".join(parts[cut:])


def signatures(points):
    """One line per family: its names with their endings in braces, and its parameters."""
    families = {}
    for name, parameters in points:
        stem, ending = family(name)
        # The first dtype of the name is T; its members' other types differ only in that.
        dtype = next((p for p in ending.split("_") if p in DTYPES), None)
        if dtype and len([p for p in ending.split("_") if p in DTYPES]) == 1:
            parameters = re.sub(rf"\b{dtype}\b", "T", parameters)
        families.setdefault(stem, []).append((ending, parameters))
    lines = []
    for stem, members in families.items():
        by_parameters = {}
        for ending, parameters in members:
            by_parameters.setdefault(parameters, []).append(ending)
        if len(by_parameters) > 1 and all("bf16" in ending or "f16" in ending or "f32" in ending for ending, _ in members):
            # Two types: the names say which, in the parameters' order.
            by_parameters = {re.sub(r"\b(bf16|f16|f32)\b\*", "T*", members[0][1]): [ending for ending, _ in members]}
        for parameters, endings in by_parameters.items():
            names = stem
            if endings != [""]:
                names += "_" + (endings[0] if len(endings) == 1 else "{" + ",".join(endings) + "}")
            lines.append(wrapped(f"{names}({parameters})"))
    return lines


def wrapped(line, width=118):
    if len(line) <= width:
        return line
    head, rest = line.split("(", 1)
    out, current = [], head + "("
    for piece in re.split(r"(?<=,) ", rest):
        if len(current) + len(piece) + 1 > width:
            out.append(current.rstrip())
            current = "    "
        current += piece + " "
    return "\n".join(out + [current.rstrip()])


def comment(path):
    lines = []
    with open(path) as file:
        for line in file:
            if not line.startswith("//"):
                break
            lines.append(line[2:].removeprefix(" ").rstrip())
    return lines


def main():
    include = headers()
    with open(PAGE) as file:
        hand_written = file.read().split(MARK)[0].rstrip()
    out = [hand_written, "", MARK, ""]
    folder = None
    for path in sorted(glob.glob(ROOT + "/kernels/**/*.cu", recursive=True)):
        relative = os.path.relpath(path, ROOT + "/kernels")
        if os.path.dirname(relative) != folder:
            folder = os.path.dirname(relative)
            out += [f"## {folder}", ""]
        points = entry_points(path, include)
        if not points:
            sys.exit(f"kernel-docs: no entry points found in {relative}")
        out += [f"### {relative}", "", "```text", *comment(path), "```", "", "```cuda", *signatures(points), "```", ""]
    text = "\n".join(out).rstrip() + "\n"
    with open(PAGE, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
