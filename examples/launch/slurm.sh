# Start the ranks as tasks of a Slurm job; sourced by a batch script with EXAMPLE set.
#
# Preempted (SIGTERM, then Slurm requeues the job), near the time limit (--signal) or after a failure
# (below) the job goes on where its last checkpoint is.  MAX_RESTARTS bounds the restarts of all kinds.
. examples/launch/common.sh
train_flags "$@"
NNODES=${SLURM_JOB_NUM_NODES:-$NNODES}
RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$RANKS_PER_NODE}
LOGS=${LOGS:-$OUT-slurm}  # not in OUT, which a start that is refused removes again

COMMAND=(
    srun --nodes "$NNODES" --ntasks-per-node "$RANKS_PER_NODE" --kill-on-bad-exit=1
    --output "$LOGS/slurm-%j-%N.log" --open-mode append
    "$PYTHON" -u "$ENTRY" "${FLAGS[@]}"
)
if is_dry; then
    show "${COMMAND[@]}"
    check_flags $((NNODES * RANKS_PER_NODE))
    exit
fi

mkdir -p "$LOGS"
restarts=${SLURM_RESTART_COUNT:-0}
say() { echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID, restart $restarts: $*"; }

say "starts on $NNODES nodes; per-node logs: $LOGS/slurm-$SLURM_JOB_ID-NODE.log"
code=0
"${COMMAND[@]}" 2>"$LOGS/srun-$SLURM_JOB_ID.err" || code=$?
cat "$LOGS/srun-$SLURM_JOB_ID.err"
# srun ends with the largest code.  Where one rank ends with 2 the others are ended by SIGTERM: 143.
! grep -q 'Exited with exit code 2$' "$LOGS/srun-$SLURM_JOB_ID.err" || code=2
case $code in
    0) say "the run has ended"; exit 0 ;;
    2) say "a flag or the data are at fault, see the logs: not started again"; exit 2 ;;
    143) say "ended on SIGTERM" ;;  # all ranks after a save, or the others of a rank that died
    *) say "failed with code $code" ;;
esac
if [ "$restarts" -ge "${MAX_RESTARTS:-20}" ]; then
    say "MAX_RESTARTS=${MAX_RESTARTS:-20} reached: not started again"
    exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID" && say "requeued"
# scontrol ends this script; Slurm must not see it end by itself before.
sleep 60
exit "$code"
