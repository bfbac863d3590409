"""Tokens that come one at a time become text, as much of it as no later token can change, up to a stop string.

Behind the engine, in front of whoever reads the answer. Which tokens end an answer is decided elsewhere: an
end-of-sequence token is not to be pushed, unless the tokenizer holds it for a special one, which has no text here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Ids that are decoded with each new one, from `_MIN_WINDOW` to `_MAX_WINDOW`; their text has to be longer than what
# the first of them may lose for being the first: a leading space, and bytes of a character that began before them.
_MIN_WINDOW, _MAX_WINDOW = 8, 16
_MIN_CONTEXT = 4  # characters


class TextStream:
    """The text of an answer, piece by piece. The pieces together are, for any ids,
    `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`, cut in front of the stop
    string that ends first.

    Args:
        tokenizer: transformers'.
        stop: strings that end the text; none of them empty.

    `finish_reason` is "stop" once one was found, and None otherwise. Work per token does not grow with the answer: a
    window of the last ids is decoded. Two things are known of decoders beside that:

    * Byte-level ones write one U+FFFD for the bytes of a character that is not complete, so only the last character
      of a text may change, and only where it is that.
    * Those with byte fallback (`<0xE2>`) write a run of byte tokens as characters if all of it is UTF-8, and as one
      U+FFFD each otherwise, so nothing of a run is certain before a token of another kind.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.finish_reason: str | None = None
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._skipped = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._window: list[int] = []
        self._num_given = 0  # characters of the window's text that were certain when it was decoded last
        self._maybe_stop = ""  # certain text that may be the start of a stop string
        self._ended = False

    def push(self, token_id: int) -> str:
        """Text that is certain now and was not before; "" once a stop string was found or `finish` was called."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._ended or token is None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decode(self._window)
        new = self._advance(text, uncertain=text.endswith(REPLACEMENT))
        if len(self._window) > _MAX_WINDOW:
            self._shorten(len(text) - self._num_given)
        return self._up_to_stop(new)

    def finish(self) -> str:
        """The rest, when no token follows: bytes that have not become a character are U+FFFD."""
        if self._ended:
            return ""
        new = self._up_to_stop(self._advance(self._decode(self._window), uncertain=False))
        rest, self._maybe_stop, self._ended = self._maybe_stop, "", True
        return new + rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _advance(self, text: str, *, uncertain: bool) -> str:
        """What is new in the window's text, but for its last character where that is uncertain."""
        num_given, self._num_given = self._num_given, len(text) - uncertain
        return text[num_given : self._num_given]

    def _shorten(self, num_uncertain: int) -> None:
        """Forget the older ids, if the others' text tells apart what is new just as well."""
        text = self._decode(self._window[-_MIN_WINDOW:])
        if len(text) >= num_uncertain + _MIN_CONTEXT:
            self._window = self._window[-_MIN_WINDOW:]
            self._num_given = len(text) - num_uncertain

    def _up_to_stop(self, new: str) -> str:
        """Of certain text, what cannot be a stop string's; ends the stream where one is complete."""
        text = self._maybe_stop + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.finish_reason, self._ended, self._maybe_stop = "stop", True, ""
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        kept = next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        self._maybe_stop = text[len(text) - kept :]
        return text[: len(text) - kept]
