#!/usr/bin/env bash
# Train the end of a run on with 2048 tokens a sequence (docs/context.md), on two ranks:
#   PARENT=runs/tiny DATA=... OUT=... bash examples/trinity_tiny/07_extend_context.sh [Megatron flags]
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_tiny
OUT=${OUT:-runs/tiny-2k}
TRAIN_ITERS=${TRAIN_ITERS:-40}
PARENT=${PARENT:-runs/tiny}
[ ! -d "$PARENT/checkpoints" ] || PARENT=$PARENT/checkpoints
# Re-warm-up to a tenth of the peak, then linear to 0 (report 3.5).
set -- --pretrained-checkpoint "$PARENT" --seq-length "${SEQ_LENGTH:-2048}" \
    --context-parallel-size 2 --micro-batch-size 1 \
    --lr-decay-style linear --lr-warmup-fraction 0.1 --lr 1e-3 --min-lr 0 \
    --decoupled-lr 3e-4 --decoupled-min-lr 0 "$@"
. examples/launch/torchrun.sh
