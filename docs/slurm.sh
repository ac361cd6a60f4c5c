#!/bin/bash
# Pretraining under Slurm, on one node or several; goes on by itself after a pre-emption and beyond the time limit:
#     sbatch --nodes=2 --gpus-per-node=4 docs/slurm.sh DATA --preset paper-3d --out RUN workers=8 cache=CACHE
# All that follows is passed on to `cover pretrain`. DATA, RUN and CACHE must be on file systems that all nodes see.
#SBATCH --job-name=cover
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
# ntasks-per-node: torchrun is one task on each node, and starts a process for each GPU there
# signal: to this script, 600 s before the limit; the time that a step, a validation and a checkpoint may take at most

set -euo pipefail

: "${1:?usage: sbatch slurm.sh DATA --out RUN [--preset P] [key=value ...]}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# what is passed on makes every process save after its step; then the job goes back into the queue, to resume there
limit_is_near=
trap 'limit_is_near=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:${COVER_PORT:-29500}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout=600 \
    -m cover pretrain "$@" --resume &
job=$!

code=0
wait "$job" || code=$?
if [[ -n $limit_is_near ]]; then
    wait "$job" || true # the trap has ended the first wait
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
