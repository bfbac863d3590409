"""Memory of four ranks against the tensors and files that each owns; benchmarks/memory.py does it with 2 GB."""

import pytest
import torch

from benchmarks import memory
from benchmarks.synthetic import save_random_calibration, save_random_llama
from compressors.klt.calibration_file import TOKENS_FILE, file_name
from pipeline.config.reading import load_config
from pipeline.models.weight_files import checkpoint_fingerprint
from pipeline.partition.plan import default_plan
from pipeline.runtime.memory import pss_bytes
from tests.helpers.launch import call_on_ranks, run_ranks

WINDOW = 64
LOGITS_NBYTES = 3 * 64 * 2**20  # a chunk, its softmax, and what is kept of freed ones
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


@pytest.mark.skipif(pss_bytes() is None, reason="needs Linux' smaps_rollup")
def test_a_rank_with_klt_holds_its_own_tensors_and_its_part_of_its_links_files(tmp_path):
    """A file that ranks of one machine map together counts once. The token table alone is 136 MB."""
    hidden_size, num_layers, vocab_size = 896, 4, 151_936
    model_dir, calibration = tmp_path / "model", tmp_path / "calibration"
    save_random_llama(
        model_dir,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        dtype=torch.bfloat16,
        num_shards=2,
    )
    links = default_plan(num_layers, memory.NUM_RANKS, wrap=True).links
    save_random_calibration(
        calibration,
        link_names=[link.name for link in links],
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        checkpoint=checkpoint_fingerprint(model_dir),
    )
    given = memory.overrides(model_dir, tmp_path, window=WINDOW, dtype="bf16")
    given.append(("compressor", f"klt(calibration={calibration}, step=0.5)"))
    arguments = [word for key, value in given for word in ("--set", f"{key}={value}")]
    (idle,) = call_on_ranks(1, memory.print_idle_share)
    idle_nbytes = int(idle.check().stdout)
    for rank in run_ranks([arguments] * memory.NUM_RANKS, timeout_s=300):
        rank.check()
    for m in memory.rank_memories(load_config(None, given)):
        own_links = [link for link in links if m.rank in (link.src_node, link.dst_node)]
        shared = sum((calibration / file_name(link.name)).stat().st_size for link in own_links) / 2
        shared += (calibration / TOKENS_FILE).stat().st_size / memory.NUM_RANKS
        allowance = ALLOWANCE_NBYTES + (LOGITS_NBYTES if m.rank == 0 else 0)
        assert m.share_nbytes <= 1.15 * (m.own_nbytes + shared) + idle_nbytes + allowance, (m, shared, idle_nbytes)
