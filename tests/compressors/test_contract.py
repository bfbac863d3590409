"""The contract of compressors.base, held by every registered codec."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import DTYPES, SHAPES, SPECS, hidden_states, make, round_trip
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors import CorruptPayload, Payload
from compressors.rows import RowCodec

# largest relative error (Frobenius norm) on float32 hidden states with outlier channels
ERROR_BOUNDS = {
    "none": 0.0,
    "fp16": 3e-4,
    "bf16": 2e-3,
    "fp8_e4m3": 0.03,
    "fp8_e5m2": 0.06,
    "int8": 0.03,
    "int7": 0.06,
    "int6": 0.12,
    "int5": 0.23,
    "int4": 0.42,
    "int4(granularity=tensor)": 0.6,
    "int3": 0.6,
    "int2": 1.0,
    "nf4": 0.17,
    "fp4": 0.22,
    "mxfp4": 0.2,
    "hqq1": 2.0,
    "hqq2": 0.8,
    "hqq3": 0.4,
    "hqq4": 0.2,
    "hqq8": 0.02,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_restores_shape_and_dtype_within_the_bound(spec, shape, dtype):
    x = hidden_states(shape, dtype)
    codec = make(spec, dtype, shape[-1])
    payload = codec.compress(x)
    assert payload.shape == shape
    assert payload.data.dtype == torch.uint8 and payload.data.dim() == 1
    assert payload.nbytes <= codec.max_nbytes(shape)
    if codec.fixed_size:
        assert payload.nbytes == codec.max_nbytes(shape)
    decoded = round_trip(spec, x)
    assert decoded.shape == x.shape and decoded.dtype == dtype
    assert decoded.isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_error_on_hidden_states(spec):
    x = hidden_states((2, 40, 576))
    error = (round_trip(spec, x) - x).norm() / x.norm()
    assert error <= ERROR_BOUNDS[spec]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_constant_and_huge_rows_stay_finite(spec, dtype):
    largest = torch.finfo(dtype).max
    x = torch.zeros(1, 8, 70, dtype=dtype)
    x[0, 1] = 1.5
    x[0, 2] = -3.0
    x[0, 3] = largest
    x[0, 4, ::2], x[0, 4, 1::2] = largest, -largest
    x[0, 5, 7] = largest
    x[0, 6] = torch.finfo(dtype).smallest_normal
    decoded = round_trip(spec, x)
    assert decoded.isfinite().all()
    assert not decoded[0, 0].any()
    if make(spec, dtype).causal:
        torch.testing.assert_close(decoded[0, 1:3], x[0, 1:3], rtol=0.01, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", SPECS)
def test_a_non_finite_value_stays_visible_and_in_its_token(spec, value):
    x = hidden_states((1, 4, 130))
    clean = round_trip(spec, x)
    x[0, 1, 77] = value
    decoded = round_trip(spec, x)
    assert not decoded[0, 1, 77].isfinite()
    if make(spec).causal:
        assert torch.equal(decoded[0, [0, 2, 3]], clean[0, [0, 2, 3]])


@pytest.mark.parametrize("spec", [s for s in SPECS if make(s).causal])
def test_causal_codecs_decode_a_token_from_its_past_alone(spec):
    x = hidden_states((2, 9, 96))
    decoded = round_trip(spec, x)
    changed = x.clone()
    changed[0, 5:] = hidden_states((4, 96), seed=1) * 50
    changed[1] = -7.0
    assert torch.equal(round_trip(spec, changed)[0, :5], decoded[0, :5])
    assert torch.equal(round_trip(spec, x[:1, :5])[0], decoded[0, :5])


@pytest.mark.parametrize("spec", [s for s in SPECS if not make(s).causal])
def test_codecs_marked_non_causal_are(spec):
    x = hidden_states((1, 8, 96))
    changed = x.clone()
    changed[0, 7] *= 100
    assert not torch.equal(round_trip(spec, changed)[0, :7], round_trip(spec, x)[0, :7])


@pytest.mark.parametrize("spec", SPECS)
def test_no_state_crosses_frames(spec):
    codec, x = make(spec, hidden_size=96), hidden_states((2, 6, 96))
    first = bytes(codec.compress(x).data.numpy())
    decoded = codec.decompress(codec.compress(x), torch.device("cpu"), torch.float32)
    kept = decoded.clone()
    other = codec.compress(hidden_states((1, 11, 96), seed=3))
    codec.decompress(other, torch.device("cpu"), torch.float32)
    assert torch.equal(decoded, kept), "a decoded tensor belongs to the caller"
    assert bytes(codec.compress(x).data.numpy()) == first


@pytest.mark.parametrize("spec", SPECS)
def test_input_is_left_alone_and_may_be_strided(spec):
    wide = hidden_states((2, 6, 192))
    x = wide[:, ::2, ::2]
    before = wide.clone()
    assert torch.equal(round_trip(spec, x), round_trip(spec, x.contiguous()))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("spec", SPECS)
def test_wrong_length_is_corrupt(spec):
    codec, x = make(spec), hidden_states((2, 3, 64))
    payload = codec.compress(x)
    data = payload.data.clone()
    for wrong in (data[:-1], data[:0], torch.cat([data, data[:1]])):
        with pytest.raises(CorruptPayload):
            codec.decompress(Payload(wrong.clone(), payload.shape), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("spec", [s for s in SPECS if make(s).fixed_size])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 70)))
def test_any_bytes_of_the_right_length_decode_to_the_right_shape(spec, seed, shape):
    codec = make(spec, hidden_size=shape[-1])
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (codec.max_nbytes(shape),), dtype=torch.uint8, generator=generator)
    for dtype in DTYPES:
        decoded = codec.decompress(Payload(data, shape), torch.device("cpu"), dtype)
        assert decoded.shape == shape and decoded.dtype == dtype


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_payload_may_lie_anywhere_in_a_frame(spec, offset):
    x = hidden_states((2, 3, 65))
    payload = make(spec, hidden_size=65).compress(x)
    frame = torch.zeros(offset + payload.data.numel(), dtype=torch.uint8)
    frame[offset:] = payload.data
    decoded = make(spec, hidden_size=65).decompress(
        Payload(frame[offset:], payload.shape), torch.device("cpu"), torch.float32
    )
    assert torch.equal(decoded, round_trip(spec, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 4, 129), (3, 5, 100), (1, 64, 576)], ids=str)
@pytest.mark.parametrize("spec", [s for s in SPECS if isinstance(make(s), RowCodec)])
def test_compiled_loops_write_the_bytes_and_floats_of_the_torch_operations(spec, shape, dtype):
    x = hidden_states(shape, dtype)
    x.view(-1)[::11] *= 1e4
    x.view(-1)[::13] = 0.5
    if shape[1] > 3:
        x[0, 0] = 0
        x[0, 1, 3] = math.nan
        x[0, 2, 5] = -math.inf
        x[0, 3] = torch.finfo(dtype).tiny
    compiled, reference = make(spec, dtype, shape[-1]), make(spec, dtype, shape[-1])
    reference.encode_cpu, reference.decode_cpu = reference.encode, reference.decode
    payload = compiled.compress(x)
    assert torch.equal(payload.data, reference.compress(x).data)
    for out_dtype in DTYPES:
        a, b = (c.decompress(payload, torch.device("cpu"), out_dtype) for c in (compiled, reference))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
