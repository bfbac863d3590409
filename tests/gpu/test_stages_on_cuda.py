"""Stages on a CUDA device over Gloo, and links over NCCL."""

import numpy as np
import pytest
import torch

from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import run_ranks
from tests.helpers.tiny_models import tiny_arguments

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")]


def losses(exp_dir, num_ranks, *more):
    arguments = tiny_arguments(
        exp_dir, "--compressor", "int8", "--set", f"partition.num_nodes={max(num_ranks, 2)}", *more
    )
    outcomes = run_ranks([arguments] * num_ranks, distributed=num_ranks > 1)
    assert [o.returncode for o in outcomes] == [0] * num_ranks, "\n".join(o.stderr for o in outcomes)
    (path,) = exp_dir.glob("*.json")
    return read_record(path), read_per_token(path)["loss"]


def test_cuda_stages_over_gloo(tmp_path):
    _, expected = losses(tmp_path / "one", 1, "--set", "runtime.device=cuda")
    record, got = losses(tmp_path / "two", 2, "--set", "runtime.device=cuda", "--set", "runtime.backend=gloo")
    assert record.backend == "gloo"
    np.testing.assert_array_equal(got, expected)
    assert all(stage.compute_s > 0 for stage in record.stages.values())


@pytest.mark.skipif(NUM_GPUS < 2, reason="NCCL needs a GPU per rank, two at least")
def test_links_over_nccl(tmp_path):
    _, expected = losses(tmp_path / "one", 1, "--set", "runtime.device=cuda:0")
    record, got = losses(tmp_path / "two", 2, "--set", "runtime.backend=nccl")
    assert record.backend == "nccl"
    np.testing.assert_array_equal(got, expected)
