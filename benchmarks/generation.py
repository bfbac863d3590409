"""Tokens per second of the ring against transformers' generate, in one run, turn by turn.

    export OMP_WAIT_POLICY=PASSIVE
    torchrun --nproc_per_node=4 -m benchmarks.generation --config demo.yaml
    torchrun --nproc_per_node=4 -m benchmarks.generation --config demo.yaml --dtype bf16 --rounds 1

Without that variable the threads of a rank spin for a while when it has nothing left to compute, on cores that another
rank needs; OpenMP reads it when torch is loaded. Rank 0 holds the unsplit model as well; while it generates, the other
ranks wait in the ring without work. Before anything is timed, the ring's tokens are compared with the reference's.
Prints medians of all rounds as ratios, and where a step's time goes. A codec, other weights and so on come from the
config.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, read_config
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.runtime.launch import on_deployment

PROMPTS = (
    "The canal was built",
    "Once upon a time there was a lock keeper who",
    "A list of the largest rivers:",
    "In the year 1850",
    "The recipe needs two eggs and",
    "def fibonacci(n):",
    "It is a truth universally acknowledged that",
    "Water flows",
)
LONG_PROMPT = 1900


class Request:
    """A prompt that is answered with just so many tokens (`sequences.Answering`)."""

    expires_s = float("inf")

    def __init__(self, prompt_ids: Sequence[int], num_tokens: int) -> None:
        from pipeline.models.sampling import SamplingOptions

        self.prompt_ids, self.options, self.num_tokens = prompt_ids, SamplingOptions(), num_tokens
        self.token_ids: list[int] = []
        self.is_finished, self.error = False, None
        self.began_s, self.first_s = 0.0, 0.0

    @property
    def num_wanted(self) -> int:
        return self.num_tokens - len(self.token_ids)

    def begin(self) -> None:
        self.began_s = time.perf_counter()

    def take(self, token: Any, *, was_draft: bool) -> None:
        if not self.token_ids:
            self.first_s = time.perf_counter()
        self.token_ids.append(token.token_id)
        if len(self.token_ids) == self.num_tokens:
            self.is_finished = True

    def count(self, payload_bytes: Sequence[float], *, brings_tokens: bool) -> None:
        pass

    def finish(self, reason: str, error: str | None = None) -> None:
        self.is_finished, self.error = True, error


class Bench:
    """One deployment, and on rank 0 the model that it is measured against."""

    def __init__(self, config: RunConfig, deployment: Any, num_tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from transformers.utils import logging as transformers_logging

        from pipeline.generation.ring import GenerationRing
        from pipeline.models.loading import WeightFormat, bitsandbytes_config

        transformers_logging.set_verbosity_error()  # else it warns that answers end at no token, as they should here
        self.config, self.deployment, self.num_tokens = config, deployment, num_tokens
        self.control = deployment.control
        self.ring = GenerationRing(config, deployment)
        self.cores = len(os.sched_getaffinity(0))
        self.times: dict[str, list[float]] = defaultdict(list)
        self.phases: dict[str, dict[str, float]] = {}
        self.is_first = self.control.world.rank == 0
        if self.is_first:
            tokenizer = AutoTokenizer.from_pretrained(deployment.model.directory)
            self.prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
            text = tokenizer(" ".join(PROMPTS) * 40)["input_ids"]
            self.long_prompt = text[:LONG_PROMPT]
            self.tokenizer = tokenizer
            weights = WeightFormat.from_config(config.model)
            options: dict[str, Any] = {"dtype": weights.dtype}
            if weights.linear_bits is not None:
                options["device_map"] = {"": "cpu"}
                options["quantization_config"] = bitsandbytes_config(weights)
            self.model = AutoModelForCausalLM.from_pretrained(deployment.model.directory, **options).eval()

    def ring_s(self, name: str, num: int, passes: int, *, threads: int = 1) -> list[list[int]]:
        """Seconds of `num` prompts at once, in so many passes."""
        torch.set_num_threads(threads)
        requests = [Request(ids, self.num_tokens) for ids in self.prompts[:num]] if self.is_first else []
        report = self._run(requests, passes, self.ring.prefill_chunk)
        torch.set_num_threads(self.deployment.threads)
        if self.is_first:
            assert all(request.error is None for request in requests), [request.error for request in requests]
            # From the last first token on: prefill is another matter.
            decoded = num * (self.num_tokens - 1)
            begun = max(request.first_s for request in requests)
            self.times[name].append((self.end_s - begun) / decoded)
            self.phases[name] = report
        return [request.token_ids for request in requests]

    def reference_s(self, name: str, num: int, *, threads: int = 0) -> list[list[int]]:
        """Seconds of transformers' generate on rank 0, a batch of `num` prompts padded on the left.

        With all cores, or so many threads.
        """
        outputs: list[list[int]] = []
        if self.is_first:
            torch.set_num_threads(threads or self.cores)
            length = max(map(len, self.prompts[:num]))
            ids = torch.tensor([[0] * (length - len(p)) + p for p in self.prompts[:num]])
            mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in self.prompts[:num]])
            options = {"attention_mask": mask, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
            with torch.inference_mode():
                start_s = time.perf_counter()
                self.model.generate(ids, max_new_tokens=1, **options)
                first_s = time.perf_counter()
                output = self.model.generate(ids, max_new_tokens=self.num_tokens, **options)
                end_s = time.perf_counter()
            self.times[name].append((end_s - first_s - (first_s - start_s)) / (num * (self.num_tokens - 1)))
            outputs = output[:, length:].tolist()
            torch.set_num_threads(self.deployment.threads)
        self.control.barrier()
        return outputs

    def ttft_s(self, name: str, chunk: int) -> None:
        """Seconds to the first token of a long prompt."""
        requests = [Request(self.long_prompt, 1)] if self.is_first else []
        self._run(requests, 1, chunk or LONG_PROMPT)
        if self.is_first:
            assert requests[0].error is None, requests[0].error
            self.times[name].append(requests[0].first_s - requests[0].began_s)

    def _run(self, requests: Sequence[Request], passes: int, chunk: int) -> dict[str, float]:
        from pipeline.generation.scheduler import Scheduler, SchedulerConfig

        scheduler = None
        if self.is_first:
            scheduler = Scheduler(
                SchedulerConfig(
                    num_slots=self.config.generation.max_slots,
                    slot_length=self.ring.slot_length,
                    prefill_chunk=chunk,
                    passes=passes,
                    shares_prefixes=False,
                    shares_passes=not self.ring.mixes_tokens,
                )
            )
            for request in requests:
                scheduler.submit(request)
            scheduler.close()
        before = {index: dict(times.as_dict()) for index, times in self.ring.times.items()}
        self.ring.run(scheduler)
        self.end_s = time.perf_counter()
        spent: dict[str, float] = defaultdict(float)
        for index, times in self.ring.times.items():
            for phase, seconds in times.as_dict().items():
                spent[phase] += seconds - before[index].get(phase, 0.0)
        summed: dict[str, float] = defaultdict(float)
        for rank in self.control.gather(dict(spent)):
            for phase, seconds in rank.items():
                summed[phase] += seconds
        return dict(summed)


def run(config: RunConfig, deployment: Any, num_tokens: int, rounds: int) -> None:
    bench = Bench(config, deployment, num_tokens)
    cases: dict[str, Callable[[str], Any]] = {
        "generate, one sequence": lambda name: bench.reference_s(name, 1),
        "generate, one sequence, one thread": lambda name: bench.reference_s(name, 1, threads=1),
        "ring, one sequence": lambda name: bench.ring_s(name, 1, 1),
        f"ring, one sequence, {bench.cores} threads a rank": lambda name: bench.ring_s(name, 1, 1, threads=bench.cores),
        "ring, four sequences": lambda name: bench.ring_s(name, 4, 2),
        "generate, batch of eight": lambda name: bench.reference_s(name, 8),
        "generate, batch of four, one thread": lambda name: bench.reference_s(name, 4, threads=1),
        "ring, eight rows in two passes": lambda name: bench.ring_s(name, 8, 2),
        "ring, eight rows in one pass": lambda name: bench.ring_s(name, 8, 1),
        "first token of a long prompt, chunks of 256": lambda name: bench.ttft_s(name, 256),
        "first token of a long prompt, whole": lambda name: bench.ttft_s(name, 0),
    }
    compare(bench)
    for number in range(rounds):
        for name, case in cases.items():
            case(name)
        if bench.is_first:
            print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    if bench.is_first:
        show(bench)
    bench.ring.close()


def compare(bench: Bench) -> None:
    """The ring's tokens and the reference's, a prompt at a time; ties aside they are equal without a codec."""
    own = bench.ring_s("warm-up", len(PROMPTS), 2)
    bench.reference_s("warm-up of generate", 1)
    if not bench.is_first:
        return
    num_equal = 0
    for prompt, tokens in zip(bench.prompts, own, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            output = bench.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=bench.num_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        num_equal += output[0, len(prompt) :].tolist() == tokens
    print(f"answers equal to the unsplit model's: {num_equal} of {len(own)}")


def show(bench: Bench) -> None:
    median = {name: statistics.median(times) for name, times in bench.times.items()}
    one, eight = median["generate, one sequence"], median["generate, batch of eight"]
    model = bench.config.model
    weights = ", 8-bit weights" if model.load_in_8bit else ", 4-bit weights" if model.load_in_4bit else ""
    if (types := bench.deployment.model.block_types) is not None:
        weights = f", {types} blocks in the ring"
    print(
        f"{model.name}, {model.dtype}{weights}, codec {bench.config.compressor}, {bench.cores} cores, "
        f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}"
    )
    for name, seconds in median.items():
        if "warm-up" in name:
            continue
        if "first token" in name:
            print(f"{name}: {seconds:.2f} s")
            continue
        against = eight if "eight" in name else one
        other = "the batch" if against is eight else "one"
        print(f"{name}: {1 / seconds:.2f} tokens/s, {against / seconds:.2f} of {other}")
    chunks = median["first token of a long prompt, chunks of 256"]
    print(f"chunks bring the first token {median['first token of a long prompt, whole'] / chunks:.2f} times as soon")
    ratio = median["ring, one sequence"] / median["ring, four sequences"]
    print(f"four sequences at once: {ratio:.2f} of one sequence's rate in the ring")
    for name in ("ring, one sequence", "ring, four sequences"):
        phases = bench.phases[name]
        steps = bench.num_tokens * (1 if "one" in name else 4)
        parts = {phase: 1e3 * seconds / steps for phase, seconds in phases.items() if phase not in ("wait_s",)}
        told = ", ".join(f"{phase.removesuffix('_s')} {ms:.2f}" for phase, ms in parts.items() if ms >= 0.005)
        print(f"{name}, ms a token over all ranks: {told}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every sequence")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    try:
        own = [("runtime.threads", 1), ("generation.prefill_chunk", 0)]  # links then have room for whole prompts
        config = with_overrides(read_config(arguments), own)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    work = lambda deployment: run(config, deployment, arguments.tokens, arguments.rounds)
    on_deployment(config, Path(config.exp_dir), work, with_text=False)
    return 0


if __name__ == "__main__":
    run_command(main)
