"""What every rank of a test would import and set up anew, once, in the server that ranks are forked from (`launch`).

numba fills its tables with the first kernel that runs, transformers compiles a thousand patterns with the first
checkpoint: more CPU time than most tests' runs take. Kernels themselves stay out, since where they are cached is
decided when they are imported.
"""

import contextlib
import gc
import importlib

from numba.core.registry import cpu_target

for name in (
    "run_pipeline",
    "pipeline.analyse",
    "pipeline.analysis.plots",
    "pipeline.calibrate",
    "pipeline.evaluation.sweep",
    "matplotlib.backends.backend_agg",
    "transformers.models.auto.modeling_auto",
    *(f"transformers.models.{m}.modeling_{m}" for m in ("gemma3", "gpt_neox", "llama", "qwen2", "qwen3")),
):
    importlib.import_module(name)
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
with contextlib.suppress(ImportError, AttributeError):  # of some releases only
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
gc.freeze()  # or each rank's collector would copy the pages that all share
