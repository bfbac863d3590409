"""What needs a CUDA device: codecs there, stages there over Gloo, and links over NCCL."""

import numpy as np
import pytest
import torch
from tests.helpers.launch import run_ranks
from tests.helpers.tiny_models import tiny_arguments

from compressors.registry import builtin_names, make_compressor
from pipeline.record import read_per_token, read_record

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "fp16", "bf16", "fp8_e4m3", "int8", "int3", "nf4"])
def test_codecs_give_the_same_bytes_and_values_as_on_the_cpu(name, dtype):
    assert name in builtin_names()
    codec = make_compressor(name)
    x = torch.randn(2, 33, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_cpu, on_gpu = codec.compress(x), make_compressor(name).compress(x.cuda())
    assert on_gpu.data.is_cuda
    assert torch.equal(on_cpu.data, on_gpu.data.cpu())
    decoded = codec.decompress(on_gpu, torch.device("cuda"), dtype)
    assert torch.equal(decoded.cpu(), make_compressor(name).decompress(on_cpu, torch.device("cpu"), dtype))


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
    assert record["backend"] == "gloo"
    np.testing.assert_array_equal(got, expected)
    assert all(stage["compute_s"] > 0 for stage in record["stages"].values())


@pytest.mark.skipif(NUM_GPUS < 2, reason="NCCL needs a GPU per rank, two at least")
def test_links_over_nccl(tmp_path):
    _, expected = losses(tmp_path / "one", 1, "--set", "runtime.device=cuda:0")
    record, got = losses(tmp_path / "two", 2, "--set", "runtime.backend=nccl")
    assert record["backend"] == "nccl"
    np.testing.assert_array_equal(got, expected)
