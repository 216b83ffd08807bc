#!/usr/bin/env bash
# netns.sh - several hosts on one machine: each a network namespace with its own name and address.
#
# The bridge lives in a namespace of its own, so nothing of the machine's network is touched. Hosts share the
# file system and the process table: build once, kill by pid.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: netns.sh COMMAND        (as root)

  up N               hosts fv1 .. fvN at 198.18.77.1 .. N
  down               remove them, and kill what still runs there
  on HOST CMD...     run a command on a host; mpirun there starts its ranks on the other hosts
  link HOST up|down  plug or unplug a host
  loss HOST PERCENT  of the packets to and from it are lost (0: none; needs nft)
  delay HOST MS      its packets take so much longer, each way, until this command ends (needs python3, ethtool)
  hosts              their names, separated by commas

Example:  netns.sh up 3
          netns.sh on fv1 deploy/fovead-run --hosts "$(netns.sh hosts)" --interface eth0 --listen 198.18.77.1:7411 --insecure
HELP
}

readonly net=198.18.77 bridge=fvsw state=/run/fovea-netns
self=$(realpath -- "${BASH_SOURCE[0]}")
readonly self

all_hosts() { ip netns list | awk '$1 ~ /^fv[0-9]+$/ { print $1 }' | sort -V; }

up() {
    local n=$1 i j h
    ip netns add "$bridge"
    ip -n "$bridge" link set lo up
    ip -n "$bridge" link add br0 type bridge
    ip -n "$bridge" link set br0 up
    mkdir -p "$state"
    for ((i = 1; i <= n; i++)); do
        h=fv$i
        ip netns add "$h"
        ip -n "$h" link set lo up
        ip link add "v$i" netns "$bridge" type veth peer name eth0 netns "$h"
        ip -n "$bridge" link set "v$i" master br0 up
        ip -n "$h" addr add "$net.$i/24" dev eth0
        ip -n "$h" link set eth0 up
        touch "$state/uts-$h" # Open MPI tells hosts apart by their names
        unshare --uts="$state/uts-$h" hostname "$h"
        mkdir -p "/etc/netns/$h" # ip netns exec binds it over /etc/hosts
        {
            echo "127.0.0.1 localhost"
            for ((j = 1; j <= n; j++)); do echo "$net.$j fv$j"; done
        } >"/etc/netns/$h/hosts"
    done
}

down() {
    local h
    for h in $(all_hosts); do
        ip netns pids "$h" | xargs -r kill -KILL 2>/dev/null || true
        umount "$state/uts-$h" 2>/dev/null || true
        ip netns del "$h"
        rm -rf "/etc/netns/${h:?}" "$state/uts-$h"
    done
    ip netns del "$bridge" 2>/dev/null || true
    rmdir "$state" 2>/dev/null || true
}

on() {
    local h=$1
    shift
    export OMPI_MCA_plm=rsh OMPI_MCA_plm_rsh_agent="$self agent" OMPI_MCA_plm_rsh_no_tree_spawn=1
    exec ip netns exec "$h" nsenter --uts="$state/uts-$h" "$@"
}

# What mpirun calls instead of ssh: HOST 'words of a command line'...
agent() {
    local h=$1
    shift
    # (a host of its own would not have it)
    exec env -u FOVEA_RUN ip netns exec "$h" nsenter --uts="$state/uts-$h" sh -c "$*"
}

loss() {
    ip netns exec "$1" nft delete table inet fovea 2>/dev/null || true
    [[ $2 -gt 0 ]] || return 0
    ip netns exec "$1" nft -f - <<RULES
table inet fovea {
    chain in { type filter hook input priority 0; iifname "eth0" numgen random mod 100 < $2 drop; }
    chain out { type filter hook output priority 0; oifname "eth0" numgen random mod 100 < $2 drop; }
}
RULES
}

# Frames that are carried by a program must be whole, as on a wire: no checksums left to a card, none larger than they may be.
delay() {
    ip netns exec "$1" ethtool -K eth0 tx off tso off gso off gro off >/dev/null
    ip netns exec "$bridge" ethtool -K "v${1#fv}" tx off tso off gso off gro off >/dev/null
    exec ip netns exec "$bridge" python3 "$(dirname "$self")/net_delay.py" "v${1#fv}" "$2"
}

case ${1:-} in
up) [[ ${2:-} =~ ^[1-9][0-9]?$ ]] || { usage >&2 && exit 2; } && up "$2" ;;
down) down ;;
on) [[ $# -ge 3 ]] || { usage >&2 && exit 2; } && shift && on "$@" ;;
agent) shift && agent "$@" ;;
link) ip -n "$bridge" link set "v${2#fv}" "$3" ;;
loss) [[ ${3:-} =~ ^[0-9]+$ ]] || { usage >&2 && exit 2; } && loss "$2" "$3" ;;
delay) [[ ${3:-} =~ ^[0-9]+$ ]] || { usage >&2 && exit 2; } && delay "$2" "$3" ;;
hosts) all_hosts | paste -sd, ;;
--help) usage ;;
*) usage >&2 && exit 2 ;;
esac
