#!/usr/bin/env bash
# What it will cost, and whether this machine is right: bash examples/trinity_nano/02_plan.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_nano
. examples/launch/common.sh

run "$PYTHON" -m trinity_megatron.cli plan --preset "$PRESET" --gpu "${GPU:-h100}" \
    --gpus $((NNODES * RANKS_PER_NODE)) --tokens "$TOKENS" "${LAYOUT_FLAGS[@]}" "$@"
run "$PYTHON" -m trinity_megatron.cli doctor
