#!/usr/bin/env bash
# Installs a CUDA 13.0 compiler into .cuda/ at the repository's root, from PyPI, without root rights and without a GPU.
#
#   scripts/install-cuda.sh            then: cargo build --release
#
# build.rs finds the nvcc in there by itself. Run it again at any time: it does nothing where all is in place.
# Remove it with: rm -rf .cuda
set -euo pipefail

# The compiler is 13.0, so that the kernels load with every driver of the 580 series and newer. cuobjdump and nvdisasm
# only read what it wrote; as wheels they start at 13.2. cccl is here because cuda_fp16.h includes <nv/target>.
PINS=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-cuda-cccl==13.0.85
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cuobjdump==13.2.86
  nvidia-cuda-nvdisasm==13.2.86
)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
env=$root/.cuda
stamp=$env/installed.txt
PYTHON=${PYTHON:-python3}

say() { echo "install-cuda: $*"; }
die() {
  echo "install-cuda: $*" >&2
  exit 1
}

# Prints the folder that holds bin/nvcc, or nothing.
toolkit() {
  local found
  for found in "$env"/lib/*/site-packages/nvidia/cu13; do
    [[ -f $found/bin/nvcc ]] && echo "$found" && return
  done
  return 0
}

installed() {
  [[ -f $stamp && $(<"$stamp") == "${PINS[*]}" ]] || return 1
  local home
  home=$(toolkit)
  [[ -n $home ]] && "$home/bin/nvcc" --version >/dev/null 2>&1
}

if installed; then
  say "already in place: $(toolkit)/bin/nvcc"
  exit 0
fi

[[ $(uname -s) == Linux ]] || die "the compiler's wheels are for Linux, this is $(uname -s); set NVCC to your own nvcc"
command -v "$PYTHON" >/dev/null || die "'$PYTHON' was not found; install Python 3 or name it: PYTHON=... $0"
command -v g++ >/dev/null ||
  say "warning: g++ was not found, and nvcc needs one as its host compiler (Debian: apt-get install g++)"

rm -rf "$env"
pip_install=("install" --quiet --disable-pip-version-check --no-deps --only-binary=:all: "${PINS[@]}")
if "$PYTHON" -m venv "$env" >/dev/null 2>&1; then
  say "installing ${#PINS[@]} wheels into a virtual environment, $env"
  "$env/bin/python" -m pip "${pip_install[@]}"
elif "$PYTHON" -m pip --version >/dev/null 2>&1; then
  # Debian keeps venv in a package of its own; pip alone can fill a folder of the same form.
  say "'$PYTHON -m venv' does not work here; installing ${#PINS[@]} wheels with pip into $env"
  rm -rf "$env"
  "$PYTHON" -m pip "${pip_install[@]}" --target "$env/lib/python3/site-packages"
else
  rm -rf "$env"
  die "'$PYTHON' has neither venv nor pip; install one of them (Debian: apt-get install python3-venv) and run this again"
fi

home=$(toolkit)
[[ -n $home ]] || die "the wheels are installed, but $env/lib/*/site-packages/nvidia/cu13/bin/nvcc is not there"
# Wheels unpacked by an old pip lose their executable bits.
find "$home/bin" "$home/nvvm/bin" -maxdepth 1 -type f ! -name '*.profile' -exec chmod +x {} +
# nvcc looks for its libraries in lib64, the wheels put them in lib.
[[ -e $home/lib64 ]] || ln -s lib "$home/lib64"

"$home/bin/nvcc" --version >/dev/null || die "$home/bin/nvcc does not run on this machine (see the message above)"
echo "${PINS[*]}" >"$stamp"
# build.rs watches this file while it has found no nvcc: a new time stamp makes the next cargo build look again.
touch "${BASH_SOURCE[0]}"

say "ready: $("$home/bin/nvcc" --version | grep -o 'release.*') in $home/bin"
