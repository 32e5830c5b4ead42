#!/usr/bin/env bash
# Gathers in pack/ what a GPU host without Rust needs to run the GPU tests and benchmarks: the release binaries of the
# integration tests, of the command (`fsmoe bench`) and of the Criterion benchmarks of the GPU, stripped. They need glibc as
# new as this machine's and NVIDIA's driver, nothing else. The other Criterion benchmarks are of the CPU and stay here.
#
#   scripts/pack-gpu-tests.sh [it] [fsmoe] [cuda]        by default it and fsmoe; every one has the kernels in it
#   (copy pack/ over)   pack/it --ignored cuda --test-threads 1 --nocapture
#                       pack/fsmoe bench layer --json > ours.jsonl
#                       pack/cuda --bench [NAME]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# More than this each says that something is packed which should not be: the kernels are most of a binary.
LIMIT_MIB=30

wanted=("${@:-it}")
(($#)) || wanted+=(fsmoe)
for name in "${wanted[@]}"; do
  [[ $name == @(it|fsmoe|cuda) ]] || {
    echo "pack-gpu-tests: '$name' is none of it, fsmoe, cuda" >&2
    exit 1
  }
done

executables() {
  local profile=(--release)
  # Benchmarks are built as releases are, and cargo says so by another flag.
  [[ $1 == bench ]] && profile=()
  cargo "$@" "${profile[@]}" --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])
'
}

rm -rf pack
mkdir pack
for name in "${wanted[@]}"; do
  case $name in
    it) executables test --no-run --test it ;;
    cuda) executables bench --no-run --bench cuda ;;
    fsmoe) executables build --bin fsmoe ;;
  esac
done | sort -u | while read -r name path; do
  # Tests and benchmarks bring the command along, whose executable they may run.
  [[ " ${wanted[*]} " != *" $name "* ]] || strip -o "pack/$name" "$path"
done
for name in "${wanted[@]}"; do
  [[ -x pack/$name ]] || {
    echo "pack-gpu-tests: cargo built no executable '$name'" >&2
    exit 1
  }
done

# On a GPU host a binary without kernels would fail for want of them, far from the cause.
fatbin=$(find "${CARGO_TARGET_DIR:-target}/release/build" -path '*/fsmoe-*/out/kernels.fatbin' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
[[ -s $fatbin ]] || {
  echo "pack-gpu-tests: the build embedded no CUDA kernels; run scripts/install-cuda.sh first" >&2
  exit 1
}
size=$(du -sm pack | cut -f1)
((size <= LIMIT_MIB * ${#wanted[@]})) || {
  echo "pack-gpu-tests: pack/ is $size MiB, more than $LIMIT_MIB MiB a binary" >&2
  exit 1
}
ls -l pack
echo "pack-gpu-tests: $size MiB; on the GPU host: pack/it --ignored cuda --test-threads 1 --nocapture"
