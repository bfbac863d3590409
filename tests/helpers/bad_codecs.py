"""Codecs that fail in mid-run, as plug-ins: `tests.helpers.bad_codecs:Raising(rank=2)`.

Each acts like `none` until it is due: at the fourth compress call on `rank`. A rank is known by torchrun's
variable, so that all ranks have the same config. What happens is kept out of the options, so that a repaired
run is the same run: the file named by the variable BAD_CODEC_REPAIRED, once it exists, makes every codec
behave.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

import torch

from compressors import Compressor, Payload

DUE = 4  # the call of `compress` that goes wrong


class _Late(Compressor):
    fixed_size = False

    def __init__(self, rank: int, seconds: float = 0.0, *, link=None) -> None:
        super().__init__(link=link)
        self.rank, self.seconds = rank, seconds
        self._calls = 0

    def compress(self, x: torch.Tensor, **side) -> Payload:
        self._calls += 1
        data = x.contiguous().view(torch.uint8).reshape(-1)
        if self._calls != DUE or os.environ.get("RANK") != str(self.rank) or _is_repaired():
            return Payload(data, tuple(x.shape))
        return self._go_wrong(data, tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return payload.data.clone().view(dtype).reshape(payload.shape).to(device)

    def max_nbytes(self, shape) -> int:
        return 4 * shape[0] * shape[1] * shape[2]

    def _go_wrong(self, data: torch.Tensor, shape: tuple[int, ...]) -> Payload:
        raise NotImplementedError


class Raising(_Late):
    name = "raising"

    def _go_wrong(self, data, shape):
        raise ArithmeticError("no more bits")


class RaisingWhere(Compressor):
    """Raises in `method` ("compress" or "decompress") at its `call`-th call; call 1 is the warm-up's.

    Which rank that is, is settled by the link that the codec is put on.
    """

    name = "raising_where"

    def __init__(self, method: str, call: int, *, link=None) -> None:
        super().__init__(link=link)
        self.method, self.call = method, call
        self._calls = {"compress": 0, "decompress": 0}

    def compress(self, x: torch.Tensor, **side) -> Payload:
        self._count("compress")
        return Payload(x.contiguous().view(torch.uint8).reshape(-1), tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self._count("decompress")
        return payload.data.clone().view(dtype).reshape(payload.shape).to(device)

    def _count(self, method: str) -> None:
        self._calls[method] += 1
        if method == self.method and self._calls[method] == self.call and not _is_repaired():
            raise ArithmeticError(f"no more {method}")


class Dying(_Late):
    """Its rank is killed at the first frame behind the warm-up's: as the system does where memory runs out."""

    name = "dying"
    frame_invariant = True

    def compress(self, x: torch.Tensor, **side) -> Payload:
        self._calls += 1
        if self._calls == 2 and os.environ.get("RANK") == str(self.rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return Payload(x.contiguous().view(torch.uint8).reshape(-1), tuple(x.shape))


class Unmakeable(_Late):
    """Cannot be made on one rank."""

    name = "unmakeable"

    def __init__(self, rank: int, *, link=None) -> None:
        super().__init__(rank, link=link)
        if os.environ.get("RANK") == str(rank) and not _is_repaired():
            raise OSError("no such device")


class TooLarge(_Late):
    name = "too_large"

    def _go_wrong(self, data, shape):
        return Payload(torch.cat([data, data[:1]]), shape)


class WrongShape(_Late):
    name = "wrong_shape"

    def _go_wrong(self, data, shape):
        return Payload(data, (shape[0], shape[2], shape[1]))


class ShortBytes(_Late):
    """Sends what its own decompress cannot read."""

    name = "short_bytes"

    def _go_wrong(self, data, shape):
        return Payload(data[:-3].clone(), shape)


class Hanging(_Late):
    name = "hanging"

    def _go_wrong(self, data, shape):
        time.sleep(3600)


class Slow(_Late):
    """Takes long, and holds the interpreter lock meanwhile."""

    name = "slow"

    def _go_wrong(self, data, shape):
        ctypes.PyDLL(None).usleep(int(self.seconds * 1e6))
        return Payload(data, shape)


class SlowToDecode(_Late):
    """Takes long for every frame on `rank`, or on all ranks if that is -1."""

    name = "slow_to_decode"

    def decompress(self, payload, device, dtype):
        if self.rank in (-1, int(os.environ.get("RANK", "-1"))):
            time.sleep(self.seconds)
        return super().decompress(payload, device, dtype)

    def _go_wrong(self, data, shape):
        return Payload(data, shape)


class SlowToLoad(_Late):
    """The first object takes long to make."""

    name = "slow_to_load"
    num_made = 0

    def __init__(self, rank: int, seconds: float = 0.0, *, link=None) -> None:
        super().__init__(rank, seconds, link=link)
        SlowToLoad.num_made += 1
        if SlowToLoad.num_made == 1 and os.environ.get("RANK") == str(rank):
            time.sleep(seconds)

    def _go_wrong(self, data, shape):
        return Payload(data, shape)


def _is_repaired() -> bool:
    path = os.environ.get("BAD_CODEC_REPAIRED")
    return path is not None and os.path.exists(path)


class RaisingForShape(Compressor):
    """Like `none`, but raises for frames of `rows` rows of `tokens` tokens each; 0 stands for any number."""

    name = "raising_for_shape"
    frame_invariant = True

    def __init__(self, rows: int = 0, tokens: int = 0, *, link=None) -> None:
        super().__init__(link=link)
        self.rows, self.tokens = rows, tokens

    def compress(self, x: torch.Tensor, **side) -> Payload:
        if self.rows in (0, x.shape[0]) and self.tokens in (0, x.shape[1]):
            raise ArithmeticError(f"no bits for {tuple(x.shape)}")
        return Payload(x.contiguous().view(torch.uint8).reshape(-1), tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return payload.data.clone().view(dtype).reshape(payload.shape).to(device)


class SlowToSend(Compressor):
    """Like `none`, but takes `seconds` for every frame."""

    name = "slow_to_send"
    frame_invariant = True

    def __init__(self, seconds: float, *, link=None) -> None:
        super().__init__(link=link)
        self.seconds = seconds

    def compress(self, x: torch.Tensor, **side) -> Payload:
        time.sleep(self.seconds)
        return Payload(x.contiguous().view(torch.uint8).reshape(-1), tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return payload.data.clone().view(dtype).reshape(payload.shape).to(device)
