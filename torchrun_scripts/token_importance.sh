#!/bin/sh
# The whole experiment on token importance for one config on two ranks: layers compared, relevance of heads, oracle,
# the sweep over metrics, and its curves.
#
#     sh torchrun_scripts/token_importance.sh demo_importance.yaml
#
# Further arguments go to every step. Weights for heads come from the validation text; where the text is a file, name
# the validation file in VALIDATION. Without it they come from the scored text.
# Interrupted, the same command goes on.
set -eu
cd "$(dirname "$0")/.."
. torchrun_scripts/environment.sh
config=${1:?name a config, for example demo_importance.yaml}
shift
folder=results/$(basename "$config" .yaml)
run="torchrun --standalone --nproc_per_node=2"

$run -m pipeline.analyse layers --config "$config" --out "$folder/layers" "$@"
$run -m pipeline.analyse heads --config "$config" --out "$folder/heads" "$@" \
    --set dataset.split=validation ${VALIDATION:+--set dataset.path="$VALIDATION"}
$run -m pipeline.analyse oracle --config "$config" --out "$folder/oracle" "$@"
$run run_pipeline.py --config "$config" --sweep token_importance.yaml --exp_dir "$folder" "$@"
python -m pipeline.report.importance_curves "$folder"
