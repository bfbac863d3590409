"""What each way to hold weights costs and yields: tokens a second, perplexity, memory; beside llama.cpp if it is there.

    python -m benchmarks.weight_formats --set model.dir=build/cache --out build/formats.json
    python -m benchmarks.weight_formats --format auto --set model.name=build/random-1b.gguf --perplexity_tokens 0 \\
        --llama build/llama/bin/python

Every case is a command of its own, run_pipeline.py on one process with all cores or on four ranks with one thread each,
and llama.cpp's server (the package xllamacpp, in the environment of the Python that --llama names) on the same file,
with one sequence, on one thread and on all cores. llama.cpp rounds activations to 8 bits and keeps keys and values in
fp16, where ours are float32. All take turns, round after round; printed are medians of rounds, and their ratios to
llama.cpp's single stream on all cores. One prompt of some eight tokens a sequence, greedy, with so many new tokens
whatever they are; a rate is that of all tokens after the last sequence's first one. Perplexities are those of windows,
whose products are of many rows, and of tokens one by one, which go the way that is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, given_keys, path_option, read_config
from pipeline.config.schema import RunConfig
from pipeline.models.source import resolve_model

PROMPTS = ("The capital of France is the city of", "Once upon a time there was a lock keeper who")
PROMPTS += ("A list of the largest rivers in the", "It is a truth universally acknowledged that a")
BITSANDBYTES = ("load_in_8bit", "load_in_4bit")
FORMATS = ("fp32", "bf16", "int8", "int4", "auto", *BITSANDBYTES)

# Run by the other Python, since llama.cpp's package need not be in this one's environment.
_LLAMA = """
import json, sys, xllamacpp
path, threads, num_tokens, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = path, 2048, 1, 0, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
asked = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
server.handle_completions(asked | {"n_predict": 8})
print(json.dumps(server.handle_completions(asked)["timings"]))
"""


class Case(NamedTuple):
    weights: str  # a value of model.weights, or a key of bitsandbytes' weights
    nodes: int
    sequences: int

    @property
    def place(self) -> str:
        where = "one process" if self.nodes == 1 else f"{self.nodes} ranks"
        return where if self.sequences == 1 else f"{where}, {self.sequences} sequences"

    def __str__(self) -> str:
        return f"{self.weights}, {self.place}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    parser.add_argument("--format", action="append", help="of model.weights, or load_in_8bit, load_in_4bit; repeated")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--perplexity_tokens", type=int, default=4000, help="of the config's text; 0: no perplexity")
    parser.add_argument("--llama", metavar="PYTHON", help="that has the package xllamacpp")
    parser.add_argument("--out", type=path_option, help="a JSON file for all figures")
    arguments = parser.parse_args(argv)
    config = read_config(arguments)
    with tempfile.TemporaryDirectory(prefix="weight_formats-") as folder:
        run(Bench(config, arguments, Path(folder)), arguments)
    return 0


def run(bench: Bench, arguments: argparse.Namespace) -> None:
    formats = arguments.format or FORMATS
    cases = [Case(name, nodes, count) for name in formats for nodes, count in ((1, 1), (4, 1), (4, 4))]
    perplexity = {name: bench.perplexity(name) for name in formats} if arguments.perplexity_tokens else {}
    for number in range(arguments.rounds):
        for case in cases:
            bench.generate(case)
        if arguments.llama:
            for threads in (1, bench.cores):
                bench.llama(threads)
        print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr, flush=True)
    bench.show(cases, perplexity)


class Bench:
    def __init__(self, config: RunConfig, arguments: argparse.Namespace, folder: Path) -> None:
        self.config, self.arguments = config, arguments
        self.cores = len(os.sched_getaffinity(0))
        self.folder = folder
        self.records: dict[Case, list[dict[str, Any]]] = defaultdict(list)
        self.llama_rates: dict[int, list[float]] = defaultdict(list)
        # All cases then find the file converted.
        resolve_model(config.model.name, cache_dir=config.model.dir, stage_to=None, show_progress=True)

    def perplexity(self, weights: str) -> dict[str, float]:
        num_tokens = self.arguments.perplexity_tokens
        windows = self._run(weights, 1, ["--first_k_tokens", str(num_tokens)])
        one_by_one = ["--set", "evaluation.mode=decode", "--first_k_tokens", str(num_tokens // 4)]
        by_token = self._run(weights, 1, one_by_one)
        return {
            "windows": windows["results"]["avg_ppl"],
            "windows, tokens/s": windows["tokens_per_s"],
            "one by one": by_token["results"]["avg_ppl"],
        }

    def generate(self, case: Case) -> None:
        prompts = self.folder / f"{case.sequences}.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[: case.sequences]))
        extra = ["--generate", str(prompts), "--set", f"generation.max_new_tokens={self.arguments.tokens}"]
        extra += ["--set", "generation.ignore_eos=true"]
        self.records[case].append(self._run(case.weights, case.nodes, extra))

    def _run(self, weights: str, nodes: int, extra: list[str]) -> dict[str, Any]:
        """The record of one command."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        start = [sys.executable] if nodes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [] if nodes == 1 else [f"--nproc_per_node={nodes}"]
        setting = f"model.{weights}=true" if weights in BITSANDBYTES else f"model.weights={weights}"
        own = ["--set", setting, "--set", f"partition.num_nodes={nodes}", "--exp_dir", str(folder)]
        own += ["--set", "runtime.threads=1"] if nodes > 1 else []
        command = [*start, "run_pipeline.py", *self._given(), *own, *extra]
        quiet = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # ranks share cores
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=quiet if nodes > 1 else None)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        (path,) = folder.glob("2*.json")
        return json.loads(path.read_text())

    def _given(self) -> list[str]:
        """The config that this program was given, as options."""
        given = [] if self.arguments.config is None else ["--config", self.arguments.config]
        for key, value in given_keys(self.arguments):
            given += ["--set", f"{key}={json.dumps(value)}"]
        return given

    def llama(self, threads: int) -> None:
        command = [self.arguments.llama, "-c", _LLAMA, str(_file(self.config.model.name)), str(threads)]
        done = subprocess.run(
            [*command, str(self.arguments.tokens), PROMPTS[0]], capture_output=True, text=True, check=True
        )
        self.llama_rates[threads].append(json.loads(done.stdout.splitlines()[-1])["predicted_per_second"])

    def show(self, cases: Sequence[Case], perplexity: dict[str, dict[str, float]]) -> None:
        llama = {threads: statistics.median(rates) for threads, rates in self.llama_rates.items()}
        for threads, rate in llama.items():
            print(f"llama.cpp, one sequence, {threads} threads: {rate:.1f} tokens/s")
        rows: dict[str, dict[str, Any]] = {}
        for case in cases:
            records = self.records[case]
            rate = statistics.median(map(_decode_rate, records))
            nbytes = max(rank["peak_rss_bytes"] for record in records for rank in record["ranks"])
            row = rows.setdefault(case.weights, {"weights": case.weights, **perplexity.get(case.weights, {})})
            row[case.place] = {"tokens_per_s": rate, "peak_rss_bytes": nbytes}
            beside = f", {rate / llama[self.cores]:.2f} of llama.cpp's" if llama else ""
            print(f"{case}: {rate:.1f} tokens/s{beside}, at most {nbytes / 2**20:.0f} MiB a rank, loading included")
        for name, figures in perplexity.items():
            print(f"{name}: perplexity {figures['windows']:.4f}, one by one {figures['one by one']:.4f}")
        if self.arguments.out:
            told = {"model": self.config.model.name, "cores": self.cores, "num_tokens": self.arguments.tokens}
            told |= {"llama.cpp": {str(threads): rate for threads, rate in llama.items()}}
            told |= {"weight_formats": list(rows.values())}
            self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
            self.arguments.out.write_text(json.dumps(told, indent=2) + "\n")


def _decode_rate(record: dict[str, Any]) -> float:
    """Tokens a second, from the last first token to the end."""
    results, requests = record["results"], record["requests"]
    run_s = results["generated_tokens"] / results["tokens_per_s"]
    return (results["generated_tokens"] - len(requests)) / (run_s - max(request["ttft_s"] for request in requests))


def _file(name: str) -> Path:
    """The GGUF file that a model's name means."""
    if not name.startswith("package:"):
        return Path(name)
    from importlib.util import find_spec

    package, _, inner = name.removeprefix("package:").partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)), inner)


if __name__ == "__main__":
    run_command(main)
