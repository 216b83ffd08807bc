#!/bin/sh
# gpu_run.sh - on the GPU machine: tests, sanitizers, benchmark, from a bundle of gpu_bundle.sh. Short table last.
#
#     gpu_run.sh RESULTS_DIR [tests] [sanitize] [bench [NAME_FILTER]]
#
# Exit status: of the first part that failed; every part is run and bounded in time.
set -u

here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
[ $# -gt 0 ] || set -- tests sanitize bench
mkdir -p "$out"
status=0

# run NAME SECONDS COMMAND...: log to RESULTS_DIR/NAME.log, one line here
run() {
    name=$1
    limit=$2
    shift 2
    begin=$(date +%s)
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
    echo "$name: exit $rc, $(($(date +%s) - begin)) s"
    if [ $rc -ne 0 ]; then
        grep -vE '^\[ (RUN|      OK) ' "$out/$name.log" | head -40
        [ $status -ne 0 ] || status=$rc
    fi
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
echo "commit $(cat "$here/commit")"
while [ $# -gt 0 ]; do
    case $1 in
    tests)
        for test in "$here"/bin/test_cuda_*; do
            run "$(basename "$test")" 200 "$test"
        done
        ;;
    sanitize)
        for tool in memcheck initcheck synccheck racecheck; do
            test=$here/bin/test_cuda_attend
            if [ "$tool" = racecheck ]; then
                test=$here/bin/race_cuda_attend
                [ -x "$test" ] || continue
            fi
            FV_GPU_QUICK=1 run "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 99 "$test"
        done
        ;;
    bench)
        filter=
        if [ $# -gt 1 ]; then
            case $2 in tests | sanitize | bench) ;; *) filter=$2 && shift ;; esac
        fi
        run bench 400 "$here/bin/bench_kernels_cuda" "$out/bench.json" "${FV_BENCH_GIB:-0}" "$filter"
        cat "$out/bench.log"
        ;;
    esac
    shift
done
exit $status
