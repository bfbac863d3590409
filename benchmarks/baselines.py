"""What the pipeline is measured against: torch.distributed.pipelining, one plain process, the hook method.

Each computes the loss of every scored token of the same windows, or their sum where its method knows no more. `serve`
runs them on demand in processes beside the pipeline's ranks, so that neither side's memory allocator, threads or
process group are the other's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime
from transformers import AutoModelForCausalLM

from compressors import Compressor
from pipeline.comm.control import Control
from pipeline.comm.world import World
from pipeline.config.schema import RunConfig
from pipeline.evaluation.evaluation import Evaluation
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.source import resolve_model
from pipeline.models.stage import Stage, TokenWindows
from pipeline.partition.plan import Plan
from pipeline.records.perplexity import sum_nll
from pipeline.runtime.codecs import make_codec
from pipeline.runtime.deployment import deploy
from pipeline.runtime.devices import available_cores

__all__ = ["BASELINES", "Run", "forward_order", "serve"]

BASELINES = ("pipelining", "plain", "hooks")


@dataclass(frozen=True)
class Run:
    """One computation of all windows: seconds from a barrier to the last result, total NLL in nats, its summands.

    `losses` (float32, one per scored token) is None where a method knows only the sum.
    """

    seconds: float
    total_nll: float
    losses: np.ndarray | None


class PlainModel:
    """The unsplit model as transformers has it; only scored positions pass the head."""

    def __init__(self, model: nn.Module, tokens: TokenWindows) -> None:
        self._model, self._tokens = model, tokens

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """Losses, float32 [number of scored tokens]."""
        losses = []
        for index in range(len(self._tokens.microbatches)):
            hidden_states = self._model.base_model(self._tokens.input_ids(index), use_cache=False).last_hidden_state
            rows, columns, targets = self._tokens.scored(index)
            logits = self._model.get_output_embeddings()(hidden_states[rows, columns]).float()
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(losses)


class HookedModel:
    """The original benchmark's method: forward hooks code each link's hidden states, the head sees every position.

    The loss is the mean that transformers computes from `labels`, so only the sum over a window is known.
    """

    def __init__(self, model: nn.Module, tokens: TokenWindows, plan: Plan, codecs: Sequence[Compressor]) -> None:
        self._model, self._tokens = model, tokens
        layers, embedding = model.base_model.layers, model.get_input_embeddings()
        sources = [layers[stage.end - 1] if stage.end else embedding for stage in plan.stages[:-1]]
        self._links = list(zip(sources, codecs, strict=True))

    @torch.inference_mode()
    def __call__(self) -> float:
        """Total NLL of all scored tokens, in nats."""
        total = 0.0
        with self._hooks():
            for index in range(len(self._tokens.microbatches)):
                ids = self._tokens.input_ids(index)
                rows, columns, targets = self._tokens.scored(index)
                labels = torch.full_like(ids, -100)
                labels[rows, columns + 1] = targets
                total += self._model(ids, labels=labels, use_cache=False).loss.item() * targets.numel()
        return total

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer, codec in self._links:
                handle = layer.register_forward_hook(lambda module, inputs, x, codec=codec: _through(codec, x))
                stack.callback(handle.remove)
            yield


def _through(codec: Compressor, hidden_states: torch.Tensor) -> torch.Tensor:
    return codec.decompress(codec.compress(hidden_states), hidden_states.device, hidden_states.dtype)


class TorchPipelining:
    """torch.distributed.pipelining with our stages and plan, in the order that ours falls into: the runtime differs.

    `order` is that of all ranks (`forward_order`). Its runtime takes any list of actions, but insists on a backward for
    each FORWARD; they stand at the end and `eval` makes nothing of them. Receive shapes are fixed, hence windows of one
    length only.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        order: Sequence[Sequence[tuple[int, int]]],
        tokens: TokenWindows,
        *,
        num_stages: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        shapes = {microbatch.shape for microbatch in tokens.microbatches}
        if len(shapes) != 1:
            raise ValueError(f"torch.distributed.pipelining needs micro-batches of one shape, got {sorted(shapes)}")
        (shape,) = shapes
        self._tokens = tokens
        self._holds_first = any(stage.plan.is_first for stage in stages)
        hidden_states = torch.empty(*shape, hidden_size, dtype=dtype)
        parts = [
            PipelineStage(
                _StageModule(stage, tokens),
                stage.plan.stage_index,
                num_stages,
                stage.device,
                input_args=tokens.input_ids(0) if stage.plan.is_first else hidden_states,
                output_args=torch.empty(0) if stage.plan.is_last else hidden_states,
            )
            for stage in stages
        ]
        self._schedule = _PipelineScheduleRuntime(parts, len(tokens.microbatches))
        self._schedule._prepare_schedule_with_comms({rank: _with_backwards(own) for rank, own in enumerate(order)})

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor | None:
        """Losses, float32 [number of scored tokens], on the rank of the last stage, None elsewhere."""
        indices = range(len(self._tokens.microbatches))
        ids = [torch.cat([self._tokens.input_ids(m) for m in indices])] if self._holds_first else []
        return self._schedule.eval(*ids, microbatch_index=torch.tensor(indices))


class _StageModule(nn.Module):
    """One of our stages as pipelining wants it; the last one returns the losses."""

    def __init__(self, stage: Stage, tokens: TokenWindows) -> None:
        super().__init__()
        self._stage, self._tokens = stage, tokens

    def forward(self, inputs: torch.Tensor, microbatch_index: torch.Tensor) -> torch.Tensor:
        hidden_states = self._stage.forward(inputs)
        if not self._stage.plan.is_last:
            return hidden_states
        return self._stage.score(hidden_states, *self._tokens.scored(int(microbatch_index))).loss


def forward_order(plan: Plan, num_microbatches: int, *, in_flight: int) -> list[list[tuple[int, int]]]:
    """(stage index, micro-batch) in each rank's order, where rank = node and all stages take the same time.

    A stage that lies a share p of the chain behind its rank's first one is `in_flight` * p micro-batches behind it;
    later stages go first, so that finished work leaves the ring before new work enters it.
    """
    last_slot = len(plan.stages) - (plan.last_node == 0)  # results that return have a slot of their own
    order = []
    for node in range(plan.num_nodes):
        own = [stage.stage_index for stage in plan.stages_of_node(node)]
        steps = sorted(
            (m + in_flight * (index - own[0]) // max(last_slot, 1), -index, m)
            for index in own
            for m in range(num_microbatches)
        )
        order.append([(-negative_index, m) for _, negative_index, m in steps])
    return order


def _with_backwards(order: Sequence[tuple[int, int]]) -> list[_Action]:
    last_stage_first = sorted(order, key=lambda step: (step[1], -step[0]))
    return [
        _Action(index, kind, m)
        for kind, own in (
            (_ComputationType.FORWARD, order),
            (_ComputationType.FULL_BACKWARD, last_stage_first),
        )
        for index, m in own
    ]


def serve(connection: Connection, config: RunConfig, master_port: int, names: Sequence[str]) -> None:
    """Main function of the process beside each rank: load, say so, then run what is asked for until told to end.

    The processes form a group of their own through `master_port`. For a name it answers with a Run (None without
    a part in it) and the seconds of CPU time that it took here.
    """
    os.environ["MASTER_PORT"] = str(master_port)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    runtime = config.runtime
    control = Control(
        World.from_environment(),
        timeout_s=runtime.timeout_s,
        load_timeout_s=runtime.load_timeout_s,
        interface=runtime.interface,
    )
    try:
        control.form()
        baselines = _load(config, control, names)
        connection.send(None)
        while (name := connection.recv()) is not None:
            control.barrier()
            cpu_s = time.process_time()
            run = _timed(baselines[name]) if name in baselines else None
            connection.send((run, time.process_time() - cpu_s))
        control.close()
    except (Exception, KeyboardInterrupt) as e:
        control.watchdog.abort(e)


def _load(config: RunConfig, control: Control, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """The baselines that this rank has a part in. Rank 0 is the one that computes alone where one process does."""
    deployment = deploy(config, control)
    evaluation = Evaluation(config, deployment)
    plan, dtype = deployment.plan, TORCH_DTYPES[config.model.dtype]
    tokens = TokenWindows(deployment.text.ids, evaluation.microbatches, deployment.text.bos_id)
    baselines: dict[str, Callable[[], Any]] = {}
    if "pipelining" in names:
        baselines["pipelining"] = TorchPipelining(
            list(deployment.stages.values()),
            forward_order(plan, len(tokens.microbatches), in_flight=evaluation.passes_in_flight()),
            tokens,
            num_stages=len(plan.stages),
            hidden_size=evaluation.hidden_size,
            dtype=dtype,
        )
    if control.world.rank == 0 and {"plain", "hooks"} & set(names):
        model_dir = resolve_model(config.model.name, cache_dir=config.model.dir, stage_to=None, show_progress=False)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        baselines["plain"] = _on_all_cores(PlainModel(model, tokens), deployment.threads)
        codecs = [make_codec(request) for request in evaluation.codecs.requests]
        baselines["hooks"] = _on_all_cores(HookedModel(model, tokens, plan, codecs), deployment.threads)
    return baselines


def _on_all_cores(compute: Callable[[], Any], threads_otherwise: int) -> Callable[[], Any]:
    def wrapped() -> Any:
        torch.set_num_threads(available_cores())
        try:
            return compute()
        finally:
            torch.set_num_threads(threads_otherwise)

    return wrapped


def _timed(compute: Callable[[], torch.Tensor | float | None]) -> Run | None:
    start_s = time.perf_counter()
    result = compute()
    seconds = time.perf_counter() - start_s
    if isinstance(result, torch.Tensor):
        losses = result.numpy()
        return Run(seconds, sum_nll(map(float, losses)), losses)
    return None if result is None else Run(seconds, result, None)
