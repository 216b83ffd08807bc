#!/usr/bin/env bash
# gpu_bundle.sh - a folder that runs on a machine with NVIDIA GPUs and no network: binaries, libraries, clients, scripts.
#
#     deploy/gpu_bundle.sh [--tar] [BUILD_DIR [BUNDLE_DIR [TARGET ...]]]
#
# Builds with FV_WITH_CUDA=ON (nvcc 13.0 or newer) and fills BUNDLE_DIR with what gpu_run.sh needs there:
#
#     bin/        TARGETs; without any: the service, its clients' end-to-end tests, GPU tests, benchmarks
#     lib/        what they load (found by a run path of the old kind, which the libraries' own needs follow too), less
#                 the C library, the driver, NCCL, and what lib-spare/ has
#     lib-spare/  MPI and base libraries: used only where that machine has none, as mpirun and libmpi belong together
#     python-spare/    Python packages that the client and its tests need, for where they are missing
#     client/python, tests/python, bench/peers, bench/scale ... (as in the repository), gpu_run.sh, commit
#
# NCCL is never carried: gpu_run.sh chooses there, by the version of the build's headers. --tar packs all into BUNDLE_DIR/bundle.tar.xz, beside gpu_run.sh,
# which unpacks it. RACE=1 adds race_cuda_kernels, the test in the form that racecheck follows (docs/gpu.md).
# FV_FLASHINFER=DIR adds what bench/peers/flashinfer_build.sh made.
set -euo pipefail

with_tar=false
[[ ${1:-} == --tar ]] && with_tar=true && shift
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build-cuda}
bundle=${2:-$root/.carry}
if [[ $# -ge 2 ]]; then shift 2; else shift $#; fi
nvcc=$("$root/deploy/find_nvcc.sh") || {
    echo "gpu_bundle: $nvcc" >&2
    exit 1
}

configure() { # DIR MORE...
    local dir=$1
    shift
    # shellcheck disable=SC2016 # $ORIGIN is for the loader
    cmake -S "$root" -B "$dir" -G Ninja -DFV_WITH_CUDA=ON -DFV_WERROR=ON -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_BUILD_RPATH='$ORIGIN/../lib' -DCMAKE_EXE_LINKER_FLAGS=-Wl,--disable-new-dtags \
        -DCMAKE_CUDA_COMPILER="$nvcc" "$@" >/dev/null
}

compile() { # DIR TARGET...
    local dir=$1
    shift
    nice -n 5 cmake --build "$dir" -j "${JOBS:-2}" ${1:+--target "$@"}
}

# Names in BUILD_DIR/bin. (fovea_cli is the target of fovea.)
names_wanted() {
    if [[ $# -gt 0 ]]; then
        printf '%s\n' "$@" | sed 's/^fovea_cli$/fovea/'
        return
    fi
    find "$build/bin" -maxdepth 1 -type f -printf '%f\n' |
        grep -xE 'fovead|fovea|test_(cuda|gpu|nccl|e2e)_.*|test_.*_(cuda|nccl)|bench_(kernels_cuda|prefill_cuda|s2_cuda|latent_cuda|service|mixed|echo|scale|step.*)|bench_.*nccl.*'
}

libraries_of() { # FILE...: path of each that it loads
    local file
    for file in "$@"; do
        ldd "$file" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }'
    done | sort -u | grep -vE '/(libc|libm|libdl|librt|libpthread|libcuda|libnccl|ld-linux[^/]*)\.so'
}

copy_binaries() {
    local name mpi spare lib
    mkdir -p "$bundle/bin" "$bundle/lib" "$bundle/lib-spare"
    for name in $(names_wanted "$@"); do
        cp "$build/bin/$name" "$bundle/bin/"
    done
    mpi=$(libraries_of "$bundle"/bin/* | grep '/libmpi\.so' || true)
    spare=$({
        [[ -z $mpi ]] || { echo "$mpi" && libraries_of "$mpi"; }
        libraries_of "$bundle"/bin/* | grep -E '/(libstdc\+\+|libgcc_s|libz)\.so' || true
    } | sort -u)
    for lib in $(libraries_of "$bundle"/bin/*); do
        if grep -qxF "$lib" <<<"$spare"; then
            cp -L "$lib" "$bundle/lib-spare/"
        else
            cp -L "$lib" "$bundle/lib/"
        fi
    done
    strip "$bundle"/bin/*
}

fetch() { # FOLDER PACKAGE...
    local folder=$bundle/python-spare/$1
    shift
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --no-compile \
        --target "$folder" --platform any --only-binary :all: "$@" ||
        echo "gpu_bundle: pip failed: no spare $* (tests skip or fail where they are missing)" >&2
}

copy_python() {
    mkdir -p "$bundle/client/python" "$bundle/tests/deploy" "$bundle/proto"
    cp -r "$root"/client/python/{fovea,tools,README.md} "$bundle/client/python/"
    cp -r "$root/tests/python" "$bundle/tests/"
    cp "$root/tests/deploy/test_gpu_ranks.sh" "$bundle/tests/deploy/"
    cp "$root/proto/attention.proto" "$bundle/proto/"
    find "$bundle/client" "$bundle/tests" -name __pycache__ -prune -exec rm -r {} +
    # Pure Python, and older than what they serve: any protobuf and grpcio there run them.
    fetch protobuf protobuf==6.33.6
    fetch grpc grpcio-reflection==1.62.3 grpcio-health-checking==1.62.3
}

copy_bench() {
    local part
    mkdir -p "$bundle/bench"
    for part in peers scale; do
        [[ ! -d $root/bench/$part ]] || cp -r "$root/bench/$part" "$bundle/bench/"
    done
    find "$bundle/bench" \( -name '*.[ch]' -o -name '*.cu' -o -name CMakeLists.txt -o -name __pycache__ \) -prune -exec rm -r {} +
    [[ -z ${FV_FLASHINFER:-} ]] || cp -r "$FV_FLASHINFER" "$bundle/bench/peers/flashinfer"
}

configure "$build"
compile "$build" "$@"
rm -rf "$bundle"
copy_binaries "$@"
if [[ -n ${RACE:-} ]]; then
    configure "$build-race" -DCMAKE_CUDA_FLAGS=-DFV_LEAN_ALL_ARRIVE
    compile "$build-race" test_cuda_kernels
    cp "$build-race/bin/test_cuda_kernels" "$bundle/bin/race_cuda_kernels"
    strip "$bundle/bin/race_cuda_kernels"
fi
if [[ $# -eq 0 ]]; then
    copy_python
    copy_bench
fi
git -C "$root" rev-parse HEAD >"$bundle/commit" 2>/dev/null || echo unknown >"$bundle/commit"
# Of the headers, as ncclGetVersion() says it; 0: built without.
for header in "$(dirname "$nvcc")"/../include/nccl.h /usr/{local/,}include/nccl.h; do
    [[ ! -e $header ]] || break
done
awk '/^#define NCCL_(MAJOR|MINOR|PATCH) / { v[n++] = $3 } END { print v[0] * 10000 + v[1] * 100 + v[2] }' \
    "$([[ -e $header ]] && echo "$header" || echo /dev/null)" >"$bundle/nccl_version"
if $with_tar; then
    # the binaries have the same kernels in them: a window over all of them makes 300 MB 15
    (cd "$bundle" && tar -cf - ./* | xz --lzma2=preset=1,dict=512MiB >"$bundle.tar.xz")
    rm -rf "$bundle"
    mkdir -p "$bundle"
    mv "$bundle.tar.xz" "$bundle/bundle.tar.xz"
    git -C "$root" rev-parse HEAD >"$bundle/commit" 2>/dev/null || echo unknown >"$bundle/commit"
fi
cp "$root/deploy/gpu_run.sh" "$bundle/"
du -sh "$bundle"
