#!/usr/bin/env bash
# test_fovead.sh FOVEAD FOVEA - the process itself: start, banner, stop, exit codes; alone and under mpirun.
#
# Goal:   every way to start says what it started, every way to end has the exit code the documentation gives it.
# Method: real processes on a unix socket in a directory of their own.
set -uo pipefail

fovead=$1 fovea=$2
work=$(mktemp -d)
address=unix:$work/s.sock
n_failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_pml=ob1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_orte_enable_recovery=1
unset FOVEA_EXIT_FILE
trap 'rm -rf "$work"' EXIT

fail() {
    echo "FAIL $*"
    sed 's/^/    /' "$work/log" | tail -n 20
    n_failed=$((n_failed + 1))
}

expect() { # WHAT PATTERN: in the log
    grep -qE -- "$2" "$work/log" || fail "$1: the log has no \"$2\""
}

start() { # COMMAND...: in the background, until it listens
    : >"$work/log" # the last one's must not be read
    "$@" >"$work/log" 2>&1 &
    job=$!
    for _ in {1..200}; do
        grep -q 'listening on' "$work/log" && return 0
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
    fail "start: $*"
    return 1
}

finish() { # WHAT CODE
    local code
    wait "$job"
    code=$?
    [[ $code -eq $2 ]] || fail "$1: exit code $code, expected $2"
}

ranks() { # N OPTION...
    local n=$1
    shift
    start mpirun --oversubscribe -np "$n" "$fovead" --listen "$address" --kv-memory 16m "$@"
}

rank_pid() { # N: of the running job
    pgrep -P "$job" | sed -n "$(($1 + 1))p"
}

alone() {
    start "$fovead" --listen "$address" --kv-memory 16m || return
    expect alone 'fovead [0-9.]+: 1 rank, exchange none'
    expect alone 'rank 0 on .*: cpu \(.*\), KV 16.0 MiB'
    expect alone 'memory: KV cache 16.0 MiB'
    "$fovea" --address "$address" status >"$work/status" || fail "alone: fovea status"
    grep -q serving "$work/status" || fail "alone: status does not say serving"
    "$fovead" --listen "$address" --kv-memory 16m >"$work/second" 2>&1
    [[ $? -eq 1 ]] || fail "alone: a second server on the same socket must end with 1"
    kill -TERM "$job"
    finish alone 0
    expect alone 'stopped cleanly'
    [[ ! -e $work/s.sock ]] || fail "alone: the socket is left behind"
}

drained_by_rpc() {
    start "$fovead" --listen "$address" --kv-memory 16m || return
    "$fovea" --address "$address" drain >/dev/null || fail "drain: fovea drain"
    finish drain 0
}

several_ranks() { # CONTROL_ADDRESS
    ranks 3 --control-address "$1" || return
    expect "$1" '3 ranks, exchange mpi'
    expect "$1" 'rank 2 on .*: cpu'
    expect "$1" 'memory: KV cache 48.0 MiB'
    "$fovea" --address "$address" bench --layers 1 --context 100 --duration 0.2 \
        --sharding context --shard-tokens 64 >/dev/null || fail "$1: fovea bench"
    kill -TERM "$(rank_pid 0)"
    finish "$1" 0
    expect "$1" 'stopped cleanly'
}

dedicated() {
    ranks 2 --dedicated-coordinator || return
    expect dedicated 'rank 0 on .*: none \(coordinator only\), KV 0 B'
    "$fovea" --address "$address" bench --layers 1 --context 100 --duration 0.2 >/dev/null ||
        fail "dedicated: fovea bench"
    kill -TERM "$(rank_pid 0)"
    finish dedicated 0
}

dead_rank() { # RANK SIGNAL
    local file=$work/exit
    rm -f "$file"
    FOVEA_EXIT_FILE=$file ranks 3 || return
    kill "-$2" "$(rank_pid "$1")" || kill -KILL "$job"
    wait "$job"
    [[ $(cat "$file" 2>/dev/null) == 3 ]] || fail "dead rank $1: rank 0 did not end with 3"
    expect "dead rank $1" "rank $1 is gone: its control socket closed"
    [[ -z $(pgrep -f "$address") ]] || fail "dead rank $1: processes are left behind"
}

usage_errors() {
    local code
    while IFS='|' read -r expected text options; do
        # shellcheck disable=SC2086 # options are words
        "$fovead" $options >"$work/log" 2>&1
        code=$?
        [[ $code -eq $expected ]] || fail "$options: exit code $code, expected $expected"
        expect "$options" "$text"
    done <<EOF
2|kv_memory.*given "lots"|--kv-memory lots
2|no-such-option|--no-such-option
2|/nonexistent|--config /nonexistent
1|given true for one rank, expected at least two|--dedicated-coordinator --listen $address --kv-memory 16m
1|/nonexistent/s.sock|--listen unix:/nonexistent/s.sock --kv-memory 16m
0|^kv_memory = 16m|--kv-memory 16m --print-config
0|kv-memory|--help
0|^fovead [0-9]|--version
EOF
    "$fovead" --kv-memory 16m --print-config >"$work/conf"
    "$fovead" --config "$work/conf" --print-config | cmp -s - "$work/conf" ||
        fail "--print-config: does not read back"
}

alone
drained_by_rpc
usage_errors
for control in auto 127.0.0.1:0 "unix:$work/control.sock"; do
    several_ranks "$control"
done
dedicated
dead_rank 2 KILL
dead_rank 1 SEGV

if [[ $n_failed -gt 0 ]]; then
    echo "$n_failed failed"
    exit 1
fi
echo "all fine"
