#!/usr/bin/env bash
# Runs the tests of tests/it/cuda/sanitize.rs, which reach every kernel on small shapes, under NVIDIA's compute-sanitizer:
# memcheck for accesses outside of memory, racecheck for races in shared memory. Fails if either finds something, or if a
# test does not end.
#
#   scripts/sanitize.sh [IT]        the integration tests' binary, by default pack/it (scripts/pack-gpu-tests.sh)
#
# TOOLS names other tools ("memcheck racecheck"), LIMIT the seconds that a test is given (120), JOBS how many run at a time (6).
set -uo pipefail

it=${1:-pack/it}
tests=$("$it" --list --ignored | sed -n 's/: test$//p' | grep '^cuda::sanitize::')
[[ $tests ]] || {
  echo "sanitize: $it has no tests of cuda::sanitize" >&2
  exit 1
}
logs=$(mktemp -d)
export it logs

check() {
  local log="$logs/$1.${2//:/_}" from=$SECONDS
  timeout "${LIMIT:-120}" compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 \
    "$it" --ignored --exact "$2" --test-threads 1 > "$log" 2>&1
  local code=$?
  # racecheck's warnings leave the exit code alone.
  ((code)) || grep -q 'SUMMARY: 0 ' "$log" || code=9
  printf '%-10s %-42s %4d s  %s\n' "$1" "$2" $((SECONDS - from)) \
    "$([[ $code == 0 ]] && echo clean || echo "exit code $code, $(grep -h SUMMARY "$log" || echo "no summary")")"
  [[ $code == 0 ]] || grep -h '=====\|panicked' "$log" | head -20
  return $code
}
export -f check

failed=0
for tool in ${TOOLS:-memcheck racecheck}; do
  xargs -P "${JOBS:-6}" -I{} bash -c "check $tool {}" <<< "$tests" || failed=1
done
rm -rf "$logs"
exit $failed
