#!/usr/bin/env bash
# Makes .venv beside this folder and installs onecard into it at the versions of constraints.txt:
#
#     bash scripts/setup.sh               what a run needs
#     bash scripts/setup.sh dev           that and what the tests need
#     bash scripts/setup.sh dev newest    the same by constraints-newest.txt into .venv-newest
#
# The two files are the oldest and the newest versions that are supported.
#
# finetune.sh and test.sh call it at every start; where nothing changed it only compares a checksum. pip's own
# configuration (mirrors, proxies, wheel folders) holds. ONECARD_TORCH_INDEX names an index to take torch from, such as
# https://download.pytorch.org/whl/cu130. Without it: the CPU build where there is no NVIDIA card; where there is one,
# pip's choice, which is built for CUDA 13 and needs driver 580, or torch's build for CUDA 12 where the driver is older.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
extra=${1:-run} stack=${2:-oldest}
case $stack in
oldest) pins=constraints.txt venv=$root/.venv ;;
*) pins=constraints-$stack.txt venv=$root/.venv-$stack ;;
esac
log=$venv/setup.log
cpu_index=https://download.pytorch.org/whl/cpu
cuda_12_index=https://download.pytorch.org/whl/cu126

say() { printf 'onecard: %s\n' "$*" >&2; }
die() { # STATUS MESSAGE: the command's own exit codes, 2 usage and 5 resources
    say "$2"
    exit "$1"
}

has_card() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# The CUDA version that the driver can do, such as 12.8; nothing where nvidia-smi does not say.
driver_cuda() {
    nvidia-smi 2>/dev/null | grep -o -m 1 -E 'CUDA[A-Za-z ]*Version: *[0-9]+\.[0-9]+' | grep -o -E '[0-9.]+$' || true
}

# The newest card's compute capability in tenths, such as 89 for 8.9.
capability() {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | sort -n | tail -n 1 || true
}

# The index that this machine's driver asks for; nothing where pip's choice suits it.
driver_index() {
    local cuda
    cuda=$(driver_cuda)
    if [ "${cuda%%.*}" = 12 ]; then printf '%s' "$cuda_12_index"; fi
}

# Before anything is installed: what no build of this torch can use.
require_driver() {
    local cuda card
    cuda=$(driver_cuda) card=$(capability)
    [ -z "${ONECARD_TORCH_INDEX:-}" ] && [ -n "$cuda" ] || return 0
    if [ "${cuda%%.*}" -lt 12 ]; then
        die 5 "the NVIDIA driver is for CUDA $cuda, torch needs 12 or 13; install driver 580 or later (525 for CUDA 12)"
    elif [ "${cuda%%.*}" = 12 ] && [ "${card:-0}" -gt 90 ]; then
        die 5 "the NVIDIA driver is for CUDA $cuda, torch's build for CUDA 12 lacks sm_$card; install driver 580 or later"
    fi
}

# The folder is part of it: an environment that was moved or copied still runs the code of the old place.
fingerprint() { { cat "$pins" pyproject.toml; printf '%s' "$root"; } | sha256sum; }

# A build for the CPU is replaced once a card appears, and one that was chosen for the driver when that asks for another;
# a CUDA build serves both, so it stays when the card is away.
is_other_torch_due() {
    if [ -n "${ONECARD_TORCH_INDEX:-}" ]; then
        [ "$(cat "$venv/onecard-index" 2>/dev/null)" != "$ONECARD_TORCH_INDEX" ]
    elif [ "$(cat "$venv/onecard-build" 2>/dev/null)" = cpu ]; then
        { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; } && has_card
    else
        [ -e "$venv/onecard-driver-index" ] && has_card && [ "$(cat "$venv/onecard-driver-index")" != "$(driver_index)" ]
    fi
}

is_current() {
    local want stamp
    [ -x "$venv/bin/python" ] && [ ! -e "$venv/onecard-unfinished" ] || return 1
    want=$(fingerprint)
    for stamp in "$extra" dev; do # the tests' environment has all that a run needs
        [ "$(cat "$venv/onecard-$stamp" 2>/dev/null)" = "$want" ] && ! is_other_torch_due && return
    done
    return 1
}

# An install that was cut off may leave half a package that pip takes for whole, so nothing of it is kept.
is_usable() {
    [ -x "$venv/bin/python" ] && [ ! -e "$venv/onecard-unfinished" ] &&
        [ "$(cat "$venv/onecard-root" 2>/dev/null || printf '%s' "$root")" = "$root" ] &&
        "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local name unready=
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 || continue
        "$name" -c 'import ensurepip, venv' >/dev/null 2>&1 && printf '%s' "$name" && return
        unready=$name
    done
    [ -z "$unready" ] || die 5 "$unready has no venv module; apt install python3-venv, then start again"
    die 5 "no Python 3.11 to 3.14 here; apt install python3 python3-venv, then start again"
}

make_venv() {
    local python
    python=$(find_python)
    say "making ${venv##*/} with $("$python" --version)"
    rm -rf -- "$venv"
    mkdir -- "$venv"
    : >"$venv/onecard-unfinished"
    "$python" -m venv "$venv" >"$log" 2>&1 || die 5 "$python -m venv failed; see $log"
    printf '%s' "$root" >"$venv/onecard-root"
}

pip_install() {
    local errors
    errors=$("$venv/bin/python" -m pip install -q --disable-pip-version-check --log "$log" -c "$pins" "$@" \
        2>&1 >/dev/null) && return
    grep -m 3 '^ERROR' <<<"$errors" >&2 || tail -n 3 <<<"$errors" >&2
    die 5 "pip failed as shown above and all it did is in $log; start again once that is mended"
}

answers() {
    timeout 4 "$venv/bin/python" -c \
        'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3)' "$1" 2>/dev/null
}

install_torch() { # cpu|cuda
    local build=$1 index=${ONECARD_TORCH_INDEX:-}
    if [ -z "$index" ] && [ "$build" = cuda ]; then index=$(driver_index); fi
    # Only Linux has a default build that brings CUDA along.
    if [ -z "$index" ] && [ "$build" = cpu ] && [ "$(uname -s)" = Linux ]; then
        if answers "$cpu_index"; then
            index=$cpu_index
        else
            say "$cpu_index does not answer; torch comes from pip's own index"
        fi
    fi
    if is_other_torch_due; then "$venv/bin/python" -m pip uninstall -q -y torch >/dev/null 2>&1; fi
    if [ -n "$index" ]; then pip_install --extra-index-url "$index" torch; fi
}

install() {
    local build=cpu extras=
    if has_card; then
        build=cuda extras=gpu
        require_driver
    fi
    if [ "$extra" = dev ]; then extras=dev${extras:+,$extras}; fi
    : >"$log"
    : >"$venv/onecard-unfinished"
    say "installing into ${venv##*/} at the versions of $pins ($build build); the first time takes minutes"
    install_torch "$build"
    pip_install -e ".${extras:+[$extras]}"
    # The tests kill processes at each system call through a small library, which is compiled for it.
    if [ "$extra" = dev ] && ! command -v cc gcc clang >/dev/null; then pip_install ziglang; fi
    if [ "$build" = cuda ] && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
        say "there is an NVIDIA card, but pip took a torch without CUDA; name its index in ONECARD_TORCH_INDEX"
    fi
    if [ "$extra" = dev ] && ! "$venv/bin/python" scripts/browser.py "$venv/chromium" 2>>"$log"; then
        say "no Chromium, so the tests of the run's page in a browser are skipped; $(tail -n 1 "$log")"
    fi
    rm -f -- "$venv"/onecard-run "$venv"/onecard-dev
    printf '%s' "$build" >"$venv/onecard-build"
    printf '%s' "${ONECARD_TORCH_INDEX:-}" >"$venv/onecard-index"
    rm -f -- "$venv/onecard-driver-index"
    if [ "$build" = cuda ] && [ -z "${ONECARD_TORCH_INDEX:-}" ]; then driver_index >"$venv/onecard-driver-index"; fi
    fingerprint >"$venv/onecard-$extra"
    rm -f -- "$venv/onecard-unfinished"
    say "ready"
}

case $extra-$stack in
run-oldest | run-newest | dev-oldest | dev-newest) ;;
*) die 2 "usage: bash scripts/setup.sh [run|dev] [oldest|newest]" ;;
esac
cd -- "$root"
is_current && exit
command -v flock >/dev/null || die 5 "flock is missing; apt install util-linux"
[ -w "$root" ] || die 5 "$root cannot be written to; copy it to a folder of your own"
exec 9>>"$root/.venv.lock"
flock -n 9 || { say "another set-up is at work; waiting for it"; flock 9; }
is_current && exit
is_usable || make_venv
install
