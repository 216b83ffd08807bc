#!/usr/bin/env bash
# test_slurm.sh - deploy/slurm/fovea.sbatch on a Slurm of its own: one node, this machine, for the time of the test.
# usage: test_slurm.sh FOVEAD FOVEA_CLI     (exit 77: not root, or no Slurm here)
set -u
[[ $# -eq 2 ]] || { echo "usage: $0 FOVEAD FOVEA_CLI" >&2 && exit 2; }
fovead=$(realpath "$1") cli=$(realpath "$2")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ $(id -u) -ne 0 ]] || ! command -v slurmctld slurmd munged sbatch >/dev/null; then
    echo "needs root, and the packages slurm-wlm and munge"
    exit 77
fi
work=$(mktemp -d)
n_failed=0
started_munged=false

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

eventually() { # CONDITION...
    for _ in {1..300}; do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    return 1
}

cleanup() {
    scancel --full --signal KILL --user root 2>/dev/null
    local file
    for file in "$work"/run/*.pid; do
        [[ -e $file ]] && kill "$(cat "$file")" 2>/dev/null
    done
    $started_munged && kill "$(cat /run/munge/munged.pid)" 2>/dev/null
    sleep 0.5
    rm -rf "$work"
}
trap cleanup EXIT

start_slurm() {
    mkdir -p "$work"/{state,spool,run,log}
    echo 'CgroupPlugin=cgroup/v1' >"$work/cgroup.conf"
    cat >"$work/slurm.conf" <<CONF
ClusterName=fovea
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=26917
SlurmdPort=26918
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/run/slurmctld.pid
SlurmdPidFile=$work/run/slurmd.pid
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=pmix
ReturnToService=2
KillWait=5
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$work/slurm.conf
    if ! pgrep -x munged >/dev/null; then
        install -d -o munge -g munge -m 755 /run/munge
        runuser -u munge -- munged --force 2>/dev/null
        started_munged=true
    fi
    slurmctld && slurmd -N localhost
    eventually is_node_idle
}

is_node_idle() { [[ $(sinfo -h -o %T) == idle ]]; }

is_job_over() { [[ -z $(squeue -h -j "$job" 2>/dev/null) ]]; }

has_ranks() {
    "$cli" --address "$1" --token-file "fovea-$job.token" status 2>/dev/null | grep -q 'serving.* 3 ranks'
}

refuses_strangers() { "$cli" --address "$1" status 2>&1 | grep -q UNAUTHENTICATED; }

submit() {
    cd "$work" || exit 1
    job=$(FOVEA=$root FOVEAD=$fovead FOVEA_PORT=7499 sbatch --parsable --ntasks-per-node 3 --nodes 1 \
        "$root/deploy/slurm/fovea.sbatch" --kv-memory 64m)
}

check "Slurm is up" start_slurm || cat "$work"/log/*
submit
check "the job says where it listens" eventually test -s "fovea-$job.address"
check "three ranks serve there" eventually has_ranks "127.0.0.1:7499"
check "not those without the job's token" refuses_strangers "127.0.0.1:7499"
scancel --batch --signal TERM "$job"
check "scancel --signal TERM ends it" eventually is_job_over
check "after a drain" grep -q 'stopped cleanly' "fovea-$job.log"
check "the address is withdrawn" test ! -e "fovea-$job.address"
check "and the token" test ! -e "fovea-$job.token" -a ! -e "fovea-$job.tokens"

submit
check "again three ranks serve" eventually has_ranks "127.0.0.1:7499"
kill -KILL "$(pgrep --newest -f "^$fovead --listen 0.0.0.0:7499 ")"
check "after a rank is killed the launcher starts again" eventually grep -q 'starting again' "fovea-$job.log"
check "and three ranks serve in the same job" eventually has_ranks "127.0.0.1:7499"
scancel --batch --signal TERM "$job"
check "which then ends" eventually is_job_over
check "after a drain, too" grep -q 'stopped cleanly' "fovea-$job.log"

[[ $n_failed -eq 0 ]] || tail -n 40 "$work"/log/*.log "$work"/fovea-*.log
echo "$n_failed failed"
[[ $n_failed -eq 0 ]]
