# Start the ranks of this machine with torchrun; sourced with EXAMPLE set.  On each of several
# machines: NODE_RANK (from 0) and MASTER_ADDR (the machine of number 0).
. examples/launch/common.sh
train_flags "$@"

COMMAND=(
    "$PYTHON" -m torch.distributed.run
    --nnodes "$NNODES" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$RANKS_PER_NODE"
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}"
    "$ENTRY" "${FLAGS[@]}"
)
if is_dry; then
    show "${COMMAND[@]}"
    check_flags $((NNODES * RANKS_PER_NODE))
    exit
fi
# torchrun hands SIGTERM on and waits so long for the save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
exec "${COMMAND[@]}"
