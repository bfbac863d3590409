"""The arithmetic of `klt`: products have one order of summation, and both ways to compute agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from klt_cases import VOCABULARY, calibrate

from compressors.check import hidden_states
from compressors.klt.transform import KernelTransform, TorchTransform, make_transform
from tests.helpers.marks import slow_but

CPU = torch.device("cpu")
STEP = 0.4
# Around the sizes of a tile and of a block of rows.
NUM_ROWS = (*range(1, 20), 63, 128, 131, 239, 240, 241, 243, 300)
SHAPES = {
    "small": (1, 5),
    "narrow": (130, 15),
    "a tile": (64, 64),
    "odd": (577, 131),
    "no multiple of 8": (7, 1030),
    "of a model": (576, 576),
}


def random_product(length, width, num_rows=300):
    """Rows whose sizes differ a lot, so that each order of summation gives other bits; a matrix in float32 and bf16."""
    generator = np.random.default_rng(length * width)
    rows = generator.normal(size=(num_rows, length)) * np.exp(2 * generator.normal(size=(num_rows, length)))
    matrix = torch.from_numpy(generator.normal(size=(length, width))).bfloat16()
    return rows.astype(np.float32), matrix.float().numpy(), matrix.view(torch.uint16).numpy()


def multiply(rows, matrix):
    from compressors.kernels import transform

    product = np.full((len(rows), matrix.shape[1]), np.nan, np.float32)
    transform.multiply_rows(rows, matrix, product)
    return product


def in_order(rows, matrix):
    """Each product added with one rounding: in float64 products are exact, and its own rounding almost never shows."""
    product = np.zeros((len(rows), matrix.shape[1]), np.float32)
    for k in range(len(matrix)):
        product = (product + rows[:, k : k + 1].astype(np.float64) * matrix[k]).astype(np.float32)
    return product


@pytest.mark.parametrize("shape", slow_but(("small", "a tile", "odd"), SHAPES))
def test_an_element_is_the_sum_of_its_products_in_order(shape):
    rows, matrix, bits = random_product(*SHAPES[shape])
    for num_rows in (1, 5, 6, 7, 250):
        product, expected = multiply(rows[:num_rows], bits), in_order(rows[:num_rows], matrix)
        assert (product != expected).mean() < 1e-4
        np.testing.assert_allclose(product, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", slow_but(("small", "a tile", "odd"), SHAPES))
def test_a_row_is_the_same_wherever_it_stands(shape):
    rows, _, bits = random_product(*SHAPES[shape])
    alone = np.concatenate([multiply(row[None], bits) for row in rows])
    for num_rows in NUM_ROWS:
        assert np.array_equal(multiply(rows[:num_rows], bits), alone[:num_rows])
        assert np.array_equal(multiply(rows[-num_rows:], bits), alone[-num_rows:])
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(multiply(rows[shuffled], bits), alone[shuffled])


def test_order_shows_in_the_bits():
    """Else the tests above could not fail."""
    rows, _, bits = random_product(577, 131)
    backwards = multiply(np.ascontiguousarray(rows[:, ::-1]), np.ascontiguousarray(bits[::-1]))
    assert (backwards != multiply(rows, bits)).mean() > 0.5


def both(hidden_size=96, use_token_ids=True):
    calibration = calibrate(hidden_size, use_token_ids)
    return KernelTransform(*calibration, STEP), TorchTransform(*calibration, STEP, CPU)


def frame():
    """Tokens of which one is large enough and one not finite enough to be raw."""
    x = hidden_states((1, 150, 96), seed=3)[0]
    x[7] *= 1000
    x[8, 5] = torch.inf
    return x


def test_both_ways_to_compute_agree():
    kernel, by_torch = both()
    ours, theirs = kernel.analyse(frame()), by_torch.analyse(frame())
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-4, atol=1e-4)
    assert ours.is_raw.nonzero().flatten().tolist() == [7, 8]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert np.array_equal(kernel.steps(ours.finer), by_torch.steps(theirs.finer))
    ids = np.arange(150, dtype=np.int32) % VOCABULARY
    np.testing.assert_allclose(kernel.predict(ids), by_torch.predict(ids), rtol=1e-4, atol=1e-5)
    tokens = [way.synthesise(ours.y, ours.rms.numpy(), CPU, torch.float32) for way in (kernel, by_torch)]
    torch.testing.assert_close(*tokens, rtol=1e-4, atol=1e-4)


def test_both_ways_know_the_same_powers_of_two():
    kernel, by_torch = both()
    finer = torch.arange(-40, 41, dtype=torch.int32)
    assert np.array_equal(kernel.steps(finer), by_torch.steps(finer))
    rms = np.arange(-1300, 1300, 7, dtype=np.int32)
    y = torch.ones(len(rms), 96)
    tokens = [way.synthesise(y, rms, CPU, torch.float32) for way in (kernel, by_torch)]
    torch.testing.assert_close(*tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [0, 1])
def test_a_token_is_analysed_and_made_as_if_alone(way):
    transform, x = both()[way], frame()
    together = [part.clone() for part in transform.analyse(x)]
    y, rms = together[0], together[1].numpy()
    tokens = transform.synthesise(y, rms, CPU, torch.float32)
    for t in (0, 7, 8, 63, 127, 128, 149):
        alone = transform.analyse(x[t : t + 1])
        assert all(torch.equal(a, b[t : t + 1]) for a, b in zip(alone, together, strict=True))
        assert torch.equal(transform.synthesise(y[t : t + 1], rms[t : t + 1], CPU, torch.float32), tokens[t : t + 1])


@pytest.mark.parametrize("way", [0, 1])
def test_a_prediction_follows_from_its_id_alone(way):
    transform = both()[way]
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 200).astype(np.int32)
    together = transform.predict(ids).copy()
    assert len(np.unique(together, axis=0)) == len(np.unique(ids))
    for t in range(0, 200, 17):
        assert np.array_equal(transform.predict(ids[t : t + 1]), together[t : t + 1])


def test_each_distinct_id_is_predicted_once(monkeypatch):
    from compressors.kernels import transform as kernels

    num_rows = []

    def noting(rows, matrix, product, multiply_rows=kernels.multiply_rows):
        num_rows.append(len(rows))
        multiply_rows(rows, matrix, product)

    monkeypatch.setattr(kernels, "multiply_rows", noting)
    both()[0].predict(np.array([5, 3, 5, 5, 3, 9], np.int32))
    assert num_rows == [3]


@pytest.mark.parametrize("use_token_ids", [True, False])
def test_without_a_table_nothing_is_predicted(use_token_ids):
    for transform in both(use_token_ids=use_token_ids):
        assert transform.predict(np.zeros(3, np.int32)).any() == use_token_ids


def test_the_device_of_the_hidden_states_chooses():
    calibration = calibrate(96, True)
    assert isinstance(make_transform(*calibration, STEP, CPU), KernelTransform)
    assert isinstance(make_transform(*calibration, STEP, torch.device("meta")), TorchTransform)
