"""Frames as generation makes them, many and of a few tokens: no work beyond the tokens, no compiling, no growth."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import random
import sys
import threading
from pathlib import Path

import pytest
import torch
from codec_cases import SPECS, make
from klt_cases import Calibrated
from torch.utils._python_dispatch import TorchDispatchMode

import compressors.kernels
from compressors.check import hidden_states, side_inputs, travelling

CPU = torch.device("cpu")
NUM_FRAMES = 10_000
WIDTH = 96
KLT = "klt"
GENERATING = [s for s in SPECS if make(s).frame_invariant and "importance" not in make(s).needs] + [KLT]
LONG_RUN = ["none", "int4", "nf4", "hqq3", "hadamard(int4)", "outlier(channels=[0], inner=hadamard(int4))", "topk"]


def make_end(spec, width=WIDTH):
    if spec == KLT:
        return Calibrated({"name": "klt", "step": 0.4}).make(torch.empty(8, 8, width))
    return make(spec, hidden_size=width)


def round_trip(sender, receiver, x):
    side = side_inputs(sender, x)
    payload = sender.compress(x, **side)
    return payload, receiver.decompress(payload, CPU, x.dtype, **travelling(receiver, side))


def shapes(seed, width=WIDTH):
    """Passes of a generation: decoding of one to eight rows, prefills and drafts of changing lengths."""
    generator = random.Random(seed)
    while True:
        yield generator.choice([(generator.randint(1, 8), 1), (1, generator.randint(1, 48)), (2, 5)]) + (width,)


class Operations(TorchDispatchMode):
    """Counts operations, and notes the most elements that one of them made."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.count += 1
        made = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(part.numel() for part in made if isinstance(part, torch.Tensor))])
        return result


def signatures():
    """Compiled versions of all kernels."""
    modules = pkgutil.walk_packages(compressors.kernels.__path__, "compressors.kernels.")
    functions = [f for m in modules for f in vars(importlib.import_module(m.name)).values() if hasattr(f, "signatures")]
    return sum(len(function.signatures) for function in functions)


@pytest.mark.parametrize("spec", GENERATING)
def test_one_token_takes_few_operations_and_nothing_is_padded(spec):
    sender, receiver, x = make_end(spec), make_end(spec), hidden_states((1, 1, WIDTH))
    round_trip(sender, receiver, x)  # constants are made once
    with torch.inference_mode(), Operations() as operations:
        round_trip(sender, receiver, x)
    assert operations.count <= 180  # 76 for int4, 120 for hqq4
    assert operations.largest <= 64 * WIDTH  # klt's room for symbols is 58; a matrix product of 128 rows would be 128


@pytest.mark.parametrize("spec", GENERATING)
def test_no_kernel_is_compiled_after_the_first_frame(spec):
    sender, receiver = make_end(spec), make_end(spec)
    round_trip(sender, receiver, hidden_states((1, 2, WIDTH)))
    before = signatures()
    for shape in itertools.islice(shapes(1), 40):
        round_trip(sender, receiver, hidden_states(shape))
    assert signatures() == before


def resident_nbytes():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")
@pytest.mark.slow
@pytest.mark.parametrize("spec", [*LONG_RUN, "zstd(int4)", KLT])
def test_memory_stays_flat_over_many_frames(spec):
    sender, receiver = make_end(spec), make_end(spec)
    source = hidden_states((8, 48, WIDTH))
    frames = shapes(2)

    def run(count):
        for batch, num_tokens, _ in itertools.islice(frames, count):
            round_trip(sender, receiver, source[:batch, :num_tokens])

    run(2000)
    blocks, nbytes = sys.getallocatedblocks(), resident_nbytes()
    run(NUM_FRAMES)
    assert sys.getallocatedblocks() - blocks < NUM_FRAMES // 20
    assert resident_nbytes() - nbytes < 100 * NUM_FRAMES


@pytest.mark.parametrize("spec", GENERATING)
def test_links_are_served_by_threads_at_once(spec):
    inputs = [hidden_states(shape, seed=seed) for seed, shape in enumerate(itertools.islice(shapes(3), 30))]

    def run(results):
        sender, receiver = make_end(spec), make_end(spec)
        for x in inputs:
            payload, decoded = round_trip(sender, receiver, x)
            results.append((payload.data.clone(), decoded))

    alone, together = [], [[], [], []]
    run(alone)
    threads = [threading.Thread(target=run, args=(results,)) for results in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in together:
        assert len(results) == len(inputs)
        for got, expected in zip(results, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
