"""A calibration's files are read once by a process and shared: with its codecs, and with other processes."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from compressors import LinkInfo, make_compressor
from compressors.klt.calibration_file import TOKENS_FILE, Origin, file_name, write_calibration, write_token_table
from tests.compressors.klt_cases import LINK, calibrate, folder

HIDDEN_SIZE, NUM_IDS = 96, 1_600_000
TABLE_NBYTES = NUM_IDS * HIDDEN_SIZE // 4


def make(place, name="klt", **options):
    options = options or ({"step": 0.5} if name == "klt" else {"nbits": 3})
    return make_compressor(
        {"name": name, "calibration": str(place), **options},
        LinkInfo(name=LINK, hidden_size=HIDDEN_SIZE, max_tokens=64),
    )


def round_trip(codec, decoder=None):
    x = torch.randn(1, 8, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    side = {"token_ids": torch.arange(8).view(1, 8)} if codec.needs else {}
    payload, decoder = codec.compress(x, **side), decoder or codec
    return decoder.decompress(payload, torch.device("cpu"), torch.float32, **side if decoder.decoder_needs else {})


def settle(place):
    """Files of a second ago: what is younger is read again, since it may have changed within a tick of its clock."""
    for path in place.iterdir():
        os.utime(path, (time.time() - 1,) * 2)


@pytest.fixture
def place(tmp_path):
    shutil.copytree(folder(HIDDEN_SIZE), tmp_path / "calibration")
    settle(tmp_path / "calibration")
    return tmp_path / "calibration"


@pytest.fixture
def large_place(tmp_path):
    """A token table of 38 MB, and 6 of row numbers."""
    calibration, tokens = calibrate(HIDDEN_SIZE, True)
    rare = torch.ones(NUM_IDS - len(tokens.frequent), tokens.rare.shape[1], dtype=torch.uint8)
    table = dataclasses.replace(tokens, rare=rare, rows=torch.arange(NUM_IDS, dtype=torch.int32))
    origin = Origin(checkpoint="some model", text_sha256="0")
    write_calibration(tmp_path, calibration, origin, link_name=LINK, num_tokens=1)
    write_token_table(tmp_path, table, origin)
    settle(tmp_path)
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are opened by their path from here on."""
    names = []

    def noting(path, *arguments, original=Path.open, **options):
        names.append(path.name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", noting)
    return names


def anonymous_nbytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


def test_codecs_of_a_process_read_each_file_once(place, opened):
    codecs = [make(place), make(place, step=0.1), make(place, target_bits=2.0), make(place, "klt_fixed")]
    assert sorted(opened) == sorted([file_name(LINK), TOKENS_FILE])
    assert len({codec.codec_id() for codec in codecs}) == 4
    assert torch.equal(round_trip(codecs[0]), round_trip(codecs[0], make(place)))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux' smaps_rollup")
def test_a_token_table_is_not_copied_into_memory(large_place):
    before = anonymous_nbytes()
    codecs = [make(large_place, step=step) for step in (0.2, 0.4, 0.6)]
    for codec in codecs:
        round_trip(codec)
    # row numbers are copied once; the rest is scratch and the allocator's
    assert anonymous_nbytes() - before < TABLE_NBYTES // 2


def test_a_file_in_the_place_of_another_is_read_and_leaves_codecs_as_they_are(place, opened, tmp_path):
    codec = make(place)
    decoded = round_trip(codec)
    other, tokens = calibrate(HIDDEN_SIZE, True)
    other.mean[0] += 1
    try:
        origin = Origin(checkpoint="some model", text_sha256="0")
        write_calibration(place, other, origin, link_name=LINK, num_tokens=1)
    finally:
        other.mean[0] -= 1
    assert torch.equal(round_trip(codec), decoded)
    assert make(place).codec_id() != codec.codec_id()
    assert opened.count(file_name(LINK)) == 2 and opened.count(TOKENS_FILE) == 1


def test_a_file_that_was_just_written_is_read_again(place, opened):
    make(place)
    path = place / file_name(LINK)
    path.touch()
    first = make(place)
    assert make(place).codec_id() == first.codec_id()
    assert opened.count(file_name(LINK)) == 3


def overwrite(file):
    file.seek(-8, os.SEEK_END)
    file.write(b"\0" * 8)


def cut_short(file):
    file.truncate(4096)


@pytest.mark.parametrize("name", ["klt", "klt_fixed"])
@pytest.mark.parametrize("use", ["compress", "decompress"])
@pytest.mark.parametrize("change", [overwrite, cut_short])
def test_a_file_that_is_changed_while_in_use_is_an_error(name, use, change, place):
    """Both ends of a link on one machine would otherwise go on with what is there now, or read behind its end."""
    codec, decoder = make(place, name), make(place, name)
    x = torch.zeros(1, 4, HIDDEN_SIZE)
    side = {"token_ids": torch.zeros(1, 4, dtype=torch.int64)} if codec.needs else {}
    payload = codec.compress(x, **side)
    path = place / file_name(LINK)
    with path.open("r+b") as file:
        change(file)
    with pytest.raises(ValueError, match=rf"{path.name} was overwritten while in use"):
        codec.compress(x, **side) if use == "compress" else decoder.decompress(payload, "cpu", torch.float32)


def test_checks_of_a_link_are_made_for_files_that_were_read_before(place):
    make(place)
    link = {"hidden_size": HIDDEN_SIZE, "max_tokens": 64}
    spec = {"name": "klt", "calibration": str(place), "step": 0.5}
    with pytest.raises(ValueError, match="checkpoint 'other', this one has 'some model'"):
        make_compressor(spec, LinkInfo(name=LINK, checkpoint="other", **link))
    with pytest.raises(ValueError, match=f"hidden size 100, got {HIDDEN_SIZE}"):
        make_compressor(spec, LinkInfo(name=LINK, **link | {"hidden_size": 100}))
