"""Peak resident memory of each rank against the tensors that it owns, on a random Llama of 2 GB.

    python -m benchmarks.memory

Makes a float32 checkpoint in a temporary folder, runs one window through four ranks with run_pipeline.py, and holds
each rank's VmHWM, which the run's record has, against

    1.15 * own tensors, in the run's dtype  +  an idle process  +  128 MiB

An idle process has imported what a rank imports, compiler included, and done nothing; it is measured first. The 128 MiB
are for one window of 512 tokens: activations, a chunk of logits and its softmax, frame pool, process group. Runs in
float32 and in bfloat16, which is not the stored dtype, must keep within the bound, or the exit code is 1. Weights that
bitsandbytes quantises while loading are shown for information: each layer passes through memory in full precision, and
the library itself takes 50 MiB.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.synthetic import save_random_llama
from compressors.console import run_command
from pipeline.config.reading import load_config
from pipeline.config.schema import RunConfig
from pipeline.models.loading import WeightFormat
from pipeline.models.model_config import load_model_config
from pipeline.models.sizes import stage_parameter_bytes
from pipeline.records.store import read_record
from pipeline.runtime.memory import peak_rss_bytes, pss_bytes
from pipeline.runtime.placement import make_plan

__all__ = ["NUM_RANKS", "RankMemory", "overrides", "print_idle_peak", "print_idle_share", "rank_memories"]

ROOT = Path(__file__).resolve().parent.parent
NUM_RANKS = 4
ALLOWANCE_NBYTES = 128 * 2**20
BOUND_CASES = (("fp32", ()), ("bf16", ()))
OTHER_CASES = (("bf16", ("model.load_in_8bit",)), ("bf16", ("model.load_in_4bit",)))


@dataclass(frozen=True)
class RankMemory:
    """A rank's tensors, from the plan and the model's config, its peak resident memory, and its share at the end.

    In the share (`runtime.memory.pss_bytes`), a page that several processes have is divided among them.
    """

    rank: int
    own_nbytes: int
    peak_nbytes: int
    share_nbytes: int | None

    def excess_nbytes(self, idle_nbytes: int) -> int:
        """What it took beyond 115% of its tensors and an idle process."""
        return self.peak_nbytes - 115 * self.own_nbytes // 100 - idle_nbytes


def print_idle_peak(rank: int = 0) -> None:
    """Import what a rank imports and print the peak in bytes."""
    _import_what_a_rank_imports()
    print(peak_rss_bytes())


def print_idle_share(rank: int = 0) -> None:
    """The same for the share, with the codecs' kernels."""
    _import_what_a_rank_imports()
    for module in ("klt", "trellis"):
        importlib.import_module(f"compressors.kernels.{module}")
    print(pss_bytes())


def _import_what_a_rank_imports() -> None:
    for module in ("run_pipeline", "pipeline.evaluation.evaluation", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    importlib.import_module("pipeline.models.slot_kernel").compile_attention(64)  # as for caches of float32


def overrides(model_dir: Path, folder: Path, *, window: int, dtype: str) -> list[tuple[str, object]]:
    """Config of a run of one window over a byte tokenizer; text and record go to `folder`."""
    text = folder / "text"
    text.write_text("packed bytes " * window, encoding="ascii")
    return [
        ("model.name", str(model_dir)),
        ("model.dtype", dtype),
        ("dataset.name", "text"),
        ("dataset.path", str(text)),
        ("dataset.first_k_tokens", window),
        ("dataset.max_length", window),
        ("dataset.stride", window),
        ("exp_dir", str(folder)),
        ("partition.num_nodes", NUM_RANKS),
        ("runtime.threads", 1),
    ]


def rank_memories(config: RunConfig) -> list[RankMemory]:
    """From the one record in the run's folder."""
    (path,) = Path(config.exp_dir).glob("*.json")
    model_config = load_model_config(Path(config.model.name), {})
    own = [0] * NUM_RANKS
    for stage in make_plan(config, model_config).stages:
        own[stage.node] += stage_parameter_bytes(model_config, stage, WeightFormat.from_config(config.model))
    return [RankMemory(r.rank, own[r.rank], r.peak_rss_bytes, r.pss_bytes) for r in read_record(path).ranks]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_layers", type=int, default=16, help="of 113 MB each")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    arguments = parser.parse_args(argv)
    idle_nbytes = _idle_nbytes()
    within = True
    with tempfile.TemporaryDirectory(prefix="thinwire_memory_") as folder:
        model_dir = Path(folder) / "model"
        total_nbytes = save_random_llama(
            model_dir,
            hidden_size=1536,
            num_layers=arguments.num_layers,
            vocab_size=16384,
            dtype=torch.float32,
            num_shards=8,
        )
        print(f"checkpoint {total_nbytes / 1e9:.2f} GB in float32, {NUM_RANKS} ranks, one window of {arguments.window}")
        print(f"idle process {_mib(idle_nbytes)} MiB, allowance {_mib(ALLOWANCE_NBYTES)} MiB; all in MiB:")
        print(f"{'run':24}{'rank':>5}{'own':>7}{'peak':>7}{'bound':>7}{'peak - 1.15 own - idle':>25}")
        for dtype, options in BOUND_CASES + OTHER_CASES:
            case = " ".join([dtype, *(option.partition(".")[2] for option in options)])
            for memory in _run(model_dir, Path(folder), arguments.window, dtype, options):
                excess_nbytes = memory.excess_nbytes(idle_nbytes)
                bound_nbytes = memory.peak_nbytes - excess_nbytes + ALLOWANCE_NBYTES
                numbers = [memory.own_nbytes, memory.peak_nbytes, bound_nbytes]
                print(f"{case:24}{memory.rank:5}{''.join(f'{_mib(n):7}' for n in numbers)}{_mib(excess_nbytes):25}")
                within &= bool(options) or excess_nbytes <= ALLOWANCE_NBYTES
    print("within the bound" if within else "NOT within the bound")
    return 0 if within else 1


def _run(model_dir: Path, folder: Path, window: int, dtype: str, options: Sequence[str]) -> list[RankMemory]:
    """One run in processes of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        given = overrides(model_dir, Path(run_folder), window=window, dtype=dtype) + [(o, True) for o in options]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
        settings = [word for key, value in given for word in ("--set", f"{key}={value}")]
        command += ["run_pipeline.py", *settings]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise SystemExit(f"run_pipeline.py failed:\n{finished.stderr}")
        return rank_memories(load_config(None, given))


def _idle_nbytes() -> int:
    code = "from benchmarks.memory import print_idle_peak; print_idle_peak()"
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


def _mib(nbytes: int) -> int:
    return round(nbytes / 2**20)


if __name__ == "__main__":
    run_command(main)
