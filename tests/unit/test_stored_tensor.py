"""Checkpoint tensors read in parts: the same values as in one."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.models import checkpoint

TENSORS = {
    "matrix": torch.arange(37 * 13, dtype=torch.float32).view(37, 13) / 7,
    "one_row": torch.arange(500, dtype=torch.float32).view(1, 500),
    "vector": torch.arange(700, dtype=torch.float16),
    "integers": torch.arange(999, dtype=torch.int64).view(3, 333),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_mapped_nbytes", [8, 100, 700, 2**20])
@pytest.mark.parametrize("name", TENSORS)
def test_parts_make_the_whole(tmp_path, monkeypatch, name, max_mapped_nbytes, dtype):
    monkeypatch.setattr(checkpoint, "MAX_MAPPED_NBYTES", max_mapped_nbytes)
    save_file(TENSORS, tmp_path / "model.safetensors")
    read = checkpoint.StoredTensor(tmp_path / "model.safetensors", name, dtype)[...]
    stored = TENSORS[name]
    expected = stored.to(dtype) if stored.is_floating_point() else stored
    assert read.dtype == expected.dtype
    assert torch.equal(read, expected)
