#!/bin/sh
# Four ranks on one machine's CPU: the demo model with none, int8 and nf4 on its links, then a table and a figure.
# Offline once the packages are installed. `make demo` calls this.
set -eu
cd "$(dirname "$0")/.."
folder=results/cpu_demo
rm -rf "$folder"
for compressor in none int8 nf4; do
    echo "==> torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml --compressor $compressor"
    torchrun --standalone --nproc_per_node=4 run_pipeline.py --config demo.yaml --compressor "$compressor" --exp_dir "$folder"
done
echo "==> python -m pipeline.report $folder --png $folder/demo.png"
python -m pipeline.report "$folder" --png "$folder/demo.png"
