"""Every built-in codec keeps the contract (compressors.check) and the built-ins' stricter rules."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import DTYPES, FIRST_OF_CLASS, MANY_SLOW_SPECS, SPECS, compress, make, round_trip
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors import CorruptPayload, Payload, builtin_names
from compressors.check import CHECKS, Subject, dependence_on_frames, find_violations, hidden_states
from compressors.kernels import hadamard as kernels
from compressors.rows import RowCodec
from compressors.wrappers import hadamard
from tests.helpers.marks import slow_but

CPU = torch.device("cpu")

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
    "nf4(absmax=fp16)": 0.17,
    "nf4(absmax=nested)": 0.17,
    "fp4": 0.22,
    "fp4(absmax=nested)": 0.22,
    "mxfp4": 0.2,
    "hqq1": 2.0,
    "hqq2": 0.8,
    "hqq3": 0.4,
    "hqq3(layout=dense)": 0.4,
    "hqq4": 0.2,
    "hqq8": 0.02,
    "block_rowcol_mean(block_tokens=2, block_channels=4)": 0.7,
    "hadamard(int4)": 0.2,
    "hadamard(nf4, seed=7)": 0.12,
    "outlier(channels=2, inner=int4)": 0.35,
    "outlier(channels=[0], inner=hadamard(int4))": 0.4,
    "topk": 0.45,
    "topk(density=0.02, inner=fp16)": 0.9,
    "topk(density=0.5, inner=int8)": 0.18,
    "zstd": 0.0,
    "zstd(none, item_size=4, level=1)": 0.0,
    "zstd(int4)": 0.42,
    "token_mixed(metric=norm, fraction=0.25, high=int8, low=int4)": 0.42,
    "token_mixed(metric=random, fraction=0.5, high=none, low=int2)": 1.0,
    "token_mixed(metric=uniform, fraction=0.3, high=zstd(int8), low=int4)": 0.42,
    "token_mixed(metric=column, fraction=1)": 0.03,
    "token_graded(metric=uniform, fractions=[0.2, 0.3], codecs=[fp16, hadamard(int8), int4(granularity=token)])": 0.35,
    "token_graded(metric=column, fractions=[0.1, 0.2, 0.3, 0.2], "
    "codecs=[none, fp16, zstd(int8), zstd(int4), int2])": 0.6,
    "hadamard(token_mixed(metric=norm, fraction=0.25))": 0.2,
}
# constant rows come back within 1% from these; the others mix channels or tokens, or drop values
SCALAR_SPECS = [s for s in SPECS if not s.startswith(("hadamard", "topk", "outlier(channels=[0]", "hqq1"))]
ROW_CODECS = [s for s in SPECS if isinstance(make(s), RowCodec)]


def test_every_builtin_is_tested():
    calibrated = {"klt", "klt_fixed"}  # tests/compressors/test_klt.py
    assert {spec.partition("(")[0] for spec in SPECS} == set(builtin_names()) - calibrated
    assert ERROR_BOUNDS.keys() == set(SPECS)


SLOW_CHECKS = ("round trip", "frame invariance", "extreme values")


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in SLOW_CHECKS])
@pytest.mark.parametrize("spec", SPECS)
def test_contract(spec, check):
    assert find_violations(spec, check) == []


@pytest.mark.parametrize("check", SLOW_CHECKS)
@pytest.mark.parametrize("spec", MANY_SLOW_SPECS)
def test_contract_for_many_inputs(spec, check):
    assert find_violations(spec, check) == []


@pytest.mark.parametrize("spec", SPECS)
def test_float64(spec):
    """For tests of the pipeline: `none` keeps all bits, other codecs code what float32 keeps."""
    x = hidden_states((2, 13, 64)).double() * (1 + 1e-12)
    decoded = round_trip(spec, x)
    assert decoded.dtype == torch.float64
    if spec in ("none", "zstd", "zstd(none, item_size=4, level=1)"):
        assert torch.equal(decoded, x) and not torch.equal(x.float().double(), x)
        return
    if "none" not in spec:
        assert torch.equal(decoded, round_trip(spec, x.float()).double())
    payload = compress(make(spec, x.dtype), x)
    assert payload.nbytes <= make(spec, x.dtype).max_nbytes(x.shape)


@pytest.mark.parametrize("spec", SPECS)
def test_error_on_hidden_states(spec):
    x = hidden_states((2, 40, 576))
    error = (round_trip(spec, x) - x).norm() / x.norm()
    assert error <= ERROR_BOUNDS[spec]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_finite_input_decodes_to_finite_output(spec, dtype):
    limits = torch.finfo(dtype)
    x = torch.zeros(1, 8, 70, dtype=dtype)
    x[0, 1] = 1.5
    x[0, 2] = -3.0
    x[0, 3] = limits.max
    x[0, 4, ::2], x[0, 4, 1::2] = limits.max, -limits.max
    x[0, 5, 7] = limits.max
    x[0, 6] = limits.tiny
    decoded = round_trip(spec, x)
    assert decoded.isfinite().all()
    if make(spec).causal:
        assert not decoded[0, 0].any(), "a token of zeros comes back as zeros"
        if spec in SCALAR_SPECS:
            torch.testing.assert_close(decoded[0, 1:3], x[0, 1:3], rtol=0.01, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", SPECS)
def test_a_non_finite_value_stays_visible_and_in_its_token(spec, value):
    x = hidden_states((1, 4, 130))
    clean = round_trip(spec, x)
    x[0, 1, 77] = value
    decoded = round_trip(spec, x)
    assert not decoded[0, 1].isfinite().all()
    if make(spec).causal:
        assert torch.equal(decoded[0, [0, 2, 3]], clean[0, [0, 2, 3]])


@pytest.mark.parametrize("spec", [s for s in SPECS if not make(s).causal])
def test_codecs_marked_non_causal_are(spec):
    x = hidden_states((1, 8, 96))
    changed = x.clone()
    changed[0, 7, 40:] *= 100
    assert not torch.equal(round_trip(spec, changed)[0, :7], round_trip(spec, x)[0, :7])


@pytest.mark.parametrize("spec", [s for s in SPECS if not make(s).frame_invariant])
def test_codecs_that_make_no_claim_for_frames_could_not(spec):
    """`klt` and `klt_fixed`: tests/compressors/test_klt.py."""
    assert next(dependence_on_frames(Subject(spec)), None)


def test_the_codecs_of_a_token_can_generate():
    for spec in SPECS:
        outer, _, options = spec.partition("(")
        mixes_tokens = "granularity=tensor" in options or "absmax=nested" in options or "channels=2" in options
        mixes_tokens |= outer == "block_rowcol_mean" or ("token_" in spec and "fraction=1)" not in options)
        assert make(spec).frame_invariant == (not mixes_tokens), spec


@pytest.mark.parametrize("spec", MANY_SLOW_SPECS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(3, 70)))
def test_any_bytes_within_the_bound_decode_to_the_right_shape_or_are_corrupt(spec, seed, shape):
    codec = make(spec, hidden_size=shape[-1])
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (codec.max_nbytes(shape),), dtype=torch.uint8, generator=generator)
    for dtype in DTYPES:
        try:
            decoded = codec.decompress(Payload(data, shape), CPU, dtype)
        except CorruptPayload:
            assert not isinstance(codec, RowCodec), "a row codec gives every byte a meaning"
        else:
            assert decoded.shape == shape and decoded.dtype == dtype


@pytest.mark.parametrize("spec", slow_but(FIRST_OF_CLASS, [s for s in SPECS if make(s).max_nbytes((2, 3, 64)) > 4]))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_damaged_payloads(spec, data):
    x = hidden_states((2, 3, 64))
    damaged = compress(make(spec), x).data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, damaged.numel() - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, damaged.numel()))] if data.draw(st.booleans()) else damaged
    try:
        decoded = make(spec).decompress(Payload(damaged, x.shape), CPU, x.dtype)
    except CorruptPayload:
        return
    assert decoded.shape == x.shape


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], DTYPES), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 4, 129), (3, 5, 100), (1, 64, 576)], ids=str)
@pytest.mark.parametrize("spec", ROW_CODECS)
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
        a, b = (c.decompress(payload, CPU, out_dtype) for c in (compiled, reference))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS)
def test_inference_mode_and_gradients_make_no_difference(spec):
    codec, x = make(spec, hidden_size=96), hidden_states((2, 6, 96))
    with torch.inference_mode():
        first = codec.decompress(compress(codec, x), CPU, x.dtype).clone()
    second = codec.decompress(compress(codec, x.clone().requires_grad_()), CPU, x.dtype)
    assert torch.equal(first, second)
    assert not second.requires_grad and not second.is_inference()


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "none"])
def test_scratch_is_reused(spec):
    codec, x = make(spec, hidden_size=96), hidden_states((2, 6, 96))
    address = compress(codec, x).data.data_ptr()
    assert compress(codec, x[:, :4]).data.data_ptr() == address


@pytest.mark.parametrize("width", [1, 2, 6, 40, 96, 576, 5120])
def test_compiled_rotation_makes_the_floats_of_the_torch_operations(width):
    x = hidden_states((6, width))
    x[1, 0], x[2, 0], x[3, 0] = math.nan, math.inf, 3e38
    block, factors = hadamard.rotation(0, width, CPU)
    rotated, back = x.clone(), x.clone()
    kernels.rotate(rotated.numpy(), block, factors.numpy(), 1e38)
    kernels.rotate_back(back.numpy(), block, factors.numpy())
    expected = hadamard.rotate_by_torch(x, block, factors, 1e38), hadamard.rotate_back_by_torch(x, block, factors)
    torch.testing.assert_close((rotated, back), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(hadamard.rotate_back_by_torch(rotated[:1], block, factors), x[:1], rtol=1e-4, atol=1e-4)
