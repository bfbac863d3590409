"""Vectors of compiled code give what NumPy gives, lane by lane."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import jit
from compressors.kernels.vectors import (
    LANES,
    as_floats,
    as_integers,
    as_unsigned,
    bits_of,
    gather,
    lane_numbers,
    leading_zeros,
    load,
    magnitude,
    number_of_bits,
    select,
    splat,
    store,
    total,
)


@jit
def of_vectors(a, b, bits, floats, places, narrow, out, out_narrow, out_floats):
    x, y, z, at = load(a, 1), load(b, 0), load(bits, 0), load(places, 0)
    store(out, 0, x + y * 3 - (x >> 2) + (x & y) - (x | 5) + (x ^ y))
    store(out, LANES, select(x < y, magnitude(x), 7) + min(x, y) + max(x, -20) + (lane_numbers() << 1))
    store(out, 2 * LANES, as_integers(z >> 5) + as_integers(z >= as_unsigned(x)) + as_integers(x == y))
    store(out, 3 * LANES, gather(a, at) + gather(narrow, at) + load(narrow, 2))
    store(out_narrow, 0, x)
    f = load(floats, 0)
    store(out_floats, 0, magnitude(f) / 3 + f * 0.25 - as_floats(z) + as_floats(x))
    store(out_floats, LANES, gather(floats, at) + splat(np.float32(0.5)))
    store(out, 4 * LANES, as_integers(f))
    return total(x), bits_of((x < y) | (x > 90)), number_of_bits(bits_of(x <= y)), leading_zeros(np.int64(5))


def test_lanes_are_those_of_numpy():
    generator = np.random.default_rng(0)
    a, b = generator.integers(-100, 100, (2, LANES + 1)).astype(np.int32)
    b[2] = a[3]
    bits = generator.integers(0, 1 << 32, LANES).astype(np.uint32)
    floats = generator.normal(scale=50, size=LANES).astype(np.float32)
    places = generator.integers(0, LANES, LANES).astype(np.int32)
    narrow = generator.integers(0, 1 << 16, LANES + 2).astype(np.uint16)
    out, out_narrow, out_floats = np.zeros(5 * LANES, np.int32), np.zeros(LANES, np.uint16), np.zeros(16, np.float32)
    sums = of_vectors(a, b, bits, floats, places, narrow, out, out_narrow, out_floats)
    x, y = a[1:], b[:LANES]
    rows = [
        x + y * 3 - (x >> 2) + (x & y) - (x | 5) + (x ^ y),
        np.where(x < y, abs(x), 7) + np.minimum(x, y) + np.maximum(x, -20) + 2 * np.arange(LANES),
        (bits >> 5).astype(np.int32) + (bits >= x.astype(np.uint32)) + (x == y),
        a[places] + narrow[places] + narrow[2:],
        floats.astype(np.int32),
    ]
    assert np.array_equal(out.reshape(5, LANES), rows)
    assert np.array_equal(out_narrow, x.astype(np.uint16))
    expected = abs(floats) / np.float32(3) + floats * np.float32(0.25) - bits.astype(np.float32) + x.astype(np.float32)
    assert np.array_equal(out_floats[:LANES], expected)
    assert np.array_equal(out_floats[LANES:], floats[places] + np.float32(0.5))
    mask = (x < y) | (x > 90)
    assert sums == (x.sum(), sum(1 << lane for lane in range(LANES) if mask[lane]), (x <= y).sum(), 61)
