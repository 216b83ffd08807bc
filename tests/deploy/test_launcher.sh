#!/usr/bin/env bash
# test_launcher.sh - what fovead-run promises: exit codes, clean stop, settings, no leftovers.
# usage: test_launcher.sh   (exit 77: no mpirun here)
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launcher=$here/../../deploy/fovead-run
command -v mpirun >/dev/null || exit 77
unset FOVEAD "${!OMPI_MCA_@}"
work=$(mktemp -d)
bin=$(mktemp -d) # of stand-ins
export FAKE_DIR=$work
trap 'jobs -p | xargs -r kill -KILL 2>/dev/null; rm -rf "$work" "$bin"' EXIT
n_failed=0

check() { # NAME CONDITION...
    local name=$1
    shift
    if "$@"; then
        echo "ok    $name"
    else
        echo "FAIL  $name: $*"
        n_failed=$((n_failed + 1))
    fi
}

fresh() { rm -rf "${work:?}"/*; }

wait_for() { # FILE...
    local file
    for file in "$@"; do
        for _ in {1..200}; do
            [[ -e $work/$file ]] && break
            sleep 0.05
        done
        [[ -e $work/$file ]] || return 1
    done
}

start() { # launcher options; leaves its pid in $pid
    fresh
    # (a background job of a script ignores SIGINT, and so would the launcher)
    env --default-signal=INT "$launcher" --fovead "$here/fake_fovead.sh" --restarts 0 "$@" 2>"$work/stderr" &
    pid=$!
}

finish() { # leaves the exit code in $code
    wait "$pid"
    code=$?
}

gone() { # PIDFILE
    for _ in {1..100}; do
        kill -0 "$(cat "$work/$1")" 2>/dev/null || return 0
        sleep 0.05
    done
    return 1
}

test_usage() {
    "$launcher" --help | grep -q 'exit codes: 0' && code=0 || code=1
    check "help" [ "$code" -eq 0 ]
    "$launcher" -n 0 2>"$work/stderr"
    check "-n 0 is refused" [ $? -eq 2 ]
    check "and it says why" grep -q '"0" given' "$work/stderr"
    "$launcher" -n 2>/dev/null
    check "a missing value is refused" [ $? -eq 2 ]
    "$launcher" --hosts a --hostfile b 2>/dev/null
    check "hosts twice is refused" [ $? -eq 2 ]
    "$launcher" --hostfile /nowhere/hosts 2>/dev/null
    check "a missing hostfile is refused" [ $? -eq 2 ]
    "$launcher" --fovead /nowhere/fovead -n 2 2>"$work/stderr"
    check "a missing program is a start-up failure" [ $? -eq 1 ]
    check "and is named" grep -q '/nowhere/fovead' "$work/stderr"
}

test_exit_codes() {
    local code expected
    for expected in 0 1 2 3 4; do
        FAKE=exit$expected start -n 2
        finish
        check "exit code $expected is passed on" [ "$code" -eq "$expected" ]
    done
    FAKE=exit77 start -n 1
    finish
    check "an unknown exit code is a lost rank" [ "$code" -eq 3 ]
}

test_arguments() {
    FV_KV_MEMORY=1g start -n 2 --listen unix:/tmp/x -- --hosts not-mine "two words"
    finish
    check "fovead's options reach every rank" \
        [ "$(paste -sd, "$work/args.1")" = "--listen,unix:/tmp/x,--hosts,not-mine,two words" ]
    check "so do its variables" grep -q '^FV_KV_MEMORY=1g$' "$work/env.1"
    check "ranks that wait yield" grep -q '^OMPI_MCA_mpi_yield_when_idle=1$' "$work/env.1"
    check "a rank for each of -n" [ -e "$work/args.0" ]
    OMPI_MCA_mpi_yield_when_idle=0 start -n 1
    finish
    check "the user's own setting stands" grep -q '^OMPI_MCA_mpi_yield_when_idle=0$' "$work/env.0"
}

test_stop() {
    local signal
    for signal in TERM INT; do
        FAKE=serve start -n 3
        wait_for ready.0 ready.1 ready.2
        kill -$signal "$pid"
        finish
        check "SIG$signal drains: exit code" [ "$code" -eq 0 ]
        check "SIG$signal drains: ranks were told" wait_for drained.0 drained.1 drained.2
    done
    # not every mpirun passes SIGUSR1 on; this one never sees it
    mkdir -p "$bin"
    printf '#!/usr/bin/env python3\nimport os, signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\nos.execv("%s", sys.argv)\n' \
        "$(command -v mpirun)" >"$bin/mpirun"
    chmod +x "$bin/mpirun"
    PATH=$bin:$PATH FAKE=serve start -n 3
    wait_for ready.0 ready.1 ready.2
    kill -TERM "$pid"
    finish
    check "a deaf mpirun: exit code" [ "$code" -eq 0 ]
    check "a deaf mpirun: ranks were told" wait_for drained.0 drained.1 drained.2
    FAKE=deaf start -n 2
    wait_for ready.0 ready.1
    kill -TERM "$pid"
    sleep 0.3
    kill -TERM "$pid"
    finish
    check "a second SIGTERM kills" [ "$code" -eq 4 ]
    check "and nothing is left" gone pid.1
    FAKE=deaf start -n 2 --stop-timeout 1
    wait_for ready.0 ready.1
    kill -TERM "$pid"
    finish
    check "a stop that takes too long is cut" [ "$code" -eq 4 ]
    check "and that is said" grep -q 'not stopped after 1 s' "$work/stderr"
    FAKE=quit start -n 2
    finish
    check "who does not follow rank 0 is not waited for, however short its life" [ "$code" -eq 0 ]
    check "and that is said, too" grep -q 'mpirun waits for a rank' "$work/stderr"
    check "and nothing is left of it" gone pid.1
}

test_deaths() {
    local victim
    for victim in 0 2; do
        FAKE=serve start -n 3
        wait_for ready.0 ready.1 ready.2
        kill -KILL "$(cat "$work/pid.$victim")"
        finish
        check "rank $victim killed: exit code" [ "$code" -eq 3 ]
        check "rank $victim killed: it is said" grep -q 'a rank was lost' "$work/stderr"
        check "rank $victim killed: the others are gone" gone pid.1
    done
    FAKE=serve start -n 2
    wait_for ready.0 ready.1
    kill -KILL "$pid"
    finish
    check "launcher killed: ranks do not live on" gone pid.1
}

test_restarts() {
    local victim
    FAKE=lose2 start -n 1 --restarts 3
    for _ in {1..200}; do
        [[ $(wc -l 2>/dev/null <"$work/runs") -eq 3 ]] && break
        sleep 0.05
    done
    wait_for ready.0
    check "after two losses it serves" [ "$(wc -l <"$work/runs")" -eq 3 ]
    kill -TERM "$pid"
    finish
    check "and stops cleanly" [ "$code" -eq 0 ]
    FAKE=lose99 start -n 1 --restarts 2
    finish
    check "a crash loop ends: exit code" [ "$code" -eq 3 ]
    check "a crash loop ends: so many starts" [ "$(wc -l <"$work/runs")" -eq 3 ]
    check "a crash loop ends: it is said" grep -q 'giving up' "$work/stderr"
    FAKE=exit1 start -n 1 --restarts 5
    finish
    check "what does not start is not started again" [ "$code" -eq 1 ]
    for victim in rank mpirun; do
        FAKE=serve start -n 2 --restarts 1
        wait_for ready.0 ready.1
        rm "$work/ready.0"
        if [[ $victim == rank ]]; then
            kill -KILL "$(cat "$work/pid.0")" "$(cat "$work/pid.1")"
        else
            cp "$work/pid.1" "$work/old"
            kill -KILL "$(ps -o ppid= -p "$(cat "$work/pid.0")")"
        fi
        check "$victim killed: it starts again" wait_for ready.0
        [[ $victim == rank ]] || check "mpirun killed: no rank is left of it" gone old
        wait_for ready.1
        kill -TERM "$pid"
        finish
        check "$victim killed: then it stops cleanly" [ "$code" -eq 0 ]
    done
}

test_sweep() {
    local uid dir map
    uid=$(id -u)
    dir=${TMPDIR:-/tmp}/ompi.test-launcher.$uid
    map=/dev/shm/vader_segment.test-launcher.$uid.1
    mkdir -p "$dir/pid.999999999/0" "$dir/pid.$$"
    dd if=/dev/zero of="$map.dead" bs=4096 count=1 status=none
    dd if=/dev/zero of="$map.used" bs=4096 count=1 status=none
    touch -d '1 minute ago' "$map.dead" "$map.used"
    python3 -c '
import mmap, sys, time
with open(sys.argv[1], "r+b") as f:
    held = mmap.mmap(f.fileno(), 4096)
print("mapped", flush=True)
time.sleep(60)' "$map.used" >"$work/mapper" &
    wait_for mapper
    until grep -q mapped "$work/mapper"; do sleep 0.05; done
    "$launcher" --sweep
    check "a dead job's directory is swept" [ ! -e "$dir/pid.999999999" ]
    check "a living job's directory stays" [ -e "$dir/pid.$$" ]
    check "a dead job's segment is swept" [ ! -e "$map.dead" ]
    check "a segment in use stays" [ -e "$map.used" ]
    kill %% 2>/dev/null
    rm -rf "$dir" "$map.used"
}

for t in test_usage test_exit_codes test_arguments test_stop test_deaths test_restarts test_sweep; do
    $t
done
echo "$n_failed failed"
[[ $n_failed -eq 0 ]]
