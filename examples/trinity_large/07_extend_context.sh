#!/usr/bin/env bash
# Train the end of a pretraining on with 256k tokens a sequence (docs/context.md), on each node:
#   PARENT=runs/large DATA=... OUT=... bash examples/trinity_large/07_extend_context.sh [Megatron flags]
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_large
OUT=${OUT:-runs/large-256k}
SHARDED=1
BATCH_SIZES=${BATCH_SIZES:-0:512}
TRAIN_ITERS=${TRAIN_ITERS:-1000}         # not published
PARENT=${PARENT:-runs/large}
[ ! -d "$PARENT/checkpoints" ] || PARENT=$PARENT/checkpoints
# From a tenth of the peak to a twentieth, without a re-warm-up (report 3.5).
set -- --pretrained-checkpoint "$PARENT" --seq-length "${SEQ_LENGTH:-262144}" \
    --context-parallel-size 4 --micro-batch-size 1 \
    --lr-decay-style cosine --lr-warmup-iters 0 --lr 8e-5 --min-lr 4e-5 \
    --decoupled-lr 2e-5 --decoupled-min-lr 1e-5 "$@"
. examples/launch/torchrun.sh
