"""What ranks do together before and after a job: fail alike, and run each codec once."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.comm.control import Control
from pipeline.comm.watchdog import PipelineError, tell
from pipeline.records.files import RecordError
from pipeline.runtime.codecs import LinkCodecs, cause_in_words, naming
from pipeline.runtime.engine import StageError
from pipeline.runtime.timing import blank_side_inputs, decoder_side_inputs, payload_from_json, payload_to_json

__all__ = ["failing_alike", "from_all_ranks", "warm_up"]


@contextmanager
def failing_alike(control: Control) -> Iterator[None]:
    """Make a stage's or codec's failure on any rank in the enclosed work a StageError on all."""
    failure = None
    try:
        yield
    except StageError as e:
        failure = str(e)
    except (PipelineError, RecordError):
        raise
    except Exception as e:
        place = control.watchdog.place
        tell(f"ERROR: {place}: a codec raised\n{traceback.format_exc()}")
        failure = f"{place}: {cause_in_words(e)}"
    failures = [told for told in control.gather(failure) if told is not None]
    if failures:
        raise StageError(failures[0])


def from_all_ranks(control: Control, by_link: dict[str, Any]) -> dict[str, Any]:
    """JSON by link from every rank, in one mapping: a decoder's rank has no encoder to make it a frame."""
    return {index: value for rank in control.gather(by_link) for index, value in rank.items()}


def warm_up(
    control: Control,
    codecs: LinkCodecs,
    devices: Mapping[int, torch.device],
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    """Run this rank's codecs once on a small tensor, so that compiling kernels is not timed with a run."""
    own = {}
    with failing_alike(control), _one_rank_a_machine_first(control):
        for index, encoder in codecs.encoders.items():
            x = torch.ones((1, 2, hidden_size), dtype=dtype, device=devices[index])
            with naming(encoder):
                payload = encoder.compress(x, **blank_side_inputs(encoder, x))
            own[str(index)] = payload_to_json(payload)
    written = from_all_ranks(control, own)
    with failing_alike(control), _one_rank_a_machine_first(control):
        for index, decoder in codecs.decoders.items():
            device = devices[index + 1]
            payload = payload_from_json(written[str(index)], device)
            with naming(decoder):
                decoder.decompress(payload, device, dtype, **decoder_side_inputs(decoder, payload.shape))


@contextmanager
def _one_rank_a_machine_first(control: Control) -> Iterator[None]:
    """The enclosed work on local rank 0, then on the others, which find the kernels that it compiled on disk."""
    is_first = control.world.local_rank == 0
    if not is_first:
        control.barrier()
    try:
        yield
    finally:
        if is_first:
            control.barrier()
