#!/bin/bash
#SBATCH --job-name=srum
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# sbatch slurm.sh CONFIG RUN: the loop on all nodes of the job; the same job again goes on.
set -euo pipefail
config=$1 run=$2
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1  # five minutes before its time is up

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    --no-python srum run --config "$config" --out "$run" --resume &
wait $!
