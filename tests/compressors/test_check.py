"""The contract checker finds what it claims to find, and the example for codec writers keeps the contract."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from compressors import Compressor, CorruptPayload, Payload
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
    module.__dict__.update({cls.__name__: cls for cls in [Sound, *Sound.__subclasses__()]})
    monkeypatch.setitem(sys.modules, "checked_plugins", module)


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_codec_passes(check):
    assert find_violations("checked_plugins:Sound", check) == []


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


def test_the_example_for_codec_writers(tmp_path):
    (tmp_path / "my_codecs.py").write_text(EXAMPLE)
    command = [sys.executable, "-m", "compressors.check", "my_codecs:Sign"]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sign: causal, fixed size, 1.028 bits a value" in done.stdout
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 20


def test_the_readme_shows_the_same_example():
    assert EXAMPLE in (ROOT / "README.md").read_text()
