#!/usr/bin/env bash
# test_cuda_archs.sh - GPUs that the kernels would be wrong on are refused when CMake configures, before nvcc is looked for.
# usage: test_cuda_archs.sh CMAKE
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
n_failed=0

check() { # EXPECTED LIST
    local got=taken said
    said=$("$cmake" "-DFV_CUDA_ARCHS=$2" -P "$root/cmake/FvCudaArchs.cmake" 2>&1) || got=refused
    if [[ $got == refused && $said != *"given \"$2\", expected 90a-real"* ]]; then
        got="refused with: $said"
    fi
    if [[ $got == "$1" ]]; then
        echo "ok    '$2' is $1"
    else
        echo "FAIL  '$2' is $got, expected $1"
        n_failed=$((n_failed + 1))
    fi
}

cmake=${1:?"usage: test_cuda_archs.sh CMAKE"}
check taken 90a-real
check taken 80-real
check taken "80-real;90a-real"
check taken OFF # code that CMAKE_CUDA_FLAGS name
for list in 90 90-real 90-virtual 90a 80 native all all-major 100a-real "80-real;90-real" "90a-real;90" "OFF;90" 0 ""; do
    check refused "$list"
done
# and the build asks: of what it compiles for a GPU nothing comes before
grep -n -m1 -E '^(include\(FvCudaArchs\)|enable_language\(CUDA\))' "$root/kernels/cuda.cmake" | grep -q FvCudaArchs ||
    { echo "FAIL  kernels/cuda.cmake does not include FvCudaArchs first" && n_failed=$((n_failed + 1)); }
exit $((n_failed > 0))
