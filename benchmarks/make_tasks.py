"""Three small tasks for lm-evaluation-harness, made from a WikiText file and a seed; nothing is downloaded.

    python -m benchmarks.make_tasks --text wiki.test.raw --out build/tasks

Writes a JSONL file a task and its YAML, which names the file, into a folder for `run_pipeline.py --lm_eval_tasks`. The
same text and seed make the same files.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compressors.console import run_command
from compressors.user_files import read_text
from pipeline.config.options import OptionParser, path_option

TEMPLATES = Path(__file__).parent / "tasks"
TASKS = ("wiki_cloze", "copied_text", "arithmetic_choice")
NUM_CHOICES = 4
MIN_WORDS, MAX_WORDS = 40, 90  # of a passage
NUM_COPIED = 5  # words

_HEADING = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=path_option, required=True, help="a raw file of WikiText")
    parser.add_argument("--out", type=path_option, required=True, help="a folder")
    parser.add_argument("--samples", type=int, default=300, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    write_tasks(read_text(arguments.text, f"--text {arguments.text}"), arguments.out, arguments.samples, arguments.seed)
    return 0


def write_tasks(text: str, folder: Path, num_samples: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clozes = wiki_cloze(text, num_samples, random.Random(seed))
    made = {
        "wiki_cloze": clozes,
        "copied_text": [_copied_text(s["passage"], random.Random(f"{seed} {i}")) for i, s in enumerate(clozes)],
        "arithmetic_choice": [_arithmetic(random.Random(f"{seed} {i}")) for i in range(num_samples)],
    }
    for name, samples in made.items():
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        template = (TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8")
        (folder / f"{name}.yaml").write_text(template.replace("FOLDER", str(folder.resolve())), encoding="utf-8")


def wiki_cloze(text: str, num_samples: int, rng: random.Random) -> list[dict[str, Any]]:
    """Passages without their last word, with that word and others of the article, none of which is in the passage."""
    found = [sample for article in _HEADING.split(text)[1:] for sample in _clozes(article, rng)]
    if len(found) < num_samples:
        raise ValueError(f"the text has {len(found)} passages, {num_samples} are wanted; take another text")
    return rng.sample(found, num_samples)


def _clozes(article: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    plain = _plain(article)
    vocabulary = sorted({word for word in re.findall(r"\b[a-z]{4,}\b", plain)})
    for paragraph in plain.split("\n"):
        for end in re.finditer(r" ([a-z]{4,})\.(?= |$)", paragraph):
            words = paragraph[: end.start()].split(" ")[-MAX_WORDS:]
            passage, word = " ".join(words), end[1]
            near = [w for w in vocabulary if abs(len(w) - len(word)) <= 2 and w not in words and w != word]
            if len(words) < MIN_WORDS or len(near) < NUM_CHOICES - 1:
                continue
            yield _choice(rng, word, rng.sample(near, NUM_CHOICES - 1), "words") | {"passage": passage}


def _plain(article: str) -> str:
    """Without WikiText's spaces around punctuation and its `@-@`."""
    text = re.sub(r" ?@([-,.])@ ?", r"\1", article)
    text = re.sub(r" ([.,;:!?)%'])", r"\1", text)
    text = re.sub(r"\( ", "(", text)
    return re.sub(r" *\n *", "\n", text)


def _copied_text(passage: str, rng: random.Random) -> dict[str, str]:
    """A passage, the beginning of a second copy, and the words that follow there."""
    words = passage.split(" ")
    place = rng.randint(MIN_WORDS // 4, len(words) - NUM_COPIED)
    return {"passage": passage, "copy": " ".join(words[:place]), "next": " ".join(words[place : place + NUM_COPIED])}


def _arithmetic(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        pairs = [(rng.randint(2, 30), rng.randint(2, 30)) for _ in range(5)]
        solved = [f"{a} + {b} = {a + b}" for a, b in pairs[:-1]]
        (a, b), right = pairs[-1], sum(pairs[-1])
        question = "\n".join([*solved, f"{a} + {b} ="])
    else:
        first, step = rng.randint(1, 30), rng.randint(2, 12)
        question = ", ".join(str(first + step * i) for i in range(6)) + ","
        right = first + 6 * step
    wrong = rng.sample([right + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)], NUM_CHOICES - 1)
    return _choice(rng, str(right), list(map(str, wrong)), "numbers") | {"question": question}


def _choice(rng: random.Random, right: str, wrong: Sequence[str], key: str) -> dict[str, Any]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {key: choices, "answer": choices.index(right)}


if __name__ == "__main__":
    run_command(main)
