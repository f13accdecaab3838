#!/usr/bin/env bash
# Sets up .venv with the development tools, then runs every check; arguments go to pytest:
#
#     bash scripts/test.sh                   every check that needs no card
#     bash scripts/test.sh --stack newest    the same with the newest supported libraries, in .venv-newest
#     bash scripts/test.sh --card            the tests on a rehearsed card (docs/cards.md); fetches 4 GB the first time
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv stack=oldest
if [ "${1:-}" = --stack ]; then
    case ${2:-} in
    oldest) ;;
    newest) stack=newest venv=$root/.venv-newest ;;
    *) printf 'usage: bash scripts/test.sh [--stack oldest|newest | --card] [PYTEST ARGUMENT ...]\n' >&2; exit 2 ;;
    esac
    shift 2
fi
bash "$root/scripts/setup.sh" dev "$stack"
cd -- "$root"
if [ "$stack ${1:-}" = 'oldest --card' ]; then
    shift
    bash "$root/scripts/setup_card.sh"
    set -- tests/card "$@"
    is_card=yes
fi
export PATH="$venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"
# As in finetune.sh: keep freed memory, fresh pages are dear.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_-17179869184}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_-268435456}"

if [ -z "${is_card:-}" ]; then
    ruff check
    ruff format --check
    mypy
fi
# A worker a core (nproc would say OMP_NUM_THREADS); each takes what another has left over, so no slow file holds the others up.
exec python -m pytest -q -n "${ONECARD_TEST_WORKERS-$(env -u OMP_NUM_THREADS nproc)}" --dist worksteal "$@"
