"""A ring that answers what lm-evaluation-harness asks, on ranks of a test; lm_eval is imported on rank 0 alone."""

import functools
import json
from pathlib import Path

from pipeline.config.reading import load_config
from pipeline.generation.ring import GenerationRing
from pipeline.runtime.launch import on_deployment
from pipeline.serving.harness import HarnessJob

__all__ = ["answers_to", "ask_ring", "run_lm_eval"]

_KEYS = {"model.dtype": "fp64", "runtime.threads": 1, "generation.max_new_tokens": 8, "generation.max_slots": 3}


def answers_to(model, requests):
    """Of one of the harness' models, by kind of request; `requests` are the arguments of each."""
    from lm_eval.api.instance import Instance

    return {
        kind: getattr(model, kind)([Instance(kind, {}, tuple(own), index) for index, own in enumerate(arguments)])
        for kind, arguments in requests.items()
    }


def ask_ring(rank, keys, requests):
    """On every rank; rank 0 writes `answers.json` into the config's exp_dir: answers, and counts of what was asked."""
    config = load_config(None, list((_KEYS | keys).items()))
    job = HarnessJob(lambda model: answers_to(model, requests))
    worked = on_deployment(config, Path(config.exp_dir), lambda d: job.run(GenerationRing(config, d)), with_text=False)
    if worked is not None:
        told = {name: value for name, value in vars(worked.asking).items() if name.startswith("num_")}
        Path(config.exp_dir, "answers.json").write_text(json.dumps([worked.result, told]))


def run_lm_eval(rank, words):
    """The harness' own command line, on every rank, without the index of its own tasks, which takes many seconds."""
    import lm_eval.tasks

    from pipeline.serving.lm_eval import main

    lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    return main(words)
