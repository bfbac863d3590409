import pytest

from pipeline.comm.world import World

GOOD = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [*GOOD, "TORCHELASTIC_USE_AGENT_STORE"]:
        monkeypatch.delenv(name, raising=False)


def world(monkeypatch, **changes):
    for name, value in (GOOD | changes).items():
        monkeypatch.setenv(name, value)
    return World.from_environment()


def test_what_torchrun_says(monkeypatch):
    assert World.from_environment() == World()
    assert world(monkeypatch) == World(rank=1, world_size=4, local_rank=1, local_world_size=2, store_host=0)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("RANK", "abc", "0 to 3"), ("RANK", "4", "0 to 3"), ("RANK", "-1", "0 to 3"), ("RANK", "", "0 to 3"),
        ("RANK", "1.0", "0 to 3"), ("RANK", "٢", "0 to 3"), ("RANK", "9" * 5000, "0 to 3"),
        ("WORLD_SIZE", "0", "1 to "), ("MASTER_PORT", "http", "1 to 65535"), ("MASTER_PORT", "70000", "1 to 65535"),
        ("WORLD_SIZE", "four", "1 to "), ("LOCAL_RANK", "2", "0 to 1"), ("LOCAL_WORLD_SIZE", "0", "1 to 4"),
        ("LOCAL_WORLD_SIZE", "5", "1 to 4"),
        ("TORCHELASTIC_RESTART_COUNT", "x", "0 to "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(name, value, allowed, monkeypatch):
    with pytest.raises(ValueError, match="start the ranks with torchrun") as raised:
        world(monkeypatch, **{name: value})
    assert f"the environment variable {name} is {value!r}, allowed are {allowed}" in str(raised.value)


def test_half_of_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is not"):
        World.from_environment()
    with pytest.raises(ValueError, match="MASTER_ADDR is empty"):
        world(monkeypatch, MASTER_ADDR=" ")
