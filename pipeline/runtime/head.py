"""What comes of the last stage's hidden states, and how it travels where the head is not on node 0."""

from __future__ import annotations

import itertools
import json
import struct
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from compressors.base import Payload
from pipeline.comm.wire import BadFrame
from pipeline.config.schema import MAX_LOGPROBS
from pipeline.data.windows import MicroBatch
from pipeline.models.sampling import Sampled, Sampler, SamplingOptions
from pipeline.models.stage import Scores, Stage, TokenWindows
from pipeline.partition.passes import Pass, PassKind, Row

__all__ = ["Head", "begin_note", "max_result_nbytes", "result_nbytes"]

_MAX_LOGITS = 256  # rows of logits at once
_COUNT = struct.Struct("<H")
_TOKEN = struct.Struct("<IdB")
_CANDIDATE = struct.Struct("<Id")


def result_nbytes(microbatches: Sequence[MicroBatch], work: Pass) -> int:
    """Bound of a pass's result in bytes."""
    nbytes = _sampled_nbytes(len(work.rows), len(work.rows) * _max_sampled(work)) if work.samples else 0
    if work.kind is PassKind.SCORE or work.scores:
        nbytes += 8 * num_scored(microbatches, work)
    return nbytes


def max_result_nbytes(microbatches: Sequence[MicroBatch], max_rows: int, max_tokens: int) -> int:
    """Of any pass's result, with at most `max_tokens` tokens in all rows."""
    scored = max((m.num_scored for m in microbatches), default=0)
    return max(8 * scored, _sampled_nbytes(max_rows, max_tokens))


def _sampled_nbytes(num_rows: int, num_tokens: int) -> int:
    return num_rows * _COUNT.size + num_tokens * (_TOKEN.size + MAX_LOGPROBS * _CANDIDATE.size)


def _max_sampled(work: Pass) -> int:
    """Tokens that may be told of for each row of a pass that samples."""
    return work.num_tokens if work.kind is PassKind.DECODE or work.echoes else 1


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
    ) -> Scores | list[list[Sampled]] | None:
        """Of hidden states [B, T, H] of a pass; `ids` int64 [B, T] and `note` are what the pass brought.

        Scores of a SCORE pass or one that `scores`; of one that `samples` tokens, by row: 1, of a DECODE 1 to T (see
        `Pass`), of one that `echoes` T, of which the first T - 1 are the row's own from its second on; else None.
        """
        if work.kind is PassKind.SCORE:
            assert work.microbatch_index is not None
            return stage.score(output, *self._tokens.scored(work.microbatch_index))
        if work.scores:
            return self._scores(work, stage, output)
        self._follow(work, ids, note)
        return self._sample(work, stage, output) if work.samples else None

    def to_payload(self, value: Scores | list[list[Sampled]] | None) -> Payload:
        """Losses as they are, then top-1 ids as int32; of each row how many tokens, and those with their candidates."""
        if isinstance(value, Scores):
            data = torch.cat([value.loss.view(torch.uint8), value.top1.view(torch.uint8)])
        else:
            data = torch.frombuffer(bytearray(_to_bytes(value or [])), dtype=torch.uint8) if value else _NOTHING
        return Payload(data, ())

    def from_payload(self, work: Pass, data: torch.Tensor) -> Scores | list[list[Sampled]] | None:
        """Inverse of `to_payload`, from uint8 data. Raises BadFrame for other bytes."""
        if work.kind is PassKind.SCORE or work.scores:
            count = num_scored(self._tokens.microbatches, work)
            if data.numel() != 8 * count:
                raise BadFrame(f"result of {data.numel()} bytes for {count} scored tokens")
            return Scores(data[: 4 * count].view(torch.float32), data[4 * count :].view(torch.int32))
        return _from_bytes(bytes(data.numpy()), work) if work.samples else None

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

    def _sample(self, work: Pass, stage: Stage, output: torch.Tensor) -> list[list[Sampled]]:
        num_told = _max_sampled(work)
        parts = output[:, -num_told:].flatten(0, 1).split(_MAX_LOGITS)
        logits = itertools.chain.from_iterable(map(stage.logits, parts))
        return [self._sample_row(work, row, logits) for row in work.rows]

    def _sample_row(self, work: Pass, row: Row, logits: Iterator[torch.Tensor]) -> list[Sampled]:
        """After each of the row's last tokens, whose logits [V] come next, up to the first that is not the next."""
        sampler, held, end = self._samplers[row.slot], self._ids[row.slot], row.start + work.num_tokens
        ids = torch.from_numpy(np.array(held)) if sampler.reads_ids else _NO_IDS
        tokens: list[Sampled] = []
        is_over = False
        for position in range(end - _max_sampled(work) + 1, end + 1):
            own = next(logits)
            if work.echoes and position < end:
                tokens.append(sampler.tell(own, held[position], position))
            elif not is_over:
                tokens.append(sampler(own, ids[:position], position))
                is_over = position < end and tokens[-1].token_id != held[position]
            del own  # it holds the logits that it is a row of, while the next ones come
        return tokens


_NOTHING = torch.empty(0, dtype=torch.uint8)
_NO_IDS = torch.empty(0, dtype=torch.int64)


def _to_bytes(rows: list[list[Sampled]]) -> bytes:
    parts = []
    for tokens in rows:
        parts.append(_COUNT.pack(len(tokens)))
        for token in tokens:
            parts.append(_TOKEN.pack(token.token_id, token.logprob, len(token.top)))
            parts += [_CANDIDATE.pack(*candidate) for candidate in token.top]
    return b"".join(parts)


def _from_bytes(data: bytes, work: Pass) -> list[list[Sampled]]:
    rows: list[list[Sampled]] = []
    num_rows, most, place = len(work.rows), _max_sampled(work), 0
    fewest = most if work.echoes else 1
    try:
        for _ in range(num_rows):
            (count,) = _COUNT.unpack_from(data, place)
            if not fewest <= count <= most:
                raise BadFrame(f"result with {count} tokens of a row; {fewest} to {most} are possible in {work}")
            place += _COUNT.size
            rows.append([])
            for _ in range(count):
                token_id, logprob, num_top = _TOKEN.unpack_from(data, place)
                place += _TOKEN.size
                top = tuple(_CANDIDATE.unpack_from(data, place + i * _CANDIDATE.size) for i in range(num_top))
                place += num_top * _CANDIDATE.size
                rows[-1].append(Sampled(token_id, logprob, top))
    except struct.error as e:
        raise BadFrame(f"result of {len(data)} bytes for {num_rows} rows: {e}") from e
    if place != len(data):
        raise BadFrame(f"result of {len(data)} bytes for {num_rows} rows, which take {place}")
    return rows
