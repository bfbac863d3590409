"""Finished answers on disk: whole lines, or an error."""

import resource

import pytest

from pipeline.generation.answers_file import AnswersFile
from pipeline.records.files import RecordError


def line(number, text):
    return {"line": number, "text": text, "error": None}


def test_a_disk_that_takes_half_a_line_is_told(tmp_path):
    """As a full one does: the system call takes what there is room for, and says how much that was."""
    file = AnswersFile(tmp_path, "digest", resume=False)
    file.add(line(1, "whole"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(RecordError, match="cannot be written"):
            file.add(line(2, "x" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(AnswersFile(tmp_path, "digest", resume=True).done) == [1]
