#!/usr/bin/env bash
# Anneal from a checkpoint of a pretraining that may still run (docs/branches.md), on each node:
#   PARENT=runs/tiny STEP=... DATA=... OUT=... [ANNEAL_TOKENS=200K] bash examples/trinity_tiny/06_anneal.sh [Megatron flags]
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_tiny
OUT=${OUT:-runs/tiny-annealed-$STEP}
set -- --branch-from "${PARENT:-runs/tiny}" --branch-step "$STEP" \
    --anneal-tokens "${ANNEAL_TOKENS:-200K}" "$@"
. examples/launch/torchrun.sh
