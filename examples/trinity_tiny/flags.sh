# The one place for what a training of Trinity tiny is made of.  The scripts of this folder read it,
# and differ only in how they start ranks.  Variables of the environment take precedence.
PRESET=tiny
GPU=${GPU-}                              # what a rank runs on; empty: a CPU
NNODES=${NNODES:-1}                      # also in 03_train_slurm.sh and 03_train_kubernetes.yaml
RANKS_PER_NODE=${RANKS_PER_NODE:-2}
TOKENS=1.6M                              # for 02_plan.sh

LAYOUT_FLAGS=(--expert-model-parallel-size 2 --micro-batch-size 4)
# 400 steps of the preset; minutes on two cores.
RECIPE_FLAGS=(
    --train-iters "${TRAIN_ITERS:-400}" --save-interval 50 --keep-last 3
    --skip-spikes 6 --on-damage previous
)
