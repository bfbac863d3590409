"""Prompt lookup (A. Saxena, 2023, as transformers' `prompt_lookup_num_tokens`): what followed the newest tokens the
last time that they stood in prompt or answer. It costs microseconds, and pays where text repeats itself: code, quotes,
summaries, corrections, lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config.schema import ConfigError
from pipeline.drafting.drafter import Draft, DrafterContext

__all__ = ["Ngram"]

MAX_LONGEST = 16
# How often the token that followed is right, by the length of the match, 1 to 8 and more.
_CONFIDENCE = (0.22, 0.37, 0.49, 0.54, 0.57, 0.62, 0.65, 0.75)


class Ngram:
    """Continues the longest suffix of the ids, of `shortest` to `longest` tokens, that occurs in them before.

    Of several places the latest counts. The most frequent continuation was no better, in passes of 8 drafts along
    given text of SmolLM2's tokenizer, 1,024 tokens at a time: 0.35 right drafts a pass against 0.37 in WikiText-2, 1.05
    against 1.04 in Python's standard library (longest match 4), by hand. With matches of up to 6 tokens 0.36 and 1.07,
    of up to 10 0.36 and 1.08; without those of one token 0.24 and 0.91.

    Where the continuation reaches the end of the ids it goes on with what it has said, so a text in a loop is followed.

    The confidence is how often drafts were right there, by the length of the match and halfway between the two texts;
    drafts that are right make the match longer, which counts for those behind them.
    """

    name = "ngram"

    def __init__(self, *, context: DrafterContext, longest: int = 6, shortest: int = 1) -> None:
        _check("longest", longest, 1, MAX_LONGEST)
        _check("shortest", shortest, 1, longest)
        self._lengths = range(longest, shortest - 1, -1)
        self._index_of: dict[int, _Index] = {}

    def draft(self, slot: int, ids: Sequence[int]) -> Iterator[Draft]:
        index = self._index_of.get(slot)
        if index is None:
            index = self._index_of[slot] = _Index(self._lengths)
        index.follow(ids)
        place = index.place_behind_suffix()
        if place is None:
            return
        length, drafted = _match_length(ids, place), list[int]()
        while True:
            drafted.append(ids[place] if place < len(ids) else drafted[place - len(ids)])
            yield Draft(drafted[-1], _CONFIDENCE[min(length, len(_CONFIDENCE)) - 1])
            place, length = place + 1, length + 1


class _Index:
    """Where each n-gram of growing ids was last followed by a token; undone token by token where ids get shorter."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: list[list[int | None]] = []  # by position: what `latest` was, for each length

    def follow(self, ids: Sequence[int]) -> None:
        """Be the index of `ids`, most of which are as before."""
        ids = ids if isinstance(ids, list) else list(ids)
        own = self._ids
        while own and (len(own) > len(ids) or own[-1] != ids[len(own) - 1]):
            self._pop()
        if own != ids[: len(own)]:  # another sequence, whose token at the same place happens to be the same
            shared = next(i for i, (old, new) in enumerate(zip(own, ids, strict=False)) if old != new)
            while len(own) > shared:
                self._pop()
        for token_id in ids[len(own) :]:
            self._append(token_id)

    def place_behind_suffix(self) -> int | None:
        """Position of the token that followed the longest suffix when it last occurred."""
        ids = self._ids
        for length in self._lengths:
            if length < len(ids) and (place := self._latest.get(tuple(ids[-length:]))) is not None:
                return place
        return None

    def _append(self, token_id: int) -> None:
        place, ids, latest = len(self._ids), self._ids, self._latest
        before = []
        for length in self._lengths:
            if length <= place:
                key = tuple(ids[place - length :])
                before.append(latest.get(key))
                latest[key] = place
        self._before.append(before)
        ids.append(token_id)

    def _pop(self) -> None:
        self._ids.pop()
        place, before = len(self._ids), self._before.pop()
        for length, earlier in zip([n for n in self._lengths if n <= place], before, strict=True):
            key = tuple(self._ids[place - length :])
            if earlier is None:
                del self._latest[key]
            else:
                self._latest[key] = earlier


def _match_length(ids: Sequence[int], place: int) -> int:
    """How many tokens in front of `place` are those at the end, as far as that changes the confidence."""
    length = 1
    while length < min(place, len(_CONFIDENCE)) and ids[place - 1 - length] == ids[-1 - length]:
        length += 1
    return length


def _check(option: str, got: int, least: int, most: int) -> None:
    if type(got) is not int or not least <= got <= most:
        raise ConfigError(f"{option} is {got!r}, allowed: an integer from {least} to {most}")
