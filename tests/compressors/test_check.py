"""The contract checker finds what it claims to find, and the example for codec writers keeps the contract."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from compressors import Compressor, CorruptPayload, Payload, make_compressor
from compressors.check import CHECKS, find_violations, main

ROOT = Path(__file__).parents[2]
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs/writing_a_codec.md").read_text(), re.DOTALL)[1]


class Sound(Compressor):
    """Raw float32; the broken codecs below each change one thing."""

    name = "sound"
    fixed_size = True

    def __init__(self, *, level=1, link=None):
        super().__init__(link=link)
        self.level = level

    def max_nbytes(self, shape):
        return 4 * torch.Size(shape).numel()

    def compress(self, x):
        return Payload(x.float().contiguous().view(-1).view(torch.uint8).clone(), x.shape)

    def decompress(self, payload, device, dtype):
        if payload.data.numel() != self.max_nbytes(payload.shape):
            raise CorruptPayload("length")
        return payload.data.clone().view(torch.float32).view(payload.shape).to(dtype).clone()


class OptionNotStored(Sound):
    def __init__(self, *, strength=1, link=None):
        super().__init__(link=link)


class OptionNotJson(Sound):
    def __init__(self, *, dtype=torch.float32, link=None):
        super().__init__(link=link)
        self.dtype = dtype


class Float64(Sound):
    def decompress(self, payload, device, dtype):
        return super().decompress(payload, device, torch.float64)


class Flattened(Sound):
    def compress(self, x):
        return Payload(super().compress(x).data, (x.numel(),))


class BoundTooSmall(Sound):
    def max_nbytes(self, shape):
        return super().max_nbytes(shape) // 2

    def decompress(self, payload, device, dtype):
        return payload.data.clone().view(torch.float32).view(payload.shape).to(dtype)


class BoundNotExact(Sound):
    def max_nbytes(self, shape):
        return super().max_nbytes(shape) + 1

    def decompress(self, payload, device, dtype):
        return payload.data.clone().view(torch.float32).view(payload.shape).to(dtype)


class KeepsTheInput(Sound):
    def compress(self, x):
        self.kept = x.clone()
        return Payload(torch.zeros(self.max_nbytes(x.shape), dtype=torch.uint8), x.shape)

    def decompress(self, payload, device, dtype):
        kept = getattr(self, "kept", torch.zeros(payload.shape))
        return kept.to(dtype) if kept.shape == payload.shape else torch.zeros(payload.shape, dtype=dtype)


class ReusesItsOutput(Sound):
    def decompress(self, payload, device, dtype):
        decoded = super().decompress(payload, device, dtype)
        self.output = getattr(self, "output", torch.empty(100_000, dtype=dtype))
        return self.output[: decoded.numel()].view(decoded.shape).copy_(decoded)


class Drifts(Sound):
    frames = 0

    def compress(self, x):
        self.frames += 1
        return super().compress(x + self.frames)


class ChangesItsInput(Sound):
    def compress(self, x):
        return super().compress(x.mul_(2))


class MixesTokens(Sound):
    def compress(self, x):
        return super().compress(x - x.float().mean(1, keepdim=True).nan_to_num().to(x.dtype))


class MixesRows(Sound):
    def compress(self, x):
        return super().compress(x - x.float().sum(0, keepdim=True).to(x.dtype))


class ClaimsFrames(Sound):
    frame_invariant = True


class MixesClaimedRows(MixesRows):
    causal = False
    frame_invariant = True


class PredictsFromTheTokenBefore(Sound):
    """Causal, but a cut in the text is seen."""

    frame_invariant = True

    def compress(self, x):
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().compress(x + 1e-3 * before)


class RoundsByPlace(Sound):
    """The last bits of a row depend on where in its block it stands, as a library's matrix product may have it."""

    frame_invariant = True

    def decompress(self, payload, device, dtype):
        decoded = super().decompress(payload, device, torch.float32)
        rows = decoded.view(-1, decoded.shape[-1])
        rows[3::4] *= 1 + 2**-23
        return decoded.to(dtype)


class RemembersClaimedFrames(Drifts):
    frame_invariant = True


class NeedsWhatDoesNotTravel(Sound):
    needs = ("importance", "colour")
    decoder_needs = ("importance", "token_ids")

    def compress(self, x, **side):
        return super().compress(x)

    def decompress(self, payload, device, dtype, **side):
        return super().decompress(payload, device, dtype)


class AddsTokenIds(Sound):
    """Takes a token's id off at the receiver, and so needs it there."""

    frame_invariant = True
    needs = decoder_needs = ("token_ids",)

    def compress(self, x, token_ids):
        return super().compress(x.float() + 64 * token_ids[..., None])

    def decompress(self, payload, device, dtype, token_ids):
        decoded = super().decompress(payload, device, torch.float32)
        return (decoded - 64 * token_ids[..., None]).to(dtype)


class FailsOnNan(Sound):
    def compress(self, x):
        if x.isnan().any():
            raise FloatingPointError("NaN")
        return super().compress(x)


class CrashesOnLength(Sound):
    def decompress(self, payload, device, dtype):
        return payload.data.clone().view(torch.float32).view(payload.shape).to(dtype)


class IgnoresLength(Sound):
    def decompress(self, payload, device, dtype):
        values = torch.zeros(self.max_nbytes(payload.shape), dtype=torch.uint8)
        count = min(values.numel(), payload.data.numel())
        values[:count] = payload.data[:count]
        return values.view(torch.float32).view(payload.shape).to(dtype)


class NeedsAlignment(Sound):
    def decompress(self, payload, device, dtype):
        if payload.data.numel() != self.max_nbytes(payload.shape):
            raise CorruptPayload("length")
        return payload.data.view(torch.float32).view(payload.shape).to(dtype).clone()


@pytest.fixture(autouse=True)
def plugin_module(monkeypatch):
    module = types.ModuleType("checked_plugins")
    classes = [cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, Sound)]
    module.__dict__.update({cls.__name__: cls for cls in classes})
    monkeypatch.setitem(sys.modules, "checked_plugins", module)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["Sound", "ClaimsFrames", "AddsTokenIds"])
def test_a_sound_codec_passes(name, check):
    assert find_violations(f"checked_plugins:{name}", check) == []


def test_a_plugin_makes_no_claim_for_frames():
    assert not make_compressor("checked_plugins:Sound").frame_invariant
    assert make_compressor("checked_plugins:Sound").decoder_needs == ()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("checked_plugins:ClaimsFrames", "can generate\n"),
        ("checked_plugins:AddsTokenIds", "can generate, with token ids beside the payload\n"),
        ("checked_plugins:Sound", "cannot generate: frame_invariant is False; nothing was found against True"),
        ("int4(granularity=tensor)", "cannot generate: a token's reconstruction depends on how a text is cut"),
        ("token_mixed(metric=norm, fraction=1)", "cannot generate: it needs importance"),
    ],
)
def test_the_command_says_whether_a_codec_can_generate(spec, words, capsys):
    assert main([spec]) == 0
    assert f": {words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spec",
    ["hadamard({})", "zstd({})", "topk(inner={}, density=1)", "outlier(channels=[0], inner={})"]
    + ["token_mixed(metric=uniform, fraction=0.5, high={}, low=int8)"],
)
def test_wrappers_pass_on_what_a_decoder_needs(spec):
    codec = make_compressor(spec.format("checked_plugins:AddsTokenIds"))
    assert codec.decoder_needs == ("token_ids",)
    assert codec.frame_invariant == ("token_mixed" not in spec)
    x, ids = torch.ones(2, 4, 96), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    payload = codec.compress(x, **{name: ids for name in codec.needs})
    decoded = codec.decompress(payload, x.device, x.dtype, token_ids=ids)
    torch.testing.assert_close(decoded, x, rtol=0.01, atol=0)
    other = codec.decompress(payload, x.device, x.dtype, token_ids=ids + 1)
    assert (other - x).abs().max() > 10


@pytest.mark.parametrize(
    ("name", "check", "message"),
    [
        ("OptionNotStored", "config", "takes 'strength' but does not store it as self.strength"),
        ("OptionNotJson", "config", "config() is not plain JSON"),
        ("Float64", "round trip", "comes back as (2, 5, 96) torch.float64"),
        ("Flattened", "round trip", "gives a payload of shape (960,)"),
        ("BoundTooSmall", "size", "has 3840 bytes, but max_nbytes((2, 5, 96)) promises 1920"),
        ("BoundNotExact", "size", "must be equal when fixed_size is True"),
        ("KeepsTheInput", "receiver", "lacks what the first one kept"),
        ("ReusesItsOutput", "frames", "a decoded tensor changes when the codec is used again"),
        ("Drifts", "frames", "state crosses frames"),
        ("ChangesItsInput", "input", "compress changes its input"),
        ("MixesTokens", "causality", "depends on later tokens: set causal = False"),
        ("MixesRows", "causality", "depends on another row: set causal = False"),
        ("MixesClaimedRows", "frame invariance", "depends on whether other rows are in the frame"),
        ("MixesClaimedRows", "frame invariance", "a codec that mixes no tokens is causal"),
        ("PredictsFromTheTokenBefore", "frame invariance", "on how a text is cut into frames: set frame_invariant ="),
        ("RoundsByPlace", "frame invariance", "depends on which tokens are in the frame"),
        ("RemembersClaimedFrames", "frame invariance", "depends on"),
        ("NeedsWhatDoesNotTravel", "side inputs", "needs has 'colour', allowed: importance, token_ids"),
        ("NeedsWhatDoesNotTravel", "side inputs", "decoder_needs has 'importance', allowed: token_ids"),
        ("NeedsWhatDoesNotTravel", "side inputs", "decoder_needs has 'token_ids', which needs has not"),
        ("FailsOnNan", "extreme values", "FloatingPointError: NaN"),
        ("CrashesOnLength", "corruption", "instead of CorruptPayload"),
        ("IgnoresLength", "corruption", "bytes are accepted, 2304 are right: raise CorruptPayload"),
        ("NeedsAlignment", "alignment", "storage"),
    ],
)
def test_a_broken_codec_is_told_what_it_breaks(name, check, message):
    violations = find_violations(f"checked_plugins:{name}", check)
    assert any(message in violation for violation in violations), violations


def test_command_line_exit_status(capsys):
    assert main(["checked_plugins:Sound"]) == 0
    assert "causal, fixed size, 32.000 bits a value" in capsys.readouterr().out
    assert main(["checked_plugins:MixesTokens"]) == 1
    assert "breaks  causality" in capsys.readouterr().out
    assert main(["int9"]) == 1
    assert "unknown compressor 'int9'" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_for_codec_writers(tmp_path):
    (tmp_path / "my_codecs.py").write_text(EXAMPLE)
    command = [sys.executable, "-m", "compressors.check", "my_codecs:Sign"]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sign: causal, fixed size, 1.028 bits a value" in done.stdout
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 20
