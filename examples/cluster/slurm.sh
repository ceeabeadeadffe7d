#!/bin/bash
# One run on Slurm: torchrun over TRAINERS nodes, vLLM servers on ENGINES nodes, served teachers on the rest, one process a GPU.
#
#   sbatch --nodes=4 --export=ALL,TRAINERS=2,ENGINES=1,STUDENT=Qwen/Qwen3-8B,TEACHER=Qwen/Qwen3-32B \
#       examples/cluster/slurm.sh recipe.yaml runs/slurm
#
# All nodes must see this directory, the recipe and the run directory. A requeued job resumes from the last checkpoint
# (train.save_every). vLLM's routes that replace weights need no key: block other access to the nodes' ports 8000 to 8007.
#SBATCH --job-name=understudy
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

recipe=$1 run_dir=$2
: "${TRAINERS:?}" "${ENGINES:?}" "${STUDENT:?}" "${TEACHER:?}"
VLLM_PYTHON=${VLLM_PYTHON:-python}
UNDERSTUDY_TOKEN=$(openssl rand -hex 32)
export VLLM_PYTHON UNDERSTUDY_TOKEN VLLM_SERVER_DEV_MODE=1 OMP_NUM_THREADS=8

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
trainers=("${nodes[@]:0:TRAINERS}")
engines=("${nodes[@]:TRAINERS:ENGINES}")
teachers=("${nodes[@]:TRAINERS+ENGINES}")

join() {
    local IFS=,
    echo "$*"
}

# prints the server URLs of each GPU on the given nodes; ports count up from the first argument
urls() {
    local first=$1 node gpu
    shift
    for node in "$@"; do
        for gpu in {0..7}; do printf '%s\n' "http://$node:$((first + gpu))"; done
    done
}

# runs $command on each GPU of the given nodes; single quotes leave its variables to each task
on_each_gpu() {
    local log=$1
    shift
    srun --nodes="$#" --ntasks="$((8 * $#))" --gpus-per-task=1 --nodelist="$(join "$@")" \
        --output="$run_dir/$log-%t.log" bash -c "$command"
}

mkdir -p "$run_dir"
# shellcheck disable=SC2016
command='exec "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server --model "$STUDENT" --served-model-name student \
    --host 0.0.0.0 --port $((8000 + SLURM_LOCALID)) --dtype bfloat16 --generation-config vllm \
    --skip-tokenizer-init --disable-uvicorn-access-log'
on_each_gpu engine "${engines[@]}" &
# shellcheck disable=SC2016
command='exec understudy serve-teacher "$TEACHER" --host 0.0.0.0 --port $((8100 + SLURM_LOCALID)) \
    --token-env UNDERSTUDY_TOKEN --dtype bfloat16'
on_each_gpu teacher "${teachers[@]}" &

mapfile -t engine_urls < <(urls 8000 "${engines[@]}")
mapfile -t teacher_urls < <(urls 8100 "${teachers[@]}")
for url in "${engine_urls[@]}" "${teacher_urls[@]}"; do
    until curl --silent --fail --output /dev/null "$url/health"; do sleep 5; done
done

resume=()
if [ -f "$run_dir/recipe.yaml" ]; then resume=(--resume); fi
# exec replaces this shell, which gets the signal two minutes before the time limit: all ranks save and end, and the servers
# end with the job
exec srun --nodes="$TRAINERS" --ntasks="$TRAINERS" --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 \
    --nodelist="$(join "${trainers[@]}")" \
    torchrun --nnodes="$TRAINERS" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="${trainers[0]}:29500" -m understudy train "$recipe" "${resume[@]}" \
    run_dir="$run_dir" "parallel={shard: 8, replicate: $TRAINERS}" \
    "rollout={type: vllm, dtype: bfloat16, url: [$(join "${engine_urls[@]}")]}" \
    "teacher={type: served, token_env: UNDERSTUDY_TOKEN, url: [$(join "${teacher_urls[@]}")]}"
