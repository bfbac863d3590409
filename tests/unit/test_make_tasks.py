"""The tasks that benchmarks make of a text."""

import json
import random

import pytest

from benchmarks.make_tasks import TASKS, wiki_cloze, write_tasks

SENTENCE = "The old lock on the canal was repaired by the town after the heavy flood , and boats could pass again , "
ENDS = ("slowly", "safely", "freely", "surely", "kindly", "boldly", "calmly", "gladly", "neatly", "weekly")
TEXT = "".join(
    f" \n = Article {number} = \n \n" + "".join(f" {SENTENCE * 2}though {end} . \n" for end in ENDS)
    for number in range(3)
)


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_same_seed_makes_the_same_files(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tasks(TEXT, tmp_path / folder, 8, seed)
    for name in TASKS:
        assert read(tmp_path / "a", name) == read(tmp_path / "b", name) != read(tmp_path / "c", name)
        assert len(read(tmp_path / "a", name)) == 8
        assert str(tmp_path / "a" / f"{name}.jsonl") in (tmp_path / "a" / f"{name}.yaml").read_text()


def test_answers_are_right(tmp_path):
    write_tasks(TEXT, tmp_path, 20, 0)
    for sample in read(tmp_path, "wiki_cloze"):
        assert sample["words"][sample["answer"]] in ENDS and len(set(sample["words"])) == 4
        assert not set(sample["words"]) & set(sample["passage"].split()) and " ," not in sample["passage"]
    for sample in read(tmp_path, "copied_text"):
        assert sample["passage"].startswith(f"{sample['copy']} {sample['next']}") and len(sample["next"].split()) == 5
    for sample in read(tmp_path, "arithmetic_choice"):
        right, question = int(sample["numbers"][sample["answer"]]), sample["question"]
        if "+" in question:
            first, second = question.splitlines()[-1].removesuffix(" =").split(" + ")
            assert right == int(first) + int(second)
        else:
            numbers = [*map(int, question.removesuffix(",").split(", ")), right]
            assert len({b - a for a, b in zip(numbers, numbers[1:], strict=False)}) == 1


def test_a_text_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="passages, 1000 are wanted"):
        wiki_cloze(TEXT, 1000, random.Random(0))
