#!/bin/sh
# Four GPUs of one machine: one rank each. Arguments go to run_pipeline.py:
#   sh torchrun_scripts/four_gpus.sh --compressor nf4 --first_k_tokens 10000
set -eu
cd "$(dirname "$0")/.."
. torchrun_scripts/environment.sh
exec torchrun --standalone --nproc_per_node=4 run_pipeline.py --config qwen3_32b.yaml "$@"
