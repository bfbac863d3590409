"""klt: calibrated transform coding with an entropy coder.

A token x of root mean square u becomes components y = (x / u - mean) @ encode: the Karhunen-Loeve transform (PCA) in a
space in which every direction weighs as much as the loss is sensitive to it (`compressors.klt.fit`). Where the
calibration has a table for that, components are predicted from the token's id, which both ends have; what is left is
quantised (`kernels.trellis`) and coded with a model of its expected size (`kernels.klt`). docs/klt_format.md specifies
the bytes. Transform coding after Goyal 2001, "Theoretical foundations of transform coding".

`step` sets rate and quality: the step of the two quantisers between which the trellis switches, the same for all
components, in units of a component's average standard deviation before prediction. `target_bits` instead chooses the
step at which the calibration's held-out text took so many bits per value. Tokens that matter more get a finer step,
2 ** (-n / 4) of it, n being a linear function of y that the calibration has fitted to the gradient's size; n is sent.

Tokens whose u is far from the calibration's, that are not finite, or that would be larger coded are sent raw: fp16
after division by a power of two. With that the bound on a frame's size holds token by token. Nothing is known of a
token but itself and its id, so that no token's reconstruction depends on what shares its frame.

A NaN or an infinity survives as such in its place; finite values come back finite.

Payload: side information and levels (`kernels.klt`), the raw tokens' exponents (int16 [R]), their values (fp16 [R, H]).
Everything is coded in host memory; on an accelerator the transforms run there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
from compressors.klt.calibration_file import LinkCalibration, read_calibration
from compressors.klt.token_table import TokenTable
from compressors.klt.transform import Analysis, KernelTransform, TorchTransform, make_transform
from compressors.options import option_error
from compressors.rows import Scratch
from compressors.saturation import saturating_cast

if TYPE_CHECKING:
    from compressors.kernels.klt import Symbols

__all__ = ["Klt", "KltCoder", "Quantized", "trellis_rates"]

STEP_RANGE = (2.0**-10, 2.0**4)
SIDE_NBYTES = 16  # of a token at most, beside what a raw one takes
BLOCK_NBYTES = 36  # of a block's length and states at most
LAMBDA = 0.15  # squared half steps that the trellis gives for a bit
CPU = torch.device("cpu")


class Klt(Compressor):
    """Transform, prediction and entropy coding by the link's file in `calibration`, at `step` or `target_bits`."""

    name = "klt"
    format_version = 3
    frame_invariant = True

    def __init__(
        self,
        *,
        calibration: str,
        step: float | None = None,
        target_bits: float | None = None,
        link: LinkInfo | None = None,
    ) -> None:
        super().__init__(link=link)
        self.calibration, self.step, self.target_bits = calibration, step, target_bits
        self._known = read_calibration(self.name, calibration, link)
        if (step is None) == (target_bits is None):
            raise option_error(self.name, "step", step, "a number, or target_bits instead of it")
        if target_bits is not None:
            step = step_for_bits(self._known.link, target_bits)
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not _in_range(step):
            raise option_error(self.name, "step", step, f"a number from {STEP_RANGE[0]} to {STEP_RANGE[1]}")
        self.needs = self.decoder_needs = ("token_ids",) if self._known.link.uses_token_ids else ()
        self._coder = KltCoder(self._known.link, self._known.tokens, float(step))

    def format_config(self) -> dict[str, Any]:
        """The files' digest stands for their path, the step for what it was chosen by."""
        chosen = {"calibration": self._known.digest, "step": self._coder.step, "target_bits": None}
        return super().format_config() | chosen

    def max_nbytes(self, shape: Sequence[int]) -> int:
        from compressors.kernels.klt import BLOCK_VALUES

        num_tokens = math.prod(shape[:-1])
        num_blocks = 1 + num_tokens * shape[-1] // BLOCK_VALUES
        side = num_tokens * SIDE_NBYTES + num_blocks * BLOCK_NBYTES
        return num_tokens * (2 * shape[-1] + 2) + side if num_tokens else 0

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        self._known.check_unchanged()
        data = self._coder.compress(x, side.get("token_ids"))
        self._known.check_unchanged()
        return Payload(data.to(x.device), tuple(x.shape))

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        data = self._data_without_meta(payload).cpu()
        self._known.check_unchanged()
        x = self._coder.decompress(data, payload.shape, device, dtype, side.get("token_ids"))
        self._known.check_unchanged()
        return x


class Quantized(NamedTuple):
    """A frame of N tokens after the trellis. The arrays are the coder's and hold until it quantises again."""

    levels: np.ndarray  # int32 [N, H], half steps
    is_raw: np.ndarray  # bool [N], with the tokens that could not be quantised
    trust: np.ndarray  # int32 [N], `kernels.trust`
    predicted: np.ndarray  # float32 [N, H], components as their ids make them likely, so far as that is trusted


class KltCoder:
    """Frames at one step of one calibration. Used by `Klt` and, on held-out text, by the calibration itself."""

    _is_compiled: ClassVar = False

    def __init__(self, calibration: LinkCalibration, tokens: TokenTable, step: float) -> None:
        from compressors.kernels import klt as kernels
        from compressors.kernels import trellis
        from compressors.kernels.klt import few_tokens

        self.step = step
        self.transform = KernelTransform(calibration, tokens, step)  # of what is in host memory
        self._transforms: dict[torch.device, KernelTransform | TorchTransform] = {CPU: self.transform}
        self.component_class = (calibration.component_eighths - round(8 * math.log2(step))).numpy()
        self._content, self._tokens = calibration, tokens
        self._scratch = Scratch()
        self._models = kernels.make_models(
            side_classes=calibration.side_classes.numpy(),
            component_class=self.component_class,
            magnitude=calibration.magnitude.numpy(),
            trust_starts=calibration.trust_starts.numpy(),
            starts=calibration.starts.numpy(),
        )
        self._prices = trellis.Prices(self.component_class - kernels.FIRST_CLASS, trellis_rates(self._models.starts))
        self._known = few_tokens.Known(
            self.transform.tables, self.transform.prediction, self._prices, self._models, float(step)
        )

    def compress(self, x: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Bytes of x [B, T, H], uint8 on the CPU."""
        num_tokens, width = math.prod(x.shape[:-1]), x.shape[-1]
        if num_tokens == 0:
            return torch.empty(0, dtype=torch.uint8)
        self._compile()
        rows = x.detach().reshape(num_tokens, width)
        coded, is_raw = self._encode(rows, self.check_ids(token_ids, num_tokens))
        if not is_raw.any():
            return torch.from_numpy(coded)
        raw = _to_raw(rows[torch.from_numpy(is_raw).to(rows.device)].float().cpu())
        parts = [torch.from_numpy(coded), *(part.reshape(-1).view(torch.uint8) for part in raw)]
        data = self._scratch.get("data", (sum(p.numel() for p in parts),), torch.uint8, CPU)
        return torch.cat(parts, out=data)

    def _compile(self) -> None:
        """Once a process: frames of few tokens have kernels of their own, for which no generation should wait."""
        if KltCoder._is_compiled:
            return
        KltCoder._is_compiled = True
        from compressors.kernels.klt.few_tokens import MOST_TOKENS

        for num_tokens in (1, MOST_TOKENS + 1):
            x, ids = torch.zeros(1, num_tokens, self._content.hidden_size), torch.zeros(num_tokens, dtype=torch.int64)
            self.decompress(self.compress(x, ids), x.shape, CPU, x.dtype, ids)

    def _encode(self, rows: torch.Tensor, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Bytes but for raw tokens' values, bool [N] which these are) of tokens [N, H]."""
        from compressors.kernels import klt as kernels
        from compressors.kernels.klt import few_tokens

        raw_cost = 256 * 16 * (rows.shape[1] + 1)
        if rows.device == CPU and len(rows) <= few_tokens.MOST_TOKENS:
            return few_tokens.encode_few(rows.float().contiguous().numpy(), ids, self._known, raw_cost)
        analysis = self._transform_on(rows.device).analyse(rows)
        quantized = self.quantize(analysis, ids)
        symbols = kernels.Symbols(
            levels=quantized.levels,
            is_raw=quantized.is_raw,
            rms=analysis.rms.numpy(),
            finer=analysis.finer.numpy(),
            trust=quantized.trust,
        )
        return kernels.encode(symbols, self._models, raw_cost), symbols.is_raw

    def quantize(self, analysis: Analysis, ids: np.ndarray) -> Quantized:
        """`ids` as from `check_ids`."""
        from compressors.kernels import trellis
        from compressors.kernels.trust import apply_trust, choose_trust

        y = analysis.y
        levels = self._scratch.get("levels", y.shape, torch.int32, CPU).numpy()
        is_raw = analysis.is_raw.numpy().copy()
        predicted, steps = self.transform.predict(ids), self.transform.steps(analysis.finer)
        trust = np.zeros(len(y), np.int32)
        if self._content.uses_token_ids:
            choose_trust(y.numpy(), predicted, steps, trust)
            apply_trust(trust, predicted)
        trellis.quantize(y.numpy(), predicted, steps, analysis.finer.numpy(), self._prices, levels, is_raw)
        return Quantized(levels, is_raw, trust, predicted)

    def decompress(
        self,
        data: torch.Tensor,
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Inverse of `compress`; `token_ids` as there.

        Raises CorruptPayload for bytes that it cannot have written.
        """
        from compressors.kernels.klt import few_tokens

        num_tokens, width = math.prod(shape[:-1]), shape[-1]
        if num_tokens == 0:
            if data.numel():
                raise CorruptPayload(f"klt payload of {data.numel()} bytes for no token")
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        self._compile()
        ids = self.check_ids(token_ids, num_tokens)
        if torch.device(device) == CPU and num_tokens <= few_tokens.MOST_TOKENS:
            rows = torch.empty(num_tokens, width)
            num_coded, is_raw = few_tokens.decode_few(data.numpy(), ids, self._known, rows.numpy())
            num_raw = _num_raw(num_coded, is_raw, data, shape)
            x = saturating_cast(rows, dtype)
        else:
            symbols, num_coded = self._decode(data.numpy(), num_tokens, width)
            is_raw = symbols.is_raw
            num_raw = _num_raw(num_coded, is_raw, data, shape)
            x = self._reconstruct(symbols, ids, torch.device(device), dtype)
        if num_raw:
            raw = _from_raw(data[num_coded:].clone(), num_raw, width)
            x[torch.from_numpy(is_raw).to(device)] = saturating_cast(raw, dtype).to(device)
        return x.view(tuple(shape))

    def _reconstruct(self, symbols: Symbols, ids: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Tokens [N, H] but for raw ones."""
        from compressors.kernels import trellis
        from compressors.kernels.trust import apply_trust

        decoded = self._scratch.get("decoded", symbols.levels.shape, torch.float32, CPU)
        steps = self.transform.steps(torch.from_numpy(symbols.finer))
        predicted = self.transform.predict(ids)
        apply_trust(symbols.trust, predicted)
        trellis.reconstruct(symbols.levels, steps, predicted, symbols.is_raw, decoded.numpy())
        return self._transform_on(device).synthesise(decoded, symbols.rms, device, dtype)

    def _decode(self, data: np.ndarray, num_tokens: int, width: int) -> tuple[Symbols, int]:
        """What a frame's bytes begin with, and of how many bytes that is; -1 where they are no frame's."""
        from compressors.kernels import klt as kernels

        levels = self._scratch.get("levels", (num_tokens, width), torch.int32, CPU).numpy()
        rms, finer, trust = np.zeros((3, num_tokens), np.int32)
        symbols = kernels.Symbols(levels, np.zeros(num_tokens, np.bool_), rms, finer, trust)
        return symbols, kernels.decode(data, self._models, symbols)

    def _transform_on(self, device: torch.device) -> KernelTransform | TorchTransform:
        if device not in self._transforms:
            self._transforms[device] = make_transform(self._content, self._tokens, self.step, device)
        return self._transforms[device]

    def check_ids(self, token_ids: torch.Tensor | None, num_tokens: int) -> np.ndarray:
        """int64 [N] on the CPU; zeros where they are not used."""
        if not self._content.uses_token_ids:
            return np.zeros(num_tokens, np.int64)
        if token_ids is None or token_ids.numel() != num_tokens:
            raise ValueError(f"klt with a token table needs token_ids of {num_tokens} tokens, got {token_ids}")
        ids = np.ascontiguousarray(token_ids.cpu().numpy().reshape(-1), np.int64)
        if ids.view(np.uint64).max() >= self._tokens.num_ids:  # a negative one is a large one there
            raise ValueError(f"klt's table has {self._tokens.num_ids} token ids, got {ids.min()} to {ids.max()}")
        return ids


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


def _num_raw(num_coded: int, is_raw: np.ndarray, data: torch.Tensor, shape: Sequence[int]) -> int:
    """How many tokens' values follow the coded bytes. Raises CorruptPayload where that is not what is there."""
    num_raw = int(is_raw.sum())
    if num_coded < 0 or num_coded + num_raw * (2 * shape[-1] + 2) != data.numel():
        raise CorruptPayload(f"{data.numel()} bytes are no klt frame of shape {tuple(shape)}")
    return num_raw


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
