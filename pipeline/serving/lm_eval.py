"""lm-evaluation-harness' own command line, with the model `thinwire` in it.

torchrun --nproc_per_node=4 -m pipeline.serving.lm_eval run --model thinwire \
    --model_args config=demo.yaml,compressor=int8 --tasks arc_easy --limit 200 --output_path results/tasks

The harness (0.4.12, 0.4.13) looks for models in its own package alone, so that a model of another one is registered
before its command line runs. `model_args` are `config`, flags of `run_pipeline.py` without dashes, and dotted keys of
the config. What the harness writes is its own; records are written by `run_pipeline.py --lm_eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.console import run_command
from pipeline.config.reading import find_config, load_config
from pipeline.config.schema import FLAG_KEYS, ConfigError, RunConfig
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.runtime.deployment import Deployment
    from pipeline.serving.harness import HarnessJob
    from pipeline.serving.harness_model import ThinwireLM

__all__ = ["config_of"]

NAME = "thinwire"


def main(argv: Sequence[str] | None = None) -> int:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    if argv is not None:
        sys.argv[1:] = argv  # which the harness' own parser reads
    arguments = HarnessCLI().parse_args()
    if getattr(arguments, "command", None) != "run":
        cli_evaluate()
        return 0
    asked = EvaluatorConfig.from_cli(arguments)
    try:
        if asked.model != NAME:
            raise ConfigError(f"--model is {asked.model}; this command has the model {NAME}, lm_eval the others")
        config = config_of(asked.model_args)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    job: HarnessJob | None = None

    def work(model: ThinwireLM) -> None:
        _register(model)
        HarnessCLI().execute(arguments)

    def serve(deployment: Deployment) -> None:
        from pipeline.generation.ring import GenerationRing
        from pipeline.serving.harness import HarnessJob

        nonlocal job
        job = job or HarnessJob(work)
        job.run(GenerationRing(config, deployment))

    def progress() -> int | None:
        return 0 if job is None else job.progress

    on_deployment(config, Path(config.exp_dir), serve, with_text=False, progress=progress)
    return 0


def config_of(model_args: Mapping[str, Any]) -> RunConfig:
    """The config that the harness' `model_args` ask for. Raises ConfigError."""
    keys = [(FLAG_KEYS.get(name, name), value) for name, value in model_args.items() if name != "config"]
    path = model_args.get("config")
    return load_config(None if path is None else find_config(str(path)), keys)


def _register(model: ThinwireLM) -> None:
    """Under the name that the harness asks its registry for; it then gets the model that there is."""
    from lm_eval.api.registry import register_model

    from pipeline.serving.harness_model import ThinwireLM

    @register_model(NAME)
    class Deployed(ThinwireLM):
        @classmethod
        def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> Any:
            return model

        @classmethod
        def create_from_arg_string(cls, arg_string: Any, additional_config: Any = None) -> Any:
            return model


if __name__ == "__main__":
    run_command(main)
