"""Do two checkouts compute and send the same? Every codec on one and four ranks, swept, interrupted and resumed.

    python -m benchmarks.compare_versions ../before .
    python -m benchmarks.compare_versions ../before . --codecs none nf4 --tokens 1024

Both run in this Python environment on the demo's model and text, the transform codecs with one calibration, made by the
first checkout. Compared bit for bit are losses and likeliest tokens of every scored token, payload and header bytes on
every link and codec ids; every key of the first checkout's records has to be in the second's. Prints a line per
difference and a summary; exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from compressors.console import run_command
from pipeline.config.options import path_option
from pipeline.records.store import read_record

NUM_RANKS = 4
CALIBRATION_TOKENS = 2048
CODECS = (
    *("none", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", *(f"int{nbits}" for nbits in range(2, 9))),
    *("nf4", "fp4", "mxfp4", *(f"hqq{nbits}" for nbits in (1, 2, 3, 4, 8))),
    "block_rowcol_mean(block_tokens=2, block_channels=2)",
    *("hadamard(int4)", "outlier(channels=8, inner=int4)", "topk(density=0.1)", "zstd(int8)"),
    "token_mixed(metric=column, fraction=0.25, high=int8, low=int4)",
    "token_mixed(metric=norm, fraction=0.25, high=int8, low=int4)",
    "token_graded(metric=uniform, fractions=[0.25, 0.25], codecs=[int8, int6, int4])",
    *("klt(calibration={calibration}, step=0.7)", "klt(calibration={calibration}, target_bits=2)"),
    "klt_fixed(calibration={calibration}, nbits=4)",
)
RESUMED_CODECS = ("nf4", "klt(calibration={calibration}, step=0.7)")
COMPARED_KEYS = ("results", "traffic_per_link", "traffic_totals", "codecs", "causal", "protocol", "dataset", "plan")
PRINT_IDS = """
import json, sys
import torch
from compressors import LinkInfo, make_compressor
link = LinkInfo(name="layer:2:node0->node1", hidden_size=576, max_tokens=128, dtype=torch.float32)
print(json.dumps({spec: make_compressor(spec, link).codec_id() for spec in json.load(sys.stdin)}))
"""


class Checkout:
    """Commands of one version, records in a folder of its own."""

    def __init__(self, root: Path, folder: Path, base: Mapping[str, Any]) -> None:
        self.root, self.folder = root.resolve(), folder
        self._base = [f"{key}={value}" for key, value in base.items()]
        self._env = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str, ranks: int, check: bool = True, **options: Any) -> subprocess.CompletedProcess:
        return subprocess.run(self._command(*words, ranks=ranks), cwd=self.root, env=self._env, check=check, **options)

    def pipeline(self, *words: str) -> list[str]:
        sets = [word for setting in self._base for word in ("--set", setting)]
        return ["run_pipeline.py", "--config", "demo.yaml", *sets, *words]

    def interrupt(self, words: Sequence[str], exp_dir: Path) -> int:
        """Start on four ranks, end after two finished micro-batches; returns how many the journal holds."""
        process = subprocess.Popen(self._command(*words, ranks=NUM_RANKS), cwd=self.root, env=self._env)
        while process.poll() is None and self._num_finished(exp_dir) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait()
        return self._num_finished(exp_dir)

    def codec_ids(self, specs: Sequence[str]) -> dict[str, int]:
        command = [sys.executable, "-c", PRINT_IDS]
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self._env,
            check=True,
            input=json.dumps(specs),
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(done.stdout)

    def _command(self, *words: str, ranks: int) -> list[str]:
        if ranks == 1:
            return [sys.executable, *words]
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *words]

    def _num_finished(self, exp_dir: Path) -> int:
        return sum(path.read_bytes().count(b'{"finished"') for path in exp_dir.glob("*.journal"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=path_option, help="a checkout")
    parser.add_argument("after", type=path_option, help="another")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--other_headers", action="store_true", help="frames have other headers: leave their bytes out")
    parser.add_argument("--tokens", type=int, default=384, help="of the demo's text")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="compare_versions_") as name:
        folder = Path(name)
        base = {
            "dataset.first_k_tokens": arguments.tokens,
            "dataset.max_length": 128,
            "dataset.stride": 64,
            "runtime.threads": 1,
        }
        roots = {"before": arguments.before, "after": arguments.after}
        checkouts = [Checkout(root, folder / name, base) for name, root in roots.items()]
        calibration = folder / "calib"
        specs = [codec.format(calibration=calibration) for codec in arguments.codecs]
        resumed = [codec.format(calibration=calibration) for codec in RESUMED_CODECS]
        if any("klt" in spec for spec in (*specs, *resumed)):
            calibrate = ("-m", "pipeline.calibrate", "--config", "demo.yaml")
            calibrate += ("--set", "dataset.max_length=256", "--set", "runtime.threads=1")
            tokens = ("--tokens", str(CALIBRATION_TOKENS))
            checkouts[0].run(*calibrate, *tokens, "--out", str(calibration), ranks=1)
        differences = list(compare_ids(checkouts, [spec for spec in specs if "klt" not in spec]))
        for ranks in (1, NUM_RANKS):
            records = [run_sweep(checkout, specs, ranks) for checkout in checkouts]
            differences += [f"{ranks} ranks, {line}" for line in compare(*records, arguments.other_headers)]
            print(f"swept {len(records[0])} codecs on {ranks} ranks: {len(differences)} differences so far", flush=True)
        for spec in resumed:
            records = [run_interrupted(checkout, spec) for checkout in checkouts]
            differences += [f"resumed, {line}" for line in compare(*records, arguments.other_headers)]
            print(f"interrupted and resumed {spec.partition('(')[0]}: {len(differences)} so far", flush=True)
    for line in differences:
        print(line)
    print(f"{len(specs)} codecs on 1 and {NUM_RANKS} ranks, {len(resumed)} resumed: {len(differences)} differences")
    return bool(differences)


def run_sweep(checkout: Checkout, specs: Sequence[str], ranks: int) -> dict[str, Path]:
    """Records by codec."""
    exp_dir = checkout.folder / f"sweep-{ranks}"
    exp_dir.mkdir(parents=True)
    sweep = checkout.folder / f"sweep-{ranks}.yaml"
    sweep.write_text(yaml.safe_dump({"name": "all", "points": [{"compressor": spec} for spec in specs]}))
    words = checkout.pipeline("--sweep", str(sweep), "--exp_dir", str(exp_dir))
    done = checkout.run(*words, ranks=ranks, check=False, stdout=subprocess.DEVNULL)
    records = find_records(exp_dir)
    if done.returncode or len(records) != len(specs):
        raise SystemExit(f"{checkout.root}: the sweep ended with {done.returncode} and {len(records)} records")
    return records


def run_interrupted(checkout: Checkout, spec: str) -> dict[str, Path]:
    exp_dir = checkout.folder / f"resumed-{spec.partition('(')[0]}"
    exp_dir.mkdir()
    words = checkout.pipeline("--exp_dir", str(exp_dir), "--compressor", spec, "--set", "dataset.first_k_tokens=2048")
    num_finished = checkout.interrupt(words, exp_dir)
    if find_records(exp_dir) or num_finished < 1:
        raise SystemExit(f"{checkout.root}: killed at the wrong time: {num_finished} micro-batches are in the journal")
    checkout.run(*words, "--resume", ranks=NUM_RANKS, stdout=subprocess.DEVNULL)
    return find_records(exp_dir)


def find_records(folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if "results" in record:
            found[json.dumps(record["args"]["compressor"])] = path
    return found


def compare_ids(checkouts: Sequence[Checkout], specs: Sequence[str]) -> Iterator[str]:
    before, after = (checkout.codec_ids(specs) for checkout in checkouts)
    changed = [spec for spec in specs if before[spec] != after[spec]]
    yield from (f"{spec}: codec id {before[spec]} became {after[spec]}" for spec in changed)


def compare(before: Mapping[str, Path], after: Mapping[str, Path], other_headers: bool) -> Iterator[str]:
    """A line per difference between the records of the same codec, but for header bytes with `other_headers`."""
    for name, path in before.items():
        if name not in after:
            yield f"{name}: no record"
            continue
        old, new = (read_record(p).model_dump(mode="json") for p in (path, after[name]))
        if other_headers:
            old, new = without_headers(old), without_headers(new)
        yield from (f"{name}: {key} is {new[key]}, was {old[key]}" for key in COMPARED_KEYS if old[key] != new.get(key))
        yield from (f"{name}: the record lacks {key}" for key in sorted(set(keys(old)) - set(keys(new))))
        if per_token(path) != per_token(after[name]):
            yield f"{name}: losses or likeliest tokens differ"


def without_headers(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: without_headers(inner) for key, inner in value.items() if key != "header_bytes"}


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from keys(inner, f"{prefix}{key}.")


def per_token(record: Path) -> dict[str, bytes]:
    with safe_open(record.with_suffix(".safetensors"), framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}


if __name__ == "__main__":
    run_command(main)
