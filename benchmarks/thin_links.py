"""What thin and far links do to prompt and token, for each codec: emulated links, measured, beside what is predicted.

    export OMP_WAIT_POLICY=PASSIVE
    torchrun --nproc_per_node=4 -m benchmarks.thin_links --config demo.yaml --calibration results/cpu_demo/calibration

Every round takes all codecs through all links, and through loopback, one after the other. Per codec and link:

* the first token of a prompt of 512 tokens, in chunks of 256: seconds;
* one sequence: seconds between tokens; predicted is what it takes over loopback plus, of each link, the delay and the
  frame's bits at the link's rate;
* four sequences at once: tokens a second;
* at one of the delays, four prompts of 512 tokens at once: prompt tokens a second.

Answers must be the same over every link, or nothing is printed. A table and a JSON of medians and conditions are
written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation import Request
from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.runtime.launch import on_deployment

CODECS = ("bf16", "int8", "nf4", "klt(calibration={calibration}, step={step})")
PROMPT_TOKENS = 512
TEXT = (
    "The canal was built between 1768 and 1777 to bring coal to the town. Boats were drawn by horses, later by steam, "
    "and paid a toll at every lock. When the railway came, traffic fell, and the company sold its land to the city. "
)

Cell = tuple[str, str, str]  # codec, rate, delay
LOOPBACK = ("", "0")
NUM_SEQUENCES = 4


class TimedRequest(Request):
    """That keeps when its last token came, and the payload bytes of its passes, all links together."""

    def __init__(self, prompt_ids: Sequence[int], num_tokens: int) -> None:
        super().__init__(prompt_ids, num_tokens)
        self.last_s = 0.0
        self.pass_nbytes: list[float] = []

    def take(self, token: Any, *, was_draft: bool) -> None:
        super().take(token, was_draft=was_draft)
        self.last_s = time.perf_counter()

    def count(self, payload_bytes: Sequence[float], *, brings_tokens: bool) -> None:
        self.pass_nbytes.append(sum(payload_bytes))


class Bench:
    """One deployment per codec, all with the same loaded stages. Rank 0 alone has requests and times.

    `seconds` has all rounds' by cell and quantity: `prompt`, `token` (of one sequence), `several` (a token's share with
    four) and `prefill` (a prompt token's share); `nbytes` what a pass sends over all links, headers included.
    """

    def __init__(self, config: RunConfig, deployment: Any, codecs: Mapping[str, str], num_tokens: int) -> None:
        from transformers import AutoTokenizer

        self.config, self.control, self.num_tokens = config, deployment.control, num_tokens
        self.is_first = deployment.control.world.rank == 0
        self.configs = {name: with_overrides(config, [("compressor", spec)]) for name, spec in codecs.items()}
        self.deployments = {
            name: dataclasses.replace(deployment, codecs=make_link_codecs(own, deployment))
            for name, own in self.configs.items()
        }
        ids = AutoTokenizer.from_pretrained(deployment.model.directory)(TEXT * 60)["input_ids"]
        self.prompts = [ids[i * PROMPT_TOKENS :][:PROMPT_TOKENS] for i in range(NUM_SEQUENCES)]
        self.seconds: dict[tuple[Cell, str], list[float]] = defaultdict(list)
        self.nbytes: dict[tuple[Cell, str], float] = {}
        self._answers: dict[str, list[list[int]]] = {}

    def measure(self, codec: str, rate: str, delay: str, *, prefill: bool) -> None:
        from pipeline.generation.ring import GenerationRing

        links = [("links.rate", rate or None), ("links.delay", delay)]
        ring = GenerationRing(with_overrides(self.configs[codec], links), self.deployments[codec])
        short = [prompt[:16] for prompt in self.prompts]
        runs = [self._run(ring, self.prompts[:1], 1), self._run(ring, short[:1], self.num_tokens)]
        runs.append(self._run(ring, short, self.num_tokens))
        if prefill:
            runs.append(self._run(ring, self.prompts, 1))
        ring.close()
        if self.is_first:
            self._check(codec, rate, delay, runs[:3])
            self._take((codec, rate, delay), runs)

    def _check(self, codec: str, rate: str, delay: str, runs: Sequence[Sequence[TimedRequest]]) -> None:
        told = [request.token_ids for requests in runs for request in requests]
        if self._answers.setdefault(codec, told) != told:
            raise SystemExit(f"{codec}: answers over {rate}, {delay} are not those over other links")

    def _take(self, cell: Cell, runs: Sequence[Sequence[TimedRequest]]) -> None:
        (prompt,), (alone,), several, *whole = runs
        self.seconds[cell, "prompt"].append(prompt.first_s - prompt.began_s)
        self.seconds[cell, "token"].append((alone.last_s - alone.first_s) / (self.num_tokens - 1))
        begun_s, ended_s = max(r.first_s for r in several), max(r.last_s for r in several)
        self.seconds[cell, "several"].append((ended_s - begun_s) / (NUM_SEQUENCES * (self.num_tokens - 1)))
        self.nbytes[cell, "prompt"] = sum(prompt.pass_nbytes)
        self.nbytes[cell, "token"] = statistics.mean(alone.pass_nbytes[1:]) + self.header_nbytes
        for requests in whole:
            spent_s = max(r.first_s for r in requests) - min(r.began_s for r in requests)
            self.seconds[cell, "prefill"].append(spent_s / (NUM_SEQUENCES * PROMPT_TOKENS))

    def _run(self, ring: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[TimedRequest]:
        from pipeline.generation.scheduler import Scheduler, SchedulerConfig

        requests = [TimedRequest(prompt, num_tokens) for prompt in prompts] if self.is_first else []
        scheduler = None
        if self.is_first:
            scheduler = Scheduler(
                SchedulerConfig(
                    num_slots=self.config.generation.max_slots,
                    slot_length=ring.slot_length,
                    prefill_chunk=ring.prefill_chunk,
                    passes=ring.passes,
                    shares_prefixes=False,
                    shares_passes=True,
                )
            )
            for request in requests:
                scheduler.submit(request)
            scheduler.close()
        reports = ring.run(scheduler)
        sent = [traffic for report in reports for traffic in report["sent"].values()]
        self.header_nbytes = sum(each["header_bytes"] / each["num_frames"] for each in sent)
        errors = [request.error for request in requests if request.error is not None]
        if errors:
            raise SystemExit(errors[0])
        return requests


def make_link_codecs(config: RunConfig, deployment: Any) -> Any:
    from pipeline.runtime.codecs import codec_requests, make_codecs
    from pipeline.runtime.link_specs import generation_workload

    model_config = deployment.model.config
    requests = codec_requests(
        config,
        deployment.plan,
        hidden_size=model_config.hidden_size,
        max_tokens=generation_workload(config, model_config).max_tokens,
        checkpoint=deployment.model.checkpoint_digest,
    )
    return make_codecs(requests, deployment.plan, deployment.control, measure_error=False)


def run(config: RunConfig, deployment: Any, codecs: Mapping[str, str], arguments: argparse.Namespace) -> None:
    bench = Bench(config, deployment, codecs, arguments.tokens)
    delays = arguments.delays.split(",")
    links = [LOOPBACK, *itertools.product(arguments.rates.split(","), delays)]
    middle = delays[len(delays) // 2]
    for number in range(arguments.rounds + 1):
        if number == 0:  # warms up, and is forgotten
            bench.measure(next(iter(codecs)), *LOOPBACK, prefill=False)
            bench.seconds.clear()
            continue
        for rate, delay in links:
            for codec in codecs:
                bench.measure(codec, rate, delay, prefill=delay in (middle, LOOPBACK[1]))
        if bench.is_first:
            print(f"round {number} of {arguments.rounds} done", file=sys.stderr, flush=True)
            write(bench, config, deployment, links, arguments)
    if bench.is_first:
        print(arguments.out)


def write(
    bench: Bench, config: RunConfig, deployment: Any, links: Sequence[tuple[str, str]], arguments: argparse.Namespace
) -> None:
    from pipeline.config.units import parse_duration, parse_rate
    from pipeline.records.environment import software_versions
    from pipeline.records.files import write_json

    num_links = len(deployment.plan.chain_names)
    median = {key: statistics.median(values) for key, values in bench.seconds.items()}
    rows = []
    for (rate, delay), codec in itertools.product(links, bench.configs):
        cell, near = (codec, rate, delay), (codec, *LOOPBACK)
        bits = 8 * bench.nbytes[cell, "token"]
        crossing_s = num_links * parse_duration(delay) + (bits / parse_rate(rate) if rate else 0.0)
        prefill = median.get((cell, "prefill"))
        rows.append(
            {
                "codec": codec,
                "rate": rate or None,
                "delay": delay,
                "ttft_s": median[cell, "prompt"],
                "tpot_s": median[cell, "token"],
                "predicted_tpot_s": median[near, "token"] + crossing_s,
                "tokens_per_s_of_four": 1 / median[cell, "several"],
                "prompt_tokens_per_s": None if prefill is None else 1 / prefill,
                "prompt_bytes_per_token_per_link": bench.nbytes[cell, "prompt"] / PROMPT_TOKENS / num_links,
                "bytes_per_token_per_link": bench.nbytes[cell, "token"] / num_links,
            }
        )
    conditions = {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "blocks": deployment.model.block_types,
        "rounds": len(next(iter(bench.seconds.values()))),
        "prompt_tokens": PROMPT_TOKENS,
        "generated_tokens": arguments.tokens,
        "prefill_chunk": config.generation.prefill_chunk,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "specs": {name: own.compressor for name, own in bench.configs.items()},
        "versions": software_versions(),
        "environment": dict(deployment.environment),
    }
    write_json(arguments.out, {"conditions": conditions, "rows": rows})
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As docs/thin_links.md has it."""
    lines = [
        "| link, codec | bytes/token/link | first token of 512, s | ms/token | predicted | tokens/s of four "
        "| prompt tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        link = f"{row['rate']}, {row['delay']}" if row["rate"] else "loopback"
        prefill = "" if row["prompt_tokens_per_s"] is None else f"{row['prompt_tokens_per_s']:.0f}"
        cells = [
            *(f"{link}, `{row['codec']}`", f"{row['bytes_per_token_per_link']:.0f}", f"{row['ttft_s']:.2f}"),
            *(f"{1e3 * row['tpot_s']:.0f}", f"{1e3 * row['predicted_tpot_s']:.0f}"),
            *(f"{row['tokens_per_s_of_four']:.2f}", prefill),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """First token against rate, at the middle delay, and a token against delay, at the lowest rate."""
    from matplotlib.figure import Figure

    from pipeline.config.units import parse_duration, parse_rate

    over = [row for row in rows if row["rate"]]
    rates = sorted({row["rate"] for row in over}, key=parse_rate)
    delays = sorted({row["delay"] for row in over}, key=parse_duration)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    prompt, token = figure.subplots(1, 2)
    for color, codec in enumerate(dict.fromkeys(row["codec"] for row in over)):
        cells = {(row["rate"], row["delay"]): row for row in over if row["codec"] == codec}
        middle = delays[len(delays) // 2]
        seconds = [cells[rate, middle]["ttft_s"] for rate in rates]
        prompt.plot([parse_rate(rate) / 1e6 for rate in rates], seconds, "o-", color=f"C{color}", label=codec)
        far = [cells[rates[0], delay] for delay in delays]
        ms = [1e3 * parse_duration(delay) for delay in delays]
        for key, style, kind in (("tpot_s", "o", "measured"), ("predicted_tpot_s", "-", "predicted")):
            token.plot(ms, [1e3 * row[key] for row in far], style, color=f"C{color}", label=f"{codec}, {kind}")
    prompt.set(xscale="log", yscale="log", xlabel="rate of each link, Mbit/s", ylabel="first token, s")
    prompt.set_title(f"first token of a prompt of 512 tokens, {middle} one way", fontsize=10)
    token.set(xlabel="delay of each link, one way, ms", ylabel="ms a token", ylim=(0, None))
    token.set_title(f"one sequence over {rates[0]}", fontsize=10)
    for axes in (prompt, token):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    parser.add_argument("--rates", default="1mbit,10mbit,100mbit")
    parser.add_argument("--delays", default="1ms,20ms,50ms")
    parser.add_argument("--calibration", type=path_option, help="of klt, for this model and plan")
    parser.add_argument("--step", type=float, default=1.1, help="of klt")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of every sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=path_option, default=Path("build/thin_links.json"))
    parser.add_argument("--draw", type=path_option, metavar="PNG", help="measure nothing: draw what --out has")
    arguments = parser.parse_args(argv)
    if arguments.draw is not None:
        draw(json.loads(arguments.out.read_text())["rows"], arguments.draw)
        return 0
    if arguments.calibration is None:
        parser.error("--calibration is missing")
    own = [("generation.max_slots", NUM_SEQUENCES), ("generation.max_length", PROMPT_TOKENS + 64)]
    try:
        config = with_overrides(read_config(arguments), [("runtime.threads", 1), *own])
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    specs = [codec.format(calibration=arguments.calibration, step=arguments.step) for codec in CODECS]
    codecs = {spec.partition("(")[0]: spec for spec in specs}
    work = lambda deployment: run(config, deployment, codecs, arguments)
    on_deployment(config, Path(config.exp_dir), work, with_text=False)
    return 0


if __name__ == "__main__":
    run_command(main)
