"""klt's search and entropy coder come back, keep to their bounds, and refuse what no encoder can have written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compressors.kernels import klt as kernels
from compressors.kernels import trellis
from compressors.klt.models import prior_models

NO_RAW_COST = 1 << 40
NEXT_STATE = [[0, 2], [2, 0], [1, 3], [3, 1]]
PRIOR = {name: tensor.numpy() for name, tensor in prior_models().items()}
STARTS, MAGNITUDE = PRIOR["starts"], PRIOR["magnitude"][: kernels.LAST_WIDE_CLASS - kernels.FIRST_CLASS + 1]
BITS = 15 - np.log2(np.diff(STARTS, axis=1)).reshape(2, -1, 64).swapaxes(0, 1)
RATES = np.ascontiguousarray(0.15 * BITS[..., [*range(0, 63, 2), 63]])


def classes_of(width, first=20, last=-16):
    return np.linspace(first, last, width).astype(np.int32)


def models_of(classes):
    return kernels.make_models(
        side_classes=np.zeros(2, np.int32), component_class=classes, magnitude=MAGNITUDE, starts=STARTS
    )


def quantized(num_tokens, classes, *, seed=0, finer=0):
    """`Symbols` of Laplacian components of these classes, side by side with what was quantised."""
    generator = np.random.default_rng(seed)
    values = (generator.laplace(size=(num_tokens, classes.size)) * 2 ** (classes / 8)).astype(np.float32)
    symbols = nothing(num_tokens, classes.size)
    symbols.rms[:] = generator.integers(-9, 10, num_tokens)
    symbols.finer[:] = finer
    prices = trellis.Prices(classes - kernels.FIRST_CLASS, RATES.astype(np.float32))
    steps = np.ones(num_tokens, np.float32)
    trellis.quantize(values, np.zeros_like(values), steps, symbols.finer, prices, symbols.levels, symbols.is_raw)
    return symbols, values


def nothing(num_tokens, width):
    levels, is_raw = np.full((num_tokens, width), 77, np.int32), np.zeros(num_tokens, np.bool_)
    return kernels.Symbols(levels, is_raw, *np.zeros((2, num_tokens), np.int32))


def comes_back(symbols, models, raw_cost=NO_RAW_COST, tail=b""):
    """Encode, decode, compare; returns the bytes."""
    data = kernels.encode(symbols, models, raw_cost)
    received = nothing(*symbols.levels.shape)
    assert kernels.decode(np.append(data, np.frombuffer(tail, np.uint8)), models, received) == data.size
    coded = ~symbols.is_raw
    assert np.array_equal(received.is_raw, symbols.is_raw)
    assert (received.levels[~coded] == 0).all()
    for name in ("levels", "rms", "finer"):
        assert np.array_equal(getattr(received, name)[coded], getattr(symbols, name)[coded]), name
    return data


@pytest.mark.parametrize("width", [1, 7, 16, 48, 576, 896, 5120])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 100, 1000])
def test_frames_come_back(width, num_tokens):
    if width * num_tokens > 10**6:
        num_tokens = 10**6 // width
    symbols, _ = quantized(num_tokens, classes_of(width))
    comes_back(symbols, models_of(classes_of(width)))


def test_frames_are_cut_into_blocks_and_states():
    shapes = {(8, 576): (1, 1), (9, 576): (1, 2), (40, 576): (1, 8), (227, 576): (1, 8), (228, 576): (2, 8)}
    assert {s: (kernels.num_blocks(*s), kernels.num_states(*s)) for s in shapes} == shapes
    assert kernels.num_blocks(1, 1 << 20) == 1


@pytest.mark.parametrize("num_tokens", [1, 2, 30, 300])
@pytest.mark.parametrize("every", [1, 2, 7])
def test_raw_tokens_are_left_out(num_tokens, every):
    symbols, _ = quantized(num_tokens, classes_of(576))
    symbols.is_raw[::every] = True
    data = comes_back(symbols, models_of(classes_of(576)), tail=b"\xff\x00" * 40)
    if every == 1:
        assert data.size < 300 + 2 * num_tokens


@pytest.mark.parametrize(("first", "last", "finer"), [(170, -60, 0), (60, 10, 30), (20, 20, 64), (-32, -40, -64)])
def test_classes_beyond_the_models(first, last, finer):
    classes = classes_of(37, first, last)
    for num_tokens in (3, 900):
        symbols, _ = quantized(num_tokens, np.minimum(classes, 100), finer=finer)
        comes_back(symbols, models_of(classes))


@pytest.mark.parametrize("component_class", [-32, 0, 20, 24, 77, 140, 500])
def test_levels_of_all_sizes(component_class):
    """Escapes in all lanes and models, up to the largest levels."""
    generator = np.random.default_rng(1)
    classes = np.full(43, component_class, np.int32)
    sizes = 2 ** generator.uniform(0, 20, (300, 43))
    values = (sizes * generator.choice([-1, 1], sizes.shape) / 2.01).astype(np.float32)
    values[0], values[1] = 524280, -524280
    symbols = nothing(300, 43)
    prices = trellis.Prices(np.clip(classes, -32, 20) + 32, RATES.astype(np.float32))
    ones = np.ones(300, np.float32)
    trellis.quantize(values, np.zeros_like(values), ones, symbols.finer, prices, symbols.levels, symbols.is_raw)
    assert not symbols.is_raw.any() and abs(symbols.levels).max() > trellis.MAX_LEVEL - 100
    comes_back(symbols, models_of(classes))
    for t in (0, 1, 5):
        one = kernels.Symbols(*(array[t : t + 1].copy() for array in symbols))
        comes_back(one, models_of(classes))


def test_tokens_dearer_than_raw_are_marked():
    classes = classes_of(576)
    symbols, _ = quantized(60, classes)
    models = models_of(classes)
    costs = []
    for t in range(60):
        lone = kernels.Symbols(*(array[t : t + 1].copy() for array in symbols))
        low, high = 0, 1 << 30
        while high - low > 1:
            middle = (low + high) // 2
            lone.is_raw[0] = False
            kernels.encode(lone, models, middle)
            low, high = (middle, high) if lone.is_raw[0] else (low, middle)
        costs.append(high)
        lone.is_raw[0] = False
        nbits = 8 * kernels.encode(lone, models, NO_RAW_COST).size
        assert abs(high / 256 - nbits) < 0.01 * nbits + 40
    limit = int(np.median(costs))
    comes_back(symbols, models, raw_cost=limit)
    assert np.array_equal(symbols.is_raw, np.array(costs) > limit)


def test_side_information_out_of_range_is_raw():
    symbols, _ = quantized(6, classes_of(20))
    symbols.rms[:] = [1024, -1024, 1025, -1025, 0, 0]
    symbols.finer[:] = [64, -64, 0, 0, 65, -65]
    comes_back(symbols, models_of(classes_of(20)))
    assert symbols.is_raw.tolist() == [False, False, True, True, True, True]


def damaged(data, generator):
    for _ in range(12):
        flipped = data.copy()
        for at in generator.integers(0, data.size, generator.integers(1, 4)):
            flipped[at] ^= 1 << generator.integers(0, 8)
        yield flipped
        yield data[: generator.integers(0, data.size)].copy()
    for head in range(0, 13):
        yield generator.integers(0, 256, head).astype(np.uint8)
        yield np.append(np.zeros(head, np.uint8), data)
        yield np.append(np.full(min(head, 4), 255, np.uint8), data[min(head, 4) :])


@pytest.mark.parametrize("shape", [(1, 7), (3, 576), (20, 576), (230, 576), (3, 40000)])
def test_damaged_bytes_are_refused_or_in_range(shape):
    classes = classes_of(shape[1], 60, -30)
    models = models_of(classes)
    symbols, _ = quantized(shape[0], classes)
    symbols.is_raw[1::5] = True
    data = kernels.encode(symbols, models, NO_RAW_COST)
    refused = 0
    for blob in damaged(data, np.random.default_rng(3)):
        received = nothing(*shape)
        used = kernels.decode(blob, models, received)
        refused += used == -1
        if used != -1:
            assert 0 < used <= blob.size
            assert abs(received.levels).max() < trellis.MAX_LEVEL
            assert abs(received.rms).max() <= 1024 and abs(received.finer).max() <= 64
    assert refused >= 30
    for size in range(60 if data.size > 100 else 0):  # in a few bytes nearly anything is some frame
        assert kernels.decode(data[: data.size - 1 - size], models, nothing(*shape)) == -1


def best_cost(values, classes):
    """Of one lane, by trying the nearest levels of all paths through the four states."""
    costs = {0: 0.0}
    for value, c in zip(2.0 * values, classes, strict=True):
        following = {}
        for state, parity in itertools.product(costs, (0, 1)):
            q = state >> 1
            indices = [i for i in range(-400, 401) if i % 2 == parity]
            levels = np.array([2 * i - q * ((i > 0) - (i < 0)) for i in indices])
            nearest = int(abs(levels - value).argmin())
            price = RATES[c, q, min(abs(indices[nearest]), 32 - 1)]
            cost = costs[state] + (levels[nearest] - value) ** 2 + price
            after = NEXT_STATE[state][parity]
            following[after] = min(following.get(after, np.inf), cost)
        costs = following
    return min(costs.values())


@pytest.mark.parametrize("width", [1, 7, 8, 9, 61])
def test_search_finds_the_cheapest_path(width):
    classes = classes_of(width, 20, -10)
    symbols, values = quantized(2, classes, seed=5)
    for t, lane in itertools.product(range(2), range(min(width, trellis.LANES))):
        own = slice(lane, None, trellis.LANES)
        state, cost = 0, 0.0
        for level, value, c in zip(
            symbols.levels[t, own].tolist(), values[t, own], classes[own] - kernels.FIRST_CLASS, strict=True
        ):
            q = state >> 1
            assert level % 2 == q or level == 0
            index = (level + (q if level > 0 else 0)) >> 1
            cost += (level - 2.0 * value) ** 2 + RATES[c, q, min(abs(index), 31)]
            state = NEXT_STATE[state][index & 1]
        best = best_cost(values[t, own], classes[own] - kernels.FIRST_CLASS)
        assert cost == pytest.approx(best, rel=1e-4, abs=1e-4)


def test_out_of_range_is_raw():
    values = np.zeros((4, 9), np.float32)
    values[1, 3], values[2, 8] = np.nan, 1e9
    symbols = nothing(4, 9)
    symbols.is_raw[3] = True
    prices = trellis.Prices(classes_of(9) + 32, RATES.astype(np.float32))
    ones = np.ones(4, np.float32)
    trellis.quantize(values, np.zeros_like(values), ones, symbols.finer, prices, symbols.levels, symbols.is_raw)
    assert symbols.is_raw.tolist() == [False, True, True, True] and not symbols.levels.any()


def test_reconstruction_is_near_and_clamped():
    classes = classes_of(61)
    symbols, values = quantized(5, classes)
    symbols.is_raw[2] = True
    symbols.levels[4, 0] = 1 << 19
    predicted = np.full_like(values, 3)
    decoded = np.empty_like(values)
    trellis.reconstruct(symbols.levels, np.ones(5, np.float32), predicted, symbols.is_raw, decoded)
    assert abs(decoded - 3 - values)[[0, 1, 3]].max() < 1.6
    assert (decoded[2] == 3).all() and decoded[4, 0] == 1e4


def test_levels_do_not_depend_on_what_shares_a_frame():
    symbols, values = quantized(50, classes_of(583))
    prices = trellis.Prices(classes_of(583) + 32, RATES.astype(np.float32))
    for t in (0, 17, 49):
        alone = nothing(1, 583)
        row, one = values[t : t + 1].copy(), np.ones(1, np.float32)
        trellis.quantize(row, np.zeros_like(row), one, alone.finer, prices, alone.levels, alone.is_raw)
        assert np.array_equal(alone.levels[0], symbols.levels[t])


def ideal_bits(symbols, models):
    """Sum of -log2 of the probabilities of the levels' symbols; there must be no others."""
    shape = symbols.levels.shape
    classes = np.empty(shape, np.int16)
    kernels.classify(symbols.levels, models.component_class, symbols.finer, models.magnitude, classes)
    counts = np.zeros((2 * kernels.NUM_CLASSES, kernels.NUM_SYMBOLS), np.int64)
    kernels.count_symbols(symbols.levels, classes, counts)
    assert counts.sum() == symbols.levels.size
    return float((counts * (15 - np.log2(np.diff(models.starts, axis=1)))).sum())


@pytest.mark.parametrize(("num_tokens", "width"), [(600, 576), (80, 5120)])
def test_bytes_are_near_the_entropy(num_tokens, width):
    classes = classes_of(width, 8, -16)
    symbols, _ = quantized(num_tokens, classes)
    symbols.rms[:] = 0
    models = models_of(classes)
    spare = 8 * kernels.encode(symbols, models, NO_RAW_COST).size - ideal_bits(symbols, models)
    assert 0 < spare < 0.02 * symbols.levels.size


def test_frames_of_one_token_cost_little_more():
    classes = classes_of(576, 8, -16)
    symbols, _ = quantized(400, classes)
    models = models_of(classes)
    together = kernels.encode(symbols, models, NO_RAW_COST).size
    alone = [kernels.Symbols(*(array[t : t + 1] for array in symbols)) for t in range(400)]
    assert sum(kernels.encode(token, models, NO_RAW_COST).size for token in alone) < 1.05 * together
