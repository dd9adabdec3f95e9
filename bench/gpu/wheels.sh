#!/bin/bash
# Wheels that a GPU machine without internet may lack beside torch, transformers, accelerate and peft.
#
#   bench/gpu/wheels.sh download [PYTHON_VERSION]   with internet: into build/wheels, at the pinned versions (3.12)
#   bench/gpu/wheels.sh install                     on the GPU machine: those that are missing, into its python3
set -euo pipefail
cd "$(dirname "$0")/../.."
PACKAGES="trl bitsandbytes datasets liger-kernel obstore pydantic pydantic-core annotated-types typing-inspection
          dill multiprocess xxhash"
LIMIT_MIB=64

pinned() { grep -iE "^$1==" constraints/trainer.txt; }

download() {
    mkdir -p build/wheels
    local pins=() package version="${1:-3.12}"
    for package in $PACKAGES; do pins+=("$(pinned "$package")"); done
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest build/wheels \
        --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform any "${pins[@]}"
    du -m build/wheels/*.whl | sort -n
    local size
    size=$(du -cm build/wheels/*.whl | tail -1 | cut -f1)
    echo "$size MiB in all"
    if [ "$size" -gt "$LIMIT_MIB" ]; then
        echo "more than $LIMIT_MIB MiB: leave out what the machine has" >&2
        exit 1
    fi
}

install() {
    local package missing=()
    for package in $PACKAGES; do
        python3 -m pip show --quiet "$package" 2>/dev/null || missing+=("$package")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        python3 -m pip install --quiet --no-index --find-links build/wheels --no-deps "${missing[@]}"
    fi
    echo "installed: ${missing[*]:-nothing was missing}"
}

case "${1:-}" in
    download) download "${2:-}" ;;
    install) install ;;
    *) sed -n '2,5p' "$0"; exit 2 ;;
esac
