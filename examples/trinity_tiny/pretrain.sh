#!/usr/bin/env bash
# Pretrain Trinity tiny with torchrun. Usage: DATA=... OUT=... bash examples/trinity_tiny/pretrain.sh [Megatron flags]
set -euo pipefail
cd "$(dirname "$0")/../.."

torchrun \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${NPROC:-1}" \
    examples/pretrain_trinity.py \
    --preset tiny --data "${DATA:?folder made by trinity-megatron prepare-data}" \
    --out "${OUT:?folder of the run}" \
    "$@"
