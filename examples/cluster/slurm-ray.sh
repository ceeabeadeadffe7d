#!/bin/bash
# One run on Slurm with the launcher `ray`; the recipe's section `launcher` sets the number of processes and their resources.
#
#   sbatch --nodes=4 examples/cluster/slurm-ray.sh recipe.yaml
#
# The recipe has `launcher: {type: ray, address: auto, ...}`. All nodes must see this directory, the recipe and the run directory.
#SBATCH --job-name=understudy
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

recipe=$1
shift
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
export RAY_ADDRESS="$head:6379" RAY_USAGE_STATS_ENABLED=0

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --block --port=6379 --num-gpus=8 --include-dashboard=false &
until srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap ray status > /dev/null 2>&1; do sleep 2; done
if [ "${#nodes[@]}" -gt 1 ]; then
    srun --nodes="$((${#nodes[@]} - 1))" --ntasks="$((${#nodes[@]} - 1))" --exclude="$head" --overlap \
        ray start --block --address="$RAY_ADDRESS" --num-gpus=8 &
fi

# runs on the first node; exec replaces this shell, which gets the signal two minutes before the time limit
exec understudy train "$recipe" "$@"
