"""What comes of the last stage's hidden states, and how it travels where the head is not on node 0."""

from __future__ import annotations

from typing import Any

import torch

from compressors.base import Payload
from pipeline.comm.wire import BadFrame
from pipeline.models.stage import Scores, Stage, TokenWindows
from pipeline.partition.passes import Pass, PassKind

__all__ = ["Head"]


class Head:
    """Scores of a text's tokens.

    `result_link` is the link that carries them to node 0, None where the head is there.
    """

    def __init__(self, tokens: TokenWindows, result_link: int | None) -> None:
        self.result_link = result_link
        self._tokens = tokens

    def results(self, work: Pass, stage: Stage, output: torch.Tensor, ids: torch.Tensor | None, note: bytes) -> Any:
        """Of hidden states [B, T, H] of a pass; `ids` int64 [B, T] and `note` are what the pass brought."""
        assert work.kind is PassKind.SCORE and work.microbatch_index is not None
        return stage.score(output, *self._tokens.scored(work.microbatch_index))

    def to_payload(self, value: Scores) -> Payload:
        """Losses as they are, then top-1 ids as int32."""
        return Payload(torch.cat([value.loss.view(torch.uint8), value.top1.view(torch.uint8)]), ())

    def from_payload(self, work: Pass, data: torch.Tensor) -> Scores:
        """Inverse of `to_payload`, from uint8 data. Raises BadFrame for another number of bytes."""
        assert work.microbatch_index is not None
        num_scored = self._tokens.microbatches[work.microbatch_index].num_scored
        if data.numel() != 8 * num_scored:
            raise BadFrame(f"result of {data.numel()} bytes for {num_scored} scored tokens")
        return Scores(data[: 4 * num_scored].view(torch.float32), data[4 * num_scored :].view(torch.int32))
