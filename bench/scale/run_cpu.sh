#!/usr/bin/env bash
# run_cpu.sh - the scaling run on CPU ranks, small: the same checks, the same figures, a few minutes.
#
#     bench/scale/run_cpu.sh [RANKS [BENCH_SCALE [RESULTS_DIR]]]         (default: 2 and then 4 ranks, one thread each)
#
# Contexts are divided by FV_SHRINK (32). More ranks than cores show that it works, not how fast it is.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
bench=${2:-$here/../../build/release/bin/bench_scale}
for n in ${1:-2 4}; do
    "$here/run_gpus.sh" "$n" "$bench" "${3:-scale-cpu}-$n" --backend cpu --threads 1 --shrink "${FV_SHRINK:-32}" \
        --rotate 128m --seconds 0.3
done
