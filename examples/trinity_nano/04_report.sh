#!/usr/bin/env bash
# Draw the run, also while it goes on: OUT=... bash examples/trinity_nano/04_report.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_nano
. examples/launch/common.sh

run "$PYTHON" -m trinity_megatron.cli report "$OUT" "$@"
