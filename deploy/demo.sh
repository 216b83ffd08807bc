#!/usr/bin/env bash
# demo.sh - from a fresh checkout to text by a real model whose attention is computed by Fovea.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: deploy/demo.sh [--ranks N] [--keep] [OPTION of the demo]...

Installs what is missing, builds, starts fovead on N ranks of this host, and generates text with
SmolLM2-135M-Instruct: numpy computes the model, Fovea every attention call.

  --ranks N       ranks of the service (default 3)
  --keep          leave the service running afterwards
  --check         also run with local attention; fail unless the token ids are identical
  --prompt TEXT   repeatable; --max-tokens N, --frontends N, --temperature T, --sharding MODE ...:
                  see .venv/bin/python -m fovea.demo --help

Left to itself (--sharding auto) the service keeps sessions as short as these on one rank; to show more of it
the demo asks for heads: with 3 ranks each holds one of the model's 3 KV heads.
HELP
}

ranks=3 keep=false demo_args=(--sharding heads)
while [[ $# -gt 0 ]]; do
    case $1 in
    --ranks) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { usage >&2 && exit 2; } && ranks=$2 && shift ;;
    --keep) keep=true ;;
    --help) usage && exit 0 ;;
    *) demo_args+=("$1") ;;
    esac
    shift
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/deploy/setup.sh" --model

work=$(mktemp -d)
address=unix:$work/fovea.sock
service=''

stop_service() {
    if [[ -n $service ]]; then
        kill -TERM "$service" 2>/dev/null || true
        wait "$service" || echo "demo: the service ended with code $?" >&2
    fi
    rm -rf "$work"
}
trap stop_service EXIT

# A thousand tokens of this model take 45 MiB of KV in fp32, so half a GiB a rank is plenty.
"$root/deploy/fovead-run" --fovead "$root/build/release/bin/fovead" -n "$ranks" \
    --listen "$address" --kv-memory 512m >"$work/fovead.log" 2>&1 &
service=$!
for _ in {1..300}; do
    [[ -S $work/fovea.sock ]] && break
    kill -0 "$service" 2>/dev/null || break
    sleep 0.1
done
cat "$work/fovead.log"
[[ -S $work/fovea.sock ]] || {
    echo "demo: the service did not start" >&2
    exit 1
}

"$root/.venv/bin/python" -m fovea.demo --address "$address" ${demo_args[@]+"${demo_args[@]}"}

if $keep; then
    trap - EXIT
    disown "$service"
    echo "the service goes on at $address (log: $work/fovead.log); to stop it: kill $service"
fi
