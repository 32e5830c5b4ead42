#!/usr/bin/env bash
# Gathers in pack/ what a GPU host without Rust needs to run the GPU tests: the release binaries of the integration tests
# and of the command, stripped. They need glibc as new as this machine's and NVIDIA's driver, nothing else.
#
#   scripts/pack-gpu-tests.sh
#   (copy pack/ over)   pack/it --ignored cuda --test-threads 1 --nocapture
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# More than this says that something is packed which should not be: the binaries are a few MiB.
LIMIT_MIB=60

executables() {
  cargo "$@" --release --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])
'
}

rm -rf pack
mkdir pack
{
  executables test --no-run --test it
  executables build --bin fsmoe
} | sort -u | while read -r name path; do
  # Both commands name the fsmoe executable; the last copy stands.
  strip -o "pack/$name" "$path"
done
for name in it fsmoe; do
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
((size <= LIMIT_MIB)) || {
  echo "pack-gpu-tests: pack/ is $size MiB, more than $LIMIT_MIB MiB" >&2
  exit 1
}
ls -l pack
echo "pack-gpu-tests: $size MiB; on the GPU host: pack/it --ignored cuda --test-threads 1 --nocapture"
