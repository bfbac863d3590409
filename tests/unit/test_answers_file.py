"""Finished answers on disk: whole lines, or an error, and nothing that was there is lost."""

import resource

import pytest

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
