#!/usr/bin/env bash
# test_fovead.sh FOVEAD FOVEA - the process itself: start, banner, stop, exit codes; alone and under mpirun.
#
# Goal:   every way to start says what it started, every way to end has the exit code the documentation gives it.
# Method: real processes on a unix socket in a directory of their own.
set -uo pipefail

fovead=$(realpath "$1") fovea=$(realpath "$2")
launcher=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/deploy/fovead-run
work=$(mktemp -d)
address=unix:$work/s.sock
disk=$(mktemp -d -p "${FV_TEST_DISK:-/var/tmp}")
n_failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_pml=ob1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_orte_enable_recovery=1
unset FOVEA_EXIT_FILE
export FV_RESPAWN=false # what follows a loss is to be seen
# many services on one address, each of its own shape: none shall find what one before it has left
FV_STORE_DIR=$(mktemp -d -p /dev/shm) && export FV_STORE_DIR FV_STORE_DISCARD=true
trap 'jobs -p | xargs -r kill -KILL 2>/dev/null; rm -rf "$work" "$disk" "$FV_STORE_DIR"' EXIT

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

# Waits for the job, 20 s at most: what then still runs is killed, and its exit code tells.
wait_job() {
    for _ in {1..200}; do
        kill -0 "$job" 2>/dev/null || break
        sleep 0.1
    done
    kill -0 "$job" 2>/dev/null && rank_pids | xargs -r kill -KILL && kill -KILL "$job" && echo "    (killed: it did not end)" >>"$work/log"
    wait "$job"
}

finish() { # WHAT CODE
    local code
    wait_job
    code=$?
    [[ $code -eq $2 ]] || fail "$1: exit code $code, expected $2"
}

ranks() { # N OPTION...
    local n=$1
    shift
    start mpirun --oversubscribe -np "$n" "$fovead" --listen "$address" --kv-memory 16m "$@"
}

rank_pids() { pgrep -f -- "^$fovead .*--listen $address"; }

rank_pid() { # N: of the running job, those that were started later excepted
    local pid
    for pid in $(rank_pids); do
        grep -qsz '^OMPI_PARENT_PORT=' "/proc/$pid/environ" && continue
        grep -qsz "^OMPI_COMM_WORLD_RANK=$1\$" "/proc/$pid/environ" && echo "$pid"
    done
}

launched() { # OPTION...: through fovead-run
    # (a background job of a script ignores SIGINT, and so would the launcher)
    start env -u OMPI_MCA_orte_enable_recovery --default-signal=INT "$launcher" --fovead "$fovead" --restarts 0 "$@" \
        --listen "$address" --kv-memory 16m
}

newest_rank() { pgrep -n -f -- "^$fovead .*--listen $address"; }

until_logged() { # PATTERN: within 10 s
    for _ in {1..200}; do
        grep -qE -- "$1" "$work/log" && return 0
        sleep 0.05
    done
    return 1
}

nothing_left() { # WHAT: of the job that has ended
    for _ in {1..50}; do
        [[ -z $(rank_pids) ]] && return
        sleep 0.1
    done
    fail "$1: processes are left behind"
    rank_pids | xargs -r kill -KILL
}

in_status() { # FIELD PATTERN: waits until the service's status has it
    for _ in {1..100}; do
        "$fovea" --address "$address" status --json 2>/dev/null | grep -qE "\"$1\":[[:space:]]*$2\b" && return 0
        sleep 0.05
    done
    return 1
}

cpu_ticks() { cut -d ' ' -f 14 "/proc/$job/stat"; } # (user time; a tick is 10 ms)

until_busy() { # TICKS: until the service has computed for that long
    local first
    first=$(cpu_ticks)
    for _ in {1..200}; do
        [[ $(($(cpu_ticks) - first)) -ge $1 ]] && return 0
        sleep 0.05
    done
    return 1
}

free_port() { # below those that the system gives to whoever connects
    local port
    while port=$((10000 + RANDOM % 20000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

tensors() { # N: q.npy and kv.npy of N tokens, 8 heads of 64, float32, all zero
    local file
    for file in q kv; do
        printf '\x93NUMPY\x01\x00\x76\x00%-117s\n' \
            "{'descr': '<f4', 'fortran_order': False, 'shape': ($1, 8, 64), }" >"$work/$file.npy"
        truncate -s $((128 + $1 * 8 * 64 * 4)) "$work/$file.npy"
    done
}

alone() { # SIGNAL that stops it
    start "$fovead" --listen "$address" --kv-memory 16m || return
    expect alone 'fovead [0-9.]+: 1 rank, exchange none'
    expect alone 'rank 0 on .*: cpu \(.*\), KV 16.0 MiB'
    expect alone 'memory: KV cache 16.0 MiB'
    "$fovea" --address "$address" status >"$work/status" || fail "alone: fovea status"
    grep -q serving "$work/status" || fail "alone: status does not say serving"
    "$fovead" --listen "$address" --kv-memory 16m >"$work/second" 2>&1
    [[ $? -eq 1 ]] || fail "alone: a second server on the same socket must end with 1"
    kill -"$1" "$job"
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
    expect "$1" 'memory: KV cache 42.0 MiB' # (of 16 MiB a rank, 2 are for KV that moves)
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

exit_code_of_rank_0() { cat "$work/exit" 2>/dev/null; }

dead_rank() { # RANK SIGNAL
    rm -f "$work/exit"
    FOVEA_EXIT_FILE=$work/exit ranks 3 || return
    kill "-$2" "$(rank_pid "$1")" || kill -KILL "$job"
    wait_job
    [[ $(exit_code_of_rank_0) == 3 ]] || fail "dead rank $1: rank 0 did not end with 3"
    expect "dead rank $1" "rank $1 is gone: its control socket closed"
    nothing_left "dead rank $1"
}

# As dead_rank, while steps run over all ranks: the exchange breaks as well as the control socket.
dead_rank_mid_step() {
    local client
    rm -f "$work/exit"
    FOVEA_EXIT_FILE=$work/exit ranks 3 || return
    timeout 30 "$fovea" --address "$address" --retry 0 bench --layers 1 --context 300 --duration 20 \
        --sharding context --shard-tokens 64 >"$work/bench" 2>&1 &
    client=$!
    in_status n_steps '[1-9][0-9]+' || fail "dead rank mid step: no step ran: $(cat "$work/bench")"
    kill -KILL "$(rank_pid 2)" || kill -KILL "$job"
    wait_job
    [[ $(exit_code_of_rank_0) == 3 ]] || fail "dead rank mid step: rank 0 did not end with 3"
    expect "dead rank mid step" 'rank 2 is gone'
    wait "$client"
    [[ $? -eq 1 ]] || fail "dead rank mid step: the client must end with 1: $(cat "$work/bench")"
    nothing_left "dead rank mid step"
}

# A rank that lives but does nothing: after --step-deadline-ms it counts as lost.
hung_rank() {
    local begin
    launched -n 3 --step-deadline-ms 1000 --heartbeat-ms 0 || return
    kill -STOP "$(rank_pid 1)"
    begin=$SECONDS
    tensors 300
    timeout 15 "$fovea" --address "$address" --retry 0 attend -q "$work/q.npy" -k "$work/kv.npy" -v "$work/kv.npy" \
        --sharding context --shard-tokens 64 --out "$work/out.npy" >"$work/attend" 2>&1
    [[ $? -eq 1 ]] || fail "hung rank: the client must end with 1: $(cat "$work/attend")"
    finish "hung rank" 3
    [[ $((SECONDS - begin)) -lt 10 ]] || fail "hung rank: the end took $((SECONDS - begin)) s"
    expect "hung rank" 'the service ends: rank 1 '
    nothing_left "hung rank"
}

# A rank that is stopped while nothing is under way: its heartbeats are missed.
stopped_rank() {
    local begin
    launched -n 3 || return
    begin=$SECONDS
    kill -STOP "$(rank_pid 1)"
    finish "stopped rank" 3
    [[ $((SECONDS - begin)) -lt 10 ]] || fail "stopped rank: the end took $((SECONDS - begin)) s"
    expect "stopped rank" 'the service ends: rank 1 is gone: not heard for [0-9]+ ms'
    nothing_left "stopped rank"
}

# The coordinator is stopped: the others hear nothing of it and leave by themselves.
stopped_coordinator() {
    local pid
    OMPI_MCA_orte_enable_recovery=1 ranks 3 || return
    pid=$(rank_pid 0)
    kill -STOP "$pid"
    for _ in {1..100}; do
        [[ -z $(rank_pid 1)$(rank_pid 2) ]] && break
        sleep 0.1
    done
    [[ -z $(rank_pid 1)$(rank_pid 2) ]] || fail "stopped coordinator: the others did not leave"
    [[ $(grep -c 'exit 5: rank 0 was not heard for' "$work/log") -eq 2 ]] || fail "stopped coordinator: nobody says why"
    kill -KILL "$pid"
    wait_job
    nothing_left "stopped coordinator"
}

# A spare takes the place of a rank that is lost, while steps run over all ranks: the service goes on.
spare() { # SIGNAL DURABILITY
    local client
    launched -n 3 --spares 2 --durability "$2" || return
    timeout 30 "$fovea" --address "$address" bench --layers 1 --context 300 --duration "$([[ $2 == none ]] && echo 20 || echo 4)" \
        --sharding context --shard-tokens 64 >"$work/bench" 2>&1 &
    client=$!
    in_status n_steps '[1-9][0-9]+' || fail "spare: no step ran: $(cat "$work/bench")"
    kill -KILL "$(rank_pid 3)" # a spare that is lost is nobody's loss
    kill "-$1" "$(rank_pid 2)"
    if [[ $2 == none ]]; then
        wait "$client"
        grep -qE 'DATA_LOSS: .* was lost with rank 2' "$work/bench" || fail "spare: the session's loss is not said: $(cat "$work/bench")"
    else # what rank 2 held is in its slot's store
        wait "$client" || fail "spare: the session is lost: $(cat "$work/bench")"
        expect "spare" 'durability: of 1 sessions 0 are lost'
    fi
    "$fovea" --address "$address" bench --layers 1 --context 300 --duration 0.2 --sharding context --shard-tokens 64 >/dev/null ||
        fail "spare: fovea bench afterwards"
    expect "spare" 'rank 2: spare 4 on .* takes its place'
    expect "spare" 'rank 0 engine: epoch 2: repaired in [0-9]+ ms'
    kill -KILL "$(rank_pid 1)" # none is left
    finish "spare" 3
    expect "spare" 'rank 1 is lost, and no spare is left'
    nothing_left "spare"
}

# Level host: whoever takes over reads the slot's log first. That takes as long as it takes, beyond --repair-deadline-ms.
long_log() { # PROCESS that takes over, DEADLINE_MS, SECONDS, OPTION...
    local log lock size who=$1 deadline=$2 seconds=$3
    shift 3
    launched -n 3 --durability host --disk-dir "$disk" --repair-deadline-ms "$deadline" "$@" || return
    log=$(find "$disk" -name slot-0002.log)
    size=$(stat -c %s "$log")
    cp "$log" "$log.new" && truncate -s 1G "$log.new" # (zeros at its end are room; the rank has the old one's lock)
    exec {lock}<"$log.new" && flock "$lock" && mv "$log.new" "$log"
    kill -KILL "$(rank_pid 2)"
    until_logged "rank 2: $who" || fail "long log: nobody takes the place"
    sleep "$seconds" # in place of a slow disk
    truncate -s "$size" "$log"
    exec {lock}<&-
    until_logged 'epoch 2: repaired in' || fail "long log: not repaired"
    kill -TERM "$job"
    finish "long log" 0
    nothing_left "long log"
}

# A spare is stopped while it takes over, by somebody who has the lost rank's store: it is killed, and the next one takes over.
stopped_spare() {
    local journal lock first
    launched -n 3 --spares 2 || return
    first=$(rank_pid 3)
    journal=$(find "$FV_STORE_DIR" -name slot-0002.journal)
    cp "$journal" "$journal.new" # (the rank has the old one's lock)
    exec {lock}<"$journal.new" && flock "$lock" && mv "$journal.new" "$journal"
    kill -KILL "$(rank_pid 2)"
    until_logged 'rank 2: spare 3 on .* takes its place' || fail "stopped spare: the first one is not taken"
    sleep 0.1
    kill -STOP "$first"
    until_logged 'rank 2: spare 4 on .* takes its place' || fail "stopped spare: the second one is not taken"
    exec {lock}<&-
    until_logged 'epoch 3: repaired in' || fail "stopped spare: not repaired"
    grep -qs '^State:.*stopped' "/proc/$first/status" && fail "stopped spare: it still is there"
    kill -TERM "$job"
    finish "stopped spare" 0
    nothing_left "stopped spare"
}

# No spare waits: a process is started in the lost rank's place, and in that one's, while steps run over all ranks.
respawned() { # SIGNAL CONTROL_ADDRESS
    local client
    FV_RESPAWN=true launched --restarts 1 -n 3 --control-address "$2" || return
    timeout 30 "$fovea" --address "$address" bench --layers 1 --context 300 --duration 4 \
        --sharding context --shard-tokens 64 >"$work/bench" 2>&1 &
    client=$!
    in_status n_steps '[1-9][0-9]+' || fail "respawned: no step ran: $(cat "$work/bench")"
    kill "-$1" "$(rank_pid 2)"
    until_logged 'epoch 2: repaired in' || fail "respawned: not repaired"
    kill "-$1" "$(newest_rank)"
    until_logged 'epoch 3: repaired in' || fail "respawned: not repaired a second time"
    kill "-$1" "$(rank_pid 1)"
    until_logged 'epoch 4: repaired in' || fail "respawned: not repaired a third time"
    wait "$client" || fail "respawned: the client's session is lost: $(cat "$work/bench")"
    [[ $(grep -c 'durability: of 1 sessions 0 are lost' "$work/log") -eq 3 ]] || fail "respawned: other sessions than the stores had"
    [[ $(grep -c 'listening on' "$work/log") -eq 1 ]] || fail "respawned: the job was started again"
    kill -TERM "$job"
    finish respawned 0
    expect respawned 'stopped cleanly'
    nothing_left respawned
}

# The coordinator is killed: its connections linger (TIME_WAIT), and the job is started again where it was all the same.
killed_coordinator() {
    launched --restarts 1 -n 2 --control-address "127.0.0.1:$(free_port)" || return
    kill -KILL "$(rank_pid 0)"
    for _ in {1..200}; do
        [[ $(grep -c 'listening on' "$work/log") -eq 2 ]] && break
        sleep 0.05
    done
    [[ $(grep -c 'listening on' "$work/log") -eq 2 ]] || fail "killed coordinator: the job does not come back"
    kill -TERM "$job"
    finish "killed coordinator" 0
    nothing_left "killed coordinator"
}

# fovead-run is killed, and mpirun ends its ranks: that was not meant, and the sessions are there again. A stop is, and takes them away.
killed_launcher() {
    local model session
    launched -n 2 || return
    model=$("$fovea" --address "$address" models register --name killed --layers 1 --q-heads 2 --kv-heads 2 --head-dim 32) ||
        fail "killed launcher: fovea models register"
    session=$("$fovea" --address "$address" open "$model") || fail "killed launcher: fovea open"
    kill -KILL "$job"
    wait_job
    nothing_left "killed launcher"
    FV_STORE_DISCARD=false launched -n 2 || return
    "$fovea" --address "$address" sessions | grep -q "$session" || fail "killed launcher: the session is gone"
    kill -TERM "$job"
    finish "killed launcher" 0
    [[ -z $(find "$FV_STORE_DIR" -name '*.journal' 2>/dev/null) ]] || fail "killed launcher: a clean stop leaves the store"
}

# A request is under way when the signal comes: it is finished and answered before the service stops.
running_request() { # SIGNAL
    local client
    start "$fovead" --listen "$address" --kv-memory 64m --threads 1 --drain-timeout-ms 60000 || return
    tensors 8192
    timeout 60 "$fovea" --address "$address" --timeout 60 attend --keep -q "$work/q.npy" -k "$work/kv.npy" \
        -v "$work/kv.npy" --out "$work/out.npy" >"$work/attend" 2>&1 &
    client=$!
    until_busy 30 || fail "SIG$1: the request did not start: $(cat "$work/attend")"
    kill "-$1" "$job"
    kill -0 "$client" 2>/dev/null || fail "SIG$1: the request was over before the signal: nothing is shown"
    finish "SIG$1" 0
    expect "SIG$1" 'stopped cleanly'
    wait "$client" || fail "SIG$1: the running request: $(cat "$work/attend")"
    [[ -s $work/out.npy ]] || fail "SIG$1: the running request has no answer"
    rm -f "$work/out.npy"
}

hostfile() {
    echo 'localhost slots=3' >"$work/hosts"
    launched --hostfile "$work/hosts" || return
    expect hostfile '3 ranks, exchange mpi'
    "$fovea" --address "$address" bench --layers 1 --context 300 --duration 0.2 \
        --sharding context --shard-tokens 64 >/dev/null || fail "hostfile: fovea bench"
    kill -INT "$job"
    finish hostfile 0
    expect hostfile 'stopped cleanly'
    nothing_left hostfile
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

alone TERM
alone INT
drained_by_rpc
usage_errors
for control in auto 127.0.0.1:0 "unix:$work/control.sock"; do
    several_ranks "$control"
done
dedicated
dead_rank 2 KILL
dead_rank 1 SEGV
dead_rank_mid_step
hung_rank
stopped_rank
stopped_coordinator
killed_coordinator
killed_launcher
spare KILL none
spare KILL process
spare STOP process
stopped_spare
long_log 'spare 3 on .* takes its place' 1000 1.5 --spares 1
FV_RESPAWN=true long_log 'no spare waits' 1500 2.5 --restarts 1
respawned KILL "127.0.0.1:$(free_port)"
respawned STOP auto
running_request TERM
running_request INT
hostfile

if [[ $n_failed -gt 0 ]]; then
    echo "$n_failed failed"
    exit 1
fi
echo "all fine"
