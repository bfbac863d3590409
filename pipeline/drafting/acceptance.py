"""How often a drafter's drafts are right, learnt while tokens come."""

from __future__ import annotations

__all__ = ["Acceptance"]

_NUM_BINS = 8
_PRIOR_WEIGHT = 3.0
_TRUST = 0.75  # in what a drafter says of itself, before anything is known
_MEMORY = 64.0  # drafts of a bin, after which older ones have faded


class Acceptance:
    """The chance that a draft of some confidence is right, where those before it are: counts in bins of confidence.

    What is not known yet is as in `prior` or, without one, a part of what the drafter says of itself.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._right, self._seen = [0.0] * _NUM_BINS, [0.0] * _NUM_BINS
        self._overall: list[float] = [0.0, 0.0]

    def chance(self, confidence: float) -> float:
        place = self._bin(confidence)
        prior = _TRUST * confidence if self._prior is None else self._prior.chance(confidence)
        return (self._right[place] + _PRIOR_WEIGHT * prior) / (self._seen[place] + _PRIOR_WEIGHT)

    @property
    def mean(self) -> float:
        """Of drafts of any confidence, before one is made."""
        prior = 0.25 if self._prior is None else self._prior.mean
        right, seen = self._overall
        return (right + _PRIOR_WEIGHT * prior) / (seen + _PRIOR_WEIGHT)

    def learn(self, confidence: float, *, is_right: bool) -> None:
        place = self._bin(confidence)
        keep = 1 - 1 / _MEMORY
        self._right[place] = keep * self._right[place] + is_right
        self._seen[place] = keep * self._seen[place] + 1
        self._overall = [keep * self._overall[0] + is_right, keep * self._overall[1] + 1]
        if self._prior is not None:
            self._prior.learn(confidence, is_right=is_right)

    @staticmethod
    def _bin(confidence: float) -> int:
        return min(_NUM_BINS - 1, max(0, int(confidence * _NUM_BINS)))
