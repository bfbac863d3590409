"""What one token costs `klt` while a text is decoded, beside reading its matrices once.

    python -m benchmarks.one_token_in_a_run --hidden-sizes 576 896 5120

For each hidden size a random Llama of two layers, one behind the link and one before, scores a text token by token
(`evaluation.mode=decode`) in a process of one thread with a random calibration. Each end of the link has a matrix of
the transform and one of the prediction, bf16, which what a layer reads has driven out of the caches. Prints the stages'
times of the record for a token, and what reading as many bytes takes that are in no cache, in turns; medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.synthetic import save_random_calibration, save_random_llama
from compressors.console import run_command
from compressors.kernels.bits import jit
from pipeline.models.weight_files import checkpoint_fingerprint
from pipeline.records.run_record import RunRecord
from pipeline.report.results import load_records

LINK = "layer:0:node0->node1"
STEP = 0.4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[576, 896, 5120])
    parser.add_argument("--tokens", type=int, default=64, help="of the text")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens, {arguments.rounds} rounds, one thread; us a token")
    print(f"{'H':>6}{'bits/value':>12}{'encode':>10}{'decode':>10}{'reading':>10}{'encode/reading':>16}{'decode/reading':>16}")
    for width in arguments.hidden_sizes:
        with tempfile.TemporaryDirectory() as folder:
            print(line(Path(folder), width, arguments.tokens, arguments.rounds), flush=True)
    return 0


def line(folder: Path, width: int, num_tokens: int, rounds: int) -> str:
    command = prepare(folder, width, num_tokens)
    times = []
    for number in range(rounds):
        record = run(command, folder / str(number))
        encode_s, decode_s = record.stages["0"].compress_s, record.stages["1"].decompress_s
        encode, decode = encode_s / num_tokens, decode_s / num_tokens
        times.append((encode, decode, reading_s(2 * width * (width + min(1024, width)))))
    encode, decode, reading = (1e6 * statistics.median(column) for column in zip(*times, strict=True))
    bits = record.traffic_per_link[LINK].bits_per_value
    ratios = f"{encode / reading:16.2f}{decode / reading:16.2f}"
    return f"{width:6d}{bits:12.3f}{encode:10.0f}{decode:10.0f}{reading:10.0f}{ratios}"


def prepare(folder: Path, width: int, num_tokens: int) -> list[str]:
    """The command of a run, but for where its record goes."""
    model, calibration, text = folder / "model", folder / "calibration", folder / "text.txt"
    save_random_llama(model, hidden_size=width, num_layers=2, vocab_size=256, dtype=torch.float32, num_shards=2)
    save_random_calibration(
        calibration,
        link_names=[LINK],
        hidden_size=width,
        vocab_size=256,
        checkpoint=checkpoint_fingerprint(model),
    )
    text.write_text("the canal lock keeper opens a gate " * num_tokens)
    settings = {
        "model.name": model,
        "dataset.name": "text",
        "dataset.path": text,
        "dataset.max_length": num_tokens,
        "dataset.stride": num_tokens,
        "evaluation.mode": "decode",
        "evaluation.decode_chunk": 1,
        "partition.num_nodes": 2,
        "partition.wrap": "false",
        "runtime.threads": 1,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    codec = f"klt(calibration={calibration}, step={STEP})"
    config = folder / "config.yaml"
    config.write_text("{}\n")
    run_pipeline = Path(__file__).resolve().parent.parent / "run_pipeline.py"
    begin = [sys.executable, str(run_pipeline), "--config", str(config)]
    return [*begin, "--compressor", codec, "--first_k_tokens", str(num_tokens), *words]


def run(command: list[str], folder: Path) -> RunRecord:
    done = subprocess.run([*command, "--exp_dir", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    (record,) = load_records([folder])
    return record


@jit
def _read(words):
    total = np.uint64(0)
    for i in range(words.size):
        total ^= words[i]
    return total


def reading_s(nbytes: int, calls: int = 21) -> float:
    """Seconds to read so many bytes once, when the caches have others."""
    words, others = np.ones(nbytes // 8, np.uint64), np.ones(2**24, np.uint64)
    times = []
    for _ in range(calls):
        _read(others)
        start_s = time.perf_counter()
        _read(words)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


if __name__ == "__main__":
    run_command(main)
