#!/usr/bin/env bash
# Write the newest checkpoint for serving: OUT=... [FORMAT=fp8-block] bash examples/trinity_nano/05_export.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_nano
. examples/launch/common.sh

run "$PYTHON" -m trinity_megatron.cli export --load "$OUT/checkpoints" \
    --out "${HF:-$OUT/hf}" --format "${FORMAT:-bf16}" "$@"
