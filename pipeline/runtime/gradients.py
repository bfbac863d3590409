"""Forward and backward through the pipeline, to see what the objective's gradient is at each link.

For what must know how much hidden states matter: calibration, importance of tokens, relevance of attention heads.
One micro-batch is in flight; hidden states cross as they are, gradients come back as raw float32, both over Gloo. With
S stages, link i < S - 1 of the chain leads from stage i to stage i + 1, and link 2 S - 3 - i from there back.
Nothing is trained: weights need no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compressors.base import Payload
from pipeline.comm.link import Frame
from pipeline.comm.link_ends import Hop, open_links
from pipeline.data.windows import MicroBatch
from pipeline.models.attention import AttentionReader
from pipeline.models.stage import Objective, TokenWindows
from pipeline.partition.passes import Pass
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.engine import Departure, Engine, Entry, Result, StageError
from pipeline.runtime.link_specs import gradient_specs
from pipeline.runtime.sources import MicroBatches

__all__ = ["GradientPass", "Observers", "OnForward", "OnGradient"]

# Called on the rank that sends on a link, once per micro-batch: link index, micro-batch index, hidden states
# [B, T, H] in the run's dtype and the objective's gradient at them, float32 [B, T, H]; both on the stage's device.
OnGradient = Callable[[int, int, torch.Tensor, torch.Tensor], None]

# Called on the rank that has a stage, once per micro-batch: stage index, micro-batch index, what goes into the stage's
# layers (of the first one, embeddings) and what comes out, [B, T, H] in the run's dtype on the stage's device.
OnForward = Callable[[int, int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Observers:
    """What is shown of a pass.

    `on_gradient` takes hidden states and gradients at this rank's outgoing links, `on_forward` hidden states at both
    ends of this rank's stages. `on_finished` is told on node 0 that a micro-batch is done, by its index.
    `attention_readers`, by stage index, are as `Stage.forward` takes them.
    """

    on_gradient: OnGradient = lambda *_: None
    on_forward: OnForward = lambda *_: None
    on_finished: Callable[[int], None] = lambda microbatch_index: None
    attention_readers: Mapping[int, AttentionReader] = field(default_factory=dict)


class GradientPass:
    """One pass over micro-batches on a deployed model.

    Args:
        deployment: the loaded stages; every rank makes a pass alike.
        microbatches: of the deployment's text.
        objective: what is differentiated, summed over scored positions; None: forward only, for what is `seen` of it.
        seen: what is shown of it.
    """

    def __init__(
        self,
        deployment: Deployment,
        microbatches: Sequence[MicroBatch],
        *,
        dtype: torch.dtype,
        objective: Objective | None = Objective.NLL,
        seen: Observers,
    ) -> None:
        text = deployment.text
        self._deployment, self._microbatches = deployment, microbatches
        self._dtype, self._objective, self._seen = dtype, objective, seen
        self._tokens = TokenWindows(text.ids, microbatches, text.bos_id)
        self._num_links = len(deployment.plan.links)
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # stage -> (input, output)
        self._value = 0.0

    def run(self) -> float:
        """The whole pass; returns the objective's sum (0 without one), on every rank.

        Raises StageError on every rank where a stage has raised on one, and as `Engine.run`.
        """
        plan, control, devices = self._deployment.plan, self._deployment.control, self._deployment.devices
        there = [
            Hop(link.src_node, link.dst_node, devices.get(link.index), devices.get(link.index + 1))
            for link in plan.links
        ]
        back = [Hop(hop.dst_node, hop.src_node, hop.dst_device, hop.src_device) for hop in reversed(there)]
        specs = gradient_specs(
            plan, self._microbatches, hidden_size=self._deployment.model.config.hidden_size, dtype=self._dtype
        )
        ends = open_links([*there, *back], specs, control.world, receives_ahead=1, groups=self._deployment.groups)
        source = MicroBatches(self._tokens) if control.world.rank == 0 else None
        engine = Engine(self, ends, control.report, source=source, credits=1)
        with torch.set_grad_enabled(self._objective is not None):
            engine.run()
        told = control.gather([self._value, source.failure if source else None])
        if told[0][1] is not None:
            raise StageError(told[0][1])
        return sum(value for value, _ in told)

    def place(self, link_index: int | None, work: Pass) -> str:
        if link_index is None or link_index < self._num_links:
            return f"stage {0 if link_index is None else link_index + 1}, {work}"
        return f"stage {2 * self._num_links - 1 - link_index}, {work}, backward"

    def enter(self, entry: Entry) -> Departure | Result:
        return self._forward(0, entry.work, self._deployment.stages[0].embed(entry.token_ids).detach())

    def unpack(self, link_index: int, frame: Frame) -> torch.Tensor:
        assert frame.payload is not None
        if link_index >= self._num_links and self._objective is None:
            return torch.empty(0)
        dtype = self._dtype if link_index < self._num_links else torch.float32
        return frame.payload.data.clone().view(dtype).view(frame.payload.shape)

    def step(self, link_index: int, frame: Frame, inputs: torch.Tensor, entry: Entry | None) -> Departure | Result:
        if link_index < self._num_links:
            index = link_index + 1
            return self._forward(index, frame.work, inputs.to(self._deployment.stages[index].device))
        index = 2 * self._num_links - 1 - link_index
        if self._objective is None:
            return self._back(index, frame.work, None)
        _, output = self._graphs[index]
        gradient = inputs.to(output.device)
        self._seen.on_gradient(index, _index(frame.work), output.detach(), gradient)
        return self._backward(index, frame.work, gradient.to(output.dtype))

    def spare(self, link_index: int, frame: Frame) -> Result:
        raise AssertionError("a text's micro-batches are never void")

    def drop(self, link_index: int | None, work: Pass) -> None:
        self._graphs.clear()

    def waited(self, link_index: int, seconds: float, *, sending: bool) -> None:
        pass

    def _forward(self, index: int, work: Pass, x: torch.Tensor) -> Departure | Result:
        stage = self._deployment.stages[index]
        output = stage.forward(x.requires_grad_(), self._seen.attention_readers.get(index))
        self._seen.on_forward(index, _index(work), x.detach(), output.detach())
        if not stage.plan.is_last:
            if self._objective is not None:
                self._graphs[index] = x, output
            return _departure(index, output.detach())
        if self._objective is None:
            return self._back(index, work, None)
        self._graphs[index] = x, output
        value, gradient = stage.objective_gradient(output, *self._tokens.scored(_index(work)), self._objective)
        self._value += value
        return self._backward(index, work, gradient)

    def _backward(self, index: int, work: Pass, gradient: torch.Tensor) -> Departure | Result:
        """From the gradient at a stage's output to that at its input."""
        x, output = self._graphs.pop(index)
        if output.requires_grad:
            torch.autograd.backward(output, gradient)
        return self._back(index, work, x.grad)

    def _back(self, index: int, work: Pass, gradient: torch.Tensor | None) -> Departure | Result:
        """Towards node 0, without a gradient where none is taken."""
        if index == 0:
            self._seen.on_finished(_index(work))
            return Result(None, ())
        link_index = 2 * self._num_links - index
        if gradient is not None:
            return _departure(link_index, gradient.float())
        shape = (*self._microbatches[_index(work)].shape, self._deployment.model.config.hidden_size)
        return Departure(link_index=link_index, payload=Payload(torch.empty(0, dtype=torch.uint8), shape), trail=())


def _index(work: Pass) -> int:
    assert work.microbatch_index is not None
    return work.microbatch_index


def _departure(link_index: int, x: torch.Tensor) -> Departure:
    data = x.contiguous().view(-1).view(torch.uint8)
    return Departure(link_index=link_index, payload=Payload(data, tuple(x.shape)), trail=())
