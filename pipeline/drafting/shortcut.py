"""Drafts past the other nodes: a linear map stands in for the layers between node 0's first and last ones.

In a wrap-around plan node 0 has embedding, first layers, last layers and head. For the token at position t it has the
embedding e_t, what its first layers make of it, x_t, and, once the token before has been around the ring, what came
back of that, y_{t-1}. The map (`shortcut_file`) estimates y_t from the three; last layers and head make a draft of it,
which in turn is embedded, and so on. No network, no second model.

Where y_t is not back yet, later positions stand on the estimate of it. Both stages compute over the sequence's own
slots, behind what passes have put there: keys and values of estimates lie behind the last true ones, and the slots are
cropped to these once a draft is no longer asked for. The next pass begins there or before, and overwrites them.

Left out: how many drafts are taken (`policy`), how the map is made (`analysis.shortcut_calibration`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import torch

from pipeline.drafting.drafter import Draft, DrafterContext
from pipeline.drafting.shortcut_file import check_plan, read_shortcut
from pipeline.models.cache import SlotCache
from pipeline.partition.passes import Pass, Row

__all__ = ["FIRST_POSITION", "MAX_ESTIMATED", "Shortcut", "Trail", "estimate"]

MAX_ESTIMATED = 64  # positions that drafts may stand on without their state having come back
FIRST_POSITION = 2  # that can be estimated: the state of position 0 is like no other's in most models


def estimate(
    x: torch.Tensor, e: torch.Tensor, before: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """y_t [..., H] from x_t, e_t and y_{t-1}, each [..., H], with a map of their dtype (`ShortcutMap`)."""
    return torch.cat([x, e, before], -1) @ weights + bias


class Shortcut:
    """
    Args:
        calibration: folder with the file that `python -m pipeline.calibrate --shortcut` has written.

    Raises ValueError for a plan without a shortcut, and a file that is missing, damaged or of another model or plan.
    """

    name = "shortcut"

    def __init__(self, *, calibration: str, context: DrafterContext) -> None:
        check_plan(context.plan)
        config = context.model_config
        found = read_shortcut(
            calibration,
            context.plan,
            checkpoint=context.checkpoint_digest,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
        self._first, self._last = context.stages[0], context.stages[len(context.plan.stages) - 1]
        device, dtype = self._last.device, self._last.decoder.config.dtype
        self._weights, self._bias = found.weights.to(device, dtype), found.bias.to(device, dtype)
        if not (self._weights.isfinite().all() and self._bias.isfinite().all()):
            raise ValueError(f"its map does not fit into {dtype}; take bf16 or fp32 (model.dtype)")
        eos_ids = [token_id for token_id in context.eos_ids if token_id < config.vocab_size]
        self._eos_ids = frozenset(eos_ids)
        likely_ids = torch.tensor(sorted({*found.likely_ids.tolist(), *eos_ids}))
        cut_head = self._last.cut_head(likely_ids)
        self._head = self._last.logits if cut_head is None else cut_head
        self._head_ids = None if cut_head is None else likely_ids.tolist()
        self._sent: dict[int, Trail] = {}  # x of what the first stage holds, by slot
        self._returned: dict[int, Trail] = {}  # y of what the last one holds
        self._turns: dict[int, int] = {}  # changes whenever the slot's contents may have
        if context.watch is None:
            raise ValueError("shortcut needs the hidden states of passes, and none will go")
        context.watch(self._take_sent, self._take_returned)

    def draft(self, slot: int, ids: Sequence[int]) -> Iterator[Draft]:
        """As `Drafter.draft`. None where a state that it takes is not there: of a short sequence, or one of whose
        tokens too many are under way.
        """
        turn = self._begin_turn(slot)
        first, last = self._first.slots, self._last.slots
        assert first is not None and last is not None
        num_sent = _num_held(self._sent.get(slot), first, slot, ids)
        num_true = _num_held(self._returned.get(slot), last, slot, ids)
        if not self._can_draft(slot, len(ids), num_sent, num_true):
            return
        try:
            start, new = num_true, list(ids[num_true:])
            x = self._x_of_ids(slot, ids, num_sent, num_true)
            before = self._returned[slot].states[num_true - 1]
            while True:
                before, draft = self._advance(slot, start, new, x, before)
                if draft is None:
                    return
                yield draft
                start += len(new)
                if self._turns[slot] != turn or draft.token_id in self._eos_ids or start >= last.max_length:
                    return
                new = [draft.token_id]
                x = self._extend_first(slot, start, new)
        finally:
            if self._turns[slot] == turn:
                for slots, kept in ((first, num_sent), (last, num_true)):
                    slots.crop(slot, min(kept, slots.length(slot)))

    def _can_draft(self, slot: int, num_ids: int, num_sent: int, num_true: int) -> bool:
        """Whether there are states for all positions from `num_true` on that the first stage will not compute."""
        assert self._last.slots is not None
        num_new = num_ids - min(num_true, num_sent)
        if num_true < FIRST_POSITION or num_true >= num_ids or num_new > MAX_ESTIMATED:
            return False
        if num_ids > self._last.slots.max_length or num_true - 1 not in self._returned[slot].states:
            return False
        return all(position in self._sent[slot].states for position in range(num_true, num_sent))

    def _x_of_ids(self, slot: int, ids: Sequence[int], num_sent: int, num_true: int) -> torch.Tensor:
        """x [T, H] of the positions from `num_true` on: known of those that were sent, others are computed."""
        parts = [self._sent[slot].states[position][None] for position in range(num_true, num_sent)]
        if num_sent < len(ids):
            parts.append(self._extend_first(slot, num_sent, ids[num_sent:]))
        return torch.cat(parts)[num_true - len(ids) :]

    @torch.inference_mode()
    def _extend_first(self, slot: int, start: int, ids: Sequence[int]) -> torch.Tensor:
        """x [T, H] of tokens that begin at a position."""
        return self._first.forward(torch.tensor([list(ids)]), rows=(Row(slot, start),))[0]

    @torch.inference_mode()
    def _advance(
        self, slot: int, start: int, ids: Sequence[int], x: torch.Tensor, before: torch.Tensor
    ) -> tuple[torch.Tensor, Draft | None]:
        """Estimate y of tokens that begin at a position, from their x [T, H] and y [H] before them.

        Returns y of the last one, and what may follow it; nothing where the model makes no numbers of that.
        """
        device, dtype = self._bias.device, self._bias.dtype
        e = self._first.embed(torch.tensor(list(ids))).to(device, dtype)
        states = []
        for x_t, e_t in zip(x.to(device, dtype), e, strict=True):
            before = estimate(x_t, e_t, before, self._weights, self._bias)
            states.append(before)
        output = self._last.forward(torch.stack(states)[None], rows=(Row(slot, start),))[0, -1:]
        logits = self._head(output)[0]
        likelihoods = torch.softmax(logits.to(torch.promote_types(dtype, torch.float32)), -1)
        confidence, place = likelihoods.max(-1)
        if not confidence.isfinite():
            return before, None
        token_id = int(place) if self._head_ids is None else self._head_ids[int(place)]
        return before, Draft(token_id, float(confidence))

    def _begin_turn(self, slot: int) -> int:
        turn = self._turns[slot] = self._turns.get(slot, 0) + 1
        return turn

    def _take_sent(self, work: Pass, ids: torch.Tensor, states: torch.Tensor) -> None:
        self._take(self._sent, work, ids, states)

    def _take_returned(self, work: Pass, ids: torch.Tensor, states: torch.Tensor) -> None:
        self._take(self._returned, work, ids, states)

    def _take(self, trails: dict[int, Trail], work: Pass, ids: torch.Tensor, states: torch.Tensor) -> None:
        copied = {row.slot: trails[row.from_slot].ids[: row.start] for row in work.rows if row.from_slot in trails}
        for row, own_ids, own_states in zip(work.rows, ids.tolist(), states, strict=True):
            trail = trails.setdefault(row.slot, Trail())
            if row.from_slot is not None:
                trail.begin(copied.get(row.slot, array("q")))
            trail.extend(row.start, own_ids, own_states)
            self._begin_turn(row.slot)


class Trail:
    """What a stage holds of a slot's sequence, as passes have put it there.

    Attributes:
        ids: the tokens.
        states: hidden states [H] of the last ones, by position, those that have come while it grew.
    """

    def __init__(self) -> None:
        self.ids = array("q")
        self.states: dict[int, torch.Tensor] = {}

    def begin(self, ids: array[int]) -> None:
        """With what another slot holds, whose states nobody will ask for: a pass follows."""
        self.ids, self.states = array("q", ids), {}

    def extend(self, start: int, ids: Sequence[int], states: torch.Tensor) -> None:
        """Tokens from a position on, and their hidden states [T, H]; what was there is gone."""
        if start > len(self.ids):  # began before anybody watched
            self.ids, self.states = array("q"), {}
            return
        del self.ids[start:]
        self.ids.extend(ids)
        end = len(self.ids)
        kept = states[-MAX_ESTIMATED:].clone()
        self.states = {p: state for p, state in self.states.items() if end - MAX_ESTIMATED <= p < start}
        self.states |= zip(range(end - len(kept), end), kept, strict=True)


def _num_held(trail: Trail | None, slots: SlotCache, slot: int, ids: Sequence[int]) -> int:
    """How many positions of a sequence are in its slot: those up to the first where it has another token."""
    if trail is None:
        return 0
    held = trail.ids[: slots.length(slot)]
    differs = (place for place, (own, other) in enumerate(zip(held, ids, strict=False)) if own != other)
    return next(differs, min(len(held), len(ids)))
