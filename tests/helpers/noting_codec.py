"""A codec like `none` that writes down, in the file named by NOTES, which rank begins and ends its first calls when."""

from __future__ import annotations

import os
import time

import torch

from compressors import Compressor, Payload


class Noting(Compressor):
    name = "noting"
    fixed_size = False

    def __init__(self, *, link=None) -> None:
        super().__init__(link=link)
        self._met: set[str] = set()

    def max_nbytes(self, shape) -> int:
        return 4 * shape[0] * shape[1] * shape[2]

    def compress(self, x: torch.Tensor) -> Payload:
        self._note("compress")
        return Payload(x.contiguous().view(torch.uint8).reshape(-1), tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self._note("decompress")
        return payload.data.clone().view(dtype).reshape(payload.shape).to(device)

    def _note(self, method: str) -> None:
        if method in self._met:
            return
        self._met.add(method)
        for event in ("begins", "ends"):
            with open(os.environ["NOTES"], "a") as file:
                file.write(f"{os.environ['RANK']} {event} {method}\n")
            time.sleep(0.3)
