"""What a run measures beside its results: how well each link's codec reconstructs, and how long one token takes.

Neither belongs to the timed phases of a run. The reconstruction is decoded at the sending end, from the payload's
bytes, by a codec object of its own; one-token times are taken rank by rank, so that ranks that share a machine do not
slow each other down.
"""

from __future__ import annotations

import base64
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compressors import Compressor, Payload
from compressors.base import decode_meta, encode_meta
from pipeline.models.stage import Stage
from pipeline.partition.passes import Row

__all__ = [
    "CACHED_TOKENS",
    "blank_side_inputs",
    "decoder_side_inputs",
    "payload_from_json",
    "payload_to_json",
    "squared_error",
    "time_compress",
    "time_decompress",
    "time_microbatch",
    "time_one_token",
    "time_tokens",
    "wait_for_stream",
]

REPEATS = 5
MAX_S = 1.0  # for a large model, fewer repeats have to do
CACHED_TOKENS = 16  # few: what a step takes on a CPU or a GPU is the reading of its weights


def squared_error(
    decoder: Compressor, payload: Payload, x: torch.Tensor, token_ids: torch.Tensor | None
) -> tuple[float, float]:
    """(sum of (x - x')^2, sum of x^2) in float64 over one frame, x' being what `decoder` makes of the payload."""
    side = dict.fromkeys(decoder.decoder_needs, token_ids)
    reconstruction = decoder.decompress(payload, x.device, x.dtype, **side)
    exact = x.double()
    return (exact - reconstruction.double()).square().sum().item(), exact.square().sum().item()


@torch.inference_mode()
def time_one_token(stage: Stage, hidden_size: int, dtype: torch.dtype, *, least: bool = False) -> float:
    """Median seconds of a stage's forward pass for one token behind `CACHED_TOKENS` in a cache; the last stage's with
    the head. `least`: of more passes the shortest.
    """

    def pass_one(token: torch.Tensor) -> None:
        output = stage.forward(token, rows=(Row(0, CACHED_TOKENS),))
        if stage.plan.is_last:
            stage.logits(output[:, -1])

    stage.open_slots(1, CACHED_TOKENS + 1)
    try:
        stage.forward(_blank_inputs(stage, CACHED_TOKENS, hidden_size, dtype), rows=(Row(0, 0),))
        token = _blank_inputs(stage, 1, hidden_size, dtype)
        timed = _least_s if least else _median_s
        return timed(lambda: pass_one(token), stage.device)
    finally:
        stage.close_slots()


@torch.inference_mode()
def time_tokens(stage: Stage, num_tokens: int, hidden_size: int, dtype: torch.dtype, *, max_s: float) -> float:
    """Seconds of a stage's forward pass for some tokens of one sequence, behind `CACHED_TOKENS` where the slot has
    room; the last stage's with the head for each of them. The shortest of several that take up to `max_s`.

    The stage's slots are open, and slot 0, which it uses, is empty afterwards.
    """
    assert stage.slots is not None
    num_cached = min(CACHED_TOKENS, stage.slots.max_length - num_tokens)

    def pass_tokens(start: int, inputs: torch.Tensor) -> None:
        output = stage.forward(inputs, rows=(Row(0, start),))
        if stage.plan.is_last:
            stage.logits(output[0])

    try:
        if num_cached > 0:
            pass_tokens(0, _blank_inputs(stage, num_cached, hidden_size, dtype))
        inputs = _blank_inputs(stage, num_tokens, hidden_size, dtype)
        return min(_times_s(lambda: pass_tokens(num_cached, inputs), stage.device, 4 * REPEATS, max_s))
    finally:
        stage.slots.crop(0, 0)


def _blank_inputs(stage: Stage, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """What a stage takes for one row: token ids int64 [1, T], or hidden states [1, T, H]."""
    if stage.plan.is_first:
        return torch.zeros(1, num_tokens, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, num_tokens, hidden_size, generator=generator).to(stage.device, dtype)


@torch.inference_mode()
def time_microbatch(
    stage: Stage, shape: tuple[int, int], hidden_size: int, dtype: torch.dtype, *, scored: int
) -> float:
    """Seconds of a later stage's forward pass for a micro-batch [B, T], the shortest of several; the last stage's with
    the losses of `scored` positions of every row.
    """
    num_rows, num_tokens = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_tokens, hidden_size, generator=generator).to(stage.device, dtype)
    rows = torch.arange(num_rows).repeat_interleave(scored)
    columns = torch.arange(num_tokens - scored, num_tokens).repeat(num_rows)
    targets = torch.zeros_like(rows)

    def pass_one() -> None:
        output = stage.forward(x)
        if stage.plan.is_last:
            stage.score(output, rows, columns, targets)

    return _least_s(pass_one, stage.device)


@torch.inference_mode()
def time_compress(encoder: Compressor, x: torch.Tensor) -> tuple[float, Payload]:
    """Median seconds of `compress` for a frame `x` [1, 1, H], and the payload."""
    side = blank_side_inputs(encoder, x)
    return _median_s(lambda: encoder.compress(x, **side), x.device), encoder.compress(x, **side)


@torch.inference_mode()
def time_decompress(decoder: Compressor, payload: Payload, device: torch.device, dtype: torch.dtype) -> float:
    """Median seconds of `decompress`."""
    side = decoder_side_inputs(decoder, payload.shape)
    return _median_s(lambda: decoder.decompress(payload, device, dtype, **side), device)


def blank_side_inputs(codec: Compressor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Side inputs of the right form for hidden states [B, T, H], where only time and size matter."""
    shape = x.shape[:2]
    side = {"importance": torch.zeros(shape, device=x.device), "token_ids": torch.zeros(shape, dtype=torch.int64)}
    return {name: side[name] for name in codec.needs}


def decoder_side_inputs(codec: Compressor, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """What `decompress` takes beside a payload of shape (B, T, H), as `blank_side_inputs` had it."""
    return {name: torch.zeros(tuple(shape[:2]), dtype=torch.int64) for name in codec.decoder_needs}


def payload_to_json(payload: Payload) -> dict[str, Any]:
    """A small payload as text, for the few that travel outside the links."""
    data, meta = payload.data.cpu().numpy().tobytes(), encode_meta(payload.meta)
    return {"data": base64.b64encode(data).decode(), "meta": base64.b64encode(meta).decode(), "shape": payload.shape}


def payload_from_json(value: Mapping[str, Any], device: torch.device) -> Payload:
    """Inverse of `payload_to_json`, on `device`."""
    data = torch.from_numpy(np.frombuffer(base64.b64decode(value["data"]), np.uint8).copy()).to(device)
    return Payload(data, tuple(value["shape"]), decode_meta(base64.b64decode(value["meta"])))


def _median_s(operation: Callable[[], Any], device: torch.device) -> float:
    return statistics.median(_times_s(operation, device, REPEATS))


def _least_s(operation: Callable[[], Any], device: torch.device) -> float:
    """What it takes where nothing else is done: other work on the machine only ever adds to it."""
    return min(_times_s(operation, device, 4 * REPEATS))


def _times_s(
    operation: Callable[[], Any], device: torch.device, repeats: int, max_s: float = MAX_S
) -> list[float]:
    operation()
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < max_s):
        wait_for_stream(device)
        start_s = time.perf_counter()
        operation()
        wait_for_stream(device)
        times.append(time.perf_counter() - start_s)
    return times


def wait_for_stream(device: torch.device) -> None:
    """Wait until a GPU has done what this thread has asked of it; a CPU always has.

    Never for the device as a whole: an NCCL receive is work on it, too, and ends only when another rank has sent.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
