#!/usr/bin/env bash
# gpu_run.sh - on the GPU machine: everything there is to run from a bundle of gpu_bundle.sh. Short table last.
#
#     gpu_run.sh RESULTS_DIR [PART]...
#
#   tests          the GPU tests; with 2 GPUs or more also what several ranks do, and do when one dies
#   sanitize       memcheck, racecheck (with RACE=1's test), initcheck, synccheck over the GPU tests
#   bench [NAME]   the kernels beside the streaming read; NAME: only cases whose name contains it
#   e2e            fovead --backend cuda alone, and with 2 GPUs or more on 2 ranks: the C clients' end-to-end tests, tests/python
#   service        a rank's step beside its kernel; bench_service, batch 1 x 128k and 64 x 32k tokens, TCP and unix, beside
#                  the bare echo
#   mixed          decode of 8 sessions while a prompt of 128k is prefilled, and alone: bench_mixed, by time and uncut
#   transformers   Hugging Face models generate the same tokens as with SDPA, on one rank and on two
#   scale [N]      bench/scale/run_gpus.sh over N GPUs (all that there are)
#   peers          PyTorch's and FlashInfer's attention kernels at the shapes of `bench`, and one table of all
#
# Without PARTs: tests e2e bench. Every command is bounded, and all together by FV_RUN_SECONDS (560); a part that finds
# no time left is reported as such. FV_KERNELS_GIB, FV_SERVICE_GIB: GPU memory to take there (0 = most of it);
# FV_SERVICE_CASES: batch x context (1x131072 64x32768); FV_SCALE_ONLY=mla: only what bench_scale has of it;
# FV_RUN_RANKS=2: e2e and transformers only so many ranks; FV_RUN_BACKEND=cpu FV_RUN_GPUS=2: a dry run without a GPU.
# RESULTS_DIR gets table.txt and results.tar.gz (logs and figures), rewritten after every command.
# Exit status: of the first command that failed; every part is run.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
[[ $# -ge 1 ]] || { sed -n '2,22p' "$0" && exit 2; }
mkdir -p "$1" && results=$(cd "$1" && pwd)
shift
[[ $# -gt 0 ]] || set -- tests e2e bench
readonly deadline=$((SECONDS + ${FV_RUN_SECONDS:-560}))
work=$(mktemp -d)
mkdir "$work/results"
status=0

# ---------------------------------------------------------------- the machine

unpack() {
    [[ ! -d $here/bin && -e $here/bundle.tar.xz ]] || return 0
    bundle=$work/bundle
    mkdir "$bundle"
    tar -xJf "$here/bundle.tar.xz" -C "$bundle" 2>/dev/null ||
        python3 -m tarfile -e "$here/bundle.tar.xz" "$bundle"
}

# What only this machine lacks is taken from the spare folders: mpirun and libmpi must be of one version.
use_spare_libraries() {
    local lib known
    known=$(ldconfig -p)
    for lib in "$bundle"/lib-spare/*; do
        [[ ! -e $lib || -e $bundle/lib/${lib##*/} ]] || grep -qF "${lib##*/} " <<<"$known" ||
            ln -s "../lib-spare/${lib##*/}" "$bundle/lib/"
    done
}

use_spare_python() {
    export PYTHONPATH=$bundle/client/python PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
    python3 -c 'import fovea._pb.attention_pb2' 2>/dev/null ||
        PYTHONPATH=$bundle/python-spare/protobuf:$PYTHONPATH
    python3 -c 'import grpc_reflection, grpc_health' 2>/dev/null ||
        PYTHONPATH=$PYTHONPATH:$bundle/python-spare/grpc
}

# Of the system's NCCL and PyTorch's the one of the version whose headers the build used, which its device API demands;
# else the newest.
choose_nccl() {
    local found
    found=$(python3 - "$(cat "$bundle/nccl_version")" <<'PYTHON'
import ctypes, pathlib, sys
wanted = int(sys.argv[1])
places = [pathlib.Path(entry) / "nvidia/nccl/lib/libnccl.so.2" for entry in sys.path]
best = (False, 0, "")
for name in ["libnccl.so.2", *(str(place) for place in places if place.exists())]:
    try:
        version = ctypes.c_int()
        ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL).ncclGetVersion(ctypes.byref(version))
        best = max(best, (version.value == wanted, version.value, name))
    except OSError:
        continue
print(*best[1:])
PYTHON
    )
    nccl_version=${found%% *}
    [[ $found != */* ]] || LD_LIBRARY_PATH=$(dirname "${found#* }")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
}

describe() {
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv,noheader
    echo "commit $(cat "$here/commit"), $n_gpus GPU(s), NCCL $nccl_version (built with $(cat "$bundle/nccl_version")), $(mpirun --version 2>/dev/null | head -n 1)"
}

# ---------------------------------------------------------------- running

say() { echo "$*" | tee -a "$results/table.txt"; }

pack() { tar -czf "$results/results.tar.gz.new" -C "$work" results && mv "$results"/results.tar.gz{.new,}; }

time_left() { echo $((deadline - SECONDS)); }

# run NAME SECONDS COMMAND...: log to NAME.log, one line here
run() {
    local name=$1 limit=$2 log=$work/results/$1.log begin=$SECONDS rc counts
    shift 2
    if [[ $(time_left) -lt 10 ]]; then
        say "$(printf '%-28s not run: no time left' "$name")"
        [[ $status -ne 0 ]] || status=124
        return 1
    fi
    [[ $limit -lt $(time_left) ]] || limit=$(time_left)
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    rc=$?
    counts=$(grep -hE '^\[  (PASSED|FAILED)  \] [0-9]+ test|^=* ?[0-9]+ (passed|failed|skipped).* in |ERROR SUMMARY|RACECHECK SUMMARY' \
        "$log" | sed 's/=//g; s/^ *//; s/ *$//' | tail -n 2 | paste -sd ';')
    case $rc in
    0) say "$(printf '%-28s ok %4d s  %s' "$name" $((SECONDS - begin)) "$counts")" ;;
    77) say "$(printf '%-28s skipped    %s' "$name" "$(tail -n 1 "$log")")" ;;
    *)
        say "$(printf '%-28s FAILED (%d) %4d s  %s' "$name" "$rc" $((SECONDS - begin)) "$counts")"
        grep -vE '^\[ (RUN|      OK) ' "$log" | grep -E 'ERROR|rror:|FAIL|assert|fovead|expected' | head -n 25
        tail -n 8 "$log"
        [[ $status -ne 0 ]] || status=$rc
        ;;
    esac
    pack
    return "$rc"
}

mpi() { echo "mpirun --oversubscribe -np $1"; } # N: the command that starts N ranks

has() { [[ -x $bundle/bin/$1 ]]; }

# ---------------------------------------------------------------- parts

part_tests() {
    local test name
    for test in "$bundle"/bin/test_{cuda,gpu,nccl}_* "$bundle"/bin/test_*_{cuda,nccl}; do
        name=${test##*/}
        [[ -x $test ]] && run "tests-$name" 200 "$test"
    done
    [[ $n_gpus -lt 2 || $backend != cuda ]] ||
        run tests-gpu-ranks 200 "$bundle/tests/deploy/test_gpu_ranks.sh" "$bundle/bin/fovead" "$bundle/bin/fovea"
}

# TOOL TEST [NAME...]: a sanitizer each for these tests of TEST, side by side; without names one for all
sanitize() {
    local tool=$1 test=$2
    has "$test" || return
    shift 2
    # shellcheck disable=SC2016 # for the shell inside
    FV_GPU_QUICK=1 run "sanitize-$tool-$test" 120 bash -c '
        tool=$1 test=$2 folder=$(mktemp -d) status=0 pids=()
        shift 2
        for name in "${@:-}"; do
            compute-sanitizer --tool "$tool" --error-exitcode 99 "$test" ${name:+"$name"} >"$folder/${name:-all}" 2>&1 &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
        cat "$folder"/*
        exit $status' sanitize "$tool" "$bundle/bin/$test" "$@"
}

part_sanitize() {
    local tool test
    sanitize racecheck race_cuda_kernels bf16 f16 f32 f16_wide bf16_q_parts
    for tool in memcheck initcheck synccheck; do
        sanitize "$tool" test_cuda_kernels bf16 f16 f32 f16_wide bf16_q_parts
        for test in test_cuda_attend test_cuda_pages test_cuda_prefill test_cuda_latent test_cuda_s2; do
            sanitize "$tool" "$test"
        done
    done
}

part_bench() {
    run bench 400 "$bundle/bin/bench_kernels_cuda" "$work/results/bench.json" "${FV_KERNELS_GIB:-0}" "${1:-}"
    cat "$work/results/bench.log"
    if has bench_prefill_cuda && [[ $backend == cuda ]]; then
        run prefill 60 "$bundle/bin/bench_prefill_cuda" "$work/results/prefill.jsonl"
        cat "$work/results/prefill.log"
    fi
    if has bench_s2_cuda && [[ $backend == cuda ]]; then # 36 GiB of KV
        run s2 60 "$bundle/bin/bench_s2_cuda" "$work/results/s2.jsonl"
        cat "$work/results/s2.log"
    fi
    if has bench_latent_cuda && [[ $backend == cuda ]]; then
        run latent 60 "$bundle/bin/bench_latent_cuda" 24
        cat "$work/results/latent.log"
    fi
}

# What the backend serves, for pytest -k: CUDA ranks refuse added-up scores in this version.
served() { if [[ $backend == cuda ]]; then echo "not exact_slices and not True"; fi; }

# What N ranks of the service take to start, as words for env: for the C tests, for the Python tests.
c_service() {
    echo "FV_TEST_CLI=$bundle/bin/fovea"
    [[ $1 -eq 1 ]] || echo "FV_TEST_LAUNCH=$(mpi "$1")"
}
python_service() {
    echo "FOVEAD=$bundle/bin/fovead"
    echo "FOVEAD_ARGS=--backend=$backend"
    [[ $1 -eq 1 ]] || echo "FV_TEST_RANKS=$1"
}

pytest() { # NAME SECONDS RANKS ARGS...
    local name=$1 limit=$2 ranks=$3 words
    shift 3
    mapfile -t words < <(python_service "$ranks")
    run "$name-$ranks" "$limit" env "${words[@]}" python3 -m pytest -q -p no:cacheprovider "$@"
}

part_e2e() {
    local n name words
    for n in ${FV_RUN_RANKS:-1 2}; do
        [[ $n -le $n_gpus ]] || continue
        mapfile -t words < <(c_service "$n")
        for name in test_e2e_attend test_e2e_session test_e2e_stream test_e2e_latent test_e2e_cli; do
            has "$name" || continue
            [[ $name != test_e2e_cli || $n -eq 1 ]] || continue
            run "e2e-$name-$n" 180 env FV_TEST_FOVEAD="$bundle/bin/fovead --backend=$backend" "${words[@]}" \
                "$bundle/bin/$name"
        done
        pytest e2e-python 400 "$n" "$bundle/tests/python" --ignore-glob "$bundle/tests/python/test_transformers*" \
            -k "$(served)"
    done
}

start_fovead() { # ARGS...: its pid in $fovead; on a socket and a port
    "$bundle/bin/fovead" --backend "$backend" --listen "unix:$work/fovea.sock" --listen 127.0.0.1:7411 "$@" \
        >"$work/results/fovead.log" 2>&1 &
    fovead=$!
    for _ in {1..300}; do
        [[ -S $work/fovea.sock ]] && return 0
        kill -0 "$fovead" 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/results/fovead.log"
    return 1
}

part_service() {
    local case name memory=()
    if has bench_step_cuda && [[ $backend == cuda ]]; then
        run step 120 "$bundle/bin/bench_step_cuda" --json "$work/results/step.json"
        cat "$work/results/step.log"
    fi
    [[ ${FV_SERVICE_GIB:-0} -eq 0 ]] || memory=(--kv-memory "${FV_SERVICE_GIB}g")
    if start_fovead "${memory[@]}"; then
        for case in ${FV_SERVICE_CASES:-1x131072 64x32768}; do
            name=service-b${case%x*}-${case#*x}
            run "$name" 240 "$bundle/bin/bench_service" --connect "unix:$work/fovea.sock" --connect 127.0.0.1:7411 \
                --call stream --batch "${case%x*}" --in-flight 1 --context "${case#*x}" --rounds 5 --seconds 2 \
                --json "$work/results/$name.json"
            cat "$work/results/$name.log"
        done
    else
        say "service                      FAILED: fovead did not start"
        status=1
    fi
    kill -TERM "$fovead" 2>/dev/null
    wait "$fovead" 2>/dev/null
}

part_mixed() {
    local pieces name shape=()
    read -ra shape <<<"${FV_MIXED_SHAPE:---clients 8 --context 32768 --prompt 131072 --chunk 512}"
    for pieces in 0 8192; do # 0: by time
        name=mixed-$pieces
        if start_fovead --prefill-tokens-per-step "$pieces"; then
            run "$name" 200 "$bundle/bin/bench_mixed" --connect "unix:$work/fovea.sock" "${shape[@]}" \
                --rounds "${FV_MIXED_ROUNDS:-3}" --seconds 2 --json "$work/results/$name.json"
            cat "$work/results/$name.log"
        else
            say "$name                      FAILED: fovead did not start"
            status=1
        fi
        kill -TERM "$fovead" 2>/dev/null
        wait "$fovead" 2>/dev/null
    done
}

part_transformers() {
    local n
    for n in ${FV_RUN_RANKS:-1 2}; do
        [[ $n -le $n_gpus ]] || continue
        pytest transformers 240 "$n" -s "$bundle/tests/python/test_transformers_device.py"
        pytest transformers-families 240 "$n" "$bundle/tests/python/test_transformers.py" -k "$(served)"
    done
}

part_scale() {
    local n=${1:-$n_gpus} words
    if has bench_exchange_nccl && [[ $n -ge 2 && $backend == cuda ]]; then
        read -ra words <<<"$(mpi "$n")"
        run "exchange-nccl-$n" 120 "${words[@]}" "$bundle/bin/bench_exchange_nccl"
        cat "$work/results/exchange-nccl-$n.log"
    fi
    run "scale-$n" 540 "$bundle/bench/scale/run_gpus.sh" "$n" "$bundle/bin/bench_scale" "$work/results/scale" \
        --backend "$backend" ${FV_SCALE_ONLY:+--only "$FV_SCALE_ONLY"}
    cat "$work/results/scale-$n.log"
}

part_peers() {
    run peers 400 python3 "$bundle/bench/peers/peers.py" --bench "$bundle/bin/bench_kernels_cuda" --out "$work/results/peers"
    cat "$work/results/peers.log"
    run peers-prefill 120 python3 "$bundle/bench/peers/prefill.py" --out "$work/results/peers_prefill.json"
    cat "$work/results/peers-prefill.log"
    run peers-s2 200 python3 "$bundle/bench/peers/s2_prefill.py" --bench "$bundle/bin/bench_s2_cuda" \
        --out "$work/results/peers_s2_prefill" --seconds 150
    cat "$work/results/peers-s2.log"
}

# ---------------------------------------------------------------- main

bundle=$here
backend=${FV_RUN_BACKEND:-cuda}
trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 NCCL_NVLS_ENABLE=0
export FV_DURABILITY=${FV_DURABILITY:-none} # figures of the kernels; a mirror of the KV takes as much of /dev/shm
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader
unpack
use_spare_libraries
use_spare_python
choose_nccl
n_gpus=${FV_RUN_GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')}
: >"$results/table.txt"
say "$(describe)"
parts=" tests sanitize bench e2e service mixed transformers scale peers "
while [[ $# -gt 0 ]]; do
    [[ $parts == *" $1 "* ]] || { echo "gpu_run: unknown part $1" >&2 && exit 2; }
    part=$1
    argument=
    shift
    if [[ $# -gt 0 && $parts != *" $1 "* ]]; then
        argument=$1
        shift
    fi
    case $part in
    tests) part_tests ;;
    sanitize) part_sanitize ;;
    bench) part_bench "$argument" ;;
    e2e) part_e2e ;;
    service) part_service ;;
    mixed) part_mixed ;;
    transformers) part_transformers ;;
    scale) part_scale "$argument" ;;
    peers) part_peers ;;
    esac
done
echo
cat "$results/table.txt"
pack
exit $status
