"""klt: calibrated transform coding with an entropy coder.

A token x of root mean square u becomes components y = (x / u - mean) @ encode: the Karhunen-Loeve transform (PCA) in a
space in which every direction weighs as much as the loss is sensitive to it (`compressors.klt.fit`). Each component is
predicted from the decoded components of the token before and, where the calibration has a table for that, from the
token's id; what is left is quantised (`kernels.trellis`) and coded with a model of its expected size (`kernels.klt`).
Transform coding after Goyal 2001, "Theoretical foundations of transform coding"; predicting inside the loop is DPCM.

`step` sets rate and quality: the step of the two quantisers between which the trellis switches, the same for all
components, in units of a component's average standard deviation before prediction. `target_bits` instead chooses the
step at which the calibration's held-out text took so many bits per value. Tokens that matter more get a finer step,
2 ** (-n / 4) of it, n being a linear function of y that the calibration has fitted to the gradient's size; n is sent.

Tokens whose u is far from the calibration's, that are not finite, or that would be larger coded are sent raw: fp16
after division by a power of two. With that the bound on a frame's size holds token by token, and no token's
reconstruction depends on a later one. Prediction begins anew in every row.

With `temporal=false` nothing is predicted from the token before, every token is computed as if it were alone
(`TokenTransform`), and ids are not coded: they come beside the payload at both ends. Then no token's reconstruction
depends on what shares its frame: this is `klt` for generation. The calibration is the same; its models and
`target_bits` were fitted with the token before, so that it takes a little more than they expect.

A NaN or an infinity survives as such in its place; finite values come back finite.

Payload: rANS words (uint32 [W], at least 2 unless there is no token), the raw tokens' exponents (int16 [R]), their
values (fp16 [R, H]). Everything is coded in host memory; on an accelerator the transforms run there, unless `temporal`
is false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
from compressors.klt.calibration_file import LinkCalibration, TokenTable, read_calibration
from compressors.klt.transform import FrameTransform, TokenTransform
from compressors.options import check_choice, option_error
from compressors.rows import Scratch
from compressors.saturation import saturating_cast

__all__ = ["Klt", "KltCoder", "trellis_rates"]

STEP_RANGE = (2.0**-10, 2.0**4)
SIDE_NBYTES = 16  # of a token at most, beside what a raw one takes
LAMBDA = 0.15  # squared half steps that the trellis gives for a bit
CPU = torch.device("cpu")


class Klt(Compressor):
    """Transform, prediction and entropy coding by the link's file in `calibration`, at `step` or `target_bits`.

    `temporal=False` leaves out the prediction from the token before and makes the codec frame-invariant.
    """

    name = "klt"

    def __init__(
        self,
        *,
        calibration: str,
        step: float | None = None,
        target_bits: float | None = None,
        temporal: bool = True,
        link: LinkInfo | None = None,
    ) -> None:
        super().__init__(link=link)
        self.calibration, self.step, self.target_bits = calibration, step, target_bits
        self.temporal = check_choice(self.name, "temporal", temporal, (True, False))
        self.frame_invariant = not temporal
        self._known = read_calibration(self.name, calibration, link)
        if (step is None) == (target_bits is None):
            raise option_error(self.name, "step", step, "a number, or target_bits instead of it")
        if target_bits is not None:
            step = step_for_bits(self._known.link, target_bits)
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not _in_range(step):
            raise option_error(self.name, "step", step, f"a number from {STEP_RANGE[0]} to {STEP_RANGE[1]}")
        self.needs = ("token_ids",) if self._known.link.uses_token_ids else ()
        self.decoder_needs = () if temporal else self.needs
        self._coder = KltCoder(self._known.link, self._known.tokens, float(step), temporal=temporal)

    def config(self) -> dict[str, Any]:
        """Without `temporal` where it is true, as before there was the option: ids and digests stay what they were."""
        return {option: value for option, value in super().config().items() if (option, value) != ("temporal", True)}

    def format_config(self) -> dict[str, Any]:
        """The files' digest stands for their path, the step for what it was chosen by."""
        chosen = {"calibration": self._known.digest, "step": self._coder.step, "target_bits": None}
        return super().format_config() | chosen

    def max_nbytes(self, shape: Sequence[int]) -> int:
        num_tokens = math.prod(shape[:-1])
        return num_tokens * (2 * shape[-1] + 2 + SIDE_NBYTES) + 12 if num_tokens else 0

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        data = self._coder.compress(x, side.get("token_ids"))
        self._known.check_unchanged()
        return Payload(data.to(x.device), tuple(x.shape))

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        data = self._data_without_meta(payload).cpu()
        x = self._coder.decompress(data, payload.shape, device, dtype, side.get("token_ids"))
        self._known.check_unchanged()
        return x


class KltCoder:
    """Frames at one step of one calibration. Used by `Klt` and, on held-out text, by the calibration itself."""

    def __init__(
        self, calibration: LinkCalibration, tokens: TokenTable, step: float, *, temporal: bool = True
    ) -> None:
        from compressors.kernels import klt as kernels

        self.step, self.temporal = step, temporal
        self.transform = (FrameTransform if temporal else TokenTransform)(calibration, tokens, step)
        self._content, self._tokens = calibration, tokens
        self._scratch = Scratch()
        self._side_classes = calibration.side_classes.numpy()
        self.component_class = (calibration.component_eighths - round(8 * math.log2(step))).numpy()
        self._trellis_class = self.component_class - kernels.FIRST_CLASS
        self._magnitude, self._starts = calibration.magnitude.numpy(), calibration.starts.numpy()
        self._rates = trellis_rates(self._starts)
        frequency = np.arange(1, (1 << 15) + 1)
        self._frequency_bits = np.concatenate([[0], np.ceil(256 * (15 - np.log2(frequency)))]).astype(np.int64)
        temporal_rank = calibration.temporal_in.shape[1] if temporal else 0
        self._temporal_factors = (
            calibration.temporal_in[:, :temporal_rank].contiguous().numpy(),
            calibration.temporal_out[:temporal_rank].numpy(),
        )
        coded = tokens if temporal else TokenTable.empty()
        self._id_ranks, self._id_starts = coded.ranks.numpy(), coded.rank_starts.numpy()
        self._guesses = kernels.first_guesses(self._starts)
        self._id_guesses = kernels.first_guesses(self._id_starts[None])
        self._ids = coded.by_rank.numpy()

    def compress(self, x: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Bytes of x [B, T, H], uint8 on the CPU."""
        from compressors.kernels import klt as kernels

        num_tokens, width = math.prod(x.shape[:-1]), x.shape[-1]
        if num_tokens == 0:
            return torch.empty(0, dtype=torch.uint8)
        rows = x.reshape(num_tokens, width)
        y, rms, finer, is_raw = self.transform.analyse(rows)
        y, ids = y.cpu(), self.check_ids(token_ids, num_tokens)
        levels, flags, _ = self.quantize(y, finer, is_raw, ids, x.shape[1])
        raw_cost = 256 * 16 * (width + 1)
        num_ops = num_tokens * (width + width // 2 + 20) + 17 * width + 64
        room = self._scratch.get("words", (num_tokens * (width + SIDE_NBYTES) // 2 + 8,), torch.int32, CPU)
        words = room.numpy().view(np.uint32)
        while True:
            ops = self._scratch.get("ops", (num_ops, 3), torch.int16, CPU).numpy().view(np.uint16)
            num_words = kernels.encode(
                levels, flags, rms.numpy(), finer.numpy(), ids, self._side_classes, self.component_class,
                self._magnitude, self._starts, self._frequency_bits, self._id_ranks, self._id_starts, raw_cost, ops,
                words,
            )  # fmt: skip
            if num_words == kernels.OPS_FULL:
                num_ops *= 2
            elif num_words == kernels.ENCODE_AGAIN:
                levels, flags, _ = self.quantize(y, finer, torch.from_numpy(flags), ids, x.shape[1])
            else:
                break
        parts = [torch.from_numpy(words[:num_words].view(np.int32))]
        if flags.any():
            parts += _to_raw(rows[torch.from_numpy(flags).to(rows.device)].float().cpu())
        parts = [part.reshape(-1).view(torch.uint8) for part in parts]
        data = self._scratch.get("data", (sum(p.numel() for p in parts),), torch.uint8, CPU)
        return torch.cat(parts, out=data)

    def quantize(
        self, y: torch.Tensor, finer: torch.Tensor, is_raw: torch.Tensor, ids: np.ndarray, tokens_per_row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(levels int32 [N, H] in half steps, is_raw bool [N] with what was added, components as decoded float32
        [N, H])."""
        from compressors.kernels import trellis

        levels = self._scratch.get("levels", y.shape, torch.int32, CPU).numpy()
        decoded = self._scratch.get("decoded", y.shape, torch.float32, CPU).numpy()
        flags = is_raw.numpy().copy()
        trellis.quantize(
            y.cpu().numpy(), self.transform.predict(ids), self.transform.steps(finer), flags, tokens_per_row,
            *self._temporal_factors, self._trellis_class, 2 * finer.numpy(), self._rates, levels, decoded,
        )  # fmt: skip
        return levels, flags, decoded

    def decompress(
        self,
        data: torch.Tensor,
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Inverse of `compress`; `token_ids` as there, where `temporal` is false.

        Raises CorruptPayload for bytes that it cannot have written.
        """
        from compressors.kernels import klt as kernels
        from compressors.kernels import trellis

        num_tokens, width = math.prod(shape[:-1]), shape[-1]
        if num_tokens == 0:
            if data.numel():
                raise CorruptPayload(f"klt payload of {data.numel()} bytes for no token")
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        blob = data.numpy()
        words = np.frombuffer(blob[: blob.size // 4 * 4].tobytes(), "<u4")
        levels = self._scratch.get("levels", (num_tokens, width), torch.int32, CPU).numpy()
        flags = np.zeros(num_tokens, np.bool_)
        rms, finer, id_ranks = np.zeros((3, num_tokens), np.int32)
        num_ids = self._id_ranks.size
        num_words = kernels.decode(
            words, self._side_classes, self.component_class, self._magnitude, self._starts, self._guesses, num_ids,
            self._id_starts[None], self._id_guesses, levels, flags, rms, finer, id_ranks,
        )  # fmt: skip
        num_raw = int(flags.sum())
        if num_words < 0 or 4 * num_words + num_raw * (2 * width + 2) != blob.size:
            raise CorruptPayload(f"{blob.size} bytes are no klt frame of shape {tuple(shape)}")
        if not self.temporal:
            ids = self.check_ids(token_ids, num_tokens)
        else:
            ids = self._ids[id_ranks] if num_ids else id_ranks
        decoded = self._scratch.get("decoded", (num_tokens, width), torch.float32, CPU)
        trellis.reconstruct(
            levels, self.transform.predict(ids), self.transform.steps(torch.from_numpy(finer)), flags, shape[1],
            *self._temporal_factors, decoded.numpy(),
        )  # fmt: skip
        x = self.transform.synthesise(decoded, rms, device, dtype)
        if num_raw:
            raw = _from_raw(torch.from_numpy(blob[4 * num_words :].copy()), num_raw, width)
            x[torch.from_numpy(flags).to(device)] = saturating_cast(raw, dtype).to(device)
        return x.view(tuple(shape))

    def check_ids(self, token_ids: torch.Tensor | None, num_tokens: int) -> np.ndarray:
        """int32 [N] on the CPU; zeros where they are not used."""
        if not self._content.uses_token_ids:
            return np.zeros(num_tokens, np.int32)
        if token_ids is None or token_ids.numel() != num_tokens:
            raise ValueError(f"klt with a token table needs token_ids of {num_tokens} tokens, got {token_ids}")
        ids = token_ids.reshape(-1).to(CPU, torch.int32)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokens.num_ids:
            raise ValueError(
                f"klt's table has {self._tokens.num_ids} token ids, got {int(ids.min())} to {int(ids.max())}"
            )
        return ids.numpy()


def trellis_rates(starts: np.ndarray) -> np.ndarray:
    """What magnitudes 0, 1, ... of an index cost, float32 [classes, 2, magnitudes] in squared half steps."""
    bits = 15 - np.log2(np.diff(starts.astype(np.int64), axis=1))
    by_quantizer = bits.reshape(2, -1, bits.shape[1]).swapaxes(0, 1)
    escape = by_quantizer[..., -1:]
    return np.ascontiguousarray(LAMBDA * np.concatenate([by_quantizer[..., :-1:2], escape], -1), np.float32)


def step_for_bits(calibration: LinkCalibration, target_bits: float) -> float:
    """The step at which the held-out text took `target_bits` per value, between the steps that were measured."""
    steps, bits = calibration.rate_steps.tolist(), calibration.rate_bits.tolist()
    if (
        isinstance(target_bits, bool)
        or not isinstance(target_bits, (int, float))
        or not bits[-1] <= target_bits <= bits[0]
    ):
        raise option_error("klt", "target_bits", target_bits, f"a number from {bits[-1]:.3f} to {bits[0]:.3f}")
    for i in range(len(steps) - 1):
        if bits[i + 1] <= target_bits <= bits[i]:
            share = (bits[i] - target_bits) / max(bits[i] - bits[i + 1], 1e-9)
            return steps[i] + share * (steps[i + 1] - steps[i])
    raise AssertionError("bits fall with the step")


def _in_range(step: float) -> bool:
    return STEP_RANGE[0] <= step <= STEP_RANGE[1]


def _to_raw(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [R, H] to exponents int16 [R] and fp16 values [R, H] with finite values below 2**15."""
    largest = torch.where(raw.isfinite(), raw.abs(), 0).amax(1)
    exponents = torch.frexp(largest).exponent.to(torch.int16)
    return exponents, torch.ldexp(raw.double(), (15 - exponents.int()).unsqueeze(1)).half()


def _from_raw(data: torch.Tensor, num_raw: int, width: int) -> torch.Tensor:
    """Inverse of `_to_raw` from uint8 [R (2 + 2 H)], to float32."""
    exponents = data[: 2 * num_raw].view(torch.int16)
    values = data[2 * num_raw :].view(torch.float16).view(num_raw, width)
    if ((exponents < -160) | (exponents > 128)).any():
        raise CorruptPayload(f"raw tokens have exponents {exponents.tolist()}")
    largest = torch.finfo(torch.float32).max  # a value may have been rounded up to 2**128
    x = torch.ldexp(values.double(), (exponents.int() - 15).unsqueeze(1))
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).float()
