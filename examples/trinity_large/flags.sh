# The one place for what a training of Trinity Large is made of.  The scripts of this folder read it,
# and differ only in how they start ranks.  Variables of the environment take precedence.
PRESET=large
GPU=${GPU-b300}                          # what a rank runs on; empty: a CPU
NNODES=${NNODES:-256}                    # also in 03_train_slurm.sh and 03_train_kubernetes.yaml
RANKS_PER_NODE=${RANKS_PER_NODE:-8}
TOKENS=17T                               # for 02_plan.sh

LAYOUT_FLAGS=(
    --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 3
    --expert-model-parallel-size 8 --micro-batch-size 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if [ -n "${SHARDED:-}" ]; then  # HSDP instead, 16 replicas of 128 ranks: docs/sharding.md
    LAYOUT_FLAGS=(
        --use-megatron-fsdp --num-distributed-optimizer-instances 16
        --expert-model-parallel-size 8 --micro-batch-size 2
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    )
fi
# 17T tokens of the report, batches of 12288 sequences and of 16384 after 4.9T tokens; the last 3T
# decay.  Documents do not attend to each other.
RECIPE_FLAGS=(
    --step-batch-size-schedule "${BATCH_SIZES:-0:12288 4.9T:16384}"
    --train-iters "${TRAIN_ITERS:-138830}"
    --dataloader-inter-document-masking
    --save-interval 250 --keep-last 3 --save-retain-interval 5000
    --skip-spikes 6 --rewind-on-spike --on-damage previous
    --async-save --ckpt-assume-constant-structure
)
[ -n "${SHARDED:-}" ] || RECIPE_FLAGS+=(--check-replicas 500)  # whole replicas only
