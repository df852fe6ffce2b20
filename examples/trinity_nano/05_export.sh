#!/usr/bin/env bash
# Write the newest checkpoint for transformers: OUT=... bash examples/trinity_nano/05_export.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_nano
. examples/launch/common.sh

run "$PYTHON" -m trinity_megatron.cli convert --from-megatron "$OUT/checkpoints" \
    --to-hf "${HF:-$OUT/hf}" "$@"
