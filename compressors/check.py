"""Check a codec against the contract of `compressors.base` and say in words what it breaks.

    python -m compressors.check my_package.codecs:Sketch
    python -m compressors.check "outlier(channels=8, inner=int4)"

The same checks hold the built-in codecs in the tests. They use small inputs on the CPU and take seconds; how
well a codec preserves a model is for a run of the pipeline to say. Exit status 0 means that nothing was
found.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload, option_names
from compressors.registry import make_compressor

__all__ = ["CHECKS", "find_violations", "main"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 5, 96), (1, 1, 96), (1, 0, 96), (0, 3, 96), (3, 5, 100), (1, 4, 129), (2, 3, 7), (1, 1, 1))
CPU = torch.device("cpu")


def hidden_states(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values with a few channels twenty times larger, as hidden states have them."""
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    x[..., :: max(shape[-1] // 3, 1)] *= 20
    return x.to(dtype)


def side_inputs(codec: Compressor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `codec` needs beside `x`, made up.

    The importance follows the values, as metrics' do, unless the codec is causal: then its metric must know
    places only.
    """
    batch, num_tokens, _ = x.shape
    by_place = (torch.arange(num_tokens, device=x.device) * 7 % 11).float().expand(batch, num_tokens)
    side = {
        "importance": by_place if codec.causal else x.float().norm(dim=-1),
        "token_ids": torch.arange(num_tokens, device=x.device).expand(batch, num_tokens),
    }
    return {name: side[name] for name in codec.needs}


class Subject:
    """A spec under test: makes fresh codecs and runs them."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def make(self, x: torch.Tensor) -> Compressor:
        """A codec as one end of a link for inputs like `x` makes it."""
        link = LinkInfo(name="check", hidden_size=x.shape[-1], max_tokens=max(x[..., 0].numel(), 1), dtype=x.dtype)
        return make_compressor(self.spec, link)

    def compress(self, codec: Compressor, x: torch.Tensor) -> Payload:
        """Compress with made-up side inputs where the codec needs some."""
        return codec.compress(x, **side_inputs(codec, x))

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What a codec object that has seen nothing decodes from a copy of the bytes."""
        payload = self.compress(self.make(x), x)
        received = Payload(payload.data.clone(), payload.shape, dict(payload.meta))
        return self.make(x).decompress(received, CPU, x.dtype)


def check_round_trip(subject: Subject) -> Iterator[str]:
    """Shape and dtype come back, for every dtype and for empty, single, odd and batched inputs."""
    for dtype in DTYPES:
        for shape in SHAPES:
            x = hidden_states(shape, dtype)
            payload = subject.compress(subject.make(x), x)
            if payload.shape != shape:
                yield f"compress of {shape} {dtype} gives a payload of shape {payload.shape}"
            decoded = subject.round_trip(x)
            if decoded.shape != x.shape or decoded.dtype != dtype:
                yield f"{shape} {dtype} comes back as {tuple(decoded.shape)} {decoded.dtype}"
            elif not decoded.isfinite().all():
                yield f"{shape} {dtype}, all finite, comes back with NaN or infinities"


def check_size(subject: Subject) -> Iterator[str]:
    """`max_nbytes` is an upper bound of the payload, and exact where `fixed_size` says so."""
    for shape in SHAPES:
        for x in (hidden_states(shape), torch.zeros(shape), hidden_states(shape) * 1e4):
            codec = subject.make(x)
            nbytes, bound = subject.compress(codec, x).nbytes, codec.max_nbytes(shape)
            if nbytes > bound:
                yield f"a payload of {shape} has {nbytes} bytes, but max_nbytes({shape}) promises {bound}"
            elif codec.fixed_size and nbytes != bound:
                yield (
                    f"a payload of {shape} has {nbytes} bytes, max_nbytes({shape}) is {bound}: "
                    "they must be equal when fixed_size is True"
                )


def check_receiver(subject: Subject) -> Iterator[str]:
    """A second object decodes what the first one does: the bytes are complete."""
    x = hidden_states((2, 6, 96))
    sender = subject.make(x)
    payload = subject.compress(sender, x)
    copy = Payload(payload.data.clone(), payload.shape, dict(payload.meta))
    at_sender = sender.decompress(copy, CPU, x.dtype)
    if not torch.equal(subject.make(x).decompress(copy, CPU, x.dtype), at_sender):
        yield "a second codec object decodes the same bytes to other values: it lacks what the first one kept"


def check_frames(subject: Subject) -> Iterator[str]:
    """No state crosses frames, and a decoded tensor belongs to the caller."""
    x, other = hidden_states((2, 6, 96)), hidden_states((1, 11, 96), seed=3)
    codec = subject.make(x)
    payload = subject.compress(codec, x)
    decoded = codec.decompress(Payload(payload.data.clone(), payload.shape, payload.meta), CPU, x.dtype)
    kept = decoded.clone()
    codec.decompress(subject.compress(codec, other), CPU, x.dtype)
    if not torch.equal(decoded, kept):
        yield "a decoded tensor changes when the codec is used again"
    again = codec.decompress(subject.compress(codec, x), CPU, x.dtype)
    if not torch.equal(again, kept):
        yield "the same input decodes to other values after another frame: state crosses frames"


def check_input(subject: Subject) -> Iterator[str]:
    """The input is left alone and may be a strided view."""
    wide = hidden_states((2, 6, 192))
    x, before = wide[:, ::2, ::2], wide.clone()
    decoded = subject.round_trip(x)
    if not torch.equal(wide, before):
        yield "compress changes its input"
    if not torch.equal(decoded, subject.round_trip(x.contiguous())):
        yield "a strided input decodes to other values than its contiguous copy"


def check_causality(subject: Subject) -> Iterator[str]:
    """Where `causal` is True, token t depends on no later token and on no other row."""
    x = hidden_states((2, 9, 96))
    if not subject.make(x).causal:
        return
    first = subject.round_trip(x)[0, :5]
    later, row = x.clone(), x.clone()
    later[0, 5:] = hidden_states((4, 96), seed=1) * 50
    row[1] = -7.0
    cases = [(later, "later tokens"), (row, "another row")]
    if "importance" not in subject.make(x).needs:  # a choice among all tokens of a row depends on their number
        cases.append((x[:1, :5], "whether other tokens are there"))
    for changed, what in cases:
        if not torch.equal(subject.round_trip(changed)[0, :5], first):
            yield f"causal is True, but a token's reconstruction depends on {what}: set causal = False"


def check_extremes(subject: Subject) -> Iterator[str]:
    """Constant, huge, tiny, NaN and infinite values have some defined result."""
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        for value in (0.0, -3.0, limits.max, -limits.max, limits.tiny, math.nan, math.inf, -math.inf):
            for x in (torch.full((1, 2, 96), value, dtype=dtype), hidden_states((1, 4, 96), dtype)):
                x[0, 1, 7] = value
                decoded = subject.round_trip(x)
                if decoded.shape != x.shape:
                    yield f"an input with {value} comes back as {tuple(decoded.shape)}"


def check_corruption(subject: Subject) -> Iterator[str]:
    """A wrong length raises CorruptPayload; other bytes raise it or give a tensor of the right shape."""
    x = hidden_states((2, 3, 96))
    codec = subject.make(x)
    payload = subject.compress(codec, x)
    data, meta = payload.data.clone(), dict(payload.meta)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, data.shape, dtype=torch.uint8, generator=generator) for _ in range(20)]
    wrong_lengths = [data[:-1], data[:0], torch.cat([data, data[:1]])] if data.numel() else [torch.zeros_like(data[:1])]
    cases = [(bytes_, "a wrong length") for bytes_ in wrong_lengths] + [(bytes_, "noise") for bytes_ in noise]
    for bytes_, what in cases:
        got = Payload(bytes_.clone(), payload.shape, meta)
        try:
            decoded = codec.decompress(got, CPU, x.dtype)
        except CorruptPayload:
            continue
        except Exception as e:
            yield f"bytes of {what} raise {type(e).__name__} ({e}) instead of CorruptPayload"
            return
        if decoded.shape != x.shape:
            yield f"bytes of {what} decode to the shape {tuple(decoded.shape)} instead of {tuple(x.shape)}"
        elif what == "a wrong length" and codec.fixed_size:
            yield f"{got.data.numel()} bytes are accepted, {data.numel()} are right: raise CorruptPayload"


def check_alignment(subject: Subject) -> Iterator[str]:
    """The bytes may lie at any offset of a frame."""
    x = hidden_states((2, 3, 65))
    payload = subject.compress(subject.make(x), x)
    expected = subject.round_trip(x)
    for offset in (1, 2, 3):
        frame = torch.zeros(offset + payload.data.numel(), dtype=torch.uint8)
        frame[offset:] = payload.data
        decoded = subject.make(x).decompress(Payload(frame[offset:], payload.shape, payload.meta), CPU, x.dtype)
        if not torch.equal(decoded, expected):
            yield f"the same bytes at offset {offset} of a buffer decode to other values"


def check_config(subject: Subject) -> Iterator[str]:
    """`config()` holds every option as JSON, and equal options give equal codec ids."""
    x = hidden_states((1, 1, 96))
    codec = subject.make(x)
    for option in option_names(type(codec)):
        if not hasattr(codec, option):
            yield f"__init__ takes {option!r} but does not store it as self.{option}"
            return
    try:
        json.dumps(codec.config(), allow_nan=False)
    except (TypeError, ValueError) as e:
        yield f"config() is not plain JSON: {e}"
        return
    if codec.codec_id() != subject.make(x).codec_id():
        yield "two codecs from the same spec have different codec ids"


CHECKS: dict[str, Callable[[Subject], Iterator[str]]] = {
    "config": check_config,
    "round trip": check_round_trip,
    "size": check_size,
    "receiver": check_receiver,
    "frames": check_frames,
    "input": check_input,
    "causality": check_causality,
    "extreme values": check_extremes,
    "corruption": check_corruption,
    "alignment": check_alignment,
}


def find_violations(spec: str, check: str) -> list[str]:
    """What `spec` breaks of the check of that name, one sentence each; an exception counts as one."""
    try:
        return list(dict.fromkeys(CHECKS[check](Subject(spec))))
    except Exception as e:
        return [f"{type(e).__name__}: {e}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m compressors.check", description="Check a codec.")
    parser.add_argument("spec", help="a codec: package.module:Class, a built-in name, or a short form")
    spec = parser.parse_args(argv).spec
    x = hidden_states((2, 64, 576))
    try:
        codec = Subject(spec).make(x)
    except ValueError as e:
        print(e)
        return 1
    num_violations = 0
    for name, check in CHECKS.items():
        violations = find_violations(spec, name)
        num_violations += len(violations)
        print(f"{'breaks' if violations else 'keeps':6}  {name}: {check.__doc__}")
        for violation in violations:
            print(f"        - {violation}")
    if num_violations:
        return 1
    bits = 8 * Subject(spec).compress(codec, x).nbytes / x.numel()
    error = (Subject(spec).round_trip(x) - x).norm() / x.norm()
    kind = f"{'causal' if codec.causal else 'not causal'}, {'fixed' if codec.fixed_size else 'variable'} size"
    quality = f"{bits:.3f} bits a value and relative error {error:.4f} on made-up hidden states"
    print(f"{codec.name}: {kind}, {quality}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
