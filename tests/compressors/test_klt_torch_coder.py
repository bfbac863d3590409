"""klt's coder in PyTorch against that in Numba: the same levels, the same bytes, the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressors.kernels import klt as kernels
from compressors.kernels import trellis
from compressors.klt import torch_coder
from compressors.klt.codec import trellis_rates
from compressors.klt.models import prior_models
from tests.helpers.marks import slow_but, slowly

NO_RAW_COST = 1 << 40
SIDE_CLASSES = np.array([9, -3], np.int32)
# (N, H): (blocks, states)
SHAPES = {
    (1, 1): (1, 1),
    (1, 7): (1, 1),
    (3, 8): (1, 1),
    (1, 576): (1, 1),
    (16, 323): (1, 2),
    (5, 2565): (1, 4),
    (300, 96): (1, 8),
    (1001, 135): (2, 8),
    (5, 40003): (3, 8),
}


def both_models(classes):
    parts = {"side_classes": SIDE_CLASSES, "component_class": classes}
    parts |= {name: tensor.numpy() for name, tensor in prior_models().items()}
    return kernels.make_models(**parts), torch_coder.make_models(**{k: torch.from_numpy(v) for k, v in parts.items()})


def frame(num_tokens, classes, *, seed=0, outliers=0.0, raw=0.0):
    """Symbols of tokens whose components spread as their classes say and activity can follow."""
    generator = np.random.default_rng(seed)
    shape = num_tokens, len(classes)
    spread = 2 ** (np.minimum(classes, 100) / 8) * 2 ** generator.normal(size=(num_tokens, 1))
    values = (generator.laplace(size=shape) * spread).astype(np.float32)
    values[generator.random(shape) < outliers] *= 300
    sent = kernels.Symbols(
        np.empty(shape, np.int32),
        generator.random(num_tokens) < raw,
        generator.integers(-90, 90, num_tokens).astype(np.int32),
        generator.integers(-6, 6, num_tokens).astype(np.int32),
        generator.integers(0, 3, num_tokens).astype(np.int32),
    )
    prices = trellis.Prices(classes - kernels.FIRST_CLASS, rates())
    trellis.quantize(values, np.zeros_like(values), steps(sent.finer), sent.finer, prices, sent.levels, sent.is_raw)
    return sent


def rates():
    return trellis_rates(prior_models()["starts"].numpy())


def steps(finer):
    return (0.8 * 2.0 ** (-finer / 4)).astype(np.float32)


def classes_of(width, first=20, last=-20):
    return np.linspace(first, last, width).astype(np.int32)


def in_torch(symbols):
    return torch_coder.Symbols(*(torch.from_numpy(part.copy()) for part in symbols))


def room(num_tokens, width):
    levels, is_raw = np.zeros((num_tokens, width), np.int32), np.zeros(num_tokens, np.bool_)
    return kernels.Symbols(levels, is_raw, *np.zeros((3, num_tokens), np.int32))


def assert_same(symbols, others):
    """Of coded tokens, everything; of the others, that they are raw."""
    assert np.array_equal(symbols.is_raw, np.asarray(others.is_raw))
    for name in ("levels", "rms", "finer", "trust"):
        parts = [np.asarray(getattr(side, name)) for side in (symbols, others)]
        assert parts[1].dtype == np.int32
        assert np.array_equal(*(part[~symbols.is_raw] for part in parts)), name


def exchange(sent, models, raw_cost=NO_RAW_COST, tail=b"\x07\x00"):
    """Both encode, both decode what may follow with it; returns the bytes."""
    of_kernels, of_torch = models
    of_sent = in_torch(sent)
    data = kernels.encode(sent, of_kernels, raw_cost)
    assert np.array_equal(torch_coder.encode(of_sent, of_torch, raw_cost).numpy(), data)
    assert_same(sent, of_sent)
    if kernels.num_states(*sent.levels.shape) > 1 or sent.is_raw.any():  # the words of others go to the end
        blob = np.append(data, np.frombuffer(tail, np.uint8))
    else:
        blob = data
    received, used = torch_coder.decode(torch.from_numpy(blob), of_torch, len(sent.levels))
    assert used == len(data)
    assert_same(sent, received)
    assert not received.levels[received.is_raw].any()
    back = room(*sent.levels.shape)
    assert kernels.decode(blob, of_kernels, back) == len(data)
    assert_same(sent, back)
    return data


@pytest.mark.parametrize(("shape", "cut"), [slowly(*s) if s[1][1] > 1 else s for s in SHAPES.items()])
def test_frames_of_all_sizes(shape, cut):
    assert (kernels.num_blocks(*shape), kernels.num_states(*shape)) == cut
    classes = classes_of(shape[1])
    exchange(frame(shape[0], classes, outliers=0.001), both_models(classes))


@pytest.mark.parametrize("shape", slow_but([(1, 7), (20, 33)], [(1, 7), (20, 33), (16, 323), (300, 96)]))
@pytest.mark.parametrize("raw", [0.3, 1.0])
def test_raw_tokens(shape, raw):
    classes = classes_of(shape[1])
    sent = frame(shape[0], classes, raw=raw)
    sent.is_raw[0] = True
    exchange(sent, both_models(classes))


@pytest.mark.slow
def test_dear_tokens_and_side_information_out_of_range_become_raw():
    classes = classes_of(96)
    sent = frame(40, classes, outliers=0.01)
    sent.rms[:6] = [1024, -1024, 1025, -1025, 0, 0]
    sent.finer[:6] = [64, -64, 0, 0, 65, -65]
    exchange(sent, both_models(classes), raw_cost=5 * 256 * 96)
    assert sent.is_raw[2:6].all()
    assert 8 < sent.is_raw.sum() < 32


@pytest.mark.parametrize("shape", slow_but([(3, 43)], [(3, 43), (120, 43), (500, 43)]))
@pytest.mark.parametrize(("first", "last"), [(-32, -60), (20, 20), (21, 77), (170, -40)])
def test_escapes_and_low_bits(shape, first, last):
    """Levels up to the largest, also where the models expect none such."""
    classes = classes_of(shape[1], first, last)
    generator = np.random.default_rng(1)
    values = (2 ** generator.uniform(0, 19.9, shape) * generator.choice([-1, 1], shape) / 2).astype(np.float32)
    values[0], values[1] = 524280, -524280
    sent = room(*shape)
    prices = trellis.Prices(np.clip(classes, -32, 20) + 32, rates())
    ones = np.ones(shape[0], np.float32)
    trellis.quantize(values, np.zeros_like(values), ones, sent.finer, prices, sent.levels, sent.is_raw)
    assert not sent.is_raw.any() and abs(sent.levels).max() > trellis.MAX_LEVEL - 100
    exchange(sent, both_models(classes))


@pytest.mark.parametrize("place", slow_but([63, 64], [0, 7, 63, 64, 100, 127, 128, 191]))
def test_a_lone_escape_among_many_small_levels(place):
    """What is decoded without a look for escapes is decoded anew from before the first."""
    classes = np.full(192, -20, np.int32)
    sent = room(2, len(classes))
    sent.levels[1, place] = 400
    exchange(sent, both_models(classes))


def test_no_token():
    models = both_models(classes_of(9))
    assert len(exchange(room(0, 9), models, tail=b"")) == 0


def test_side_classes_without_a_model_are_refused():
    with pytest.raises(ValueError, match=r"side classes go from -32 to 20, got \[0, 21\]"):
        torch_coder.make_models(side_classes=torch.tensor([0, 21]), component_class=torch.zeros(1), **prior_models())


def damaged(data, generator, count):
    for _ in range(count):
        flipped = data.copy()
        for at in generator.integers(0, data.size, generator.integers(1, 4)):
            flipped[at] ^= 1 << generator.integers(0, 8)
        yield flipped
        yield data[: generator.integers(0, data.size)].copy()
        yield generator.integers(0, 256, generator.integers(0, data.size)).astype(np.uint8)
        head = generator.integers(0, 12)
        yield np.append(np.zeros(head, np.uint8), data)
        yield np.append(np.full(min(head, 4), 255, np.uint8), data[min(head, 4) :])


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((1, 1), 50),
        slowly((1, 7), 40),
        slowly((3, 40), 20),
        slowly((20, 320), 1),
        slowly((230, 96), 1),
        slowly((3, 45003), 1),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_damaged_bytes_are_refused_or_read_alike(shape, count, raw):
    classes = classes_of(shape[1], 60, -30)
    of_kernels, of_torch = both_models(classes)
    sent = frame(shape[0], classes)
    sent.is_raw[1::3] = raw
    data = kernels.encode(sent, of_kernels, NO_RAW_COST)
    refused = 0
    for blob in damaged(data, np.random.default_rng(3), count):
        back = room(*shape)
        used = kernels.decode(blob, of_kernels, back)
        received, of_received = torch_coder.decode(torch.from_numpy(blob), of_torch, shape[0])
        assert of_received == used
        if used != -1:
            assert_same(back, received)
        refused += used == -1
    assert refused >= count


def levels_of_both(values, predicted, finer, classes, is_raw):
    levels, of_kernels, of_torch = np.empty(values.shape, np.int32), is_raw.copy(), torch.from_numpy(is_raw.copy())
    trellis.quantize(values, predicted, steps(finer), finer, trellis.Prices(classes, rates()), levels, of_kernels)
    parts = [torch.from_numpy(part) for part in (values, predicted, steps(finer), finer, classes, rates())]
    of_levels = torch_coder.quantize(*parts, of_torch)
    assert np.array_equal(of_torch.numpy(), of_kernels)
    assert of_levels.dtype == torch.int32
    assert np.array_equal(of_levels.numpy(), levels)
    decoded = np.empty_like(values)
    trellis.reconstruct(levels, steps(finer), predicted, of_kernels, decoded)
    of_decoded = torch_coder.reconstruct(of_levels, parts[2], parts[1], of_torch)
    assert np.array_equal(of_decoded.numpy(), decoded)
    return levels, of_kernels


@pytest.mark.parametrize("width", slow_but([1, 9, 61], [1, 7, 8, 9, 61, 576]))
def test_levels_are_equal(width):
    generator = np.random.default_rng(width)
    classes = classes_of(width, 30, -5)
    values = (generator.laplace(size=(200, width)) * 2 ** (classes / 8) / 16).astype(np.float32)
    predicted = generator.normal(size=values.shape).astype(np.float32)
    finer = generator.integers(-64, 65, 200).astype(np.int32)
    levels, is_raw = levels_of_both(values, predicted, finer, classes, generator.random(200) < 0.1)
    assert levels.any() and is_raw.any() and not is_raw.all()


def test_levels_are_equal_at_ties_and_out_of_range():
    generator = np.random.default_rng(0)
    finer = np.zeros(400, np.int32)
    values = 0.2 * generator.integers(-12, 13, (400, 20)).astype(np.float32)  # quarters of a level
    odd = [np.nan, np.inf, -np.inf, 3e38, -3e38, 0.4 * (trellis.MAX_LEVEL - 4), 0.4 * (trellis.MAX_LEVEL - 5)]
    values[: len(odd), 3] = odd
    _, is_raw = levels_of_both(values, np.zeros_like(values), finer, np.full(20, 35, np.int32), np.zeros(400, np.bool_))
    assert is_raw.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5]
