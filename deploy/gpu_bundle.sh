#!/bin/sh
# gpu_bundle.sh - a folder that runs on a machine with an NVIDIA driver: binaries, and the shared libraries beside them.
#
#     deploy/gpu_bundle.sh [BUILD_DIR [BUNDLE_DIR [TARGET ...]]]
#
# Builds with FV_WITH_CUDA=ON (nvcc 13.0 or newer) and copies TARGETs (default: the GPU tests and benchmark) to
# BUNDLE_DIR/bin, and what they load, less the C library and the driver, to BUNDLE_DIR/lib, where their run path points
# (the old kind, which the libraries' own needs follow too). The service: name fovead and fovea as TARGETs.
# RACE=1 adds race_cuda_attend, the test in the form that racecheck follows (docs/gpu.md).
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build-cuda}
bundle=${2:-$root/.carry}
if [ $# -ge 2 ]; then shift 2; else shift $#; fi
[ $# -gt 0 ] || set -- test_cuda_attend test_cuda_pages bench_kernels_cuda

# configure DIR MORE...
configure() {
    dir=$1
    shift
    # shellcheck disable=SC2016 # $ORIGIN is for the loader
    cmake -S "$root" -B "$dir" -G Ninja -DFV_WITH_CUDA=ON -DFV_WERROR=ON -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_BUILD_RPATH='$ORIGIN/../lib' -DCMAKE_EXE_LINKER_FLAGS=-Wl,--disable-new-dtags \
        -DCMAKE_CUDA_COMPILER="${NVCC:-/usr/local/cuda/bin/nvcc}" "$@" >/dev/null
}

configure "$build"
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
if [ -n "${RACE:-}" ]; then
    configure "$build-race" -DCMAKE_CUDA_FLAGS=-DFV_LEAN_ALL_ARRIVE
    nice -n 5 cmake --build "$build-race" -j "${JOBS:-2}" --target test_cuda_attend
    cp "$build-race/bin/test_cuda_attend" "$bundle/bin/race_cuda_attend"
fi
strip "$bundle"/bin/*
cp "$root/deploy/gpu_run.sh" "$bundle/"
git -C "$root" rev-parse HEAD >"$bundle/commit" 2>/dev/null || echo unknown >"$bundle/commit"
du -sh "$bundle"
