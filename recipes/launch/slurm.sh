#!/bin/bash
# Train on the GPUs of several Slurm nodes: `sbatch recipes/launch/slurm.sh recipe.yaml`.
# Copy it and edit the six lines below. Recipe, data, model and runs/ must be in a folder that all
# nodes share. Needs tunesmith in an environment that all nodes see: activate it where it says so.
#SBATCH --job-name=tunesmith
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --ntasks-per-node=1
# One task per node: torchrun starts a process per GPU. Two minutes before the time is up, TERM
# ends the run after a step; `tunesmith resume runs/run-1` in another job goes on from there.
set -euo pipefail

recipe=${1:-recipe.yaml}
# source /shared/venv/bin/activate
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:29500" \
    -m tunesmith train "$recipe"
