"""The journal of an unfinished run: what survives a kill, what is refused."""

import errno
import json
import os
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records.files import RecordError
from pipeline.records.journal import FinishedMicroBatch, Journal
from tests.helpers.small_files import small_files

DIGEST = "ab" * 32
OTHER_DIGEST = DIGEST[:16] + "cd" * 24  # names the same file


def result(index: int, num_tokens: int = 3) -> FinishedMicroBatch:
    rng = np.random.default_rng(index)
    loss = rng.normal(size=num_tokens).astype(np.float32)
    loss[index % num_tokens] = [np.nan, np.inf, 1e-45][index % 3]  # what JSON cannot hold
    return FinishedMicroBatch((index, 7 * index), loss, rng.integers(0, 50000, num_tokens, dtype=np.int32))


def same(a: FinishedMicroBatch, b: FinishedMicroBatch) -> bool:
    return (a.payload_bytes, a.loss.tobytes(), a.top1.tobytes()) == (
        b.payload_bytes,
        b.loss.tobytes(),
        b.top1.tobytes(),
    )


def run(folder, *, start: int, finish: int, resume: bool = True) -> Journal:
    """A session that starts micro-batches up to `start` and finishes those up to `finish`, then is killed."""
    journal = Journal.open(folder, DIGEST, resume=resume)
    for index in range(len(journal.finished), start):
        journal.start(index)
    for index in range(len(journal.finished), finish):
        journal.finish(result(index))
    journal.close()
    return journal


def resumed(folder) -> Journal:
    journal = Journal.open(folder, DIGEST, resume=True)
    journal.close()
    return journal


def test_finished_micro_batches_survive_bit_by_bit(tmp_path):
    run(tmp_path, start=6, finish=4, resume=False)
    journal = resumed(tmp_path)
    assert len(journal.finished) == 4
    assert all(same(done, result(index)) for index, done in enumerate(journal.finished))
    assert journal.interrupted == [4, 5]
    assert journal.num_sessions == 2


def test_what_is_sent_twice_again_counts_twice(tmp_path):
    run(tmp_path, start=6, finish=4, resume=False)  # 4 and 5 are lost
    run(tmp_path, start=7, finish=5)  # 5 and 6 are lost
    run(tmp_path, start=5, finish=5)  # ends before it starts any
    journal = resumed(tmp_path)
    assert journal.interrupted == [4, 5, 5, 6]
    assert journal.num_sessions == 4


def test_time_before_the_last_finished_micro_batch_counts(tmp_path):
    clock = iter([0.0, 10.0, 100.0, 103.0])
    with mock.patch("pipeline.records.journal.time.monotonic", lambda: next(clock)):
        journal = Journal.open(tmp_path, DIGEST, resume=False)
        journal.restart_clock()
        journal.finish(result(0))
        assert journal.elapsed_s == 100.0  # the last of it in vain, if the run is killed here
    journal.close()
    assert resumed(tmp_path).earlier_s == 10.0


def test_without_resume_it_starts_empty_and_sets_the_old_one_aside(tmp_path):
    run(tmp_path, start=3, finish=3, resume=False)
    assert Journal.exists(tmp_path, DIGEST)
    run(tmp_path, start=0, finish=0, resume=False)
    assert not Journal.exists(tmp_path, DIGEST)
    assert resumed(tmp_path).finished == []
    path = tmp_path / f"{DIGEST[:16]}.journal"
    path.with_suffix(".journal.old").rename(path)
    assert len(resumed(tmp_path).finished) == 3


def test_what_cannot_be_set_aside_is_not_lost(tmp_path):
    run(tmp_path, start=3, finish=3, resume=False)
    with mock.patch("pipeline.records.journal.shutil.copyfile", side_effect=OSError(errno.ENOSPC, "No space left")):
        with pytest.raises(RecordError, match="journal cannot be copied to .*journal.old: No space left; make room"):
            Journal.open(tmp_path, DIGEST, resume=False)
    assert len(resumed(tmp_path).finished) == 3


def test_what_was_set_aside_before_stays(tmp_path):
    for number in (3, 2, 1):
        run(tmp_path, start=number, finish=number, resume=False)
    run(tmp_path, start=0, finish=0, resume=False)
    path = tmp_path / f"{DIGEST[:16]}.journal"
    for number, name in ((3, "old"), (2, "old2"), (1, "old3")):
        path.with_suffix(f".journal.{name}").rename(path)
        assert len(resumed(tmp_path).finished) == number


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_truncation_resumes_to_a_prefix_and_goes_on(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("journal")
    finish = data.draw(st.integers(0, 4))
    run(folder, start=data.draw(st.integers(finish, 6)), finish=finish, resume=False)
    if data.draw(st.booleans()):
        finish = data.draw(st.integers(finish, 6))
        run(folder, start=finish, finish=finish)
    path = folder / f"{DIGEST[:16]}.journal"
    os.truncate(path, round(data.draw(st.floats(0, 1)) * path.stat().st_size))  # times in it vary in length
    kept = resumed(folder).finished
    assert len(kept) <= finish
    assert all(same(done, result(index)) for index, done in enumerate(kept))
    run(folder, start=7, finish=7)
    assert [same(done, result(index)) for index, done in enumerate(resumed(folder).finished)] == [True] * 7


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_changed_byte_is_never_taken_over(tmp_path_factory, data):
    """It costs the last line, or two if it joins them, or is refused."""
    folder = tmp_path_factory.mktemp("journal")
    run(folder, start=4, finish=4, resume=False)
    path = folder / f"{DIGEST[:16]}.journal"
    content = bytearray(path.read_bytes())
    position = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))  # times in it vary in length
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        kept = resumed(folder).finished
    except RecordError:
        return
    assert len(kept) in (2, 3)
    assert all(same(done, result(index)) for index, done in enumerate(kept))


def test_a_damaged_line_before_intact_ones_is_named(tmp_path):
    run(tmp_path, start=4, finish=4, resume=False)
    path = tmp_path / f"{DIGEST[:16]}.journal"
    lines = path.read_bytes().split(b"\n")
    lines[6] = lines[6].replace(b'"loss": "', b'"loss": "A')
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RecordError, match=r"journal, line 7, is damaged; delete the file to start over"):
        Journal.open(tmp_path, DIGEST, resume=True)
    assert path.read_bytes() == b"\n".join(lines)  # a refused journal is left as it was


def test_a_missing_line_is_named(tmp_path):
    run(tmp_path, start=4, finish=4, resume=False)
    path = tmp_path / f"{DIGEST[:16]}.journal"
    lines = path.read_bytes().split(b"\n")
    del lines[6]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RecordError, match="micro-batch 2 stands where 1 is due; delete the file to start over"):
        Journal.open(tmp_path, DIGEST, resume=True)


def test_another_runs_journal_is_refused(tmp_path):
    run(tmp_path, start=2, finish=2, resume=False)
    with pytest.raises(RecordError, match="written by another version or for another config"):
        Journal.open(tmp_path, OTHER_DIGEST, resume=True)


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    first = Journal.open(tmp_path, DIGEST, resume=False)
    first.finish(result(0))
    for resume in (False, True):
        with pytest.raises(RecordError, match="belongs to a run with the same config that is still going on"):
            Journal.open(tmp_path, DIGEST, resume=resume)
    first.close()
    assert len(resumed(tmp_path).finished) == 1


def test_a_full_disk_is_named_and_costs_only_the_last_line(tmp_path):
    run(tmp_path, start=2, finish=2, resume=False)
    journal = Journal.open(tmp_path, DIGEST, resume=True)
    with small_files(journal.path.stat().st_size + 20):
        with pytest.raises(RecordError, match="journal cannot be written: File too large; make room"):
            journal.finish(result(2))
        journal.close()
    kept = resumed(tmp_path).finished
    assert len(kept) == 2 and all(same(done, result(index)) for index, done in enumerate(kept))


def test_the_end_of_the_run_removes_it(tmp_path):
    journal = Journal.open(tmp_path, DIGEST, resume=False)
    journal.finish(result(0))
    journal.remove()
    assert not Journal.exists(tmp_path, DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / f"{DIGEST[:16]}.journal").mkdir()
    with pytest.raises(RecordError, match="journal cannot be written: Is a directory"):
        Journal.open(tmp_path, DIGEST, resume=False)


def test_sessions_tell_what_they_ran_on(tmp_path):
    for environment, finish in (({"threads": "1"}, 2), ({"threads": "2"}, 3), (None, 4)):
        journal = Journal.open(tmp_path, DIGEST, resume=True, environment=environment)
        while len(journal.finished) < finish:
            journal.finish(result(len(journal.finished)))
        journal.close()
    assert resumed(tmp_path).sessions == [(0, {"threads": "1"}), (2, {"threads": "2"}), (3, None), (4, None)]


def test_a_journal_of_before_is_read(tmp_path):
    """Without a word on what its sessions ran on."""
    run(tmp_path, start=2, finish=2, resume=False)
    path = tmp_path / f"{DIGEST[:16]}.journal"
    lines = path.read_bytes().split(b"\n")
    text = json.dumps({"format": "thinwire journal 1", "digest": DIGEST}).encode()
    path.write_bytes(b"\n".join([b"%08x %s" % (zlib.crc32(text), text), *lines[1:]]))
    journal = resumed(tmp_path)
    assert len(journal.finished) == 2 and journal.sessions == [(0, None), (2, None)]


def test_what_is_in_the_way_can_be_known_before(tmp_path):
    Journal.check(tmp_path, DIGEST, resume=True)
    assert list(tmp_path.iterdir()) == []
    journal = Journal.open(tmp_path, DIGEST, resume=False)
    journal.finish(result(0))
    for resume in (False, True):
        with pytest.raises(RecordError, match="still going on: wait for its end, or end it"):
            Journal.check(tmp_path, DIGEST, resume=resume)
    journal.close()
    before = journal.path.read_bytes()
    Journal.check(tmp_path, DIGEST, resume=True)
    with pytest.raises(RecordError, match="another config"):
        Journal.check(tmp_path, OTHER_DIGEST, resume=True)
    assert journal.path.read_bytes() == before
    journal.path.unlink()
    journal.path.mkdir()
    with pytest.raises(RecordError, match="cannot be written: Is a directory"):
        Journal.check(tmp_path, DIGEST, resume=False)
