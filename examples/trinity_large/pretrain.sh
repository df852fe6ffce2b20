#!/usr/bin/env bash
# Pretrain Trinity large with torchrun. Usage: DATA=... OUT=... bash examples/trinity_large/pretrain.sh [Megatron flags]
set -euo pipefail
cd "$(dirname "$0")/../.."

torchrun \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${NPROC:-8}" \
    examples/pretrain_trinity.py \
    --preset large --data "${DATA:?folder made by trinity-megatron prepare-data}" \
    --out "${OUT:?folder of the run}" \
    --pipeline-model-parallel-size 4 --expert-model-parallel-size 64 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --train-iters ${TRAIN_ITERS:-100000} --save-interval 1000 "$@"
