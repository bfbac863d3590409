"""Check a codec against the contract of `compressors.base` and say in words what it breaks.

    python -m compressors.check my_package.codecs:Sketch
    python -m compressors.check "outlier(channels=8, inner=int4)"

The same checks hold the built-in codecs in the tests. They use small inputs on the CPU and take seconds; how
well a codec preserves a model is for a run of the pipeline to say. Exit status 0 means that nothing was
found. The last lines say what the codec is, and whether a generation may run over it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload, option_names
from compressors.console import run_command
from compressors.registry import make_compressor

__all__ = ["CHECKS", "dependence_on_frames", "find_violations", "main"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 5, 96), (1, 1, 96), (1, 0, 96), (0, 3, 96), (3, 5, 100), (1, 4, 129), (2, 3, 7), (1, 1, 1))
SIDE_INPUTS = ("importance", "token_ids")
TRAVELLING_SIDE_INPUTS = ("token_ids",)
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


def travelling(codec: Compressor, side: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of the sender's side inputs a frame brings the decoder."""
    return {name: side[name].clone() for name in codec.decoder_needs}


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

    def decompress(self, codec: Compressor, payload: Payload, x: torch.Tensor) -> torch.Tensor:
        """Decompress to the dtype of `x`, with what a frame of `x` brings beside the payload."""
        return codec.decompress(payload, CPU, x.dtype, **travelling(codec, side_inputs(codec, x)))

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What a codec object that has seen nothing decodes from a copy of the bytes."""
        payload = self.compress(self.make(x), x)
        received = Payload(payload.data.clone(), payload.shape, dict(payload.meta))
        return self.decompress(self.make(x), received, x)


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
    at_sender = subject.decompress(sender, copy, x)
    if not torch.equal(subject.decompress(subject.make(x), copy, x), at_sender):
        yield "a second codec object decodes the same bytes to other values: it lacks what the first one kept"


def check_frames(subject: Subject) -> Iterator[str]:
    """No state crosses frames, and a decoded tensor belongs to the caller."""
    x, other = hidden_states((2, 6, 96)), hidden_states((1, 11, 96), seed=3)
    codec = subject.make(x)
    payload = subject.compress(codec, x)
    decoded = subject.decompress(codec, Payload(payload.data.clone(), payload.shape, payload.meta), x)
    kept = decoded.clone()
    subject.decompress(codec, subject.compress(codec, other), other)
    if not torch.equal(decoded, kept):
        yield "a decoded tensor changes when the codec is used again"
    again = subject.decompress(codec, subject.compress(codec, x), x)
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


def dependence_on_frames(subject: Subject) -> Iterator[str]:
    """What the reconstruction of a token depends on beside the token: nothing, if the codec is frame-invariant."""
    for dtype in DTYPES:
        yield from _dependence_on_frames(subject, hidden_states((3, 12, 96), dtype))
    yield from _dependence_on_frames(subject, hidden_states((3, 12, 129)))


def _dependence_on_frames(subject: Subject, x: torch.Tensor) -> Iterator[str]:
    """The same for the tokens of `x` [3, 12, H], of which some are changed to unusual ones.

    All frames go through one encoder and one decoder, as in a generation. Tokens alone in their frames are the
    reference, and are compared bit for bit; NaN equals NaN.
    """
    x[0, 3] *= 100
    x[0, 5] = x[0, 5].sign()
    x[1, 6] = 0
    x[2, 4, 7] = math.nan
    sender, receiver = subject.make(x), subject.make(x)
    text = torch.arange(x[..., 0].numel()).view(x.shape[:2])
    side = side_inputs(sender, x)
    if "token_ids" in side:
        side["token_ids"] = text

    def round_trip(frame: torch.Tensor) -> torch.Tensor:
        """The tokens at places [B, T] of the text, as they come back from one frame."""
        frame_side = {name: value.flatten()[frame] for name, value in side.items()}
        payload = sender.compress(x.flatten(0, 1)[frame], **frame_side)
        received = Payload(payload.data.clone(), payload.shape, dict(payload.meta))
        return receiver.decompress(received, CPU, x.dtype, **travelling(receiver, frame_side))

    alone = torch.cat([round_trip(place.view(1, 1)) for place in text.flatten()])[:, 0]
    for what, frames in _frames(text).items():
        if not all(_same_bits(round_trip(frame), alone[frame]) for frame in frames):
            yield f"a token's reconstruction depends on {what}"


def _frames(text: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Frames [B, T] of a text's places [3, 12], by what differs from tokens that come alone."""
    generator = torch.Generator().manual_seed(0)

    def mixed(*shape: int) -> torch.Tensor:
        return torch.randperm(text.numel(), generator=generator)[: math.prod(shape)].view(shape)

    cuts = [torch.randperm(11, generator=generator)[:3].sort().values + 1 for _ in range(4)]
    return {
        "how a text is cut into frames": [part for cut in cuts for part in text[:1].tensor_split(cut.tolist(), 1)],
        "whether other rows are in the frame": [*text.split(1, 1), text[:, :5], text[[2, 0]], text],
        "which tokens are in the frame": [mixed(1, 36), mixed(8, 1), mixed(4, 9), mixed(2, 5), mixed(1, 3)],
    }


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((same | (a.isnan() & b.isnan())).all())


def check_frame_invariance(subject: Subject) -> Iterator[str]:
    """Where `frame_invariant` is True, no token depends on what shares its frame or on how a text is cut."""
    codec = subject.make(hidden_states((1, 1, 96)))
    if not codec.frame_invariant:
        return
    if not codec.causal:
        yield "frame_invariant is True and causal is False: a codec that mixes no tokens is causal"
    for dependence in dependence_on_frames(subject):
        yield f"frame_invariant is True, but {dependence}: set frame_invariant = False"


def check_side_inputs(subject: Subject) -> Iterator[str]:
    """`needs` and `decoder_needs` name side inputs that are there."""
    codec = subject.make(hidden_states((1, 1, 96)))
    for name in codec.needs:
        if name not in SIDE_INPUTS:
            yield f"needs has {name!r}, allowed: {', '.join(SIDE_INPUTS)}"
    for name in codec.decoder_needs:
        if name not in TRAVELLING_SIDE_INPUTS:
            yield f"decoder_needs has {name!r}, allowed: {', '.join(TRAVELLING_SIDE_INPUTS)}"
        elif name not in codec.needs:
            yield f"decoder_needs has {name!r}, which needs has not: a frame brings what compress was given"


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
            decoded = subject.decompress(codec, got, x)
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
        decoded = subject.decompress(subject.make(x), Payload(frame[offset:], payload.shape, payload.meta), x)
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
    "side inputs": check_side_inputs,
    "round trip": check_round_trip,
    "size": check_size,
    "receiver": check_receiver,
    "frames": check_frames,
    "input": check_input,
    "causality": check_causality,
    "frame invariance": check_frame_invariance,
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
    print(f"{codec.name}: {_generation(codec, Subject(spec))}")
    return 0


def _generation(codec: Compressor, subject: Subject) -> str:
    """Whether text can be generated over the codec, in words."""
    if codec.frame_invariant and "importance" in codec.needs:
        return "cannot generate: it needs importance, which is computed for whole windows of a text"
    if codec.frame_invariant:
        return "can generate" + (", with token ids beside the payload" if codec.decoder_needs else "")
    reason = next(dependence_on_frames(subject), None)
    if reason:
        return f"cannot generate: {reason}"
    return "cannot generate: frame_invariant is False; nothing was found against True: set it if it holds"


if __name__ == "__main__":
    run_command(main)
