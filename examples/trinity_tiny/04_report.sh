#!/usr/bin/env bash
# Draw the run, also while it goes on: OUT=... bash examples/trinity_tiny/04_report.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_tiny
. examples/launch/common.sh

run "$PYTHON" -m trinity_megatron.cli report "$OUT" "$@"
