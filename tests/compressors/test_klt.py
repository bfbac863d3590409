"""Calibrated codecs keep the contract, agree across objects and machines, and refuse foreign calibrations."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klt_cases import LINK, VOCABULARY, Calibrated, calibrate, folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressors import CorruptPayload, LinkInfo, Payload, make_compressor
from compressors.check import CHECKS, hidden_states, side_inputs, travelling
from compressors.kernels.klt import few_tokens
from compressors.klt.calibration_file import file_name
from tests.helpers.marks import slow_but

CPU = torch.device("cpu")
KLT = {"name": "klt", "step": 0.4}
FIXED = {"name": "klt_fixed", "nbits": 3}
CASES = {
    "klt with ids": (KLT, True),
    "klt": (KLT, False),
    "klt_fixed": (FIXED, False),
}
MANY_SLOW_CASES = slow_but(("klt with ids", "klt_fixed"), CASES)
SUBJECTS = pytest.mark.parametrize("subject", [Calibrated(*case) for case in CASES.values()], ids=CASES)


def make(options=KLT, use_token_ids=True, hidden_size=96, **link):
    info = {"name": LINK, "hidden_size": hidden_size, "max_tokens": 64} | link
    return make_compressor({"calibration": folder(hidden_size, use_token_ids), **options}, LinkInfo(**info))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", slow_but(("klt with ids", "klt_fixed"), CASES))
def test_contract(name, check):
    assert list(CHECKS[check](Calibrated(*CASES[name]))) == []


@SUBJECTS
def test_non_finite_values_stay_visible_and_change_no_earlier_token(subject):
    x = hidden_states((2, 5, 96))
    clean = subject.round_trip(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        changed = x.clone()
        changed[0, 2, 7] = value
        decoded = subject.round_trip(changed)
        assert not decoded[0, 2].isfinite().all() and decoded[0, 3:].isfinite().all()
        assert torch.equal(decoded[0, :2], clean[0, :2]) and torch.equal(decoded[1], clean[1])


RATES = {
    "klt": [{"step": step} for step in (1.0, 0.4, 0.2, 0.05, 0.002)],
    "klt_fixed": [{"nbits": nbits} for nbits in (1, 3, 4, 6, 8)],
}


@pytest.mark.parametrize("name", CASES)
def test_error_falls_with_the_rate(name):
    options, use_token_ids = CASES[name]
    x = hidden_states((2, 40, 96), seed=11)
    sizes, errors = [], []
    for rate in RATES[options["name"]]:
        subject = Calibrated(options | rate, use_token_ids)
        sizes.append(subject.compress(subject.make(x), x).nbytes)
        errors.append(float((subject.round_trip(x) - x).norm() / x.norm()))
    assert sizes == sorted(set(sizes)) and errors == sorted(set(errors), reverse=True)
    assert errors[1] < 0.45 and errors[-1] < 0.02


@SUBJECTS
def test_inference_mode_and_gradients_make_no_difference(subject):
    x = hidden_states((2, 6, 96))
    codec = subject.make(x)
    with torch.inference_mode():
        first = subject.decompress(codec, subject.compress(codec, x), x).clone()
    second = subject.decompress(codec, subject.compress(codec, x.clone().requires_grad_()), x)
    assert torch.equal(first, second)
    assert not second.requires_grad and not second.is_inference()


def test_outliers_are_exact():
    """An attention sink: far larger than other tokens, nearly all in one channel."""
    x = hidden_states((1, 6, 96))
    x[0, 0] *= 100
    x[0, 3, 5] = 3e38
    decoded = Calibrated(KLT).round_trip(x)
    torch.testing.assert_close(decoded[0, [0, 3]], x[0, [0, 3]], rtol=1e-3, atol=3e33)
    torch.testing.assert_close(decoded[0, 0], x[0, 0], rtol=1e-3, atol=1.0)


def test_target_bits_is_what_held_out_text_takes():
    calibration, _ = calibrate(96, True)
    subject = Calibrated({"name": "klt", "target_bits": 2.0})
    x = hidden_states((1, 60, 96), seed=13)
    bits = 8 * subject.compress(subject.make(x), x).nbytes / x.numel()
    assert 1.2 < bits < 3.2  # other text: no token follows from its id
    assert (calibration.rate_bits.diff() <= 0).all()


def test_klt_alone_is_frame_invariant():
    """`klt_fixed` need not be: it takes means and matrix products as torch has them, and the order in which those sum
    may depend on the number of rows and on a row's place, on an accelerator above all.
    """
    for name, case in CASES.items():
        codec = Calibrated(*case).make(torch.empty(1, 1, 96))
        assert codec.frame_invariant == (name != "klt_fixed")


@pytest.mark.slow
def test_a_token_is_the_same_in_frames_of_any_length():
    """At a size where libraries change their way of summing with the number of rows."""
    codec, x = make(hidden_size=576), hidden_states((1, 200, 576))
    ids = torch.arange(200).view(1, 200) % VOCABULARY
    together = codec.decompress(codec.compress(x, token_ids=ids), CPU, x.dtype, token_ids=ids)
    for t in (0, 1, 63, 64, 127, 130, 199):
        alone = ids[:, t : t + 1]
        payload = codec.compress(x[:, t : t + 1], token_ids=alone)
        assert torch.equal(codec.decompress(payload, CPU, x.dtype, token_ids=alone), together[:, t : t + 1])


@pytest.mark.parametrize("use_token_ids", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 6])
def test_few_tokens_have_the_bytes_that_more_would_have(num_tokens, use_token_ids, monkeypatch):
    """They are coded and decoded in one call of a kernel, with a raw token among them or without one."""
    codec = make(use_token_ids=use_token_ids)
    for seed, scale in ((0, 1.0), (1, 1e6)):
        x = hidden_states((1, num_tokens, 96), seed=seed)
        x[:, -1] *= scale
        ids = {"token_ids": torch.arange(num_tokens)[None] % VOCABULARY} if use_token_ids else {}
        payload = codec.compress(x, **ids)
        decoded = codec.decompress(payload, CPU, torch.float32, **ids)
        with monkeypatch.context() as patch:
            patch.setattr(few_tokens, "MOST_TOKENS", 0)
            assert torch.equal(codec.compress(x, **ids).data, payload.data)
            assert torch.equal(codec.decompress(payload, CPU, torch.float32, **ids), decoded)


def test_ids_come_beside_the_payload():
    codec, x = make(), hidden_states((2, 30, 96), seed=15)
    ids = torch.arange(60).view(2, 30)
    assert codec.needs == codec.decoder_needs == ("token_ids",)
    assert make(use_token_ids=False).needs == make(use_token_ids=False).decoder_needs == ()
    payload = codec.compress(x, token_ids=ids)
    decoded = codec.decompress(payload, CPU, x.dtype, token_ids=ids)
    assert (decoded - x).norm() < 0.45 * x.norm()
    assert not torch.equal(codec.decompress(payload, CPU, x.dtype, token_ids=ids.flip(1)), decoded)
    with pytest.raises(ValueError, match="needs token_ids of 60 tokens"):
        codec.decompress(payload, CPU, x.dtype)


def test_prediction_uses_token_ids():
    subject = Calibrated(KLT)
    codec = subject.make(torch.empty(1, 1, 96))
    x = hidden_states((1, 4, 96))
    with pytest.raises(ValueError, match="needs token_ids of 4 tokens"):
        codec.compress(x)
    with pytest.raises(ValueError, match=f"has {VOCABULARY} token ids"):
        codec.compress(x, token_ids=torch.full((1, 4), VOCABULARY))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", MANY_SLOW_CASES)
def test_damaged_payloads(name, data):
    x = hidden_states((2, 4, 96))
    x[0, 1] *= 1000
    codec = make(*CASES[name])
    damaged = codec.compress(x, **side_inputs(codec, x)).data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, damaged.numel() - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, damaged.numel()))] if data.draw(st.booleans()) else damaged
    try:
        decoded = codec.decompress(Payload(damaged, x.shape), CPU, x.dtype, **travelling(codec, side_inputs(codec, x)))
    except CorruptPayload:
        return
    assert decoded.shape == x.shape


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), nbytes=st.integers(0, 3000), shape=st.tuples(st.integers(0, 2), st.integers(0, 9))
)
@pytest.mark.parametrize("name", MANY_SLOW_CASES)
def test_any_bytes(name, seed, nbytes, shape):
    codec, shape = make(*CASES[name]), (*shape, 96)
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    try:
        side = travelling(codec, side_inputs(codec, torch.empty(shape)))
        decoded = codec.decompress(Payload(data, shape), CPU, torch.float32, **side)
    except CorruptPayload:
        return
    assert decoded.shape == shape


def test_the_largest_frame_of_several_blocks_is_as_large_as_promised():
    """Tokens that cost just what raw ones may: more than their own bound, without that of the blocks."""
    from compressors.kernels import klt as kernels

    num_tokens, width = 4, 40_000
    frequencies = np.ones(kernels.NUM_SYMBOLS, np.int64)
    frequencies[0] = frequencies[-2] = 1 << 14  # a level of 0 takes 1 bit, others 15, escapes 37
    frequencies[-2] -= kernels.NUM_SYMBOLS - 2
    starts = np.tile(np.concatenate([[0], frequencies.cumsum()]).astype(np.int32), (2 * kernels.NUM_CLASSES, 1))
    models = kernels.make_models(
        side_classes=np.full(2, kernels.FIRST_CLASS, np.int32),
        component_class=np.full(width, -1000, np.int32),
        magnitude=np.zeros(kernels.LAST_WIDE_CLASS - kernels.FIRST_CLASS + 1, np.int64),
        trust_starts=np.array([0, 1, 2, 1 << 15], np.int32),
        starts=starts,
    )
    nbits = 16 * (width + 1)
    num_escapes, rest = 0, nbits - width
    while rest % 14 or rest // 14 > width - num_escapes:
        num_escapes, rest = num_escapes + 1, rest - 36
    levels = np.zeros((num_tokens, width), np.int32)  # multiples of 4 keep to the first quantiser
    levels[:, :num_escapes], levels[:, num_escapes : num_escapes + rest // 14] = 128, -4
    sides = [np.full(num_tokens, value, np.int32) for value in (1000, 64, 0)]
    symbols = kernels.Symbols(levels, np.zeros(num_tokens, np.bool_), *sides)
    frame = kernels.encode(symbols, models, 256 * nbits)
    assert kernels.num_blocks(num_tokens, width) == 2 and not symbols.is_raw.any()
    assert num_tokens * (2 * width + 18) < frame.size <= make().max_nbytes((1, num_tokens, width))
    kernels.encode(symbols, models, 256 * nbits - 1)
    assert symbols.is_raw.all()


def test_bits_of_klt_fixed_are_whole_and_add_up():
    codec = make(FIXED)
    x = torch.zeros(1, 7, 96)
    assert codec.fixed_size and codec.compress(x).nbytes == codec.max_nbytes(x.shape)
    # 3 bits a value and a scale a token; each width's codes are padded by at most 2 bytes
    assert 3 + 16 / 96 <= 8 * codec.max_nbytes((1, 1000, 96)) / 96_000 <= 3 + 16 / 96 + 8 * 7 * 2 / 96


@pytest.mark.parametrize("hidden_size", [96, 100])
@pytest.mark.parametrize("nbits", [2, 3, 4.3])
def test_klt_fixed_reads_a_single_token(hidden_size, nbits):
    codec = make({"name": "klt_fixed", "nbits": nbits}, hidden_size=hidden_size)
    x = torch.randn(1, 3, hidden_size, generator=torch.Generator().manual_seed(0))
    for t in range(3):
        alone = codec.decompress(codec.compress(x[:, t : t + 1]), "cpu", torch.float32)
        together = codec.decompress(codec.compress(x), "cpu", torch.float32)
        torch.testing.assert_close(alone, together[:, t : t + 1])


def test_a_foreign_or_damaged_calibration_is_refused(tmp_path):
    good = Path(folder(96)) / file_name(LINK)
    with pytest.raises(ValueError, match="hidden size 100, got 96"):
        make_compressor({"calibration": folder(96), **KLT}, LinkInfo(name=LINK, hidden_size=100, max_tokens=1))
    with pytest.raises(ValueError, match="checkpoint 'other', this one has 'some model'"):
        make(checkpoint="other")
    assert make(checkpoint="some model").codec_id() == make().codec_id()
    with pytest.raises(ValueError, match="a folder with layer-3-node0-node1.safetensors"):
        make(name="layer:3:node0->node1")
    renamed = tmp_path / file_name("layer:3:node0->node1")
    shutil.copy(good, renamed)
    with pytest.raises(ValueError, match="a file with link 'layer:3:node0->node1', this one has 'check'"):
        make({"calibration": str(tmp_path), **KLT}, name="layer:3:node0->node1")
    blob = good.read_bytes()
    for damaged in (blob[:100], blob[:-1], b"", b"\0" * 64):
        (tmp_path / good.name).write_bytes(damaged)
        with pytest.raises(ValueError, match="a safetensors file made by python -m pipeline.calibrate"):
            make({"calibration": str(tmp_path), **KLT})
    (tmp_path / good.name).write_bytes(blob[:-1])
    with pytest.raises(ValueError, match=rf"of {len(blob)} bytes \(this one has {len(blob) - 1}\)"):
        make({"calibration": str(tmp_path), **KLT})


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("starts", lambda starts: starts[:-1]),
        ("starts", lambda starts: starts.flip(0)[:, :1].repeat(1, starts.shape[1])),
        ("magnitude", lambda magnitude: magnitude[1:]),
        ("side_classes", lambda classes: classes + 1000),
        ("decode", lambda decode: decode[:, 1:]),
        ("mean", lambda mean: mean * torch.inf),
    ],
)
def test_a_calibration_of_other_sizes_is_refused(tensor, change, tmp_path):
    """The kernels index its tables without looking."""
    shutil.copytree(folder(96), tmp_path, dirs_exist_ok=True)
    path = tmp_path / file_name(LINK)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    make({"calibration": str(tmp_path), **KLT})
    save_file(tensors | {tensor: change(tensors[tensor]).contiguous()}, path, metadata)
    with pytest.raises(ValueError, match="a whole file of format"):
        make({"calibration": str(tmp_path), **KLT})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "klt"}, "step is None, allowed: a number, or target_bits"),
        ({"name": "klt", "step": 0.5, "target_bits": 2.0}, "or target_bits instead"),
        ({"name": "klt", "step": 0.0}, "step is 0.0, allowed: a number from"),
        ({"name": "klt", "step": True}, "step is True"),
        ({"name": "klt", "target_bits": 0.001}, "target_bits is 0.001, allowed: a number from"),
        ({"name": "klt_fixed", "nbits": 9}, "nbits is 9, allowed: a number from"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(options)


@pytest.mark.slow
def test_a_calibration_from_little_text_and_dead_channels():
    """Fewer tokens than channels, channels that never change, tokens far from the others: still a codec."""
    from compressors.klt.codec import KltCoder
    from compressors.klt.fit import LinkStatistics, fit
    from compressors.klt.models import SampleRow
    from compressors.klt.token_table import NarrowTable

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 64, generator=generator)
    x[..., 5:9] = 0
    x[0, 0] *= 1e4
    statistics = LinkStatistics(64, 0, CPU)
    statistics.add(x, torch.zeros(1, 20, 0))
    statistics.add_gradients(x, torch.randn(x.shape, generator=generator))
    assert statistics.num_tokens == 19
    no_ids = NarrowTable.empty()
    sample = [SampleRow(x[0], torch.zeros(20, dtype=torch.int32))]
    coder = KltCoder(fit(statistics, sample, no_ids), no_ids.table, 0.05)
    other = torch.randn(1, 30, 64, generator=generator)
    decoded = coder.decompress(coder.compress(other, None).clone(), other.shape, CPU, torch.float32)
    assert (decoded - other).norm() < 0.1 * other.norm()
