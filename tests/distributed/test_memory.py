"""Peak resident memory of four ranks against the tensors that each owns; benchmarks/memory.py does it with 2 GB."""

import pytest
import torch

from benchmarks import memory
from benchmarks.synthetic import save_random_llama
from pipeline.config.schema import load_config
from tests.helpers.launch import call_on_ranks, run_ranks

WINDOW = 64
ALLOWANCE_NBYTES = 48 * 2**20  # half of the smallest rank's tensors: a second copy of them would not fit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """400 MB in float32: 88 MB per layer-holding rank, more on rank 0."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    nbytes = save_random_llama(
        folder, hidden_size=768, num_layers=12, vocab_size=8192, dtype=torch.float32, num_shards=3
    )
    return folder, nbytes


def test_a_rank_holds_its_own_tensors_and_a_constant(checkpoint, tmp_path):
    model_dir, nbytes = checkpoint
    given = memory.overrides(model_dir, tmp_path, window=WINDOW, dtype="fp32")
    arguments = [word for key, value in given for word in ("--set", f"{key}={value}")]
    (idle,) = call_on_ranks(1, memory.print_idle_peak)
    idle_nbytes = int(idle.check().stdout)
    for rank in run_ranks([arguments] * memory.NUM_RANKS):
        rank.check()
    memories = memory.rank_memories(load_config(None, given))
    assert sum(m.own_nbytes for m in memories) == nbytes
    for m in memories:
        assert m.excess_nbytes(idle_nbytes) <= ALLOWANCE_NBYTES, m
