#!/usr/bin/env bash
# Make training data of text: SOURCE=... TOKENIZER=... DATA=... bash examples/trinity_mini/01_prepare_data.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_mini
. examples/launch/common.sh

# SOURCE: files and folders of text; TOKENIZER: the folder of the tokenizer of a released model.
run "$PYTHON" -m trinity_megatron.cli prepare-data --out "$DATA" \
    --source ${SOURCE:?files and folders of text, see docs/data.md} \
    --tokenizer "${TOKENIZER:?folder of a Hugging Face tokenizer}" "$@"
