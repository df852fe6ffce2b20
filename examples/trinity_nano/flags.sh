# The one place for what a training of Trinity Nano is made of.  The scripts of this folder read it,
# and differ only in how they start ranks.  Variables of the environment take precedence.
PRESET=nano
GPU=${GPU-h100}                          # what a rank runs on; empty: a CPU
NNODES=${NNODES:-8}                      # also in 03_train_slurm.sh and 03_train_kubernetes.yaml
RANKS_PER_NODE=${RANKS_PER_NODE:-8}
TOKENS=10T                               # for 02_plan.sh

LAYOUT_FLAGS=(
    --expert-model-parallel-size 1 --micro-batch-size 8
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if [ -n "${SHARDED:-}" ]; then  # HSDP instead, each node a replica: docs/sharding.md
    LAYOUT_FLAGS=(
        --use-megatron-fsdp --num-distributed-optimizer-instances "$NNODES"
        --micro-batch-size 16
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    )
fi
# 10T tokens of the report in batches of 4096 sequences, of which the last 12% decay.
RECIPE_FLAGS=(
    --train-iters "${TRAIN_ITERS:-596046}"
    --save-interval 500 --keep-last 3 --save-retain-interval 10000
    --skip-spikes 6 --rewind-on-spike --on-damage previous
    --async-save --ckpt-assume-constant-structure
)
[ -n "${SHARDED:-}" ] || RECIPE_FLAGS+=(--check-replicas 500)  # whole replicas only
