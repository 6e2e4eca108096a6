#!/bin/bash
# servers.sh HOST NODES MODEL CONFIG RUN [ROUNDS]: on every node, with the name of one of them. A server on its first GPU
# draws, all else is on the others. A round is a run, RUN-0, RUN-1, ...; its server has the weights of the one before.
set -euo pipefail
host=$1 nodes=$2 model=$3 config=$4 run=$5 rounds=${6:-1} gpus=${GPUS:-8} port=${PORT:-8000}

listens() { (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; }
if listens; then
    echo "port $port is taken; set PORT to another" >&2
    exit 1
fi
for ((round = 0; round < rounds; round++)); do
    CUDA_VISIBLE_DEVICES=0 srum serve "$model" --name draws --port "$port" &
    server=$!
    trap 'kill "$server"' EXIT
    until listens; do
        kill -0 "$server"  # else it has failed, and said why
        sleep 0.2
    done
    CUDA_VISIBLE_DEVICES=$(seq -s, $((gpus - 1))) \
        torchrun --nnodes "$nodes" --nproc-per-node $((gpus - 1)) --rdzv-backend c10d --rdzv-endpoint "$host:29500" \
        --no-python srum run --config "$config" --out "$run-$round" --resume --set model="$model" --set seed="$round" \
        --set rounds=1 --set "compare=[]" --set rollout.server.url="http://127.0.0.1:$port/v1" \
        --set rollout.server.model=draws --set rollout.server.timeout=3600
    kill "$server"
    wait "$server" || true
    model=$(echo "$run-$round"/round-000/train/*/model)
done
trap - EXIT
