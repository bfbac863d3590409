"""Attention of one token a row in one call (`slot_kernel`), against scaled_dot_product_attention in float64."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from pipeline.models.cache import SlotCache
from pipeline.models.slot_kernel import SeenPositions, attend_one_token
from tests.helpers.sources import ROOT

NUM_SLOTS, MAX_LENGTH = 6, 700
SCALE = 0.3
SHAPES = [(2, 3, 32), (1, 1, 16), (3, 1, 64), (2, 4, 128), (1, 2, 256)]


class Case:
    """Drawn queries, keys, values and a cache; `seen` are the positions of each row, in slots 5, 4, ..."""

    def __init__(self, seen, heads=2, shared=3, head_dim=32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.seen, self.slots = seen, list(range(NUM_SLOTS - 1, NUM_SLOTS - 1 - len(seen), -1))
        self.cache = torch.randn(2, NUM_SLOTS, heads, MAX_LENGTH, head_dim, generator=generator)
        shapes = ((heads * shared, 1), (heads, 1), (heads, 1))
        self.new = tuple(torch.randn(len(seen), *shape, head_dim, generator=generator) for shape in shapes)

    def attend(self, rows=None):
        """Of some rows, or of all."""
        rows = list(range(len(self.seen))) if rows is None else rows
        places = SeenPositions([self.slots[row] for row in rows], [self.seen[row] for row in rows])
        return attend_one_token(tuple(part[rows] for part in self.new), tuple(self.cache), places, SCALE)

    def expected(self):
        """Writes the keys and values, too."""
        outputs = []
        for row, (slot, (first, end)) in enumerate(zip(self.slots, self.seen, strict=True)):
            for part, new in zip(self.cache, self.new[1:], strict=True):
                part[slot, :, end - 1] = new[row, :, 0]
            keys, values = self.cache[:, slot : slot + 1, :, first:end].double()
            query = self.new[0][row : row + 1].double()
            shared = query.shape[1] // keys.shape[1]
            keys, values = (part.repeat_interleave(shared, 1) for part in (keys, values))
            outputs.append(scaled_dot_product_attention(query, keys, values, scale=SCALE))
        return torch.cat(outputs)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 300, MAX_LENGTH])
@pytest.mark.parametrize(("heads", "shared", "head_dim"), SHAPES)
def test_is_what_float64_gives(length, heads, shared, head_dim):
    case, other = (Case([(0, length)], heads, shared, head_dim, seed=length) for _ in range(2))
    found, expected = case.attend(), other.expected()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 4e-6
    assert torch.equal(case.cache, other.cache)  # written where the slot goes on, and nowhere else


def test_rows_see_what_is_theirs():
    seen = [(0, 5), (0, 100), (33, 97), (699, 700), (0, 1), (17, 18)]
    case, other = Case(seen), Case(seen)
    assert (case.attend() - other.expected()).abs().max() < 4e-6
    assert torch.equal(case.cache, other.cache)


def test_a_row_depends_neither_on_others_nor_on_threads(request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    seen = [(0, 700), (5, 400), (0, 699), (0, 650)]  # enough for several threads
    torch.set_num_threads(1)
    alone = torch.cat([Case(seen, head_dim=128).attend([row]) for row in range(len(seen))])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(Case(seen, head_dim=128).attend(), alone)


def test_large_scores_and_small_ones():
    """Scores hundreds apart leave weights that are 1 and 0."""
    case, other = Case([(0, 50)]), Case([(0, 50)])
    for each in (case, other):
        each.new[0].mul_(300)
    found, expected = case.attend(), other.expected()
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 3e-4  # scores of 1,000 have four digits behind the point


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none(value):
    case = Case([(0, 20), (0, 20)])
    case.new[0][0, 0, 0, 3] = value
    found = case.attend()
    assert not torch.isfinite(found[0, 0]).any()
    assert torch.isfinite(found[1]).all()


def test_queries_may_lie_in_any_order():
    case, other = Case([(0, 9)]), Case([(0, 9)])
    queries = torch.empty(1, 1, 6, 64)[..., ::2].transpose(1, 2).copy_(case.new[0])
    case.new = (queries, *case.new[1:])
    assert not queries.is_contiguous()
    assert torch.equal(case.attend(), other.attend())


@pytest.mark.parametrize(
    ("head_dim", "dtype", "has_kernel"),
    [(32, torch.float32, True), (24, torch.float32, False), (32, torch.float64, False)],
)
def test_caches_of_float32_have_it(head_dim, dtype, has_kernel):
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim)
    cache = SlotCache(config, num_slots=1, max_length=8, dtype=dtype, device=torch.device("cpu"))
    assert (cache.kernel is not None) is has_kernel


def test_a_compiler_is_loaded_by_those_who_need_it():
    """It takes 40 MB of every rank, also of one that scores or computes on a GPU."""
    script = "import sys, pipeline.models.loading, pipeline.models.stage; print('llvmlite' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_refuses_a_cache_of_another_layout():
    case = Case([(0, 9)])
    case.cache = case.cache.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(AssertionError):
        case.attend()
