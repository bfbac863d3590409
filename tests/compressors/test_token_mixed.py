"""Which tokens get which codec, what the choice costs, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import make

from compressors import CorruptPayload, Payload, make_compressor
from compressors.check import hidden_states

CPU = torch.device("cpu")
HALF = "token_mixed(metric=norm, fraction=0.5, high=none, low=int2)"


def round_trip(spec, x, importance, **side):
    payload = make(spec, x.dtype, x.shape[-1]).compress(x, importance=importance, **side)
    return payload, make(spec, x.dtype, x.shape[-1]).decompress(Payload(payload.data.clone(), x.shape), CPU, x.dtype)


def test_each_level_is_what_its_codec_makes_of_its_tokens_in_order():
    x, importance = hidden_states((2, 7, 96)), torch.tensor([[0, 5, 1, 4, 2, 6, 3], [7, 1, 9, 3, 8, 2, 0.0]])
    spec = "token_graded(metric=norm, fractions=[0.3, 0.3], codecs=[none, int8, zstd(int4)])"
    _, decoded = round_trip(spec, x, importance)
    # round(0.3 * 7) = 2 and round(0.6 * 7) = 4
    for name, first, second in (("none", [1, 5], [2, 4]), ("int8", [3, 6], [0, 3]), ("int4", [0, 2, 4], [1, 5, 6])):
        tokens = torch.stack([x[0, first], x[1, second]])
        expected = make(name).decompress(make(name).compress(tokens), CPU, x.dtype)
        assert torch.equal(torch.stack([decoded[0, first], decoded[1, second]]), expected), name


@pytest.mark.parametrize("num_tokens, num_high", [(0, 0), (1, 0), (2, 1), (3, 1), (6, 2), (100, 30)])
def test_the_fraction_is_rounded_to_whole_tokens_and_the_choice_is_counted(num_tokens, num_high):
    x = hidden_states((2, num_tokens, 96))
    spec = "token_mixed(metric=norm, fraction=0.3, high=none, low=int8)"
    payload, decoded = round_trip(spec, x, x.norm(dim=-1))
    assert [int((row == kept).all(-1).sum()) for row, kept in zip(decoded, x, strict=True)] == [num_high] * 2
    bitmap = 2 * math.ceil(num_tokens / 8) if num_high else 0
    assert payload.nbytes == 2 * (num_high * 4 * 96 + (num_tokens - num_high) * (96 + 4)) + bitmap


@pytest.mark.parametrize("fraction, inner", [(0, "int2"), (1, "none"), (0.0, "int2"), (1.0, "none")])
def test_no_choice_costs_no_bitmap_and_leaks_nothing(fraction, inner):
    x, codec = hidden_states((1, 9, 96)), make(f"token_mixed(metric=norm, fraction={fraction}, high=none, low=int2)")
    assert codec.compress(x, importance=torch.rand(1, 9)).nbytes == make(inner).max_nbytes(x.shape)
    assert codec.causal


def test_levels_cost_the_logarithm_of_their_number():
    x = hidden_states((1, 64, 96))
    for num_levels, nbits in ((2, 1), (3, 2), (4, 2), (5, 3)):
        codecs = ", ".join(["int8"] * num_levels)
        codec = make(f"token_graded(metric=norm, fractions={[0.2] * (num_levels - 1)}, codecs=[{codecs}])")
        assert codec.max_nbytes(x.shape) - make("int8").max_nbytes(x.shape) == 64 * nbits // 8


def test_equal_importance_prefers_early_tokens_and_nan_ranks_last():
    x = hidden_states((1, 4, 96))
    for importance, kept in (([1, 1, 1, 1], [0, 1]), ([math.nan, 0, math.nan, -1], [1, 3]), ([math.nan] * 4, [0, 1])):
        _, decoded = round_trip(HALF, x, torch.tensor([importance]).float())
        assert (decoded == x)[0].all(-1).nonzero().flatten().tolist() == kept


def test_a_wrong_count_in_the_bitmap_is_corrupt():
    x = hidden_states((1, 8, 96))
    data = make(HALF).compress(x, importance=torch.arange(8.0)[None]).data.clone()
    assert data[0] == 0b00001111  # level 0, the high one, has the last four tokens
    data[0] = 0b00011111
    with pytest.raises(CorruptPayload, match=r"levels of a row do not have \[4, 4\] tokens"):
        make(HALF).decompress(Payload(data, x.shape), CPU, x.dtype)


@pytest.mark.parametrize("size", [-1, 10**12, 2**62])
def test_sizes_of_variable_codecs_are_checked(size):
    spec = "token_mixed(metric=norm, fraction=0.5, high=zstd(int8), low=int4)"
    x = hidden_states((1, 8, 96))
    data = make(spec).compress(x, importance=torch.arange(8.0)[None]).data.clone()
    data[1:9] = torch.tensor([size]).view(torch.uint8)
    with pytest.raises(CorruptPayload, match="are possible"):
        make(spec).decompress(Payload(data, x.shape), CPU, x.dtype)


def test_inner_codecs_get_the_side_inputs_of_their_tokens():
    inner = "token_mixed(metric=norm, fraction=0.5, high=int8, low=int2)"
    nested = f"token_mixed(metric=norm, fraction=0.5, high=none, low={inner})"
    graded = "token_graded(metric=norm, fractions=[0.5, 0.25], codecs=[none, int8, int2])"
    x = hidden_states((1, 8, 96))
    importance = torch.tensor([[3, 1, 4, 1.5, 9, 2, 6, 5]])
    assert torch.equal(round_trip(nested, x, importance)[1], round_trip(graded, x, importance)[1])


@pytest.mark.parametrize(
    "spec",
    [
        "zstd({})",
        "hadamard({})",
        "outlier(channels=[0], inner={})",
        "topk(density=0.5, inner={})",
        "zstd(hadamard({}))",
    ],
)
def test_wrappers_pass_metric_and_importance_on(spec):
    codec, x = make(spec.format(HALF)), hidden_states((2, 6, 64))
    assert codec.needs == ("importance",) and codec.importance_metric == "norm" and not codec.causal
    decoded = codec.decompress(codec.compress(x, importance=x.norm(dim=-1)), CPU, x.dtype)
    assert decoded.shape == x.shape


@pytest.mark.parametrize("metric", ["random", "uniform"])
def test_a_metric_of_places_keeps_causality_only_with_causal_codecs(metric):
    assert make(f"token_mixed(metric={metric}, fraction=0.5)").causal
    assert not make(f"token_mixed(metric={metric}, fraction=0.5, low=int4(granularity=tensor))").causal
    assert not make("token_mixed(metric=norm, fraction=0.5)").causal


@pytest.mark.parametrize(
    "spec, message",
    [
        ("token_mixed(metric=norm, fraction=1.5)", "fraction is 1.5, allowed: a number from 0 to 1"),
        ("token_mixed(metric=norm, fraction=-0.1)", "fraction is -0.1"),
        ("token_mixed(metric=norm, fraction=.nan)", "fraction=.nan: .nan is not a finite number"),
        ("token_mixed(metric=norm, fraction=true)", "fraction is True"),
        ("token_mixed(metric=norm)", "needs option 'fraction'"),
        ("token_mixed(fraction=0.5)", "needs option 'metric'"),
        ("token_mixed(metric=3, fraction=0.5)", "metric is 3, allowed: the name of an importance metric"),
        ("token_mixed(metric=norm, fraction=0.5, high=int9)", "unknown compressor 'int9'"),
        (
            "token_mixed(metric=norm, fraction=0.5, low=token_mixed(metric=column, fraction=0.5))",
            "low is 'token_mixed', allowed: codecs by the same metric 'norm', not 'column'",
        ),
        ("token_graded(metric=norm, fractions=[0.5, 0.6], codecs=[fp16, int8, int4])", "add up to at most 1"),
        ("token_graded(metric=norm, fractions=[0.5], codecs=[fp16, int8, int4])", "a list of 2, one less than codecs"),
        ("token_graded(metric=norm, fractions=0.5, codecs=[fp16, int8])", "a list of 1"),
        ("token_graded(metric=norm, fractions=[], codecs=[fp16])", "a list of 2 to 16 codecs"),
        ("token_graded(metric=norm, fractions=[0.5], codecs=fp16)", "a list of 2 to 16 codecs"),
        ("token_graded(metric=norm, fractions=[0.5], codecs=[fp16, int8)", "brackets do not match"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(ValueError, match=message):
        make_compressor(spec)


def test_bad_importance_is_refused():
    x = hidden_states((2, 6, 96))
    with pytest.raises(ValueError, match=r"importance is \(2, 5\), expected \(2, 6\)"):
        make(HALF).compress(x, importance=torch.zeros(2, 5))


def test_lists_of_codecs_in_short_form_keep_their_options():
    codec = make_compressor(
        "token_graded(metric=norm, fractions=[0.1, 0.2], "
        "codecs=[outlier(channels=[0, 3], inner=int8), int4(granularity=token), int2])"
    )
    assert [inner.name for inner in codec.codecs] == ["outlier", "int4", "int2"]
    assert codec.codecs[0].channels == [0, 3]
    assert codec.config()["codecs"][1] == {"name": "int4", "nbits": 4, "granularity": "token"}
    assert [inner["format_version"] for inner in codec.format_config()["codecs"]] == [1, 1, 1]
