#!/usr/bin/env bash
# Pretrain a small model, teach it to chat, and count the answers that end: bash examples/chat/run.sh [FOLDER]
# A few minutes on two cores.  The learning rates are the recipe of docs/chat.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-runs/chat}
PYTHON=${PYTHON:-python}
trinity() { "$PYTHON" -m trinity_megatron.cli "$@"; }
mkdir -p "$OUT"

MODEL=(--preset tiny --hidden-size 128 --ffn-hidden-size 384 --kv-channels 32 --moe-ffn-hidden-size 64
    --moe-shared-expert-intermediate-size 64 --seq-length 256 --max-position-embeddings 256 --window-size 63,0
    --micro-batch-size 8 --global-batch-size 8)

trinity prepare-data --out "$OUT/text" --vocab-size 1024
trinity train "${MODEL[@]}" --data "$OUT/text" --out "$OUT/pretrained" --train-iters "${PRETRAIN_STEPS:-300}" \
    --eval-iters 2

"$PYTHON" examples/chat/conversations.py write "$OUT/conversations.jsonl"
trinity prepare-data --chat --source "$OUT/conversations.jsonl" --tokenizer "$OUT/text/tokenizer" --out "$OUT/chat"

# Warm-up to a tenth of the preset's peaks (Muon 1e-2, AdamW 3e-3), then linear to 0.
trinity train "${MODEL[@]}" --data "$OUT/chat" --out "$OUT/tuned" \
    --pretrained-checkpoint "$OUT/pretrained/checkpoints" --train-iters "${CHAT_STEPS:-300}" --eval-iters 2 \
    --lr 1e-3 --decoupled-lr 3e-4 --min-lr 0 --decoupled-min-lr 0 --lr-decay-style linear --lr-warmup-iters 20

PYTHONPATH=. "$PYTHON" examples/chat/conversations.py ask "$OUT/tuned/checkpoints"
printf 'What is 3 + 4?\nRepeat: blue bread\n' | trinity generate --load "$OUT/tuned/checkpoints" --chat
