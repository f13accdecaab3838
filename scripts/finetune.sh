#!/usr/bin/env bash
# Fine-tunes by a recipe: sets up .venv where needed, then runs `onecard train` with what it is given.
set -euo pipefail

usage='usage: bash scripts/finetune.sh RECIPE [section.key=value ...]
  e.g. bash scripts/finetune.sh recipes/quickstart.yaml training.learning_rate=1e-4'
case ${1:-} in
'') printf '%s\n' "$usage" >&2; exit 2 ;;
-h | --help) printf '%s\n' "$usage"; exit ;;
esac

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh"
if [ "$(cat "$root/.venv/onecard-build")" = cpu ]; then
    # glibc gives large blocks back to the system and asks for them again at every step; keeping them is many times
    # faster where fresh pages are dear.
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_-17179869184}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_-17179869184}"
    export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_-268435456}"
fi
exec "$root/.venv/bin/onecard" train "$@"
