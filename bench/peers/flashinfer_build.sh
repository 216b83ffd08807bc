#!/usr/bin/env bash
# flashinfer_build.sh - FlashInfer's decode kernels as two small libraries, for a GPU machine without network.
#
#     bench/peers/flashinfer_build.sh WORK_DIR [PYTHON]      result: WORK_DIR/flashinfer (10 MB)
#
# Takes the sources from the flashinfer-python wheel and compiles what it would compile at first use, for head_dim 128,
# bf16 and compute capability 9.0; no GPU is needed. PYTHON (default python3) must have torch, filelock and ninja: only the
# generator of the sources imports it, the libraries do not depend on its version. Then: FV_FLASHINFER=WORK_DIR/flashinfer
# deploy/gpu_bundle.sh carries it, and peers.py finds it beside itself.
set -euo pipefail

readonly FLASHINFER=0.7.2.post1 TVM_FFI=0.1.15.post2
[[ $# -ge 1 ]] || { sed -n '2,4p' "$0" >&2 && exit 2; }
mkdir -p "$1" && work=$(cd "$1" && pwd)
python=${2:-python3}
out=$work/flashinfer
mkdir -p "$out/site"

pip() { python3 -m pip --disable-pip-version-check "$@" --quiet; }

pip install --root-user-action ignore --no-deps --no-compile --upgrade --target "$work/source" flashinfer-python==$FLASHINFER
"$python" -m pip install --disable-pip-version-check --root-user-action ignore --quiet --no-deps --upgrade \
    --target "$work/here" apache-tvm-ffi==$TVM_FFI
# for the Python of the GPU machine
pip install --root-user-action ignore --no-deps --no-compile --upgrade --target "$out/site" --only-binary :all: \
    --python-version "${FV_GPU_PYTHON:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    apache-tvm-ffi==$TVM_FFI

FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_WORKSPACE_BASE=$work/build PYTHONPATH=$work/here:$work/source \
    "$python" - >"$work/ninja" <<'PYTHON'
import importlib.util
import sys
import types

# The package's own __init__ imports everything it has; the generator of sources needs little of it.
package = types.ModuleType("flashinfer")
package.__path__ = list(importlib.util.find_spec("flashinfer").submodule_search_locations)
sys.modules["flashinfer"] = package

import torch
from flashinfer.jit.attention import modules

bf16, no = torch.bfloat16, False
for spec in (
    modules.gen_batch_decode_module(bf16, bf16, bf16, torch.int32, 128, 128, 0, no, no),
    modules.gen_batch_prefill_module("fa2", bf16, bf16, bf16, torch.int32, 128, 128, 0, no, no, no),
):
    spec.write_ninja()
    print(spec.ninja_path)
PYTHON

while read -r file; do
    folder=$(dirname "$file")
    ninja -C "$(dirname "$folder")" -f "$file" -j "${JOBS:-2}" >"$work/ninja.log" || {
        tail -n 20 "$work/ninja.log" >&2
        exit 1
    }
    name=$(basename "$folder")
    cp "$folder/$name.so" "$out/${name%%_with*}.so"
done <"$work/ninja"
strip "$out"/*.so
rm -rf "$out"/site/tvm_ffi/{include,3rdparty,src}
echo "$FLASHINFER" >"$out/version"
du -sh "$out"
