"""Calibrated codecs keep the contract, agree across objects and machines, and refuse foreign calibrations."""

from __future__ import annotations

import hashlib
import itertools
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
from compressors.check import CHECKS, dependence_on_frames, hidden_states, side_inputs, travelling
from compressors.klt.calibration_file import file_name, read_calibration
from tests.helpers.marks import slow_but

CPU = torch.device("cpu")
KLT = {"name": "klt", "step": 0.4}
TOKENWISE = KLT | {"temporal": False}
FIXED = {"name": "klt_fixed", "nbits": 3}
CASES = {
    "klt with ids": (KLT, True),
    "klt": (KLT, False),
    "klt by token with ids": (TOKENWISE, True),
    "klt by token": (TOKENWISE, False),
    "klt_fixed": (FIXED, False),
}
MANY_SLOW_CASES = slow_but(("klt with ids", "klt_fixed"), CASES)
SUBJECTS = pytest.mark.parametrize("subject", [Calibrated(*case) for case in CASES.values()], ids=CASES)


def make(options=KLT, use_token_ids=True, hidden_size=96, **link):
    info = {"name": LINK, "hidden_size": hidden_size, "max_tokens": 64} | link
    return make_compressor({"calibration": folder(hidden_size, use_token_ids), **options}, LinkInfo(**info))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", slow_but(("klt with ids", "klt by token with ids", "klt_fixed"), CASES))
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


def test_only_klt_by_token_is_frame_invariant():
    """`klt` is seen to depend on frames. `klt_fixed` need not be: it takes means and matrix products as torch has them,
    and the order in which those sum may depend on the number of rows and on a row's place, on an accelerator above all.
    """
    for name, case in CASES.items():
        subject = Calibrated(*case)
        assert subject.make(torch.empty(1, 1, 96)).frame_invariant == ("by token" in name)
    for use_token_ids in (True, False):
        assert next(dependence_on_frames(Calibrated(KLT, use_token_ids)), None)


@pytest.mark.slow
def test_a_token_is_the_same_in_frames_of_any_length():
    """At a size where libraries change their way of summing with the number of rows."""
    codec, x = make(TOKENWISE, hidden_size=576), hidden_states((1, 200, 576))
    ids = torch.arange(200).view(1, 200) % VOCABULARY
    together = codec.decompress(codec.compress(x, token_ids=ids), CPU, x.dtype, token_ids=ids)
    for t in (0, 1, 63, 64, 127, 130, 199):
        alone = ids[:, t : t + 1]
        payload = codec.compress(x[:, t : t + 1], token_ids=alone)
        assert torch.equal(codec.decompress(payload, CPU, x.dtype, token_ids=alone), together[:, t : t + 1])


@pytest.mark.parametrize("length", [1, 7, 8, 130, 576])
@pytest.mark.parametrize("width", [1, 5, 96, 1030])
def test_sums_of_a_product_have_one_order(length, width):
    from compressors.kernels import transform

    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(length, width)).astype(np.float32)
    rows = generator.normal(size=(131, length)).astype(np.float32)
    product = np.full((131, width), np.nan, np.float32)
    transform.multiply_rows(rows, matrix, product)
    np.testing.assert_allclose(product, rows.astype(np.float64) @ matrix.astype(np.float64), rtol=1e-3, atol=1e-4)
    in_order = np.zeros((131, width), np.float32)
    for k in range(length):
        in_order += rows[:, k : k + 1] * matrix[k]
    assert np.array_equal(product, in_order)


def test_both_ways_to_compute_agree():
    """Where nothing can be predicted from the token before: the first tokens of rows."""
    x = hidden_states((60, 1, 96), seed=14)
    frames, tokens = Calibrated(KLT, False), Calibrated(TOKENWISE, False)
    torch.testing.assert_close(frames.round_trip(x), tokens.round_trip(x), rtol=0.01, atol=0.05)
    nbytes = [subject.compress(subject.make(x), x).nbytes for subject in (frames, tokens)]
    assert nbytes[0] == pytest.approx(nbytes[1], rel=0.01)


def test_temporal_leaves_the_ids_of_codecs_as_they_were():
    codec, by_token = make(KLT), make(TOKENWISE)
    digest = read_calibration("klt", folder(96, True), LinkInfo(name=LINK, hidden_size=96, max_tokens=64)).digest
    known = {"name": "klt", "calibration": digest, "step": 0.4, "target_bits": None, "format_version": 1}
    assert codec.format_config() == known and make(KLT | {"temporal": True}).codec_id() == codec.codec_id()
    assert by_token.format_config() == known | {"temporal": False} and by_token.codec_id() != codec.codec_id()
    with pytest.raises(ValueError, match="temporal is 1, allowed: True, False"):
        make(KLT | {"temporal": 1})


def test_by_token_ids_come_beside_the_payload():
    codec, x = make(TOKENWISE), hidden_states((2, 30, 96), seed=15)
    ids = torch.arange(60).view(2, 30)
    assert codec.needs == codec.decoder_needs == ("token_ids",) and make(KLT).decoder_needs == ()
    assert make(TOKENWISE, use_token_ids=False).decoder_needs == ()
    payload = codec.compress(x, token_ids=ids)
    decoded = codec.decompress(payload, CPU, x.dtype, token_ids=ids)
    assert (decoded - x).norm() < 0.45 * x.norm()
    assert not torch.equal(codec.decompress(payload, CPU, x.dtype, token_ids=ids.flip(1)), decoded)
    with pytest.raises(ValueError, match="needs token_ids of 60 tokens"):
        codec.decompress(payload, CPU, x.dtype)


def test_prediction_uses_token_ids():
    subject = Calibrated(KLT)
    codec = subject.make(torch.empty(1, 1, 96))
    assert (
        codec.needs == ("token_ids",) and Calibrated(KLT, use_token_ids=False).make(torch.empty(1, 1, 96)).needs == ()
    )
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


def walk(indices):
    """(levels, quantisers) of a token's indices."""
    from compressors.kernels import trellis

    state, levels, quantizers = 0, [], []
    for index in indices:
        quantizers.append(state >> 1)
        levels.append(trellis.level_of_index(index, state >> 1))
        assert trellis.index_of_level(levels[-1], state >> 1) == index
        state = trellis.NEXT_STATE[state, index & 1]
    return levels, quantizers


@pytest.mark.slow
def test_the_trellis_finds_the_nearest_levels():
    """No sequence of indices comes nearer to the target; with rates, none that the search weighs is cheaper."""
    from compressors.kernels import trellis

    num_tokens, width, largest = 40, 5, 3
    target = np.random.default_rng(0).normal(scale=1.5, size=(num_tokens, width)).astype(np.float32)
    sequences = list(itertools.product(range(-largest, largest + 1), repeat=width))
    levels, quantizers = (np.array(part) for part in zip(*map(walk, sequences), strict=True))
    errors = np.square(levels[None] - target[:, None]).sum(2)
    rates = np.random.default_rng(1).uniform(0, 1, (1, 2, largest + 1)).astype(np.float32)
    prices = rates[0, quantizers, np.abs(sequences)].sum(1)

    def chosen(rates):
        found, decoded = np.zeros((num_tokens, width), np.int32), np.zeros((num_tokens, width), np.float32)
        nothing = trellis.Prediction(
            from_ids=np.zeros_like(target),
            temporal_in=np.zeros((width, 0), np.float32),
            temporal_out=np.zeros((0, width), np.float32),
            tokens_per_row=num_tokens,
        )
        steps, finer = np.full(num_tokens, 2, np.float32), np.zeros(num_tokens, np.int32)
        in_one_class, is_raw = trellis.Prices(np.zeros(width, np.int32), rates), np.zeros(num_tokens, np.bool_)
        trellis.quantize(target, steps, finer, nothing, in_one_class, found, is_raw, decoded)
        assert not is_raw.any()
        assert np.array_equal(decoded, found)
        at = np.array([np.flatnonzero((levels == row).all(1))[0] for row in found])
        return errors[range(num_tokens), at], prices[at]

    nearest, dear = chosen(np.zeros_like(rates))
    assert nearest == pytest.approx(errors.min(1), abs=1e-4)
    error, price = chosen(rates)
    assert (error + price <= nearest + dear + 1e-4).all() and price.sum() < dear.sum()


def test_the_entropy_coder_is_an_integer_format():
    """Symbols of every size and class to the same words on every machine, and back."""
    from compressors.kernels import klt as kernels
    from compressors.kernels import trellis
    from compressors.klt.models import prior_models

    num_tokens, width = 9, 40
    values = (np.arange(num_tokens * width) * 7919 % 1000).reshape(num_tokens, width).astype(np.int32)
    indices = (values - 500) // np.array([[1], [5], [20], [90], [300], [1], [10**6], [100], [7]], np.int32)
    indices[4, 3], indices[4, 4] = trellis.MAX_LEVEL // 2 - 1, 1 - trellis.MAX_LEVEL // 2
    levels = np.array([walk(row)[0] for row in indices.tolist()], np.int32)
    prior = {name: tensor.numpy() for name, tensor in prior_models().items()}
    models = kernels.make_models(
        side_classes=np.array([12, 5], np.int32),
        component_class=np.linspace(60, -30, width).astype(np.int32),
        num_ids=5,
        id_starts=np.array([0, 20000, 30000, 32768], np.int32),
        **prior,
    )
    is_raw = np.zeros(num_tokens, np.bool_)
    is_raw[6] = True
    sent = kernels.Symbols(
        levels=levels,
        is_raw=is_raw,
        rms=np.arange(-4, 5, dtype=np.int32),
        finer=np.arange(-8, 10, 2, dtype=np.int32),
        id_ranks=np.array([3, 0, 2, 1, 4, 3, 0, 2, 1], np.int32),
    )
    ops, words = np.zeros((20_000, 3), np.uint16), np.zeros(20_000, np.uint32)
    num_words = kernels.encode(sent, models, 1 << 40, ops, words)
    assert is_raw.sum() == 1
    digest = hashlib.sha256(words[:num_words].astype("<u4").tobytes()).hexdigest()[:16]
    assert (num_words, digest) == GOLDEN_WORDS
    got = kernels.Symbols(
        np.ones_like(levels), np.zeros(num_tokens, np.bool_), *np.zeros((3, num_tokens), np.int32)
    )
    assert kernels.decode(words[:num_words], models, got) == num_words
    assert np.array_equal(got.is_raw, is_raw)
    for name in ("levels", "rms", "finer", "id_ranks"):
        assert np.array_equal(getattr(got, name)[~is_raw], getattr(sent, name)[~is_raw]), name


GOLDEN_WORDS = (147, "c14f427befe2bb46")


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
    statistics.add(x, torch.randn(x.shape, generator=generator), torch.zeros(1, 20, 0))
    assert statistics.num_tokens == 19
    no_ids = NarrowTable.empty()
    sample = [SampleRow(x[0], torch.zeros(20, dtype=torch.int32))]
    coder = KltCoder(fit(statistics, sample, no_ids), no_ids.table, 0.05)
    other = torch.randn(1, 30, 64, generator=generator)
    decoded = coder.decompress(coder.compress(other, None).clone(), other.shape, CPU, torch.float32)
    assert (decoded - other).norm() < 0.1 * other.norm()
