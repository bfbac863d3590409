"""Forward and backward through the pipeline, to see what the objective's gradient is at each link.

For what must know how much hidden states matter: calibration, importance of tokens, relevance of attention heads.
One micro-batch is in flight; hidden states cross as they are, gradients come back as raw float32, both over Gloo.
Nothing is trained: weights need no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from compressors.base import Payload
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.link_ends import make_gradient_links
from pipeline.data.windows import MicroBatch
from pipeline.models.attention import AttentionReader
from pipeline.models.stage import Objective, TokenWindows
from pipeline.partition.schedule import Action, ActionKind, make_gradient_schedule
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.runner import describe, execute

__all__ = ["GradientPass", "OnGradient"]

# Called on the rank that sends on a link, once per micro-batch: link index, micro-batch index, hidden states
# [B, T, H] in the run's dtype and the objective's gradient at them, float32 [B, T, H]; both on the stage's device.
OnGradient = Callable[[int, int, torch.Tensor, torch.Tensor], None]


class GradientPass:
    """One pass over micro-batches on a deployed model.

    Args:
        deployment: the loaded stages; every rank makes a pass alike.
        microbatches: of the deployment's text.
        objective: what is differentiated, summed over scored positions; None: forward only, for the readers' sake.
        on_gradient: takes hidden states and gradients at this rank's outgoing links.
        on_finished: told on node 0 that a micro-batch is done (forward only: has entered), by its index.
        attention_readers: of stages, by stage index, as `Stage.forward` takes them.
    """

    def __init__(
        self,
        deployment: Deployment,
        microbatches: Sequence[MicroBatch],
        *,
        dtype: torch.dtype,
        objective: Objective | None = Objective.NLL,
        on_gradient: OnGradient = lambda *_: None,
        on_finished: Callable[[int], None] = lambda microbatch_index: None,
        attention_readers: Mapping[int, AttentionReader] = MappingProxyType({}),
    ) -> None:
        text, plan = deployment.text, deployment.plan
        self._deployment, self._microbatches = deployment, microbatches
        self._dtype, self._objective = dtype, objective
        self._on_gradient, self._on_finished = on_gradient, on_finished
        self._attention_readers = attention_readers
        self._tokens = TokenWindows(text.ids, microbatches, text.bos_id)
        self._num_links = len(plan.links)
        self._links = make_gradient_links(
            plan,
            microbatches,
            deployment.control.world,
            hidden_size=deployment.model_config.hidden_size,
            dtype=dtype,
            devices=deployment.devices,
        )
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # stage -> (input, output)
        self._value = 0.0

    def run(self) -> float:
        """The whole pass; returns the objective's sum (0 without one), on every rank. Raises as `runner.execute`."""
        control = self._deployment.control
        schedule = make_gradient_schedule(
            self._deployment.plan, len(self._microbatches), world_size=control.world.world_size
        )
        senders = {
            (ActionKind.FORWARD, index)
            if index < self._num_links
            else (ActionKind.BACKWARD, index - self._num_links + 1): sender
            for index, sender in self._links.senders.items()
        }
        actions = schedule[control.world.rank]
        if self._objective is None:
            actions = [action for action in actions if action.kind is ActionKind.FORWARD]
        with torch.set_grad_enabled(self._objective is not None):
            execute(
                actions,
                lambda action: self._forward(action) if action.kind is ActionKind.FORWARD else self._backward(action),
                senders=senders,
                receivers=self._links.receivers.values(),
                report=control.report,
            )
        return sum(control.gather(self._value))

    def _forward(self, action: Action) -> None:
        index, m = action.stage_index, action.microbatch_index
        stage = self._deployment.stages[index]
        if stage.plan.is_first:
            x = stage.embed(self._tokens.input_ids(m)).detach()
        else:
            x = self._receive(self._links.receivers[index - 1], action).to(stage.device)
        output = stage.forward(x.requires_grad_(), self._attention_readers.get(index))
        if self._objective is not None:
            self._graphs[index] = x, output
        elif stage.plan.is_first:
            self._on_finished(m)
        if not stage.plan.is_last:
            self._send(self._links.senders[index], action, output.detach())

    def _backward(self, action: Action) -> None:
        index, m = action.stage_index, action.microbatch_index
        stage = self._deployment.stages[index]
        x, output = self._graphs.pop(index)
        if stage.plan.is_last:
            assert self._objective is not None, "without an objective nothing goes backward"
            value, gradient = stage.objective_gradient(output, *self._tokens.scored(m), self._objective)
            self._value += value
        else:
            received = self._receive(self._links.receivers[self._num_links + index], action).to(stage.device)
            self._on_gradient(index, m, output.detach(), received)
            gradient = received.to(output.dtype)
        if output.requires_grad:
            torch.autograd.backward(output, gradient)
        if stage.plan.is_first:
            self._on_finished(m)
        else:
            assert x.grad is not None
            self._send(self._links.senders[self._num_links + index - 1], action, x.grad.float())

    def _send(self, sender: FrameSender, action: Action, x: torch.Tensor) -> None:
        report = self._deployment.control.report
        report(describe(action), waiting=True)
        data = x.contiguous().view(-1).view(torch.uint8)
        sender.send(action.microbatch_index, Payload(data, tuple(x.shape)), ())
        report(describe(action))

    def _receive(self, receiver: FrameReceiver, action: Action) -> torch.Tensor:
        report = self._deployment.control.report
        report(describe(action), waiting=True)
        _, payload = receiver.receive(action.microbatch_index)
        x = payload.data.clone().view(receiver.spec.dtype).view(payload.shape)
        receiver.release()
        report(describe(action))
        return x
