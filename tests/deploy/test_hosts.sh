#!/usr/bin/env bash
# test_hosts.sh - fovead over three hosts: right answers, also while their network is cut, slow or lossy and daemons die; without
# restarts a killed rank or a lost host ends it with code 3.
# usage: test_hosts.sh FOVEAD PYTHON     PYTHON: with the package fovea   (exit 77: not root)
set -u
[[ $# -eq 2 ]] || { echo "usage: $0 FOVEAD PYTHON" >&2 && exit 2; }
fovead=$1 python=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
netns=$root/deploy/netns.sh
has_all() { # COMMAND...
    local each
    for each in "$@"; do command -v "$each" >/dev/null || return 1; done
}
if [[ $(id -u) -ne 0 ]] || ! has_all ip mpirun nft ethtool python3; then
    echo "needs root (network namespaces), iproute2, nftables, ethtool and Open MPI"
    exit 77
fi
"$python" -c 'import fovea' 2>/dev/null || {
    echo "$python has no package fovea"
    exit 77
}
work=$(mktemp -d)
trap '"$netns" down; rm -rf "$work"' EXIT
n_failed=0
readonly address=198.18.77.1:7411

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

start() { # OPTION...: fovead over all hosts; leaves the launcher's pid in $pid
    : >"$work/log"
    "$netns" on fv1 "$root/deploy/fovead-run" --fovead "$fovead" --hosts "$("$netns" hosts)" \
        --interface eth0 --listen "$address" --insecure --kv-memory 64m "$@" >>"$work/log" 2>&1 &
    pid=$!
    for _ in {1..300}; do
        grep -q 'listening on' "$work/log" && return 0
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}

finish() { # waits at most 20 s; leaves the exit code in $code
    for _ in {1..200}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$pid" 2>/dev/null; then
        echo "FAIL  the service did not end within 20 s"
        n_failed=$((n_failed + 1))
        kill -KILL "$pid"
    fi
    wait "$pid"
    code=$?
}

rank_on() { # HOST: the pid of its fovead
    local p
    for p in $(ip netns pids "$1"); do
        [[ $(cat "/proc/$p/comm") == fovead ]] && echo "$p" && return
    done
}

is_empty() { # HOST: within 10 s
    for _ in {1..100}; do
        [[ -z $(ip netns pids "$1") ]] && return 0
        sleep 0.1
    done
    return 1
}

has_no_rank() { # HOST: within 10 s
    for _ in {1..100}; do
        [[ -z $(rank_on "$1") ]] && return 0
        sleep 0.1
    done
    return 1
}

attend() { "$netns" on fv2 "$python" "$here/hosts_attend.py" "$address" 3 --sharding "$1"; }

"$netns" down
"$netns" up 3

check "fovead starts over three hosts" start
check "each host has its rank" grep -q 'rank 2 on fv3' "$work/log"
check "context over three hosts equals numpy" attend context
check "heads over three hosts equal numpy" attend heads
kill -TERM "$pid"
finish
check "SIGTERM: clean stop" [ "$code" -eq 0 ]

check "it starts again" start --restarts 0
kill -KILL "$(rank_on fv3)"
finish
check "a killed rank: exit code" [ "$code" -eq 3 ]
check "a killed rank: it is said which" grep -q 'rank 2 is gone' "$work/log"
check "a killed rank: fv2 is empty" is_empty fv2

check "it starts once more" start --restarts 0
"$netns" link fv3 down
finish
check "a lost host: exit code" [ "$code" -eq 3 ]
check "a lost host: it is said" grep -q 'rank 2' <(grep -E 'error|lost' "$work/log")
check "a lost host: fv2 is empty" is_empty fv2
# (mpirun's daemon there waits for the link)
check "a lost host: its own rank leaves too" has_no_rank fv3

# The rank of the lost host starts on another one, and the service goes on.
"$netns" link fv3 up
"$netns" down
"$netns" up 3
restarted() { # the service has started N times, within 30 s
    for _ in {1..300}; do
        [[ $(grep -c 'listening on' "$work/log") -ge $1 ]] && return 0
        sleep 0.1
    done
    return 1
}

# Traffic from another host runs while something happens to the network or a process.
during() { # NAME SECONDS OPTION... -- COMMAND...
    local name=$1 seconds=$2 options=() client
    shift 2
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    : >"$work/traffic"
    "$netns" on fv2 "$python" "$here/hosts_attend.py" "$address" 3 --seconds "$seconds" ${options[@]+"${options[@]}"} \
        >"$work/traffic" 2>&1 &
    client=$!
    for _ in {1..300}; do
        grep -q 'under way' "$work/traffic" && break
        sleep 0.1
    done
    "$@"
    check "$name: right answers" wait "$client"
    tail -n 1 "$work/traffic"
}

n_starts() { grep -c 'listening on' "$work/log"; }

outage() { # HOST SECONDS
    "$netns" link "$1" down
    sleep "$2"
    "$netns" link "$1" up
}

lossy() { # HOST PERCENT SECONDS
    "$netns" loss "$1" "$2"
    sleep "$3"
    "$netns" loss "$1" 0
}

slow() { # HOST MS SECONDS
    local relay
    "$netns" delay "$1" "$2" >"$work/relay" 2>&1 &
    relay=$!
    for _ in {1..100}; do
        grep -q ready "$work/relay" && break
        sleep 0.05
    done
    check "$2 ms of delay: the relay works" grep -q ready "$work/relay"
    sleep "$3"
    kill -TERM "$relay"
    wait "$relay"
}

daemon_on() { # HOST: the pid of its orted
    local p
    for p in $(ip netns pids "$1"); do
        [[ $(cat "/proc/$p/comm") == orted ]] && echo "$p" && return
    done
}

signal_daemon() { kill "-$2" "$(daemon_on "$1")"; } # HOST SIGNAL

check "it starts, to be restarted" start --restarts 9
during "a link down for 3 s, in the middle of steps" 5 -- outage fv3 3
# (TCP tries again 0.2, 0.6, 1.4, 3 and 6.2 s after what was lost: an outage that just outlasts the fourth passes the limit of 5 s)
check "a link down for 3 s: at most one restart" [ "$(n_starts)" -le 2 ]
during "5 % of packets lost" 5 -- lossy fv3 5 4
during "200 ms of delay" 5 -- slow fv3 200 4
check "loss and delay: at most one restart more" [ "$(n_starts)" -le 3 ]
during "a stopped orted" 2 -- signal_daemon fv3 STOP
signal_daemon fv3 CONT
during "a killed orted" 6 -- signal_daemon fv2 KILL
check "a killed orted: it starts again" restarted 2
during "a link down for good, in the middle of steps" 8 --may-lose -- "$netns" link fv3 down
check "a link down for good: it starts again" restarted 3
check "a link down for good: without that host" grep -q 'host fv3 is cut off: its rank 2 starts on fv1' "$work/log"
check "a link down for good: right answers" attend context
"$netns" link fv3 up
kill -TERM "$pid"
finish
check "a link down for good: clean stop" [ "$code" -eq 0 ]

[[ $n_failed -eq 0 ]] || cat "$work/log"
echo "$n_failed failed"
[[ $n_failed -eq 0 ]]
