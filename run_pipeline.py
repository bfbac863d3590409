"""Entry point: parse, deploy, run or generate, record.

torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml
python run_pipeline.py --config demo.yaml --compressor nf4
torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml --compressor nf4 --generate "The canal was built"

Installed: `thinwire --config demo.yaml`, and `torchrun --nproc_per_node=4 -m run_pipeline --config demo.yaml`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compressors.console import run_command
from pipeline.comm.watchdog import EXIT_INTERRUPTED
from pipeline.comm.world import World
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.sweep_file import Sweep, find_sweep, load_sweep
from pipeline.config.units import parse_duration, parse_rate
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.evaluation.sweep import SweepResult
    from pipeline.generation.chat import ChatJob
    from pipeline.generation.generate import Generated, GenerationJob
    from pipeline.partition.plan import Plan
    from pipeline.generation.requests import RefusedRequest, Request, RequestMaker
    from pipeline.runtime.deployment import Deployment
    from pipeline.serving.job import ServeJob

EXIT_POINTS_FAILED = 3


def make_parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        description="Run a causal LM split over ranks, hidden states compressed, and measure its perplexity.",
        epilog="Every key of a config can be set with --set; see docs/configuration.md.",
    )
    add_config_options(parser)
    parser.add_argument(
        "--generate",
        metavar="TEXT|JSONL|-",
        help="go on from a text, or answer the prompts of a .jsonl file (-: standard input)",
    )
    parser.add_argument("--chat", action="store_true", help="talk with the model in the terminal")
    parser.add_argument(
        "--serve",
        metavar="HOST:PORT",
        help="answer requests of OpenAI's API, e.g. at 127.0.0.1:8000, until Ctrl-C",
    )
    parser.add_argument("--api_key_file", metavar="FILE", help="with --serve: the key that requests must bring")
    parser.add_argument(
        "--draft",
        action="append",
        metavar="DRAFTER",
        help="guesses tokens of answers that one pass verifies, e.g. ngram; may be given several times",
    )
    parser.add_argument(
        "--lm_eval", metavar="TASKS", help="score tasks of lm-evaluation-harness, names with commas between them"
    )
    tasks = parser.add_argument_group("with --lm_eval")
    tasks.add_argument("--lm_eval_tasks", metavar="DIR", type=path_option, help="YAML files of further tasks")
    tasks.add_argument("--limit", metavar="N", type=float, help="samples of each task, or a share below 1")
    tasks.add_argument("--num_fewshot", metavar="N", type=int, help="examples in front of each sample")
    tasks.add_argument("--apply_chat_template", action="store_true", help="prompts go through the chat template")
    tasks.add_argument("--log_samples", action="store_true", help="write the harness' samples, too")
    parser.add_argument("--plan", action="store_true", help="print stages, links, bytes and memory; load nothing")
    planning = parser.add_argument_group("with --plan")
    planning.add_argument("--link_rate", metavar="RATE", help="of every link, such as 10mbit, in place of the config's")
    planning.add_argument("--link_delay", metavar="TIME", help="of every link, one way, such as 20ms")
    planning.add_argument("--records", metavar="DIR", type=path_option, help="of a sweep: chooses a codec per link")
    planning.add_argument("--max_ppl_increase", metavar="SHARE", type=float, help="default 0.01, +1%%")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from its journal")
    parser.add_argument(
        "--sweep", metavar="YAML", help="run every point of a sweep, a path or a name in configs/sweeps/"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        sweep = None if arguments.sweep is None else load_sweep(find_sweep(arguments.sweep))
        config = read_config(arguments, own=_own_keys(arguments, sweep))
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if (message := _contradiction(arguments)) is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    if arguments.plan:
        return show_plan(config, arguments)
    if arguments.chat or arguments.generate is not None:
        name, prompts = ("chat", "-") if arguments.chat else ("generate", arguments.generate)
        if _is_rank_0() and (problem := _prompts_problem(prompts)) is not None:
            print(f"error: --{name}: {problem}", file=sys.stderr)
            return 2
    if arguments.chat:
        return run_chat(config)
    if arguments.serve is not None:
        return run_serve(config)
    if arguments.generate is not None:
        return run_generate(config, arguments.generate, resume=arguments.resume)
    if arguments.lm_eval is not None:
        return run_tasks(config, sweep, arguments)
    if sweep:
        return run_sweep(sweep, config)
    return run(config, resume=arguments.resume)


def _own_keys(arguments: argparse.Namespace, sweep: Sweep | None) -> list[tuple[str, Any]]:
    """Config keys that a sweep or an option of this program sets over the file."""
    keys = [("measure_error", True), *sweep.base] if sweep else []
    options = {
        "generation.draft": arguments.draft,
        "serving.address": arguments.serve,
        "serving.api_key_file": arguments.api_key_file,
    }
    return [*keys, *((key, value) for key, value in options.items() if value is not None)]


def _contradiction(arguments: argparse.Namespace) -> str | None:
    """Why these options do not go together."""
    names = ("sweep", "generate", "chat", "serve", "plan")
    chosen = [name for name in names if getattr(arguments, name) not in (None, False)]
    if arguments.lm_eval is not None:
        chosen = [name for name in chosen if name != "sweep"] and ["lm_eval", *chosen]
    if len(chosen) > 1:
        return f"--{chosen[0]} and --{chosen[1]} are two different things; choose one"
    options = ("link_rate", "link_delay", "records", "max_ppl_increase")
    planning = [name for name in options if getattr(arguments, name) is not None]
    if planning and not arguments.plan:
        return f"--{planning[0]} belongs to --plan"
    if arguments.link_delay is not None and arguments.link_rate is None:
        return "--link_delay needs --link_rate, the links' rate, such as 10mbit"
    if arguments.max_ppl_increase is not None and arguments.records is None:
        return "--max_ppl_increase needs --records, a folder with the records of a sweep"
    if (message := _tasks_contradiction(arguments)) is not None:
        return message
    is_answering = arguments.chat or arguments.generate is not None or arguments.serve is not None
    if arguments.draft is not None and not is_answering:
        return "--draft belongs to --generate, --chat and --serve; with --plan it is --set generation.draft=..."
    if arguments.resume and (arguments.chat or arguments.serve is not None):
        name = "chat" if arguments.chat else "serve"
        return f"--{name} keeps nothing that --resume could go on from"
    if arguments.api_key_file is not None and arguments.serve is None:
        return "--api_key_file belongs to --serve"
    if arguments.generate == "-" and arguments.resume:
        return "--resume needs prompts that are known beforehand; write those of standard input to a .jsonl file"
    return None


def _tasks_contradiction(arguments: argparse.Namespace) -> str | None:
    """Why options of --lm_eval do not go together, or stand without it."""
    options = ("lm_eval_tasks", "limit", "num_fewshot", "apply_chat_template", "log_samples")
    given = [name for name in options if getattr(arguments, name) not in (None, False)]
    if arguments.lm_eval is None:
        return f"--{given[0]} belongs to --lm_eval" if given else None
    limit, num_fewshot = arguments.limit, arguments.num_fewshot
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        return f"--limit is {limit:g}, but must be a number of samples, or a share between 0 and 1"
    if num_fewshot is not None and num_fewshot < 0:
        return f"--num_fewshot is {num_fewshot}, but must be at least 0"
    if arguments.resume:
        return "--lm_eval keeps nothing that --resume could go on from"
    return None


def show_plan(config: RunConfig, arguments: argparse.Namespace) -> int:
    from pipeline.advice import plan_with_advice
    from pipeline.comm.emulation import Conditions
    from pipeline.runtime.plan_report import plan_run, plan_text

    try:
        run = plan_run(config)
        network = run.network
        if arguments.link_rate is not None:
            rate, delay_s = parse_rate(arguments.link_rate), parse_duration(arguments.link_delay or "0")
            network = (Conditions(bits_per_s=rate, delay_s=delay_s),) * len(run.plan.chain_names)
        if network is not None:
            told = plan_with_advice(
                run,
                network,
                records=arguments.records,
                max_ppl_increase=arguments.max_ppl_increase,
                is_asked_for=arguments.link_rate is not None or arguments.records is not None,
            )
            print("\n".join(told))
        elif arguments.records is None:
            print(plan_text(run))
        else:
            raise ConfigError("--records needs --link_rate, the links' rate, or a config with links")
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def run(config: RunConfig, *, resume: bool) -> int:
    def evaluate(deployment: Deployment) -> Path | None:
        from pipeline.evaluation.evaluation import Evaluation

        # torchrun --max_restarts repeats the command as it was, and means to go on.
        return Evaluation(config, deployment).run(resume=resume or deployment.control.was_restarted)

    def claim(digest: str) -> None:
        from pipeline.records.journal import Journal

        Journal.check(Path(config.exp_dir), digest, resume=resume)

    path = on_deployment(config, Path(config.exp_dir), evaluate, claim=claim)
    if path is not None:
        from pipeline.report.summary import print_summary

        print_summary([path])
    return 0


def _check_drafts(config: RunConfig) -> Callable[[Plan, Any], None]:
    """What can be wrong with drafters before weights load."""

    def check(plan: Plan, model_config: Any) -> None:
        from pipeline.drafting.registry import check_drafters

        check_drafters(config.generation.draft)

    return check


def run_generate(config: RunConfig, prompts: str, *, resume: bool) -> int:
    """Returns 3 on rank 0 when requests have failed, unless torchrun would then begin anew, which mends none."""
    is_file = prompts == "-" or prompts.endswith(".jsonl")

    job: GenerationJob | None = None

    def answer(deployment: Deployment) -> Generated | None:
        from pipeline.generation.generate import GenerationJob
        from pipeline.generation.requests import read_requests

        def requests(maker: RequestMaker) -> Iterable[Request | RefusedRequest]:
            if prompts == "-":
                return read_requests(prompts, maker)  # as they come
            return list(read_requests(prompts, maker)) if is_file else [maker.make({"prompt": prompts})]

        nonlocal job
        if job is None:
            job = GenerationJob(config, requests, resume=resume, shown=None if is_file else prompts)
        return job.run(deployment)

    def progress() -> int | None:
        return 0 if job is None else job.progress

    result = on_deployment(
        config, Path(config.exp_dir), answer, _check_drafts(config), with_text=False, progress=progress
    )
    if result is None:
        return 0
    from pipeline.report.summary import print_summary

    print(flush=True)
    for line in result.failed:
        place = f"line {line['line']}: "  # a refused line's error has it already
        print(f"failed: {place}{line['error'].removeprefix(place)}", file=sys.stderr)
    print_summary([result.record])
    print(f"answers: {result.answers}")
    return _status(bool(result.failed))


def _status(has_failures: bool) -> int:
    """Of rank 0 once all is done; torchrun takes any but 0 for a crash, and with --max_restarts would start over."""
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return EXIT_POINTS_FAILED if has_failures and not may_restart else 0


def _is_rank_0() -> bool:
    """Which alone reads prompts; an environment that does not tell is refused later on."""
    try:
        return World.from_environment().rank == 0
    except ValueError:
        return False


def _prompts_problem(prompts: str) -> str | None:
    """Why neither prompts nor a text can be meant, or prompts cannot be read."""
    if prompts == "-":
        return "standard input is closed" if sys.stdin is None else None
    is_named = prompts.endswith(".jsonl")
    try:
        path = path_option(prompts)
        if not path.is_file():
            return f"{prompts}: there is no such file" if is_named else None
        if not is_named:
            return f"{prompts}: this is a file; a file of prompts has a name that ends in .jsonl"
        with open(path, "rb") as file:
            file.read(1)
    except argparse.ArgumentTypeError as e:
        return str(e) if is_named else None
    except OSError as e:  # a text may be too long for a name
        return f"{prompts} cannot be read: {e.strerror or e}" if is_named else None
    return None


def run_chat(config: RunConfig) -> int:
    job: ChatJob | None = None

    def talk(deployment: Deployment) -> None:
        from pipeline.generation.chat import ChatJob

        nonlocal job
        job = job or ChatJob(config)
        job.run(deployment)

    def progress() -> int | None:
        return 0 if job is None else job.progress

    on_deployment(config, Path(config.exp_dir), talk, _check_drafts(config), with_text=False, progress=progress)
    return 0


def run_tasks(config: RunConfig, sweep: Sweep | None, arguments: argparse.Namespace) -> int:
    """Tasks of lm-evaluation-harness, on one config or on every point of a sweep."""
    from pipeline.serving.harness_options import HarnessOptions
    from pipeline.serving.harness_runs import score_sweep, score_tasks

    options = HarnessOptions(
        tasks=tuple(filter(None, arguments.lm_eval.split(","))),
        include_path=arguments.lm_eval_tasks,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        apply_chat_template=arguments.apply_chat_template,
        log_samples=arguments.log_samples,
    )
    has_failures = False
    if sweep is None:
        path = score_tasks(config, options)
        records = [] if path is None else [path]
    else:
        result = score_sweep(sweep, config, options)
        records, has_failures = result.records, bool(result.failures)
    if records:
        from pipeline.report.summary import print_summary

        print_summary(records)
    return _status(has_failures)


def run_serve(config: RunConfig) -> int:
    """Returns when a signal has ended it, with the status of that."""
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        print(f"error: --serve needs {', '.join(missing)}: pip install 'thinwire[serve]'", file=sys.stderr)
        return 2
    job: ServeJob | None = None

    def open_job(plan: Plan, model_config: Any) -> None:
        from pipeline.serving.job import ServeJob

        nonlocal job
        _check_drafts(config)(plan, model_config)
        job = job or ServeJob(config, is_first=_is_rank_0())

    def serve(deployment: Deployment) -> None:
        assert job is not None
        if (record := job.run(deployment)) is not None:
            from pipeline.report.summary import print_summary

            print_summary([record])

    def progress() -> int | None:
        return 0 if job is None else job.progress

    on_deployment(config, Path(config.exp_dir), serve, open_job, with_text=False, progress=progress)
    return EXIT_INTERRUPTED


def run_sweep(sweep: Sweep, config: RunConfig) -> int:
    """Returns 3 on rank 0 when points have failed. The other ranks do not: torchrun would end rank 0 in its report."""

    def run_points(deployment: Deployment) -> SweepResult:
        from pipeline.evaluation.sweep import run_points

        return run_points(sweep, config, deployment)

    result = on_deployment(sweep.deployed(config), Path(config.exp_dir), run_points)
    if result.records or result.failures:
        show_sweep(sweep, config, result)
    return _status(bool(result.failures))


def show_sweep(sweep: Sweep, config: RunConfig, result: SweepResult) -> None:
    """Final table, list of failed points, and report."""
    from pipeline.evaluation.sweep import write_page
    from pipeline.records.store import read_failure
    from pipeline.report.summary import print_summary

    print_summary(result.records)
    for path in result.failures:
        if failure := read_failure(path):
            print(f"failed: {failure.label}: {failure.error}", file=sys.stderr)
    if result.num_run and result.records:
        write_page(sweep, config, result)


def command() -> NoReturn:
    """The installed command `thinwire`."""
    run_command(main)


if __name__ == "__main__":
    run_command(main)
