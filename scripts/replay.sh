#!/usr/bin/env bash
# What the replay of a layer's CUDA graph, forward and backward, takes beside the sum of what its kernels take, which Nsight
# Compute measures one by one: the tests cuda_time_of_a_replay_* (tests/it/cuda/replay.rs). Needs ncu.
#
#   scripts/replay.sh [IT]        the integration tests' binary, by default pack/it (scripts/pack-gpu-tests.sh)
set -euo pipefail

it=${1:-pack/it}
[ -x "$it" ] || { echo "$0: $it: no such program; scripts/pack-gpu-tests.sh makes it" >&2; exit 1; }
command -v ncu > /dev/null || { echo "$0: ncu, Nsight Compute's command, is not in PATH" >&2; exit 1; }
# Not in the loop's head, where a failure would go unseen.
tests=$("$it" --list --ignored | sed -n 's/: test$//p' | grep cuda_time_of_a_replay) ||
  { echo "$0: $it has no test called cuda_time_of_a_replay_*" >&2; exit 1; }
log=$(mktemp)
for test in $tests; do
  "$it" --ignored --exact "$test" --nocapture --test-threads 1 | grep takes
  # Clocks and caches as they are in a run. Only the last replay is recorded.
  ncu --profile-from-start off --graph-profiling node --clock-control none --cache-control none \
    --metrics gpu__time_duration.sum --csv --log-file "$log" \
    "$it" --ignored --exact "$test" --test-threads 1 > /dev/null
  python3 - "$log" << 'P'
import csv, sys
rows = [line for line in open(sys.argv[1]) if line.startswith('"')]
unit = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3}
times = [float(r["Metric Value"].replace(",", "")) * unit[r["Metric Unit"]] for r in csv.DictReader(rows)]
print(f"  its {len(times)} kernels take {sum(times):.1f} us")
P
done
rm -f "$log"
