"""Codecs that act like `none` and write down who makes and uses them, as plug-ins.

What they write goes to the file that the variable WATCHED_CODECS names, one JSON object per line. A rank is known by
torchrun's variable, so that all ranks have the same config.
"""

from __future__ import annotations

import json
import os

import torch

from compressors import Compressor, Payload


class Watched(Compressor):
    name = "watched"
    fixed_size = True

    def __init__(self, *, link=None) -> None:
        super().__init__(link=link)
        self._tell("make")

    def compress(self, x: torch.Tensor, **side) -> Payload:
        self._tell("compress", num_tokens=x[..., 0].numel())
        return Payload(x.contiguous().view(torch.uint8).reshape(-1).clone(), tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self._tell("decompress")
        return payload.data.clone().view(dtype).reshape(payload.shape).to(device)

    def max_nbytes(self, shape) -> int:
        return self.link.dtype.itemsize * shape[0] * shape[1] * shape[2]

    def _tell(self, what: str, **more: int) -> None:
        line = {"what": what, "rank": int(os.environ.get("RANK", "0")), "object": id(self), "link": self.link.name}
        line |= {"max_tokens": self.link.max_tokens, **more}
        with open(os.environ["WATCHED_CODECS"], "a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")


class OtherFormat(Watched):
    """Of another version on rank 2."""

    name = "other_format"

    def format_config(self) -> dict:
        return super().format_config() | {"format_version": 1 + (os.environ.get("RANK") == "2")}


class OtherBound(Watched):
    """Of another bound on rank 2."""

    name = "other_bound"

    def max_nbytes(self, shape) -> int:
        return super().max_nbytes(shape) + (os.environ.get("RANK") == "2")


class LackingAFile(Watched):
    """Cannot be made on rank 2."""

    name = "lacking_a_file"

    def __init__(self, *, link=None) -> None:
        if os.environ.get("RANK") == "2":
            raise ValueError("no calibration for link " + link.name)
        super().__init__(link=link)
