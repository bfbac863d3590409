"""Staging: what is copied, what is copied again, and what is refused."""

import hashlib
import json
import multiprocessing
import os
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.models import staging
from pipeline.models.staging import stage_directory

CHUNK = 1000
FILES = ("config.json", "model.safetensors")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(staging, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def src(tmp_path):
    src = tmp_path / "slow" / "model"
    src.mkdir(parents=True)
    (src / "config.json").write_text("{}")
    (src / "model.safetensors").write_bytes(pattern(4 * CHUNK + 321))
    (src / "notes.md").write_text("not needed for loading")
    return src


@pytest.fixture
def chunk_reads(monkeypatch):
    """(file name, chunk index) of every chunk that is copied from the source."""
    copied = []
    copy_chunk = staging.FileCopy.copy_chunk

    def spy(self, reader, writer, index, offset, length):
        copied.append((self.source.name, index))
        copy_chunk(self, reader, writer, index, offset, length)

    monkeypatch.setattr(staging.FileCopy, "copy_chunk", spy)
    return copied


def pattern(nbytes: int, seed: int = 0) -> bytes:
    blocks = (hashlib.sha256(bytes([seed, i % 256, i // 256])).digest() for i in range(-(-nbytes // 32)))
    return b"".join(blocks)[:nbytes]


def stage(src: Path, fast: Path, files=FILES) -> Path:
    return stage_directory(src, str(fast), files=files, show_progress=False)


def interrupt_after(monkeypatch, num_chunks: int, error: BaseException) -> None:
    """Make the copy of the weights fail in the middle of writing chunk number `num_chunks`."""
    copy_chunk = staging.FileCopy.copy_chunk

    def failing(self, reader, writer, index, offset, length):
        if self.source.name == "model.safetensors" and index == num_chunks:
            writer.seek(offset)
            writer.write(b"half")
            raise error
        copy_chunk(self, reader, writer, index, offset, length)

    monkeypatch.setattr(staging.FileCopy, "copy_chunk", failing)


def test_copies_exactly_the_named_files(src, tmp_path):
    staged = stage(src, tmp_path / "fast")
    digest = hashlib.sha256(os.fsencode(src)).hexdigest()[:12]
    assert staged == tmp_path / "fast" / f"model-{digest}"
    assert all((staged / name).read_bytes() == (src / name).read_bytes() for name in FILES)
    assert {p.name for p in staged.iterdir()} == {*FILES, staging.MANIFEST_NAME, staging.LOCK_NAME}


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_any_size(src, tmp_path, nbytes):
    (src / "model.safetensors").write_bytes(pattern(nbytes))
    assert (stage(src, tmp_path / "fast") / "model.safetensors").read_bytes() == pattern(nbytes)


def test_second_start_copies_nothing(src, tmp_path, chunk_reads):
    stage(src, tmp_path / "fast")
    assert len(chunk_reads) == 6
    chunk_reads.clear()
    stage(src, tmp_path / "fast")
    assert chunk_reads == []


def test_changed_source_file_is_copied_again_alone(src, tmp_path, chunk_reads):
    stage(src, tmp_path / "fast")
    chunk_reads.clear()
    changed = pattern(4 * CHUNK + 321, seed=1)  # of the same size: only the modification time tells
    (src / "model.safetensors").write_bytes(changed)
    os.utime(src / "model.safetensors", ns=(0, 12345))
    staged = stage(src, tmp_path / "fast")
    assert (staged / "model.safetensors").read_bytes() == changed
    assert {name for name, _ in chunk_reads} == {"model.safetensors"}


def test_staged_file_of_wrong_size_is_copied_again(src, tmp_path):
    staged = stage(src, tmp_path / "fast")
    os.truncate(staged / "model.safetensors", 17)
    assert (stage(src, tmp_path / "fast") / "model.safetensors").read_bytes() == pattern(4 * CHUNK + 321)


def test_file_that_left_the_source_leaves_the_copy(src, tmp_path):
    # A stale model.safetensors would be loaded instead of the shards that replaced it.
    staged = stage(src, tmp_path / "fast")
    (src / "model-1.safetensors").write_bytes(b"shard")
    stage(src, tmp_path / "fast", files=("config.json", "model-1.safetensors"))
    assert not (staged / "model.safetensors").exists()
    manifest = json.loads((staged / staging.MANIFEST_NAME).read_bytes())
    assert set(manifest) == {"config.json", "model-1.safetensors"}


def test_symbolic_links_are_followed(tmp_path):
    blobs, src = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    src.mkdir()
    (blobs / "abc").write_bytes(b"weights")
    (src / "model.safetensors").symlink_to(blobs / "abc")
    staged = stage(src, tmp_path / "fast", files=("model.safetensors",))
    assert not (staged / "model.safetensors").is_symlink()
    assert (staged / "model.safetensors").read_bytes() == b"weights"


class TestResume:
    def interrupted(self, src, tmp_path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 3, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                stage(src, tmp_path / "fast")
        (part,) = (tmp_path / "fast").glob("*/model.safetensors.part")
        assert not part.with_name("model.safetensors").exists()
        return part

    def resumed(self, src, tmp_path) -> None:
        staged = stage(src, tmp_path / "fast")
        assert (staged / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
        assert not list(staged.glob("*.part*"))

    def test_copies_only_what_is_missing(self, src, tmp_path, chunk_reads):
        self.interrupted(src, tmp_path)
        chunk_reads.clear()
        self.resumed(src, tmp_path)
        assert chunk_reads == [("model.safetensors", 3), ("model.safetensors", 4)]

    def test_truncated_part(self, src, tmp_path, chunk_reads):
        os.truncate(self.interrupted(src, tmp_path), CHUNK + 10)
        chunk_reads.clear()
        self.resumed(src, tmp_path)
        assert [index for _, index in chunk_reads] == [1, 2, 3, 4]

    def test_corrupt_chunk(self, src, tmp_path, chunk_reads):
        part = self.interrupted(src, tmp_path)
        damaged = bytearray(part.read_bytes())
        damaged[CHUNK + 5] ^= 1
        part.write_bytes(damaged)
        chunk_reads.clear()
        self.resumed(src, tmp_path)
        assert [index for _, index in chunk_reads] == [1, 3, 4]

    def test_changed_source_starts_over(self, src, tmp_path, chunk_reads):
        self.interrupted(src, tmp_path)
        (src / "model.safetensors").write_bytes(pattern(2 * CHUNK, seed=2))
        chunk_reads.clear()
        self.resumed(src, tmp_path)
        assert [index for _, index in chunk_reads] == [0, 1]

    @pytest.mark.parametrize("hashes", [b"", b"{", b"[]", b'{"size": 1}'])
    def test_unusable_hashes_start_over(self, src, tmp_path, chunk_reads, hashes):
        part = self.interrupted(src, tmp_path)
        part.with_name(part.name + ".hashes").write_bytes(hashes)
        chunk_reads.clear()
        self.resumed(src, tmp_path)
        assert len(chunk_reads) == 5

    def test_disk_full_during_the_copy_keeps_what_is_there(self, src, tmp_path, chunk_reads):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 3, OSError(28, "No space left on device"))
            with pytest.raises(ValueError, match=r"model\.stage_to.*No space left.*start again to continue"):
                stage(src, tmp_path / "fast")
        chunk_reads.clear()
        self.resumed(src, tmp_path)
        assert [index for _, index in chunk_reads] == [3, 4]


class TestRefused:
    def set_free(self, monkeypatch, free_bytes):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(0, 0, free_bytes))

    def test_too_small_a_disk_before_anything_is_copied(self, src, tmp_path, monkeypatch, chunk_reads):
        self.set_free(monkeypatch, 4 * CHUNK + 322)  # one byte less than both files
        with pytest.raises(ValueError, match=r"needs 0\.000 GiB more .*model\.stage_to.* 0\.000 GiB free"):
            stage(src, tmp_path / "fast")
        assert chunk_reads == []
        self.set_free(monkeypatch, 4 * CHUNK + 323)
        stage(src, tmp_path / "fast")

    def test_space_already_taken_by_a_part_is_not_asked_for_again(self, src, tmp_path, monkeypatch):
        part = TestResume().interrupted(src, tmp_path)
        self.set_free(monkeypatch, 4 * CHUNK + 321 - part.stat().st_size)
        TestResume().resumed(src, tmp_path)

    def test_copy_that_reads_back_wrong(self, src, tmp_path, monkeypatch):
        copy_chunk = staging.FileCopy.copy_chunk

        def bad_disk(self, reader, writer, index, offset, length):
            copy_chunk(self, reader, writer, index, offset, length)
            if index == 2:
                writer.seek(offset)
                writer.write(b"\0")

        monkeypatch.setattr(staging.FileCopy, "copy_chunk", bad_disk)
        with pytest.raises(ValueError, match=r"\.part: bytes 2000 to 3000 differ"):
            stage(src, tmp_path / "fast")
        assert not list((tmp_path / "fast").glob("*/model.safetensors"))

    def test_source_that_changes_during_the_copy(self, src, tmp_path, monkeypatch):
        copy_chunk = staging.FileCopy.copy_chunk

        def downloading(self, reader, writer, index, offset, length):
            copy_chunk(self, reader, writer, index, offset, length)
            with open(src / "model.safetensors", "ab") as file:
                file.write(b"more")

        monkeypatch.setattr(staging.FileCopy, "copy_chunk", downloading)
        with pytest.raises(ValueError, match=r"model\.safetensors changed while it was copied"):
            stage(src, tmp_path / "fast")

    def test_source_that_shrinks_during_the_copy(self, src, tmp_path, monkeypatch):
        copy_chunk = staging.FileCopy.copy_chunk

        def shrinking(self, reader, writer, index, offset, length):
            if index == 2:
                os.truncate(src / "model.safetensors", 2 * CHUNK + 1)
            copy_chunk(self, reader, writer, index, offset, length)

        monkeypatch.setattr(staging.FileCopy, "copy_chunk", shrinking)
        with pytest.raises(ValueError, match=r"model\.safetensors ended at byte \d+ of 4321"):
            stage(src, tmp_path / "fast")

    def test_missing_source_file(self, src, tmp_path):
        with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json"):
            stage(src, tmp_path / "fast", files=("tokenizer.json",))

    def test_destination_without_parent(self, src, tmp_path):
        with pytest.raises(ValueError, match=r"cannot stage to .*model\.stage_to.*No such file"):
            stage(src, tmp_path / "unmounted" / "fast")
        assert not (tmp_path / "unmounted").exists()

    def test_destination_is_a_file(self, src, tmp_path):
        (tmp_path / "fast").write_text("")
        with pytest.raises(ValueError, match=r"cannot stage to .*model\.stage_to"):
            stage(src, tmp_path / "fast")

    def test_destination_not_writable(self, src, tmp_path, monkeypatch):
        def denied(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", denied)  # the tests may run as root, whom no mode bits stop
        with pytest.raises(ValueError, match=r"cannot stage to .*Permission denied.*writable directory"):
            stage(src, tmp_path / "fast")


def test_concurrent_processes_copy_once(src, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def worker():
        num_copied = 0
        copy_chunk = staging.FileCopy.copy_chunk

        def count(self, *args):
            nonlocal num_copied
            num_copied += 1
            copy_chunk(self, *args)

        staging.FileCopy.copy_chunk = count
        staged = stage(src, tmp_path / "fast")
        results.put((num_copied, (staged / "model.safetensors").read_bytes() == pattern(4 * CHUNK + 321)))

    workers = [context.Process(target=worker) for _ in range(4)]
    for process in workers:
        process.start()
    outcomes = [results.get(timeout=60) for _ in workers]
    for process in workers:
        process.join()
    assert sorted(copied for copied, _ in outcomes) == [0, 0, 0, 6]
    assert all(intact for _, intact in outcomes)


def test_progress_bar_counts_bytes(src, tmp_path, capsys):
    stage_directory(src, str(tmp_path / "fast"), files=FILES, show_progress=True)
    assert "staging model: 100%" in capsys.readouterr().err
    stage_directory(src, str(tmp_path / "fast"), files=FILES, show_progress=True)
    assert capsys.readouterr().err == ""
