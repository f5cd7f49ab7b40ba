#!/usr/bin/env bash
# All GPUs of this machine: ./one_node.sh --model ByteDance-Seed/BAGEL-7B-MoT --reward geneval ...
set -euo pipefail
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
case ${LAUNCHER:-accelerate} in
accelerate)
  exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$gpus" --mixed_precision no \
    --dynamo_backend no -m unigrpo_cli train "$@"
  ;;
torchrun)
  exec torchrun --standalone --nproc-per-node "$gpus" --shutdown-timeout 900 -m unigrpo_cli train "$@"
  ;;
esac
