#!/bin/bash
# nodes.sh HOST NODES CONFIG RUN: on every node, with the name of one of them.
set -euo pipefail
host=$1 nodes=$2 config=$3 run=$4

torchrun --nnodes "$nodes" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$host:29500" \
    --no-python srum run --config "$config" --out "$run" --resume
