"""Which GPU is which, and what the links go over. The GPUs are made up."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.devices import gpu_identity, link_backend, shared_gpus


def test_a_gpu_is_known_by_its_uuid(monkeypatch):
    """Every rank of a SLURM job or container sees its GPU as cuda:0."""
    uuids = iter(["a1", "b2"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(uuids)))
    assert [gpu_identity(torch.device("cuda:0")) for _ in range(2)] == ["a1", "b2"]
    assert gpu_identity(torch.device("cpu")) is None


def test_shared_gpus():
    assert shared_gpus(["a", None, "b", "a", None]) == {"a": [0, 3]}
    assert shared_gpus(["a", "b"]) == shared_gpus([None, None]) == {}


@pytest.mark.parametrize("gpus", [["a", "b"], ["a", "a"], [None, None], ["a", None]])
def test_links_go_over_gloo_unless_nccl_is_asked_for(monkeypatch, gpus):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert link_backend("auto", gpus) == link_backend("gloo", gpus) == "gloo"


def test_nccl_is_had_by_its_name(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert link_backend("nccl", ["a", "b"]) == "nccl"


@pytest.mark.parametrize(
    "gpus, why",
    [
        (["a", "b", "a"], "ranks 0, 2 share GPU a"),
        (["a", None], "rank 1 has no GPU"),
        (["a", "a", None], "rank 2 has no GPU; ranks 0, 1 share GPU a"),
    ],
)
def test_nccl_needs_a_gpu_per_rank(monkeypatch, gpus, why):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(ValueError, match=f"runtime.backend is nccl, .*: {why}. Use runtime.backend=gloo"):
        link_backend("nccl", gpus)


def test_nccl_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="this build of torch has no NCCL"):
        link_backend("nccl", ["a", "b"])
