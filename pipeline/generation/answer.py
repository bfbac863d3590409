"""One request on its way to an answer: tokens in, text out, and what it took."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.generation.requests import RefusedRequest, Request
from pipeline.generation.text import TextStream
from pipeline.models.sampling import Sampled, SamplingOptions

__all__ = ["Answer", "quantile", "refusal_line"]


class Answer:
    """What comes of a request (`sequences.Answering`).

    Args:
        link_names: of the links of hidden states.
        on_text: told what text is certain and was not before.
        on_finish: told when there will be no more.

    Attributes:
        num_passes: of its own that have brought tokens.
        num_drafts_accepted: tokens that had gone ahead as drafts.
        prompt_logprobs: of the prompt's tokens from the request's `scored_from` on, so far.
        is_cut: whether a stop string has ended its text, so that not all of its tokens are in it.
        is_cancelled: whether `cancel` was called; it is finished, as "cancelled", once the scheduler has seen it.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any,
        *,
        link_names: Sequence[str],
        on_text: Callable[[str], None] = lambda text: None,
        on_finish: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_passes = self.num_drafts_accepted = 0
        self.prompt_logprobs: list[Sampled] = []
        self.is_cancelled = self.is_cut = False
        self._tokenizer = tokenizer
        self._text: TextStream | None = None  # while tokens come: thousands of answers may wait
        self._pieces: list[str] = []
        self._link_names, self._bytes = link_names, [0.0] * len(link_names)
        self._on_text, self._on_finish = on_text, on_finish
        self._submitted_s = time.monotonic()
        self._began_s: float | None = None
        self._token_times_s: list[float] = []
        self._pass_starts: list[int] = []  # which tokens are the first of their passes
        self._logprobs: list[float] = []
        self._top_logprobs: list[tuple[tuple[int, float], ...]] = []

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.request.prompt_ids

    @property
    def options(self) -> SamplingOptions:
        return self.request.sampling

    @property
    def expires_s(self) -> float:
        limit = self.request.deadline_s
        return math.inf if limit is None else self._submitted_s + limit

    @property
    def num_wanted(self) -> int:
        return self.request.max_new_tokens - len(self.token_ids)

    @property
    def scored_from(self) -> int | None:
        return self.request.scored_from

    @property
    def is_scored(self) -> bool:
        """Whether all that is wanted of its prompt's log-probabilities has come."""
        return self.scored_from is None or len(self.prompt_logprobs) == len(self.prompt_ids) - self.scored_from

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """So far."""
        return "".join(self._pieces)

    @property
    def has_begun(self) -> bool:
        """Whether it has got a slot."""
        return self._began_s is not None

    @property
    def first_token_s(self) -> float | None:
        """When its first token came, by `time.monotonic`."""
        return self._token_times_s[0] if self._token_times_s else None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from having a slot to the first token."""
        if self._began_s is None or not self._token_times_s:
            return None
        return self._token_times_s[0] - self._began_s

    @property
    def token_gaps_s(self) -> list[float]:
        """Seconds between tokens; those of one pass come at once, and share the time since the pass before."""
        spans = itertools.pairwise([*self._pass_starts, len(self._token_times_s)])
        passes = [(self._token_times_s[start], end - start) for start, end in spans if end > start]
        return [
            gap
            for (earlier, _), (later, num_tokens) in itertools.pairwise(passes)
            for gap in [(later - earlier) / num_tokens] * num_tokens
        ]

    @property
    def bytes_per_link(self) -> dict[str, float]:
        """Payload bytes of its tokens; of passes that it shared, its share."""
        return dict(zip(self._link_names, self._bytes, strict=True))

    @property
    def logprobs(self) -> dict[str, Any] | None:
        """Of each token its log-probability (nats), and the likeliest tokens as (id, log-probability); if asked for."""
        if self.request.logprobs is None:
            return None
        return {"token_logprobs": self._logprobs, "top_logprobs": self._top_logprobs}

    def cancel(self) -> None:
        """Nobody waits for it any more. From any thread; without effect once it is finished."""
        self.is_cancelled = True

    def begin(self) -> None:
        self._began_s = time.monotonic()
        self._text = TextStream(self._tokenizer, self.request.stop)

    def take(self, token: Sampled, *, was_draft: bool) -> None:
        assert self._text is not None, "it has not begun, or has ended"
        self._token_times_s.append(time.monotonic())
        self.token_ids.append(token.token_id)
        self.num_drafts_accepted += was_draft
        if self.request.logprobs is not None:
            self._logprobs.append(token.logprob)
            self._top_logprobs.append(token.top)
        if token.token_id in self.request.eos_ids:
            self.finish("stop")
            return
        self._show(self._text.push(token.token_id))
        if self._text.finish_reason is not None:
            self.finish(self._text.finish_reason)
        elif len(self.token_ids) == self.request.max_new_tokens:
            self.finish("length")

    def take_prompt(self, tokens: Sequence[Sampled]) -> None:
        self.prompt_logprobs += tokens

    def count(self, payload_bytes: Sequence[float], *, brings_tokens: bool) -> None:
        if brings_tokens:
            self.num_passes += 1
            self._pass_starts.append(len(self.token_ids))
        self._bytes = [total + nbytes for total, nbytes in zip(self._bytes, payload_bytes, strict=True)]

    def finish(self, reason: str, error: str | None = None) -> None:
        if self._text is not None:
            self._show(self._text.finish())
            self.is_cut = self._text.finish_reason is not None
            if error is None and self._text.finish_reason is not None:  # in text that waited for its next token
                reason = self._text.finish_reason
            self._text = None
        self.finish_reason, self.error = reason, error
        self._on_finish(self)

    def as_line(self) -> dict[str, Any]:
        """For the file of answers."""
        gaps = self.token_gaps_s
        began_s = self._began_s
        return {
            "line": self.request.line,
            "prompt": self.request.text,
            "text": self.text,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "prompt_logprobs": self._prompt_logprobs_line(),
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": len(self.request.prompt_ids),
            "queued_s": None if began_s is None else began_s - self._submitted_s,
            "ttft_s": self.ttft_s,
            "tpot_s": {"median": statistics.median(gaps), "p95": quantile(gaps, 0.95)} if gaps else None,
            "bytes_per_link": self.bytes_per_link,
            "num_passes": self.num_passes,
            "num_drafts_accepted": self.num_drafts_accepted,
            "error": self.error,
        }

    def _prompt_logprobs_line(self) -> dict[str, Any] | None:
        if self.scored_from is None:
            return None
        told = self.prompt_logprobs
        return {"token_logprobs": [t.logprob for t in told], "top_logprobs": [t.top for t in told]}

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._on_text(text)


def refusal_line(refused: RefusedRequest) -> dict[str, Any]:
    """For the file of answers, of a request that was none."""
    return {
        "line": refused.line,
        "prompt": None,
        "text": "",
        "token_ids": [],
        "logprobs": None,
        "prompt_logprobs": None,
        "finish_reason": "error",
        "num_prompt_tokens": 0,
        "queued_s": None,
        "ttft_s": None,
        "tpot_s": None,
        "bytes_per_link": {},
        "num_passes": 0,
        "num_drafts_accepted": 0,
        "error": refused.error,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of `values` do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
