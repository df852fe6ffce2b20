#!/usr/bin/env bash
# Pretrain Trinity large with torchrun on a multiple of 256 GPUs (PP4 x EP64).
# Usage: DATA=... OUT=... NNODES=32 NODE_RANK=... MASTER_ADDR=... bash examples/trinity_large/pretrain.sh [Megatron flags]
# BATCH_SIZES and TRAIN_ITERS: 17T tokens of the report, batches of 12288 sequences and of 16384 after
# 4.9T tokens; the last 3T decay.  Documents do not attend to each other.
set -euo pipefail
cd "$(dirname "$0")/../.."

torchrun \
    --nnodes "${NNODES:?number of nodes}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${NPROC:-8}" \
    examples/pretrain_trinity.py \
    --preset large --data "${DATA:?folder made by trinity-megatron prepare-data}" \
    --out "${OUT:?folder of the run}" \
    --pipeline-model-parallel-size 4 --expert-model-parallel-size 64 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --dataloader-inter-document-masking \
    --step-batch-size-schedule "${BATCH_SIZES:-0:12288 4.9T:16384}" \
    --train-iters ${TRAIN_ITERS:-138830} --save-interval 1000 "$@"
