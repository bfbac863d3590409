"""Finished answers on disk: whole lines, or an error, and nothing that was there is lost."""

import fcntl
import json
import os
import resource

import pytest

from pipeline.generation import answers_file
from pipeline.generation.answers_file import AnswersFile
from pipeline.records.files import RecordError


def line(number, text):
    return {"line": number, "text": text, "error": None}


def written(folder, number):
    file = AnswersFile(folder, "digest", resume=False)
    file.add(line(number, "whole"))
    file.close()
    return file.path


def test_a_disk_that_takes_half_a_line_is_told(tmp_path):
    """As a full one does: the system call takes what there is room for, and says how much that was."""
    file = AnswersFile(tmp_path, "digest", resume=False)
    file.add(line(1, "whole"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(RecordError, match="cannot be written"):
            file.add(line(2, "x" * 100))
        with pytest.raises(OSError):
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(AnswersFile(tmp_path, "digest", resume=True).done) == [1]


def test_what_was_set_aside_before_stays(tmp_path):
    for number in (1, 2, 3, 4):
        path = written(tmp_path, number)
    kept = {name: f'"line": {number}' for number, name in ((1, "old"), (2, "old2"), (3, "old3"))}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, *(f"{path.name}.{name}" for name in kept)])
    assert all(words in path.with_name(f"{path.name}.{name}").read_text() for name, words in kept.items())


def test_an_empty_file_is_not_worth_keeping(tmp_path):
    for _ in range(3):
        AnswersFile(tmp_path, "digest", resume=False).close()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_another_run_writes_is_refused(resume, tmp_path):
    """Else the one that began first would write on to a file that has no name any more."""
    first = AnswersFile(tmp_path, "digest", resume=False)
    first.add(line(1, "kept"))
    with pytest.raises(RecordError, match="that is still going on: wait for its end, or end it"):
        AnswersFile(tmp_path, "digest", resume=resume)
    first.add(line(2, "kept"))
    first.close()
    again = AnswersFile(tmp_path, "digest", resume=True)
    assert list(again.done) == [1, 2]
    with pytest.raises(RecordError, match="that is still going on"):
        AnswersFile(tmp_path, "digest", resume=resume)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "RecursionError"),
        ('{"line": 1e999, "text": "", "error": null}', "its line is inf"),
        ('{"line": true, "text": "", "error": null}', "its line is True"),
        ('{"line": 1, "text": "", "error": null}', "its line is 1, which is no number or was there before"),
        ('{"line": 2, "text": null, "error": null}', "its text is None"),
        ('{"line": 2, "error": null}', "KeyError: 'text'"),
        ('{"line": 2, "text": "\\ud800", "error": null}', "surrogates not allowed"),
        ('{"line": 2, "text": "", "error": null, "ttft_s": NaN}', "not JSON compliant"),
        ("3", "TypeError"),
        ("", "JSONDecodeError"),
    ],
    ids=["deep", "infinite", "boolean", "twice", "null", "none", "surrogate", "nan", "number", "blank"],
)
def test_a_file_that_was_edited_is_refused_and_left_as_it_was(content, words, tmp_path):
    path = written(tmp_path, 1)
    with open(path, "a") as file:
        file.write(content + "\n")
    before = path.read_bytes()
    with pytest.raises(RecordError, match=f"line 2, is no answer .*{words}.*; delete the file to start over"):
        AnswersFile(tmp_path, "digest", resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_of_two_runs_that_start_at_once_one_gets_the_file(moment, there, resume, tmp_path, monkeypatch):
    """A second one comes while the first takes the file: no answer goes to a file without a name."""
    if there:
        written(tmp_path, 1)
    opened, moments = [], []

    def rival(*arguments, real):
        moments.append(real)
        if len(moments) == moment:
            try:
                opened.append(AnswersFile(tmp_path, "digest", resume=resume))
            except RecordError:
                pass
        return real(*arguments)

    monkeypatch.setattr("fcntl.flock", lambda *a, real=fcntl.flock: rival(*a, real=real))
    monkeypatch.setattr(answers_file, "write_whole", lambda *a, real=answers_file.write_whole: rival(*a, real=real))
    try:
        opened.append(AnswersFile(tmp_path, "digest", resume=resume))
    except RecordError:
        pass
    monkeypatch.undo()
    [only] = opened
    only.add(line(7, "kept"))
    only.close()
    assert json.loads(only.path.read_text().splitlines()[-1])["line"] == 7


def test_a_lock_on_a_file_that_lost_its_name_counts_for_nothing(tmp_path, monkeypatch):
    path = written(tmp_path, 1)

    def replace_first(*arguments, real=fcntl.flock):
        monkeypatch.undo()
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
        return real(*arguments)

    monkeypatch.setattr("fcntl.flock", replace_first)
    with pytest.raises(RecordError, match="that is still going on"):
        AnswersFile(tmp_path, "digest", resume=True)
