#!/usr/bin/env bash
# run_gpus.sh - the scaling run over N GPUs: correctness first, then every figure, then plots.
#
#     bench/scale/run_gpus.sh N [BENCH_SCALE [RESULTS_DIR [OPTION of bench_scale]...]]
#
# 1. N ranks equal one, and both equal fp64, in every sharding mode: heads, context, heads x context; nothing is timed
#    if they do not.
# 2. Strong and weak scaling, the exchange by payload: table.txt, scale.json, scale.csv, and plots where matplotlib is.
#
# One host: mpirun -np N. Several: FV_LAUNCH="srun -n 16", FV_LAUNCH="mpirun --hostfile hosts -np 16" (N is then only
# a name). FV_LAUNCH_CHECK_SECONDS, FV_LAUNCH_SECONDS: limits of both parts (180, 600).
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { sed -n '2,12p' "$0" >&2 && exit 2; }
n=$1
bench=${2:-$here/../../build/cuda/bin/bench_scale}
results=${3:-scale-$n}
shift $(($# < 3 ? $# : 3))
[[ -x $bench ]] || { echo "run_gpus: $bench is not there (build target bench_scale with FV_WITH_CUDA)" >&2 && exit 2; }
mkdir -p "$results"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink SHARP stays off: docs/gpu.md
if [[ -n ${FV_LAUNCH:-} ]]; then
    read -ra launch <<<"$FV_LAUNCH"
else
    launch=(mpirun --oversubscribe --bind-to none --mca btl "self,vader" -np "$n")
fi

# (--foreground: in our process group, so that who ends us ends the ranks, too)
echo "== $n ranks equal one?"
timeout --foreground -k 10 "${FV_LAUNCH_CHECK_SECONDS:-180}" "${launch[@]}" "$bench" --check "$@" 2>&1 | tee "$results/check.txt"
code=${PIPESTATUS[0]}
if [[ $code -ne 0 ]]; then
    echo "run_gpus: the check failed with code $code: nothing is timed"
    exit "$code"
fi
echo
echo "== figures"
timeout --foreground -k 10 "${FV_LAUNCH_SECONDS:-600}" "${launch[@]}" "$bench" --json "$results/scale.json" --csv "$results/scale.csv" "$@" 2>&1 |
    tee "$results/table.txt"
code=${PIPESTATUS[0]}
[[ $code -eq 0 ]] || echo "run_gpus: bench_scale ended with code $code"
if [[ -s $results/scale.json ]] && python3 -c 'import matplotlib' 2>/dev/null; then
    python3 "$here/plot.py" "$results/scale.json" "$results/scale" || code=1
fi
exit "$code"
