#!/bin/sh
# Four ranks on one machine's CPU: calibrate klt for the demo model, run a sweep of five codecs, generate a sentence with
# the last of them, draw a figure.
# Offline once the packages are installed. `make demo` calls this. Interrupted, the same command goes on; finished, it
# starts over.
set -eu
cd "$(dirname "$0")/.."
. torchrun_scripts/environment.sh
folder=results/cpu_demo
calibration=$folder/calibration

if ! mkdir -p "$folder" 2>/dev/null || [ ! -w "$folder" ]; then
    echo "error: cannot write to $folder in $PWD; clone to a folder that is yours" >&2
    exit 1
fi
trap 'exit 130' INT
trap '[ $? = 0 ] || echo "==> not finished; the same command goes on from here" >&2' EXIT
if [ -e "$folder/demo.png" ]; then
    rm -rf "$folder"
    mkdir "$folder"
elif [ -n "$(ls "$folder")" ]; then
    echo "==> going on with the demo that was interrupted; rm -r $folder starts anew"
fi

if [ ! -d "$calibration" ]; then
    echo "==> calibrating klt on 4,096 tokens of the standard library's docstrings"
    # In one process: kernels are compiled once instead of by four ranks at once, which takes longer than the text.
    python -m pipeline.calibrate --config demo.yaml --set dataset.split=validation --set dataset.max_length=512 \
        --tokens 4096 --mixture 0 --out "$folder/unfinished" >/dev/null
    mv "$folder/unfinished" "$calibration"
fi
echo "==> five codecs on the same model, split over four processes, scored on Python's help topics"
torchrun --standalone --nproc_per_node=4 run_pipeline.py --config demo.yaml --sweep demo.yaml --exp_dir "$folder"
echo "==> prompts in, tokens out: the same ring, with klt on its links, goes on from a text"
torchrun --standalone --nproc_per_node=4 run_pipeline.py --config demo.yaml --exp_dir "$folder/generated" \
    --compressor "klt(calibration=$calibration, step=0.4)" --set generation.max_new_tokens=32 \
    --set generation.max_slots=1 --generate "The canal was built to"
echo "==> drawing the figure"
python -m pipeline.report "$folder" --png "$folder/demo.png" >/dev/null
cat <<END
==> figure: $folder/demo.png, page: $folder/report-demo.html
==> what to try next, after . $(dirname "$(command -v torchrun)")/activate
    torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml --compressor "klt(calibration=$calibration, step=0.4)"
    torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml --compressor nf4 --chat
    torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml --sweep quick.yaml --exp_dir results/quick
    python run_pipeline.py --config qwen3_32b.yaml --plan
END
