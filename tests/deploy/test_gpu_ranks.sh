#!/usr/bin/env bash
# test_gpu_ranks.sh FOVEAD FOVEA - two GPU ranks, one of which dies or hangs in the middle of traffic.
#
# Goal:   requests end with UNAVAILABLE and the service with exit code 3 in bounded time, over windows and over send and
#         receive, whatever the rank that stays is doing; no process is left.
# Method: real processes under mpirun, `fovea bench` with its context over both ranks, SIGKILL and SIGSTOP to rank 1.
# Exit code 77: fewer than two GPUs, or no mpirun.
set -uo pipefail

fovead=$(realpath "$1") fovea=$(realpath "$2")
work=$(mktemp -d)
address=unix:$work/s.sock
n_failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_pml=ob1 OMPI_MCA_odls_base_sigkill_timeout=0
export NCCL_NVLS_ENABLE=0
readonly LIMIT_S=15 # from the signal to the last process's end; the step's deadline is 2 s of it
trap 'jobs -p | xargs -r kill -KILL 2>/dev/null; rm -rf "$work"' EXIT

[[ $(nvidia-smi -L 2>/dev/null | grep -c '^GPU') -ge 2 ]] || { echo "skipped: fewer than two GPUs" && exit 77; }
command -v mpirun >/dev/null || { echo "skipped: no mpirun" && exit 77; }

fail() {
    echo "FAIL $*"
    sed 's/^/    /' "$work/log" "$work/bench" 2>/dev/null | tail -n 30
    n_failed=$((n_failed + 1))
}

ranks() { # OPTION...: two ranks, until they listen
    : >"$work/log"
    rm -f "$work/exit"
    FOVEA_EXIT_FILE=$work/exit mpirun --bind-to none --oversubscribe -np 2 "$fovead" --listen "$address" --backend cuda \
        --kv-memory 1g --step-deadline-ms 2000 "$@" >"$work/log" 2>&1 &
    job=$!
    for _ in {1..600}; do
        grep -q 'listening on' "$work/log" && return 0
        kill -0 "$job" 2>/dev/null || break
        sleep 0.1
    done
    fail "start: $*"
    return 1
}

rank_pid() { # RANK: its process among mpirun's children
    local pid
    for pid in $(pgrep -P "$job"); do
        tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$1" && echo "$pid"
    done
}

until_steps() { # (no retries: a service that is gone shall not be waited for)
    local end=$((SECONDS + 20))
    while [[ $SECONDS -lt $end ]]; do
        kill -0 "$job" 2>/dev/null || return 1
        timeout 2 "$fovea" --address "$address" --retry 0 status --json 2>/dev/null | grep -qE '"n_steps":[[:space:]]*[1-9][0-9]' && return 0
        sleep 0.1
    done
    return 1
}

lose() { # SIGNAL OPTION...
    local signal=$1 begin client code what="SIG$1 ${*:2}" pids
    shift
    # A dead rank must not make mpirun kill the other; a stopped one nobody but mpirun ends.
    export OMPI_MCA_orte_enable_recovery=0
    [[ $signal != KILL ]] || OMPI_MCA_orte_enable_recovery=1
    ranks "$@" || return
    grep -qE "exchange nccl" "$work/log" || fail "$what: the banner names no NCCL exchange"
    timeout 60 "$fovea" --address "$address" --retry 0 bench --layers 1 --context 300 --duration 40 --sharding context \
        --shard-tokens 64 >"$work/bench" 2>&1 &
    client=$!
    if ! until_steps; then
        fail "$what: no step ran"
        for pid in $(pgrep -P "$job"); do # where its threads wait, for who reads this
            echo "    process $pid: $(cat "/proc/$pid"/task/*/wchan 2>/dev/null | sort | uniq -c | paste -sd ' ')"
            command -v gdb >/dev/null && timeout 10 gdb -p "$pid" -batch -ex 'thread apply all bt 12' 2>/dev/null | grep -E '^#|^Thread' | tail -n 80
        done
        kill -KILL "$client" "$job" 2>/dev/null
        return
    fi
    pids=$(pgrep -P "$job")
    kill "-$signal" "$(rank_pid 1)" || fail "$what: rank 1 is not there"
    begin=$SECONDS
    for ((i = 0; i < LIMIT_S * 10; i++)); do
        kill -0 "$job" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$job" 2>/dev/null; then
        fail "$what: still there after $LIMIT_S s"
        # shellcheck disable=SC2086 # one word each
        kill -KILL $pids "$job" 2>/dev/null
    fi
    wait "$job"
    wait "$client"
    code=$?
    [[ $code -eq 1 ]] || fail "$what: the client ended with $code, expected 1"
    grep -qi unavailable "$work/bench" || fail "$what: the client was not told UNAVAILABLE"
    for _ in {1..50}; do # mpirun may end before rank 0 has written it down
        [[ ! -s $work/exit ]] || break
        sleep 0.1
    done
    # (a second line names a host that was cut off)
    [[ $(head -n 1 "$work/exit" 2>/dev/null) == 3 ]] || fail "$what: rank 0 ended with $(head -n 1 "$work/exit" 2>&1), expected 3"
    for pid in $pids; do
        for ((; i < LIMIT_S * 10; i++)); do # the driver takes its time to clear up after a process
            [[ -d /proc/$pid ]] || break
            sleep 0.1
        done
        [[ ! -d /proc/$pid ]] || fail "$what: process $pid is still there"
    done
    echo "$what: over after $((SECONDS - begin)) s: $(grep -hE 'the service ends|exit 3' "$work/log" | tail -n 1)"
}

lose KILL --exchange nccl
lose STOP --exchange nccl
lose KILL --exchange nccl-collective
lose STOP --exchange nccl-collective
[[ $n_failed -eq 0 ]] || exit 1
echo "passed"
