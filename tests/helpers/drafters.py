"""Drafters of the tests, as plug-ins."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pipeline.drafting.drafter import Draft

__all__ = ["Knowing"]


class Knowing:
    """Knows what is right, and says so with probability `right`.

    `sequences` is a .json file: a list of token ids, prompt and answer, for each sequence.
    """

    name = "knowing"

    def __init__(self, *, context, sequences: str, right: float = 0.6, seed: int = 0) -> None:
        self._sequences = json.loads(Path(sequences).read_text())
        self._vocab_size = context.model_config.vocab_size
        self._right, self._rng = right, random.Random(seed)

    def draft(self, slot, ids):
        """Of the sequence that has most in common with `ids`, of which the last may be wrong."""

        def shared(known):
            pairs = enumerate(zip(known, ids, strict=False))
            return next((place for place, (one, other) in pairs if one != other), min(len(known), len(ids)))

        known = max(self._sequences, key=shared)
        for token_id in known[len(ids) :]:
            is_right = self._rng.random() < self._right
            yield Draft(token_id if is_right else (token_id + 1) % self._vocab_size, self._right)
