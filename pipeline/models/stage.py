"""One stage: token ids or hidden states in, hidden states out; on the last stage, losses of the scored positions.

Sits between the loaded modules (`loading.py`) and the runner. Whether gradients are recorded is the runner's
choice. With slots open, passes extend the sequences in them (`cache.py`). Which passes, and what is sampled from the
logits, is left to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from pipeline.data.windows import MicroBatch
from pipeline.models.attention import (
    READABLE_SDPA,
    SLOTS,
    AttentionError,
    AttentionReader,
    attention_function,
    check_readable,
    check_slots,
)
from pipeline.models.cache import SlotCache, SlotError
from pipeline.models.loading import Head, StageModel
from pipeline.partition.passes import Row
from pipeline.partition.plan import StagePlan

__all__ = ["Objective", "Scores", "Stage", "TokenWindows"]

# Scored positions pass the head in chunks, whose logits take at most so many bytes (or one position's, if that is more)
# in float32, in the model's dtype accordingly. The rows of a matrix product can decide over its last bits, so these
# sizes stay. A GPU has room for more, and reads the head's weights again for every chunk.
MAX_LOGITS_NBYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
# Losses are taken of a few rows of a chunk at a time: their float32 logits and log-probabilities take so much each.
MAX_COPY_NBYTES = 8 * 2**20


class Objective(Enum):
    """What gradients are taken of, summed over scored positions: the loss, or the logit of the true next token."""

    NLL = "nll"
    TARGET_LOGIT = "target_logit"


@dataclass(frozen=True)
class Scores:
    """Per scored token, in text order: `loss` float32 [n] in nats and `top1` int32 [n], the likeliest token id."""

    loss: torch.Tensor
    top1: torch.Tensor


class TokenWindows:
    """The text's ids, cut into micro-batches: what goes in and what is scored.

    Args:
        ids: int64 [num_tokens] on the CPU.
        microbatches: from `windows.make_microbatches`.
        bos_id: the token in front of windows that ask for one.
    """

    def __init__(self, ids: torch.Tensor, microbatches: Sequence[MicroBatch], bos_id: int | None) -> None:
        self.microbatches = microbatches
        self._ids = ids
        self._bos = torch.tensor([] if bos_id is None else [bos_id], dtype=ids.dtype)

    def input_ids(self, microbatch_index: int) -> torch.Tensor:
        """int64 [B, T]."""
        windows = self.microbatches[microbatch_index].windows
        rows = [self._ids[w.start : w.end] for w in windows]
        return torch.stack(
            [torch.cat([self._bos, row]) if w.prepend_bos else row for w, row in zip(windows, rows, strict=True)]
        )

    def scored(self, microbatch_index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(row, column, target), int64 [n] each: the logits at [row, column] predict `target`."""
        microbatch = self.microbatches[microbatch_index]
        rows, columns, targets = [], [], []
        for row, window in enumerate(microbatch.windows):
            n = window.num_scored
            last_input = window.num_inputs - 1
            rows.append(torch.full((n,), row))
            columns.append(torch.arange(last_input - n, last_input))
            targets.append(self._ids[window.end - n : window.end])
        return torch.cat(rows), torch.cat(columns), torch.cat(targets)


class Stage:
    """A loaded stage on its device.

    Attributes:
        slots: the cache between `open_slots` and `close_slots`, else None.
    """

    def __init__(self, plan: StagePlan, model: StageModel, device: torch.device, vocab_size: int) -> None:
        self.plan = plan
        self._chunk = max(1, MAX_LOGITS_NBYTES[device.type] // (4 * vocab_size))
        self._rows_at_once = max(1, MAX_COPY_NBYTES // (4 * vocab_size))
        self.device = device
        self.decoder = model.decoder
        self._head = model.head
        self.slots: SlotCache | None = None

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Allocate a cache of empty slots, in place of one that was open.

        Raises AttentionError for a model that cannot be computed over slots of `max_length` positions.
        """
        check_slots(self.decoder, max_length)
        self.close_slots()
        config = self.decoder.config
        self.slots = SlotCache(
            config, num_slots=num_slots, max_length=max_length, dtype=config.dtype, device=self.device
        )

    def close_slots(self) -> None:
        """Free the cache, if there is one."""
        self.slots = None

    def forward(
        self,
        inputs: torch.Tensor,
        attention_reader: AttentionReader | None = None,
        *,
        rows: Sequence[Row] | None = None,
    ) -> torch.Tensor:
        """Token ids int64 [B, T] (first stage), their embeddings or hidden states [B, T, H] to hidden states [B, T, H].

        Without `rows`, B texts from their beginning, which no cache keeps. With `rows`, one for each of B, the next T
        tokens of the sequences in their slots; these hold them once the forward is complete, and if it raises, are
        cropped to their `start`. Raises SlotError for rows that the cache cannot take.

        `attention_reader` is shown the attention of every layer, which changes nothing in the result; not over slots.
        """
        arguments = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs.to(self.device)}
        if rows is not None:
            if attention_reader is not None:
                raise AttentionError("attention over slots cannot be read")
            return self._extend_slots(arguments, rows, inputs.shape)
        if attention_reader is None:
            return self.decoder(**arguments, use_cache=False).last_hidden_state
        check_readable(self.decoder)
        with attention_function(self.decoder, READABLE_SDPA):
            return self.decoder(**arguments, attention_reader=attention_reader, use_cache=False).last_hidden_state

    def _extend_slots(
        self, arguments: dict[str, torch.Tensor], rows: Sequence[Row], shape: torch.Size
    ) -> torch.Tensor:
        if self.slots is None:
            raise SlotError("the stage has no slots open, a pass with rows needs them")
        if len(rows) != shape[0]:
            raise SlotError(f"a pass of {len(rows)} rows has inputs for {shape[0]}")
        slots = self.slots.begin(rows, shape[1])
        with attention_function(self.decoder, SLOTS):
            output = self.decoder(**arguments, position_ids=slots.position_ids, slots=slots, use_cache=False)
        slots.commit()
        return output.last_hidden_state

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B, T] to embeddings [B, T, H], on the first stage; `forward` takes either."""
        return self.decoder.get_input_embeddings()(input_ids.to(self.device))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The last stage's output [n, H] to logits [n, V] on its device, both in the model's dtype."""
        assert self._head is not None, "only the last stage has a head"
        return self._head(hidden_states)

    def cut_head(self, token_ids: torch.Tensor) -> Head | None:
        """The head of some tokens alone (`Head.cut`), int64 [K]: the last stage's output [n, H] to logits [n, K]."""
        assert self._head is not None, "only the last stage has a head"
        return self._head.cut(token_ids)

    def score(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor
    ) -> Scores:
        """Losses at the scored positions of the last stage's output [B, T, H].

        Only these positions pass the head, in chunks; losses are taken in float32, of a float64 model in float64 before
        they are rounded. The result is on the CPU.
        """
        selected = hidden_states[rows.to(self.device), columns.to(self.device)]
        targets = targets.to(self.device)
        # Made before any logits: small tensors that outlive them would break up the memory that they leave.
        losses = torch.empty(len(selected), device=self.device)
        top1 = torch.empty(len(selected), dtype=torch.int32, device=self.device)
        for start in range(0, len(selected), self._chunk):
            chunk = slice(start, start + self._chunk)
            self._score_chunk(selected[chunk], targets[chunk], losses[chunk], top1[chunk])
        return Scores(losses.cpu(), top1.cpu())

    def _score_chunk(
        self, selected: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, top1: torch.Tensor
    ) -> None:
        """Fill `losses` and `top1`. A function of its own: its logits are gone before the next chunk's come."""
        logits = self.logits(selected)
        for start in range(0, len(logits), self._rows_at_once):
            rows = slice(start, start + self._rows_at_once)
            exact = _exact(logits[rows])
            losses[rows] = nn.functional.cross_entropy(exact, targets[rows], reduction="none")
            top1[rows] = _argmax(exact)

    def objective_gradient(
        self,
        hidden_states: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        targets: torch.Tensor,
        objective: Objective,
    ) -> tuple[float, torch.Tensor]:
        """Value of an objective, summed over the scored positions, and its gradient [B, T, H] at the stage's output.

        Only the scored positions pass the head, in chunks, so that one chunk's logits are held at a time.
        """
        rows, columns, targets = rows.to(self.device), columns.to(self.device), targets.to(self.device)
        selected = hidden_states.detach()[rows, columns]
        value, gradients = 0.0, [selected[:0]]
        for part, target in zip(selected.split(self._chunk), targets.split(self._chunk), strict=True):
            chunk_value, chunk_gradient = self._chunk_gradient(part.detach().requires_grad_(), target, objective)
            gradients.append(chunk_gradient)
            value += chunk_value
        gradient = torch.zeros_like(hidden_states)
        gradient[rows, columns] = torch.cat(gradients)
        return value, gradient

    def _chunk_gradient(
        self, selected: torch.Tensor, targets: torch.Tensor, objective: Objective
    ) -> tuple[float, torch.Tensor]:
        logits = _exact(self.logits(selected))
        if objective is Objective.NLL:
            total = nn.functional.cross_entropy(logits, targets, reduction="sum")
        else:
            total = logits.gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(total, selected)
        return total.item(), gradient


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, those of a float64 model as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of each row's largest value, the first of equals. On a CPU by NumPy, whose kernel is vectorised."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.detach().numpy().argmax(-1))
    return logits.argmax(-1)
