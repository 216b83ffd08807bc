#!/usr/bin/env bash
# test.sh - every check of the project, from a fresh checkout. Ends with 0 only if none of them failed.
set -uo pipefail

usage() {
    cat <<'HELP'
usage: deploy/test.sh [STEP]...

Installs what is missing and runs the steps named, or all of them:

  scripts  shellcheck of the shell scripts, if it is installed
  asan     debug build with ASan and UBSan, warnings as errors: every C test
  headers  every public header compiles by itself
  tsan     build with TSan: unit, property and simulation tests
  release  release build (on a machine with a GPU: with CUDA)
  cuda     everything that is built with CUDA, warnings as errors; with a GPU its tests run too (needs nvcc)
  python   the Python client: types, a clean install, its tests against the numpy model, fovead alone, fovead
           on 3 ranks; what is sharded also on 2, 4 and 7
  hf       Hugging Face transformers generate through fovead, alone and on 3 ranks (installs torch: 6 GB)
  faults   ranks, spare, coordinator and mpirun are killed and stopped at each station of a step (tests/fault)
  live     broken HTTP/2 and mutated messages against fovead with sanitizers (tests/fuzz/live; the step asan builds it)
  soak     eight clients, three ranks, mixed load: nothing grows, nothing is left (tests/soak; --seconds 1800 is the long form)
  hosts    fovead over three hosts in network namespaces (needs root)
  slurm    the Slurm batch script on a Slurm of its own (needs root and slurm-wlm, munge)
  demo     a real model's text, token for token equal to local attention (needs the model's package)

Logs: build/logs. A step that fails does not stop the others.
HELP
}

all_steps=(scripts asan headers tsan release cuda python faults live soak hf hosts slurm demo)
steps=("$@")
[[ ${1:-} == --help ]] && usage && exit 0
[[ $# -gt 0 ]] || steps=("${all_steps[@]}")
for step in "${steps[@]}"; do
    [[ " ${all_steps[*]} " == *" $step "* ]] || {
        usage >&2
        exit 2
    }
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
logs=$root/build/logs
mkdir -p "$logs"
rm -f "$logs"/*.log # so that nothing is counted twice
jobs=$(nproc)
summary=() n_passed=0 n_skipped=0 n_failed=0

# Of a log: the lines that a reader wants when the step failed.
show_failure() {
    local found
    found=$(grep -nE 'error:|FAILED|FAIL |\*\*\*Failed|\*\*\*Timeout|ERROR:|WARNING: ThreadSanitizer' "$1" | tail -n 30)
    echo "${found:-$(tail -n 30 "$1")}"
}

# The counts that ctest and pytest close with.
counts_of() {
    grep -hE 'tests passed, .* out of|^=* ?[0-9]+ (passed|failed|skipped|deselected).* in ' "$1" |
        sed 's/=//g; s/^ *//; s/ *$//' | paste -sd ';' | sed 's/;/; /g'
}

step() { # NAME COMMAND...
    local name=$1 log=$logs/$1.log begin=$SECONDS code=0 verdict=ok counts
    shift
    printf '%-8s ... ' "$name"
    "$@" >"$log" 2>&1
    code=$?
    case $code in
    0) n_passed=$((n_passed + 1)) ;;
    77)
        verdict=skipped
        n_skipped=$((n_skipped + 1))
        ;;
    *)
        verdict=FAILED
        n_failed=$((n_failed + 1))
        ;;
    esac
    counts=$(counts_of "$log")
    printf '%s in %d s  %s\n' "$verdict" $((SECONDS - begin)) "$counts"
    summary+=("$(printf '%-8s %-7s %4d s  %s' "$name" "$verdict" $((SECONDS - begin)) "$counts")")
    if [[ $verdict == FAILED ]]; then
        show_failure "$log"
        echo "(all of it: ${log#"$root"/})"
    elif [[ $verdict == skipped ]]; then
        tail -n 1 "$log"
    fi
}

run_scripts() {
    command -v shellcheck >/dev/null || {
        echo "shellcheck is not installed"
        return 77
    }
    shellcheck deploy/*.sh bench/*/*.sh deploy/fovead-run deploy/slurm/*.sbatch tests/deploy/*.sh .ci/run
}

run_asan() {
    cmake --preset debug-asan && cmake --build --preset debug-asan && ctest --preset debug-asan -j "$jobs"
}

run_headers() { cmake --preset debug-asan && cmake --build --preset headers; }

run_tsan() {
    cmake --preset debug-tsan && cmake --build --preset debug-tsan && ctest --preset debug-tsan -j "$jobs"
}

run_release() { deploy/setup.sh; }

# No GPU is needed to compile; where there is none, the tests of label gpu load and skip themselves.
run_cuda() {
    local nvcc
    nvcc=$(deploy/find_nvcc.sh) || {
        echo "$nvcc"
        return 77
    }
    cmake --preset cuda -DCMAKE_CUDA_COMPILER="$nvcc" && cmake --build --preset cuda &&
        cmake --build --preset cuda --target fv_kernels_sm80 && ctest --preset gpu
}

# The package by itself: its types, and that pip installs it with all that it needs into an empty environment.
check_package() {
    local work code=0
    (cd client/python && "$root/.venv/bin/mypy" --cache-dir "$root/build/mypy" fovea) || code=1
    work=$(mktemp -d)
    # (of a copy: pip would also take what an earlier build has left in the folder)
    mkdir "$work/package" && cp -r client/python/{pyproject.toml,README.md,fovea} "$work/package" &&
        python3 -m venv "$work/venv" &&
        "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$work/package" &&
        (cd "$work" && venv/bin/python -I -c 'import fovea, fovea.stream, fovea.demo; print("installed:", fovea.__file__)') ||
        code=1
    rm -rf "$work"
    return $code
}

run_python() {
    local fovead=$root/build/release/bin/fovead code=0 ranks
    check_package || code=1
    .venv/bin/python -m pytest -q tests/python || code=1
    FOVEAD=$fovead .venv/bin/python -m pytest -q tests/python || code=1
    FOVEAD=$fovead FV_TEST_RANKS=3 .venv/bin/python -m pytest -q tests/python || code=1
    for ranks in 2 4 7; do
        FOVEAD=$fovead FV_TEST_RANKS=$ranks .venv/bin/python -m pytest -q tests/python/test_attend.py \
            -k "sharding or ragged or random_traffic" || code=1
    done
    FOVEAD=$fovead FV_TEST_RANKS=4 .venv/bin/python -m pytest -q tests/python/test_latent.py || code=1
    return $code
}

# The integration is proved against the real library, so its absence is a failure and not a skip.
run_hf() {
    local fovead=$root/build/release/bin/fovead code=0
    .venv/bin/pip install --quiet --disable-pip-version-check -r client/python/requirements-hf.txt || return 1
    .venv/bin/python -c 'import torch, transformers' || return 1
    FOVEAD=$fovead .venv/bin/python -m pytest -q tests/python/test_transformers.py || code=1
    FOVEAD=$fovead FV_TEST_RANKS=3 .venv/bin/python -m pytest -q tests/python/test_transformers.py || code=1
    FOVEAD=$fovead FV_TEST_RANKS=2 .venv/bin/python -m pytest -q tests/python/test_transformers_device.py || code=1
    return $code
}

# 50 runs for each of eight kinds of fault; without spares; with KV that moves; some at level host. --runs 2000 is the long form.
run_faults() {
    local faulty=build/release/bin/fovead_faulty disk code=0
    cmake --build build/release --target fovead_faulty || return 1
    .venv/bin/python tests/fault/kill_matrix.py --fovead $faulty --runs 400 --heartbeat-ms 100 || code=1
    .venv/bin/python tests/fault/kill_matrix.py --fovead $faulty --runs 96 --heartbeat-ms 100 --spares 0 --only worker || code=1
    .venv/bin/python tests/fault/kill_matrix.py --fovead $faulty --runs 112 --heartbeat-ms 100 --moves --only worker || code=1
    disk=$(mktemp -d -p "${FV_TEST_DISK:-/var/tmp}")
    .venv/bin/python tests/fault/kill_matrix.py --fovead $faulty --runs 32 --heartbeat-ms 100 --durability host --disk-dir "$disk" || code=1
    rm -rf "$disk"
    return $code
}

run_live() {
    cmake --preset debug-asan && cmake --build --preset debug-asan --target fovead &&
        .venv/bin/python tests/fuzz/live/live.py --fovead build/debug-asan/bin/fovead --seconds 20
}

run_soak() { .venv/bin/python tests/soak/soak.py --fovead build/release/bin/fovead --seconds 25; }

run_hosts() { tests/deploy/test_hosts.sh build/release/bin/fovead .venv/bin/python; }

run_slurm() { tests/deploy/test_slurm.sh build/release/bin/fovead build/release/bin/fovea; }

run_demo() { deploy/demo.sh --check --max-tokens 24 --frontends 2; }

setup_args=(--test --no-build)
[[ " ${steps[*]} " == *" demo "* ]] && setup_args+=(--model)
step setup deploy/setup.sh "${setup_args[@]}"
for step in "${steps[@]}"; do
    step "$step" "run_$step"
done

echo
echo "summary"
printf '  %s\n' "${summary[@]}"
if [[ $n_failed -gt 0 ]]; then
    echo "$n_failed steps FAILED, $n_passed passed, $n_skipped skipped"
    exit 1
fi
if [[ $n_skipped -gt 0 ]]; then
    echo "$n_passed steps passed, $n_skipped skipped"
else
    echo "all $n_passed steps passed"
fi
