#!/usr/bin/env bash
# Make training data of text: SOURCE=... TOKENIZER=... DATA=... bash examples/trinity_tiny/01_prepare_data.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_tiny
. examples/launch/common.sh

# Without SOURCE: Python's own library.
SOURCES=()
[ -z "${SOURCE:-}" ] || SOURCES=(--source $SOURCE)
run "$PYTHON" -m trinity_megatron.cli prepare-data --out "$DATA" ${SOURCES[@]+"${SOURCES[@]}"} "$@"
