"""Codes and numbers against the libraries that the codecs follow; skipped where one is not installed."""

from __future__ import annotations

import pytest
import torch
from codec_cases import DTYPES, make

from compressors.bitpack import split_bytes, unpack

CPU = torch.device("cpu")


def awkward_rows(width, dtype=torch.float32):
    """[37, width]: channels over nine decades, zeros, subnormals, ramps that hit midpoints, one sign only."""
    x = torch.randn(37, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, width)
    x[3] = 0
    x[4, :64] = 1e-40
    x[5, :64] = torch.linspace(-1, 1, 64)
    x[6, ::3] = 0
    x[7] = -x[7].abs()
    x[8] = (torch.arange(width) % 49 - 24) / 4
    return x.to(dtype)


def parts(codec, x):
    """The codec's payload of rows `x` [N, H], cut into its sections."""
    return split_bytes(codec.compress(x[None]).data, *codec.sections(*x.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 576, 5120])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_bitsandbytes_4bit(table, width, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    x = awkward_rows(width, dtype)
    packed, state = functional.quantize_4bit(x, quant_type=table, blocksize=64)
    codec = make(table, dtype, width)
    absmax, codes = parts(codec, x)
    assert torch.equal(absmax.flatten(), state.absmax)
    assert torch.equal(codes.flatten(), packed.flatten())
    if dtype == torch.float32:
        decoded = codec.decompress(codec.compress(x[None]), CPU, dtype)[0]
        assert torch.equal(decoded, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("width", [576, 5120])
def test_bitsandbytes_nested_absmax(width):
    functional = pytest.importorskip("bitsandbytes.functional")
    x = awkward_rows(width)
    _, state = functional.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)
    offset, nested_absmax, nested_codes, _ = parts(make("nf4(absmax=nested)", hidden_size=width), x)
    # their mean is a float32 sum, so a code on a midpoint may differ
    torch.testing.assert_close(offset[0], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(nested_absmax, state.state2.absmax, rtol=1e-5, atol=0)
    assert (nested_codes.flatten() != state.absmax.flatten()).float().mean() < 0.005


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nbits", range(2, 9))
def test_torchao_affine(nbits, dtype):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = awkward_rows(576, dtype)
    rows, block, levels = x.float(), (1, 576), (-(2 ** (nbits - 1)), 2 ** (nbits - 1) - 1)
    scale, zero = primitives.choose_qparams_affine(
        rows,
        primitives.MappingType.ASYMMETRIC,
        block,
        torch.int8,
        *levels,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.int16,
    )
    q = primitives.quantize_affine(rows, block, scale.float(), zero, torch.int8, *levels)
    expected = primitives.dequantize_affine(
        q, block, scale.float(), zero, torch.int8, *levels, output_dtype=torch.float32
    )
    codec = make(f"int{nbits}", dtype, 576)
    own_scale, own_zero, packed = parts(codec, x)
    assert torch.equal(own_scale, scale) and torch.equal(own_zero, zero)
    assert torch.equal(unpack(packed, nbits, 576).int() + levels[0], q.int())
    assert torch.equal(codec.decompress(codec.compress(x[None]), CPU, torch.float32)[0], expected)


@pytest.mark.parametrize("variant", ["e4m3", "e5m2"])
def test_torchao_float8(variant):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[variant]
    x = awkward_rows(576)
    x[3] = 1.0  # theirs divides a row of zeros by zero
    scale = primitives._choose_scale_float8(x, (1, 576), dtype)
    q = primitives._quantize_affine_float8(x, scale, dtype)
    own_scale, codes = parts(make(f"fp8_{variant}"), x)
    assert torch.equal(own_scale, scale.flatten())
    assert torch.equal(codes, q.view(torch.uint8))


def test_torchao_mxfp4():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = awkward_rows(576)
    scale, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    exponents, codes = parts(make("mxfp4"), x)
    assert torch.equal(exponents, scale.view(torch.uint8))
    theirs = packed.view(torch.uint8)
    assert torch.equal(codes, (theirs << 4) | (theirs >> 4)), "they put the first of a pair low"


@pytest.mark.parametrize("data", ["normal", "laplace", "outlier channels", "small"])
@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_hqq_error_is_within_a_percent(nbits, data):
    quantize = pytest.importorskip("hqq.core.quantize")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 576, generator=generator)
    if data == "laplace":
        x = 5 * x.sign() * -torch.rand(256, 576, generator=generator).log()
    elif data == "outlier channels":
        x[:, ::97] *= 30
    elif data == "small":
        x *= 0.02
    q, meta = quantize.Quantizer.quantize(x, nbits=nbits, group_size=64, axis=1, device="cpu", bitpack=False)
    theirs = quantize.Quantizer.dequantize(q, meta | {"compute_dtype": torch.float32})
    codec = make(f"hqq{nbits}", hidden_size=576)
    ours = codec.decompress(codec.compress(x[None]), CPU, torch.float32)[0]
    # theirs keeps scale and zero in float32, ours sends them in fp16
    assert (ours - x).norm() <= 1.01 * (theirs - x).norm()
    assert (ours - x).abs().mean() <= 1.01 * (theirs - x).abs().mean()
