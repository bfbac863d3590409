"""What `benchmarks.drafts` gives a model to go on from, and a conversation that people might have written."""

from __future__ import annotations

import json
from typing import Any

from pipeline.data.text import load_text

__all__ = ["CHAT", "KINDS", "prompts_of"]

KINDS = ("repetitive", "chat", "text")
WORDS_OF_TEXT = 48  # that a continuation begins with

_JSON = "".join(
    json.dumps({"id": number, "type": "lock", "city": city, "state": "open"}) + "\n"
    for number, city in enumerate(("Ghent", "Delft", "Bruges", "Utrecht", "Leiden"), 1)
)
_CODE = "".join(
    f"    @property\n    def {name}(self) -> float:\n"
    f'        """The {name} of the lock, in metres."""\n        return self._{name}\n\n'
    for name in ("length", "width", "depth")
)
_PARAGRAPH = (
    "The keeper opens the upper gate at six in the morning. Boats that wait above the lock go first, and boats that "
    "wait below the lock go after them. At noon the keeper closes the gate and reads the height of the water."
)
_REPETITIVE: tuple[dict[str, Any], ...] = (
    {"prompt": _JSON},
    {"prompt": "class Lock:\n" + _CODE + "    @property\n    def height"},
    {"messages": [{"role": "user", "content": f"Repeat this text word for word:\n\n{_PARAGRAPH}"}]},
)
_QUESTIONS = (
    "Why do canals need locks?",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "How do I find all the files of a folder that have changed today?",
)

CHAT = """\
Anna: Hi, I ordered a bicycle lamp last week and it has not arrived yet.
Support: I am sorry to hear that. Could you tell me the number of your order, please?
Anna: It is 40-1187. I ordered it on Monday.
Support: Thank you. I see order 40-1187 here, one bicycle lamp, paid on Monday. It left our house on Tuesday, but the
carrier has not scanned it since Wednesday morning.
Anna: So is it lost?
Support: It may be. Sometimes a parcel lies in a depot for a few days and then goes on. If it has not arrived by
Friday, I can send you another bicycle lamp, or give you your money back. Which would you like better?
Anna: I would like another lamp, since I need it when I ride home from work. It is dark by then.
Support: I understand. I have made a note that you would like another lamp if the parcel has not arrived by Friday. You
need not do anything; we will write to you on Friday in any case.
Anna: That is kind. What happens if both lamps arrive?
Support: Then please send one of them back. We will give you a label for it, so that it costs you nothing.
Anna: All right. One more question: does the lamp come with batteries?
Support: No, it does not come with batteries. It needs two of size AA. You can also charge it with a cable, which is in
the box.
Anna: Good to know. Then I will wait until Friday.
Support: Thank you for waiting, and I am sorry again that the parcel has not arrived yet. Is there anything else that I
can do for you?
Anna: No, that is all. Thank you!
Support: You are welcome. Have a good day, and a safe ride home from work!
"""


def prompts_of(kind: str, dataset: Any, num: int) -> list[dict[str, Any]]:
    """Lines as a file of prompts has them, at most three; `text`: how paragraphs of the config's text begin."""
    if kind == "repetitive":
        return list(_REPETITIVE[:num])
    if kind == "chat":
        return [{"messages": [{"role": "user", "content": question}]} for question in _QUESTIONS[:num]]
    text = load_text(name=dataset.name, path=dataset.path, split=dataset.split).text
    for parts in (text.split("\n\n"), text.splitlines()):  # WikiText has a line for a paragraph
        paragraphs = [words for part in parts if len(words := part.split()) > 2 * WORDS_OF_TEXT]
        if len(paragraphs) >= num:
            break
    chosen = paragraphs[:: max(1, len(paragraphs) // num)][:num]
    return [{"prompt": " ".join(words[:WORDS_OF_TEXT])} for words in chosen]
