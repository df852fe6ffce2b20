#!/usr/bin/env bash
# Pretrain Trinity mini with torchrun. Usage: DATA=... OUT=... NNODES=... NODE_RANK=... bash examples/trinity_mini/pretrain.sh [Megatron flags]
# TRAIN_ITERS: 10T tokens of the report, of which the last 12% decay.
set -euo pipefail
cd "$(dirname "$0")/../.."

torchrun \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${NPROC:-8}" \
    examples/pretrain_trinity.py \
    --preset mini --data "${DATA:?folder made by trinity-megatron prepare-data}" \
    --out "${OUT:?folder of the run}" \
    --expert-model-parallel-size 8 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --train-iters ${TRAIN_ITERS:-596046} --save-interval 1000 "$@"
