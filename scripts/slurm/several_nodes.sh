#!/usr/bin/env bash
# Several nodes with 8 GPUs each:  sbatch --nodes 4 scripts/slurm/several_nodes.sh --preset lewel_b_sync_r50_400ep [flags]
# As one_node.sh otherwise: run from the repository, on a file system that all nodes see.
#SBATCH --job-name=fastssl
#SBATCH --nodes=2
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
