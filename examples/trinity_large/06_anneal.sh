#!/usr/bin/env bash
# Anneal from a checkpoint of a pretraining that may still run (docs/branches.md), on each node:
#   PARENT=runs/large STEP=... DATA=... OUT=... [ANNEAL_TOKENS=100B] bash examples/trinity_large/06_anneal.sh [Megatron flags]
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_large
OUT=${OUT:-runs/large-annealed-$STEP}
set -- --branch-from "${PARENT:-runs/large}" --branch-step "$STEP" \
    --anneal-tokens "${ANNEAL_TOKENS:-100B}" "$@"
. examples/launch/torchrun.sh
