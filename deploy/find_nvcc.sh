#!/usr/bin/env bash
# find_nvcc.sh - prints the CUDA compiler to build with; exit 77 with the reason where there is none.
#
#     deploy/find_nvcc.sh          # nvcc 13.0 or newer: $CUDACXX, then PATH, then /usr/local/cuda
#     deploy/find_nvcc.sh --gpu    # the same, and a GPU must be visible too
set -uo pipefail

readonly WANTED=13.0 # of the machine code and the language level the kernels are written for

because() {
    echo "$*"
    exit 77
}

if [[ -n ${CUDACXX:-} ]]; then
    nvcc=$CUDACXX
else
    nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
fi
command -v "$nvcc" >/dev/null || because "no CUDA compiler (looked for $nvcc)"
version=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
[[ -n $version ]] || because "$nvcc does not tell its version"
[[ $(printf '%s\n' "$WANTED" "$version" | sort -V | head -n 1) == "$WANTED" ]] ||
    because "$nvcc is version $version, $WANTED or newer is needed"
if [[ ${1:-} == --gpu ]]; then
    nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || because "$nvcc is there, but no GPU is visible"
fi
echo "$nvcc"
