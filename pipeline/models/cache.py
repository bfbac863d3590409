"""Keys and values of the sequences in slots, of one stage's layers: what a pass reads and extends.

Stands between the stage, which begins and commits passes, and the attention function (`attention.py`), which writes a
pass's keys and values and attends over each row's. Those of position p lie at index p of their slot, so that masks,
sliding windows and rotary angles follow from positions alone. Layers with a sliding window keep all positions too, or a
slot could not be cropped to any length. Left out: who owns a slot, and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.models.processor import has_fused_multiply_add
from pipeline.partition.passes import Row

__all__ = ["SlotCache", "SlotError", "SlotPass", "cache_bytes_per_token"]


class SlotError(ValueError):
    """A pass that the cache cannot compute: positions that no slot holds, or has room for."""


def cache_bytes_per_token(config: Any, num_layers: int, dtype: torch.dtype) -> int:
    """Bytes that a slot takes for each of its positions in `num_layers` layers of a model with this config."""
    num_heads, head_dim = _head_shape(config)
    return num_layers * 2 * num_heads * head_dim * dtype.itemsize


class SlotCache:
    """Slots 0 to `num_slots` - 1 of up to `max_length` positions each, allocated at once and not initialised.

    Args:
        config: the stage's, whose `num_hidden_layers` are its own.
        dtype: that of hidden states.

    Attributes:
        layers: views of keys and values [num_slots, heads, max_length, head_dim] of each layer.
        kernel: what attends for rows of one token in one call, None where there is none.
    """

    def __init__(
        self, config: Any, *, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        for name, value in (("num_slots", num_slots), ("max_length", max_length)):
            if value < 1:
                raise SlotError(f"{name} is {value}; a cache needs at least 1")
        self.num_slots, self.max_length = num_slots, max_length
        num_heads, head_dim = _head_shape(config)
        # [layer, keys or values, slot, head, position, head_dim]: a head's positions lie together, as kernels read them
        shape = (config.num_hidden_layers, 2, num_slots, num_heads, max_length, head_dim)
        with torch.inference_mode(False):  # or it could be written in inference mode only
            self._data = torch.empty(shape, dtype=dtype, device=device)
            self.layers = [(keys, values) for keys, values in self._data]
        self.dtype, self.device = dtype, device
        self._lengths = [0] * num_slots
        self.kernel = _kernel(head_dim) if dtype == torch.float32 and device.type == "cpu" else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated: `num_slots` * `max_length` * `cache_bytes_per_token`."""
        return self._data.nbytes

    def length(self, slot: int) -> int:
        """How many positions of the slot's sequence are held."""
        self._check_slot(slot)
        return self._lengths[slot]

    def crop(self, slot: int, length: int) -> None:
        """Drop the slot's positions from `length` on. Raises SlotError when it holds fewer."""
        held = self.length(slot)
        if not 0 <= length <= held:
            raise SlotError(f"slot {slot} holds {held} positions and cannot be cropped to {length}")
        self._lengths[slot] = length

    def begin(self, rows: Sequence[Row], num_tokens: int) -> SlotPass:
        """A pass of `num_tokens` tokens in each row. Crops its slots to their `start`, with `from_slot` after copying.

        A `from_slot` gives what it held before the pass. Slots grow when the pass is committed. Raises SlotError and
        changes nothing when a slot does not hold `start` positions or has no room for the tokens, or where the rows
        contradict each other.
        """
        if not rows or num_tokens < 1:
            raise SlotError(f"a pass of {len(rows)} rows of {num_tokens} tokens; it needs at least one of each")
        row_of_slot = {row.slot: row for row in rows}
        if len(row_of_slot) < len(rows):
            raise SlotError(f"slots {[row.slot for row in rows]} of one pass; a slot can have one row of it")
        for row in rows:
            self._check_row(row, num_tokens, row_of_slot)
        for row in rows:
            if row.from_slot is not None and row.from_slot != row.slot:
                prefix = self._data[:, :, row.from_slot, :, : row.start]
                self._data[:, :, row.slot, :, : row.start] = prefix
            self._lengths[row.slot] = row.start
        return SlotPass(self, rows, num_tokens)

    def _check_row(self, row: Row, num_tokens: int, row_of_slot: dict[int, Row]) -> None:
        source = row.slot if row.from_slot is None else row.from_slot
        held = self.length(source)
        self._check_slot(row.slot)
        if not 0 <= row.start <= held:
            raise SlotError(f"slot {row.slot} is to go on at position {row.start}, slot {source} holds {held}")
        if row.start + num_tokens > self.max_length:
            raise SlotError(
                f"slot {row.slot} is to take positions {row.start} to {row.start + num_tokens - 1}, it has room for "
                f"{self.max_length}"
            )
        other = row_of_slot.get(source)
        if source != row.slot and other is not None and (other.start < row.start or other.from_slot is not None):
            raise SlotError(
                f"slot {row.slot} is to begin with {row.start} positions of slot {source}, which the same pass replaces"
            )

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise SlotError(f"slot {slot} is not among the {self.num_slots} slots, 0 to {self.num_slots - 1}")


class SlotPass:
    """One pass over a cache: where its tokens go, and what each row sees. Made by `SlotCache.begin`.

    Attributes:
        starts: first position of each row.
        position_ids: int64 [B, T] on the cache's device.
    """

    def __init__(self, cache: SlotCache, rows: Sequence[Row], num_tokens: int) -> None:
        self.starts = [row.start for row in rows]
        self.num_tokens = num_tokens
        self._cache = cache
        self._slots = [row.slot for row in rows]
        device = cache.device
        self._slot_indices = torch.tensor(self._slots, device=device)
        self.position_ids = torch.tensor(self.starts, device=device)[:, None] + torch.arange(num_tokens, device=device)
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self._seen: dict[int | None, Any] = {}  # by window, for the kernel
        self._num_written = 0

    def attend_one_token(
        self,
        layer: int,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        window: int | None,
        scale: float,
    ) -> torch.Tensor | None:
        """`write` a layer's keys and values, and attend over what each row sees: [B, heads, 1, head_dim].

        `new` are queries, keys and values. None, and nothing written, where that is not to be had in one call.
        """
        kernel = self._cache.kernel
        if self.num_tokens > 1 or kernel is None:
            return None
        self._take_turn(layer, new[1], new[2])
        if window not in self._seen:
            spans = [(self._first_seen(row, window), start + 1) for row, start in enumerate(self.starts)]
            self._seen[window] = kernel.SeenPositions(self._slots, spans)
        return kernel.attend_one_token(new, self._cache.layers[layer], self._seen[window], scale)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take a layer's keys and values [B, heads, T, head_dim] of the pass's tokens, layer by layer.

        Raises SlotError for a shape or dtype that the cache was not made for.
        """
        self._take_turn(layer, keys, values)
        for target, given in zip(self._cache.layers[layer], (keys, values), strict=True):
            if self.num_tokens == 1 and len(self._slots) > 1:
                target[self._slot_indices, :, self.position_ids[:, 0]] = given[:, :, 0]
                continue
            for row, (slot, start) in enumerate(zip(self._slots, self.starts, strict=True)):
                target[slot, :, start : start + self.num_tokens] = given[row]

    def _take_turn(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise SlotError unless these are keys and values that the cache takes, of the layer that is due."""
        targets = self._cache.layers[layer]
        _, num_heads, _, head_dim = targets[0].shape
        expected = (len(self._slots), num_heads, self.num_tokens, head_dim)
        for name, given in (("keys", keys), ("values", values)):
            if given.shape != expected or given.dtype != self._cache.dtype:
                raise SlotError(
                    f"layer {layer} of the stage makes {name} {list(given.shape)} in {given.dtype}, the cache was made "
                    f"for {list(expected)} in {self._cache.dtype}"
                )
        if layer != self._num_written:
            raise SlotError(f"layer {layer} of the stage writes its keys where layer {self._num_written} is due")
        self._num_written += 1

    def seen(self, layer: int, row: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values [1, heads, positions, head_dim] that some token of the row sees.

        Tokens see themselves and what is before them: all of it, or with a `window` the last `window` positions.
        """
        slot, keys, values = self._slots[row], *self._cache.layers[layer]
        first, end = self._first_seen(row, window), self.starts[row] + self.num_tokens
        return keys[slot : slot + 1, :, first:end], values[slot : slot + 1, :, first:end]

    def mask(self, row: int, window: int | None) -> torch.Tensor | None:
        """What each token sees of `seen`: 0, or -inf where it does not, [T, positions].

        None where that is plain: it is one token and sees all, or token i sees the tokens 0 to i of a pass from 0 on.
        """
        if self.num_tokens == 1 or (self.starts[row] == 0 and (window is None or self.num_tokens <= window)):
            return None
        start = self.starts[row]
        if (start, window) not in self._masks:
            first, device = self._first_seen(row, window), self._cache.device
            tokens = torch.arange(start, start + self.num_tokens, device=device)[:, None]
            positions = torch.arange(first, start + self.num_tokens, device=device)
            unseen = positions > tokens
            if window is not None:
                unseen |= positions <= tokens - window
            mask = torch.zeros(unseen.shape, dtype=self._cache.dtype, device=device)
            self._masks[start, window] = mask.masked_fill_(unseen, -torch.inf)
        return self._masks[start, window]

    def commit(self) -> None:
        """The forward is complete: the slots hold its tokens. Raises SlotError when a layer has written nothing."""
        num_layers = len(self._cache.layers)
        if self._num_written != num_layers:
            raise SlotError(f"{self._num_written} of the stage's {num_layers} layers have written their keys")
        for slot, start in zip(self._slots, self.starts, strict=True):
            self._cache._lengths[slot] = start + self.num_tokens

    def _first_seen(self, row: int, window: int | None) -> int:
        return 0 if window is None else max(0, self.starts[row] + 1 - window)


def _kernel(head_dim: int) -> Any:
    """The module that attends for float32 heads of this size on a CPU (`slot_kernel`), ready; None where it cannot."""
    if head_dim % 16 or not has_fused_multiply_add():
        return None
    from pipeline.models import slot_kernel  # a compiler comes with it, some 40 MB that scoring does without

    slot_kernel.compile_attention(head_dim)
    return slot_kernel


def _head_shape(config: Any) -> tuple[int, int]:
    """(heads that have keys and values of their own, their size)."""
    num_queries = config.num_attention_heads
    num_heads = getattr(config, "num_key_value_heads", None) or num_queries
    return num_heads, getattr(config, "head_dim", None) or config.hidden_size // num_queries
