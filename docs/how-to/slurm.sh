#!/bin/bash
#SBATCH --job-name=inkling
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
# Before the time limit all processes save, and the job is queued again.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export INKLING_CACHE=/shared/inkling OMP_NUM_THREADS=8
srun torchrun --no-python --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    lm train /shared/tokens --preset transformer-subword --name big --runs-dir /shared/runs \
    --set training.batch_size=2048 --max-steps 100000 &
trap 'kill -TERM $!; wait $!; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
wait $!
