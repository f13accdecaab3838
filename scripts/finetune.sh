#!/usr/bin/env bash
# Fine-tunes by a recipe: sets up .venv where needed, then runs `onecard train` with what it is given.
set -euo pipefail

usage='usage: bash scripts/finetune.sh [--processes N] RECIPE [section.key=value ...]
  e.g. bash scripts/finetune.sh recipes/quickstart.yaml training.learning_rate=1e-4
  --processes N trains on N cards of this machine, one process each'
processes=1
if [ "${1:-}" = --processes ]; then
    case ${2:-} in
    '' | *[!0-9]* | 0*) printf '%s\n' "$usage" >&2; exit 2 ;;
    esac
    processes=$2
    shift 2
fi
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
if [ "$processes" = 1 ]; then exec "$root/.venv/bin/onecard" train "$@"; fi
# Accelerate says "multi_gpu" of several processes, on cards or not; all is given so that it asks for nothing.
exec "$root/.venv/bin/accelerate" launch --multi_gpu --num_processes "$processes" --num_machines 1 \
    --mixed_precision no --dynamo_backend no --main_process_port 0 -m toolkit train "$@"
