"""Files that are written: for whom the umask says, whole or not at all, and with a cure where the disk takes none."""

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.klt.calibration_file import Origin, write_calibration, write_token_table
from pipeline.analysis.plots import plot_heads
from pipeline.importance.files import TokenOwner, write_head_relevance, write_token_importance
from pipeline.models.staging import stage_directory
from pipeline.records.files import RecordError, check_writable, write_json, write_whole
from pipeline.records.journal import FinishedMicroBatch, Journal
from pipeline.records.store import write_record
from pipeline.report.plots import plot_rate_quality
from pipeline.report.recommendation import Outlook
from pipeline.report.results import load_records
from pipeline.report.summary import write_report
from tests.compressors.klt_cases import calibrate
from tests.helpers.marks import slow_but
from tests.helpers.records import make_record, write_failed_point, write_point
from tests.helpers.small_files import small_files
from tests.helpers.sources import nodes_of, sources

DIGEST = "ab" * 32


def journal(folder):
    one = Journal.open(folder, DIGEST, resume=False)
    try:
        one.finish(FinishedMicroBatch((1,), np.zeros(5000, np.float32), np.zeros(5000, np.int32)))
    finally:
        one.close()


def token_importance(folder):
    owner = TokenOwner(checkpoint_fingerprint="a", ids_sha256="b", max_length=8, stride=8, bos="text")
    write_token_importance(folder / "tokens.safetensors", {"link": torch.zeros(5000)}, owner)


def staged(folder):
    stage_directory(source_of(folder), str(folder / "staged"), files=["weights"], show_progress=False)


def source_of(folder):
    """A folder with weights to stage, made once."""
    source = folder.with_name(folder.name + "-source")
    if not source.exists():
        source.mkdir()
        (source / "weights").write_bytes(bytes(20_000))
    return source


def calibration(folder):
    link, tokens = calibrate(64, True)
    origin = Origin(checkpoint="b", text_sha256="c")
    write_calibration(folder, link, origin, link_name="a", num_tokens=1)
    write_token_table(folder, tokens, origin)


def report(folder):
    write_report([points(folder)], folder / "report.html", Outlook())


def points(folder):
    """Two points in a folder of their own, written once."""
    place = folder.with_name(folder.name + "-points")
    if not place.exists():
        place.mkdir()
        write_point(place)
        write_point(place, "int8", nbytes=66)
    return place


WRITERS = {
    "record": write_point,
    "failed point": lambda folder: write_failed_point(folder, "x" * 9000, ""),
    "journal": journal,
    "JSON": lambda folder: write_json(folder / "a.json", {"a": "x" * 9000}),
    "report": report,
    "figure": lambda folder: plot_rate_quality(load_records([points(folder)]), folder / "a.png"),
    "analysis": lambda folder: plot_heads(
        {"weights": [[0.5, 0.5]] * 2, "relevance": [[1.0, 1.0]] * 2, "model": {"label": "m"}}, folder / "heads.png"
    ),
    "head relevance": lambda folder: write_head_relevance(
        folder / "heads.safetensors", torch.ones(50, 50), checkpoint_fingerprint="a"
    ),
    "token importance": token_importance,
    "calibration": calibration,
    "staged weights": staged,
}


@pytest.mark.parametrize("umask", slow_but([0o077], [0o002, 0o077]))
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_files_are_for_whom_the_umask_says(write, umask, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    before = os.umask(umask)
    try:
        write(folder)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_nothing_writes_files_for_their_owner_alone():
    """safetensors' save_file and tempfile's named files do, whatever the umask."""
    found = []
    for path in sources("pipeline", "compressors"):
        nodes = nodes_of(path)
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in nodes}
        found += [(path.name, name) for name in names & {"save_file", "NamedTemporaryFile", "mkstemp", "mkdtemp"}]
    # gguf.py mends the modes of what a conversion has written, by transformers or here.
    assert found == [("storage.py", "save_file")]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(write, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    points(folder)
    source_of(folder)
    calibrate(64, True)
    with small_files(2000), pytest.raises(ValueError, match="File too large") as raised:
        write(folder)
    told = str(raised.value)
    assert str(tmp_path) in told
    assert any(cure in told for cure in ("make room", "start again", "name another")), told
    left = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert left <= {".journal", ".lock", ".part", ".hashes"}  # which are read with care
    write(folder)  # and nothing is in the way of another try
    if write is journal:
        (path,) = folder.glob("*.journal")
        assert path.stat().st_size > 40_000


def test_what_was_there_before_a_full_disk_is_there_still(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with small_files(1000), pytest.raises(RecordError, match="a.json cannot be written: File too large; make room"):
        write_json(path, {"a": "x" * 5000})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_record_whose_json_does_not_fit_leaves_no_tokens_behind(tmp_path):
    record = make_record(run_id="r", notes=["y" * 50_000])
    with small_files(20_000), pytest.raises(RecordError, match="r.json cannot be written"):
        write_record(tmp_path, record, {"loss": np.zeros(3, np.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "make room there"), (errno.EDQUOT, "make room there"), (errno.EROFS, "the right to write there")],
)
def test_the_cure_follows_the_cause(number, cure, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RecordError, match=f"{os.strerror(number)}; .*{cure}"):
        write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=os.strerror(number)):
        write_whole(tmp_path / "b", b"")


def test_a_file_system_without_locks_is_found_before_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(RecordError, match=r"cannot lock files, .*: No locks available, or name another \(--exp_dir"):
        check_writable(tmp_path)


@pytest.mark.parametrize("name", ["pipe", "folder", "folder/.."])
def test_a_pipe_or_a_folder_is_not_replaced(name, tmp_path):
    """As root, a device could be."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = stat.S_IFMT((tmp_path / name).stat().st_mode)
    with pytest.raises(OSError, match="it is no regular file"):
        write_whole(tmp_path / name, b"x")
    assert stat.S_IFMT((tmp_path / name).stat().st_mode) == before
    with pytest.raises(OSError, match="it is no regular file"):
        write_whole(Path("."), b"x")


@pytest.mark.parametrize("name", ["a.md", "a.csv", "run.json", "a", ".html"])
def test_a_page_of_another_ending_overwrites_nothing(name, tmp_path):
    record = write_point(tmp_path)
    before = record.read_bytes()
    with pytest.raises(RecordError, match="must end in .html"):
        write_report([record], tmp_path / name, Outlook())
    assert record.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
