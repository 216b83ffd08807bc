#!/bin/sh
# gpu_bundle.sh - a folder that runs on a machine with an NVIDIA driver: binaries, and the shared libraries beside them.
#
#     deploy/gpu_bundle.sh [BUILD_DIR [BUNDLE_DIR [TARGET ...]]]
#
# Builds with FV_WITH_CUDA=ON (nvcc 13.0 or newer) and copies TARGETs (default: the GPU tests and benchmark) to
# BUNDLE_DIR/bin, and what they load, less the C library and the driver, to BUNDLE_DIR/lib, where their run path points.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build-cuda}
bundle=${2:-$root/.carry}
[ $# -ge 2 ] && shift 2 || shift $#
[ $# -gt 0 ] || set -- test_cuda_attend test_cuda_pages bench_kernels_cuda

cmake -S "$root" -B "$build" -G Ninja -DFV_WITH_CUDA=ON -DFV_WERROR=ON -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_BUILD_RPATH='$ORIGIN/../lib' -DCMAKE_CUDA_COMPILER="${NVCC:-/usr/local/cuda/bin/nvcc}" >/dev/null
nice -n 5 cmake --build "$build" -j "${JOBS:-2}" --target "$@"

rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/lib"
for target in "$@"; do
    cp "$build/bin/$target" "$bundle/bin/"
    ldd "$build/bin/$target" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' |
        grep -vE '/(libc|libm|libdl|librt|libpthread|libcuda|ld-linux[^/]*)\.so' | while read -r lib; do
        cp -nL "$lib" "$bundle/lib/"
    done
done
cp "$root/deploy/gpu_run.sh" "$bundle/"
git -C "$root" rev-parse HEAD >"$bundle/commit" 2>/dev/null || echo unknown >"$bundle/commit"
du -sh "$bundle"
