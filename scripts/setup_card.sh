#!/usr/bin/env bash
# Makes .venv-card for the rehearsed card: the CUDA build of torch at the version of constraints.txt and what it brings
# along, in front of the packages of .venv. `test.sh --card` and `rehearse_card.py` call it; where nothing changed it only
# compares a checksum. The build comes from PyPI, as 4 GB; ONECARD_CUDA_INDEX names another index that has it.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv-card
log=$venv/setup.log
index=${ONECARD_CUDA_INDEX:-https://pypi.org/simple}

say() { printf 'onecard: %s\n' "$*" >&2; }
die() {
    say "$1"
    exit 5
}

fingerprint() { { cat constraints.txt; printf '%s %s' "$root" "$index"; } | sha256sum; }

# pip's own configuration may name folders with a CPU build, which pip would prefer; only the certificates are kept.
pip_install() {
    local cert
    cert=$("$root/.venv/bin/python" -m pip config get global.cert 2>/dev/null || printf '%s' "${PIP_CERT:-}")
    env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL -u PIP_NO_INDEX PIP_CONFIG_FILE=/dev/null \
        "$root/.venv/bin/python" -m pip --python "$venv/bin/python" install -q --disable-pip-version-check \
        --log "$log" --index-url "$index" --only-binary :all: ${cert:+--cert "$cert"} -c constraints.txt "$@" >/dev/null 2>&1
}

install() {
    local packages
    rm -rf -- "$venv"
    "$root/.venv/bin/python" -m venv --without-pip "$venv" || die "no environment could be made in $venv"
    say "installing the CUDA build of torch into .venv-card; the first time takes minutes and 4 GB"
    { pip_install --no-deps "$(grep '^torch==' constraints.txt)" &&
        "$venv/bin/python" -c "$requirements" >"$venv/cuda.txt" 2>/dev/null && [ -s "$venv/cuda.txt" ]; } ||
        die "no CUDA build of torch from $index; see $log"
    # Since CUDA 13 a few headers that the runtime's own include are in a wheel by themselves.
    pip_install -r "$venv/cuda.txt" "nvidia-cuda-crt==13.0.*" || die "CUDA's libraries did not come from $index; see $log"
    # Of everything else there is one copy. Code of this folder comes first either way: nothing is installed from it.
    packages=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$packages" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/onecard.pth"
    fingerprint >"$venv/onecard-card"
}

requirements='
from importlib.metadata import requires
print(*(line.split(";")[0] for line in requires("torch") if line.startswith(("cuda-", "nvidia-"))), sep="\n")
'

cd -- "$root"
command -v g++ >/dev/null || die "the rehearsed card is compiled, and g++ is missing; apt install g++"
[ -x .venv/bin/python ] || die "there is no .venv yet; run bash scripts/setup.sh dev"
[ "$(cat "$venv/onecard-card" 2>/dev/null)" = "$(fingerprint)" ] || install
include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/include
[ -f "$include/cuda_runtime_api.h" ] || die "CUDA's headers are missing in $include; remove .venv-card and start again"
