"""Files of an unfinished calibration hold all that was gathered, and are refused unless they are what was written."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressors.klt.fit import LinkStatistics
from compressors.klt.token_table import TokenTable
from pipeline.analysis import gathering, unfinished
from pipeline.analysis.calibration import divide
from pipeline.analysis.gathering import SUMS, Gathered
from pipeline.analysis.unfinished import UnfinishedFiles
from pipeline.comm.control import Control
from pipeline.comm.world import World
from pipeline.data.windows import make_microbatches, make_windows
from pipeline.models.stage import TokenWindows
from tests.helpers.small_files import small_files

CPU = torch.device("cpu")
HIDDEN_SIZE, LENGTH, NUM_WINDOWS = 8, 6, 14
DIGEST = "0123456789abcdef" * 4
LINKS = [SimpleNamespace(index=0, name="layer:0:node0->node1"), SimpleNamespace(index=1, name="layer:1:node1->node0")]


def make_gathered(num_done=0, dtype=torch.bfloat16, links=LINKS):
    """Of random states and gradients, the same ones every time."""
    ids = torch.arange(LENGTH * NUM_WINDOWS) % 50
    microbatches = make_microbatches(make_windows(ids.numel(), LENGTH, LENGTH), 1)
    deployment = SimpleNamespace(
        plan=SimpleNamespace(links=links),
        stages={0: None, 1: None},
        devices={0: CPU, 1: CPU},
        model=SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN_SIZE)),
    )
    tokens = TokenWindows(ids, microbatches, None)
    gathered = Gathered(deployment, tokens, divide(microbatches), TokenTable.empty(), dtype)
    advance(gathered, num_done, dtype)
    return gathered


def advance(gathered, num_done, dtype=torch.bfloat16):
    while gathered.num_done < num_done:
        m = gathered.division.order[gathered.num_done]
        for link in gathered.links:
            generator = torch.Generator().manual_seed(100 * m + link.index)
            x, gradients = torch.randn(2, 1, LENGTH, HIDDEN_SIZE, generator=generator)
            gathered.take_states(link.index, m, x.to(dtype))
            if m in gathered.division.graded:
                gathered.take_gradients(link.index, x, gradients)
        gathered.num_done += 1


def files_of(folder, gathered, digest=DIGEST):
    control = Control(World(), timeout_s=1, load_timeout_s=1, interface=None)
    return UnfinishedFiles(folder, digest, gathered, control)


def assert_alike(one, other):
    assert one.num_done == other.num_done
    for link in one.links:
        a, b = one.tensors(link.index), other.tensors(link.index)
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(unfinished, "MIN_INTERVALS", 0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save(folder, num_done, **options):
    gathered = make_gathered(num_done, **options)
    files_of(folder, gathered).save_if_due()
    return gathered


def test_all_that_statistics_hold_is_kept():
    statistics = LinkStatistics(4, 3, CPU)
    numbers = {"hidden_size", "num_features", "rms_eighths", "num_tokens"}
    assert vars(statistics).keys() == {*SUMS, *numbers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_done", [5, 12, 13, 14])
def test_what_is_loaded_is_what_was_saved(num_done, dtype, tmp_path, capsys):
    saved = save(tmp_path, num_done, dtype=dtype)
    assert len(names(tmp_path)) == 2
    loaded = make_gathered(dtype=dtype)
    assert files_of(tmp_path, loaded).load()
    assert capsys.readouterr().out == (
        f"going on with an interrupted calibration: {num_done} of {NUM_WINDOWS} micro-batches are done\n"
    )
    assert_alike(loaded, saved)
    advance(loaded, NUM_WINDOWS, dtype)
    assert_alike(loaded, make_gathered(NUM_WINDOWS, dtype=dtype))


def test_one_moment_is_kept_and_nothing_at_the_end(tmp_path):
    gathered = make_gathered()
    files = files_of(tmp_path, gathered)
    for num_done in (4, 8):
        advance(gathered, num_done)
        files.save_if_due()
        assert [name.rpartition("-")[2] for name in names(tmp_path)] == [f"{num_done}.safetensors"] * 2
    files.remove()
    assert names(tmp_path) == []


def test_nothing_is_written_in_the_first_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 60.0)
    gathered = make_gathered()
    files = files_of(tmp_path, gathered)
    assert not files.load()
    advance(gathered, NUM_WINDOWS)
    files.save_if_due()
    files.remove()
    assert names(tmp_path) == [] and capsys.readouterr().out == ""


def test_what_is_complete_is_saved_where_something_was(tmp_path, monkeypatch):
    save(tmp_path, 4)
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 60.0)
    gathered = make_gathered()
    files = files_of(tmp_path, gathered)
    assert files.load()
    advance(gathered, 8)
    files.save_if_due()
    assert all(name.endswith("-4.safetensors") for name in names(tmp_path))
    advance(gathered, NUM_WINDOWS)
    files.save_if_due()
    assert all(name.endswith(f"-{NUM_WINDOWS}.safetensors") for name in names(tmp_path))


def test_the_newest_moment_of_all_links_is_taken(tmp_path):
    expected = save(tmp_path, 4)
    save(tmp_path, 8)
    for name in names(tmp_path):
        if name.startswith("unfinished-layer-1-") and name.endswith("-8.safetensors"):
            (tmp_path / name).unlink()
    (tmp_path / f".unfinished-layer-0-node0-node1-{DIGEST[:16]}-12.safetensors.partial").touch()
    gathered = make_gathered()
    files = files_of(tmp_path, gathered)
    assert files.load()
    assert_alike(gathered, expected)
    assert len(names(tmp_path)) == 3
    files.remove()
    assert names(tmp_path) == []


def test_an_older_moment_serves_where_the_newest_is_damaged(tmp_path, caplog):
    expected = save(tmp_path, 4)
    save(tmp_path, 8)
    (damaged,) = tmp_path.glob("unfinished-layer-1-*-8.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    gathered = make_gathered()
    assert files_of(tmp_path, gathered).load()
    assert f"{damaged} is not used: it cannot be read" in caplog.text
    assert_alike(gathered, expected)


def rewrite(path, change=lambda tensors: None, **facts):
    with safe_open(path, "pt") as file:
        tensors, told = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    change(tensors)
    save_file(tensors, path, {**told, "sha256": unfinished.tensors_digest(tensors), **facts})


@pytest.mark.parametrize(
    ("change", "facts", "cause"),
    [
        (None, {"calibration": "0123456789abcdef" * 3}, "its calibration is "),
        (None, {"format": "thinwire unfinished calibration 0"}, "its format is "),
        (None, {"link": LINKS[1].name}, "its link is "),
        (None, {"num_done": "8"}, "its num_done is '8'"),
        (None, {"sha256": "0"}, "it is damaged"),
        (lambda x: x.pop("numbers"), {}, "it has tensors "),
        (lambda x: x.update(more=torch.zeros(1)), {}, "it has tensors "),
        (lambda x: x.update(numbers=torch.zeros(2)), {}, "its numbers is torch.float32"),
        (lambda x: x.update(products=torch.zeros(3, 3, dtype=torch.float64)), {}, r"its products is .*\(3, 3\)"),
        (lambda x: x.update(sample_ids=x["sample_ids"][:, 1:].clone()), {}, "its sample_ids is "),
    ],
)
def test_other_files_are_refused_and_left_alone(change, facts, cause, tmp_path, caplog, capsys):
    save(tmp_path, NUM_WINDOWS)
    (path,) = tmp_path.glob("unfinished-layer-0-*")
    rewrite(path, change or (lambda tensors: None), **facts)
    before = path.read_bytes()
    gathered = make_gathered()
    assert not files_of(tmp_path, gathered).load()
    assert_nothing(gathered)
    assert caplog.records[0].getMessage().startswith(f"{path} is not used: ")
    assert re.search(cause, caplog.text)
    assert "starting anew" in capsys.readouterr().out
    assert path.read_bytes() == before


def assert_nothing(gathered):
    assert gathered.num_done == 0 and gathered.samples == {0: [], 1: []}
    assert all(s.num_tokens == 0 and s.products.count_nonzero() == 0 for s in gathered.statistics.values())


@pytest.mark.parametrize("ending", [f"{DIGEST[:16]}-99", f"{DIGEST[:16]}-04", "fedcba9876543210-4", "x"])
def test_files_of_other_names_are_named_and_left_alone(ending, tmp_path, caplog, capsys):
    path = tmp_path / f"unfinished-layer-0-node0-node1-{ending}.safetensors"
    path.write_bytes(b"anything")
    gathered = make_gathered()
    files = files_of(tmp_path, gathered)
    assert not files.load()
    assert f"{path} is of another calibration" in caplog.text
    assert "starting anew" in capsys.readouterr().out
    advance(gathered, 4)
    files.save_if_due()
    files.remove()
    assert path.read_bytes() == b"anything" and names(tmp_path) == [path.name]


def test_a_full_disk_is_told_once_and_leaves_what_was_there(tmp_path, caplog):
    gathered = make_gathered(4)
    files = files_of(tmp_path, gathered)
    files.save_if_due()
    before = names(tmp_path)
    for num_done in (8, 12):
        advance(gathered, num_done)
        with small_files(1000):
            files.save_if_due()
        assert names(tmp_path) == before
    assert [record.getMessage() for record in caplog.records] == [
        f"what was gathered so far cannot be saved in {tmp_path}: File too large; make room there; calibration goes "
        "on, but what was done since the last save, if any, would be lost in an interruption"
    ]
    loaded = make_gathered()
    assert files_of(tmp_path, loaded).load() and loaded.num_done == 4


def test_a_pass_has_gradients_throughout_or_nowhere():
    division = make_gathered().division
    assert set(division.order) == set(range(NUM_WINDOWS)) and len(division.order) == NUM_WINDOWS
    num_done, passes = 0, []
    while chosen := division.next_pass(num_done):
        passes.append(chosen)
        num_done += len(chosen)
    assert [m for chosen in passes for m in chosen] == list(division.order)
    assert all(len(chosen) <= gathering.MICROBATCHES_PER_PASS for chosen in passes)
    assert all(len({m in division.graded for m in chosen}) == 1 for chosen in passes)
