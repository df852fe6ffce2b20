#!/usr/bin/env bash
# Start the ranks of one machine with torchrun; flags that follow are the training's.
#   DATA=... OUT=... [NODE_RANK=... MASTER_ADDR=...] bash examples/trinity_large/03_train_torchrun.sh [Megatron flags]
#   DRY_RUN=1 bash examples/trinity_large/03_train_torchrun.sh       # check every flag for all ranks, start nothing
set -euo pipefail
cd "$(dirname "$0")/../.."
EXAMPLE=examples/trinity_large
. examples/launch/torchrun.sh
