#!/usr/bin/env bash
#SBATCH --job-name=trinity-large
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# SIGTERM to the ranks so many seconds before the time limit: they save and end.
#SBATCH --signal=TERM@900
#
# Train under Slurm.  From the folder of the repository:
#   DATA=... OUT=... sbatch [--time=...] examples/trinity_large/03_train_slurm.sh [Megatron flags]
#   DRY_RUN=1 bash examples/trinity_large/03_train_slurm.sh    # check every flag for all ranks, start nothing
set -euo pipefail
# Slurm runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
EXAMPLE=examples/trinity_large
. examples/launch/slurm.sh
