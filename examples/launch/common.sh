# What the scripts of every example share; sourced with EXAMPLE set to the folder of a model.
#
#   DATA      folder made by 01_prepare_data.sh (or the file of a mixture)
#   OUT       folder of the run; the same command goes on with a run that has begun
#   DRY_RUN   1: print the command and check every flag for the full world, start nothing
#   PYTHON    interpreter that has trinity_megatron; python3
set -euo pipefail
. "$EXAMPLE/flags.sh"
PYTHON=${PYTHON:-python3}
DATA=${DATA:-data/$PRESET}
OUT=${OUT:-runs/$PRESET}
ENTRY=examples/pretrain_trinity.py

# The flags of the training, whoever starts its ranks.  SIGTERM saves: what a scheduler sends before
# it takes machines away.
train_flags() {
    FLAGS=(
        --preset "$PRESET" --data "$DATA" --out "$OUT"
        "${LAYOUT_FLAGS[@]}" "${RECIPE_FLAGS[@]}" --exit-signal-handler "$@"
    )
}

is_dry() {
    [ "${DRY_RUN:-0}" = 1 ]
}

# Print a command as it could be typed.
show() {
    printf '%q ' "$@"
    echo
}

# Check the flags as rank 0 of all $1 ranks would.
check_flags() {
    local gpu=()
    [ -z "$GPU" ] || gpu=(--gpu "$GPU")
    "$PYTHON" -m trinity_megatron.cli dry-run --world-size "$1" ${gpu[@]+"${gpu[@]}"} "${FLAGS[@]}"
}

# Run a command, or print it with DRY_RUN=1.
run() {
    if is_dry; then show "$@"; else "$@"; fi
}
