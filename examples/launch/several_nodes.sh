#!/usr/bin/env bash
# The same line on every machine, with its number among them:
#   NODES=2 NODE=0 MAIN=10.0.0.1 ./several_nodes.sh --out /shared/run ...     and on the other NODE=1
# --out must be a directory that all of them see.
set -euo pipefail
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$gpus" \
  --master-addr "$MAIN" --master-port "${PORT:-29500}" --shutdown-timeout 900 -m unigrpo_cli train "$@"
# By accelerate:
#   accelerate launch --multi_gpu --num_machines "$NODES" --machine_rank "$NODE" --num_processes $((NODES * gpus)) \
#     --main_process_ip "$MAIN" --main_process_port 29500 --mixed_precision no --dynamo_backend no \
#     -m unigrpo_cli train "$@"
