"""What scoring holds at once, all copies counted, against what `pipeline.models.stage` promises."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.models.stage import MAX_COPY_NBYTES, MAX_LOGITS_NBYTES, Stage

VOCAB_SIZE, HIDDEN_SIZE, NUM_SCORED = 151_936, 8, 250


def peak_nbytes(call):
    """Most bytes that tensors made during `call` took at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_and_their_copies_keep_within_their_bounds(dtype):
    head = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False, dtype=dtype)
    stage = Stage(None, SimpleNamespace(decoder=None, head=head), torch.device("cpu"), VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, NUM_SCORED, HIDDEN_SIZE, generator=generator).to(dtype)
    targets = torch.randint(0, VOCAB_SIZE, (NUM_SCORED,), generator=generator)
    scored = torch.zeros(NUM_SCORED, dtype=torch.int64), torch.arange(NUM_SCORED), targets
    with torch.inference_mode():
        peak = peak_nbytes(lambda: stage.score(hidden, *scored))
        scores = stage.score(hidden, *scored)
        logits = torch.cat([head(part) for part in hidden[0].split(110)]).float()
    assert peak < MAX_LOGITS_NBYTES["cpu"] * dtype.itemsize / 4 + 2 * MAX_COPY_NBYTES + 2**20
    assert torch.equal(scores.loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(scores.top1, logits.argmax(-1).int())
