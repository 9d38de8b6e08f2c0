#!/usr/bin/env bash
# One node with 8 GPUs; submit from the repository:  sbatch scripts/slurm/one_node.sh --method lewel [any flag of train.py]
# Before the time limit the run saves, and the job is queued again and continues.  DRY_RUN=1 prints the command.
#SBATCH --job-name=fastssl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/slurm/launch.sh
