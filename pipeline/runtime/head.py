"""What comes of the last stage's hidden states, and how it travels where the head is not on node 0."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence

import numpy as np
import torch

from compressors.base import Payload
from pipeline.comm.wire import BadFrame
from pipeline.config.schema import MAX_LOGPROBS
from pipeline.data.windows import MicroBatch
from pipeline.models.sampling import Sampled, Sampler, SamplingOptions
from pipeline.models.stage import Scores, Stage, TokenWindows
from pipeline.partition.passes import Pass, PassKind

__all__ = ["Head", "begin_note", "max_result_nbytes", "result_nbytes"]

_TOKEN = struct.Struct("<IdB")
_CANDIDATE = struct.Struct("<Id")


def result_nbytes(microbatches: Sequence[MicroBatch], work: Pass) -> int:
    """Bound of a pass's result in bytes."""
    nbytes = len(work.rows) * (_TOKEN.size + MAX_LOGPROBS * _CANDIDATE.size) if work.samples else 0
    if work.kind is PassKind.SCORE or work.scores:
        nbytes += 8 * num_scored(microbatches, work)
    return nbytes


def max_result_nbytes(microbatches: Sequence[MicroBatch], max_rows: int) -> int:
    """Of any pass's result."""
    scored = max((m.num_scored for m in microbatches), default=0)
    return max(8 * scored, max_rows * (_TOKEN.size + MAX_LOGPROBS * _CANDIDATE.size))


def num_scored(microbatches: Sequence[MicroBatch], work: Pass) -> int:
    """Tokens that a pass scores: all of a micro-batch's, or those that the positions of its rows predict."""
    assert work.microbatch_index is not None
    microbatch = microbatches[work.microbatch_index]
    if work.kind is PassKind.SCORE:
        return microbatch.num_scored
    return sum(
        len(range(max(row.start, columns.start), min(row.start + work.num_tokens, columns.stop)))
        for row, columns in zip(work.rows, (window.scored_columns for window in microbatch.windows), strict=True)
    )


def begin_note(options_of_slot: dict[int, SamplingOptions]) -> bytes:
    """What the head must know of sequences that begin in a pass."""
    told = {str(slot): options.as_json() for slot, options in options_of_slot.items()}
    return json.dumps(told, separators=(",", ":")).encode() if told else b""


class Head:
    """Scores of a text's tokens, and next tokens of the sequences in slots, of which it keeps the ids.

    `result_link` is the link that carries results to node 0, None where the head is there.
    """

    def __init__(self, tokens: TokenWindows, result_link: int | None) -> None:
        self.result_link = result_link
        self._tokens = tokens
        self._ids: dict[int, array[int]] = {}  # of the sequence in each slot
        self._samplers: dict[int, Sampler] = {}

    def results(
        self, work: Pass, stage: Stage, output: torch.Tensor, ids: torch.Tensor | None, note: bytes
    ) -> Scores | list[Sampled] | None:
        """Of hidden states [B, T, H] of a pass; `ids` int64 [B, T] and `note` are what the pass brought.

        Scores of a SCORE pass or one that `scores`, one token a row of one that `samples`, else None.
        """
        if work.kind is PassKind.SCORE:
            assert work.microbatch_index is not None
            return stage.score(output, *self._tokens.scored(work.microbatch_index))
        if work.scores:
            return self._scores(work, stage, output)
        self._follow(work, ids, note)
        return self._sample(work, stage, output) if work.samples else None

    def to_payload(self, value: Scores | list[Sampled] | None) -> Payload:
        """Losses as they are, then top-1 ids as int32; tokens with their candidates."""
        if isinstance(value, Scores):
            data = torch.cat([value.loss.view(torch.uint8), value.top1.view(torch.uint8)])
        else:
            data = torch.frombuffer(bytearray(_to_bytes(value or [])), dtype=torch.uint8) if value else _NOTHING
        return Payload(data, ())

    def from_payload(self, work: Pass, data: torch.Tensor) -> Scores | list[Sampled] | None:
        """Inverse of `to_payload`, from uint8 data. Raises BadFrame for other bytes."""
        if work.kind is PassKind.SCORE or work.scores:
            count = num_scored(self._tokens.microbatches, work)
            if data.numel() != 8 * count:
                raise BadFrame(f"result of {data.numel()} bytes for {count} scored tokens")
            return Scores(data[: 4 * count].view(torch.float32), data[4 * count :].view(torch.int32))
        return _from_bytes(bytes(data.numpy()), len(work.rows)) if work.samples else None

    def _scores(self, work: Pass, stage: Stage, output: torch.Tensor) -> Scores:
        assert work.microbatch_index is not None
        rows, columns, targets = self._tokens.scored(work.microbatch_index)
        columns = columns - torch.tensor([row.start for row in work.rows])[rows]
        here = (columns >= 0) & (columns < work.num_tokens)
        return stage.score(output, rows[here], columns[here], targets[here])

    def _follow(self, work: Pass, ids: torch.Tensor | None, note: bytes) -> None:
        """Keep the slots' sequences as the caches of the stages do."""
        assert ids is not None
        copied = {row.slot: (row.from_slot, row.start) for row in work.rows if row.from_slot is not None}
        self._ids.update({slot: self._ids[source][:start] for slot, (source, start) in copied.items()})
        for row, own in zip(work.rows, ids.tolist(), strict=True):
            held = self._ids.setdefault(row.slot, array("q"))
            del held[row.start :]
            held.extend(own)
        for slot, options in json.loads(note or b"{}").items():
            self._samplers[int(slot)] = Sampler(SamplingOptions.from_json(options))

    def _sample(self, work: Pass, stage: Stage, output: torch.Tensor) -> list[Sampled]:
        logits, tokens = stage.logits(output[:, -1]), []
        for place, row in enumerate(work.rows):
            sampler = self._samplers[row.slot]
            ids = torch.from_numpy(np.array(self._ids[row.slot])) if sampler.reads_ids else _NO_IDS
            tokens.append(sampler(logits[place], ids, row.start + work.num_tokens))
        return tokens


_NOTHING = torch.empty(0, dtype=torch.uint8)
_NO_IDS = torch.empty(0, dtype=torch.int64)


def _to_bytes(tokens: list[Sampled]) -> bytes:
    parts = []
    for token in tokens:
        parts.append(_TOKEN.pack(token.token_id, token.logprob, len(token.top)))
        parts += [_CANDIDATE.pack(*candidate) for candidate in token.top]
    return b"".join(parts)


def _from_bytes(data: bytes, num_rows: int) -> list[Sampled]:
    tokens, place = [], 0
    try:
        for _ in range(num_rows):
            token_id, logprob, num_top = _TOKEN.unpack_from(data, place)
            place += _TOKEN.size
            top = tuple(_CANDIDATE.unpack_from(data, place + i * _CANDIDATE.size) for i in range(num_top))
            place += num_top * _CANDIDATE.size
            tokens.append(Sampled(token_id, logprob, top))
    except struct.error as e:
        raise BadFrame(f"result of {len(data)} bytes for {num_rows} tokens: {e}") from e
    if place != len(data):
        raise BadFrame(f"result of {len(data)} bytes for {num_rows} tokens, which take {place}")
    return tokens
