"""What `calibrate.py --shortcut` does on every rank: the map of the drafter `shortcut` from a text, and how good it is.

A pass over the text without gradients. Rank 0 sees, of the same tokens, their embeddings e_t, what its first layers
make of them, x_t, and what comes back into its last layers, y_t; the other ranks do their layers. Least squares of y_t
on (x_t, e_t, y_{t-1}, 1), from `FIRST_POSITION` of each window on: sums of products in float64, so that memory does not
grow with the text, but does with the hidden size: (3 H + 1)^2 * 8 bytes, and as much again where it is solved (24 MB at
H = 576, 1.9 GB at 5120). More than `MAX_PRODUCTS_NBYTES` is refused.

Held-out micro-batches, chosen as for `klt`, tell how often the draft behind a true state is the model's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.analysis.calibration import held_out_microbatches, token_counts, whole_windows
from pipeline.config.schema import RunConfig
from pipeline.data.windows import make_microbatches
from pipeline.drafting.shortcut import FIRST_POSITION, estimate
from pipeline.drafting.shortcut_file import ShortcutMap, write_shortcut
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.sampling import read_generation_defaults
from pipeline.models.stage import Stage, TokenWindows
from pipeline.partition.passes import Row
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.gradients import GradientPass, Observers
from pipeline.runtime.text import make_run_windows

__all__ = ["Agreement", "LeastSquares", "calibrate_shortcut", "check_hidden_size"]

MAX_PRODUCTS_NBYTES = 8 * 2**30
RIDGE = 1e-3  # of each input's own mean square
NUM_LIKELY = 16384
MAX_CHECKED = 512  # drafts, a forward of the last layers each


@dataclass(frozen=True)
class Agreement:
    """Of `num_drafts` drafts behind held-out tokens, `num_right` are what the model chooses (greedily)."""

    num_right: int
    num_drafts: int


def check_hidden_size(hidden_size: int) -> None:
    """Raise ValueError where the sums would take too much memory."""
    nbytes = 8 * (3 * hidden_size + 1) ** 2
    if nbytes > MAX_PRODUCTS_NBYTES:
        raise ValueError(
            f"hidden size {hidden_size}: fitting a shortcut takes twice {nbytes / 2**30:.1f} GiB, the limit is "
            f"{MAX_PRODUCTS_NBYTES / 2**30:.0f} GiB; take the drafter ngram"
        )


class LeastSquares:
    """Sums over tokens of the products of inputs (x_t, e_t, y_{t-1}, 1) with each other and with y_t."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        check_hidden_size(hidden_size)
        size = 3 * hidden_size + 1
        make: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._products, self._targets = torch.zeros(size, size, **make), torch.zeros(size, hidden_size, **make)
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, x: torch.Tensor, e: torch.Tensor, y: torch.Tensor) -> None:
        """Windows, [B, T, H] each. Tokens with states that are not finite are left out."""
        device = self._products.device
        x, e, y = (states.to(device, torch.float64) for states in (x, e, y))
        own, before = slice(FIRST_POSITION, None), slice(FIRST_POSITION - 1, -1)
        inputs = torch.cat([x[:, own], e[:, own], y[:, before], torch.ones_like(x[:, own, :1])], -1)
        targets = y[:, own]
        usable = inputs.isfinite().all(-1) & targets.isfinite().all(-1)
        inputs, targets = inputs[usable], targets[usable]
        self._products.addmm_(inputs.T, inputs)
        self._targets.addmm_(inputs.T, targets)
        self.num_tokens += len(inputs)

    @torch.no_grad()
    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [3 H, H], bias [H]), float32 on the CPU; no more tokens may come afterwards.

        Raises ValueError where there was no token.
        """
        if self.num_tokens == 0:
            raise ValueError(
                f"calibration text has no window of more than {FIRST_POSITION} tokens with finite hidden states"
            )
        penalty = RIDGE * self._products.diagonal()
        penalty[-1] = 0
        penalty += 1e-12 * self._products.diagonal().mean()  # an input may be 0 throughout
        self._products.diagonal().add_(penalty)
        solution = torch.linalg.solve(self._products, self._targets).float().cpu()
        if not solution.isfinite().all():
            raise ValueError(f"no map can be made of {self.num_tokens} tokens; take a longer calibration text")
        return solution[:-1].contiguous(), solution[-1].contiguous()


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """A micro-batch's states [B, T, H] on the CPU, and what the model chooses behind some of its columns, [B, C]."""

    x: torch.Tensor
    e: torch.Tensor
    y: torch.Tensor
    columns: Sequence[int]
    chosen: torch.Tensor


class _Fitting:
    """Rank 0's part: takes in the states at the ends of its stages, one micro-batch after the other."""

    def __init__(self, last: Stage, hidden_size: int, held_out: set[int], num_microbatches: int) -> None:
        self.sums = LeastSquares(hidden_size, last.device)
        self._last, self._held_out = last, held_out
        self.is_only_one = len(held_out) == num_microbatches
        self._first_states: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept: list[_HeldOut] = []

    def take(self, stage_index: int, m: int, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """As `gradients.OnForward`."""
        if stage_index == 0:
            self._first_states = inputs, output
        elif stage_index == self._last.plan.stage_index:
            assert self._first_states is not None
            e, x = self._first_states
            if m in self._held_out:
                self._keep(x, e, inputs, output)
            if m not in self._held_out or self.is_only_one:
                self.sums.add(x, e, inputs)

    def _keep(self, x: torch.Tensor, e: torch.Tensor, y: torch.Tensor, output: torch.Tensor) -> None:
        num_rows, num_tokens, _ = y.shape
        num_drafts = max(1, MAX_CHECKED // (len(self._held_out) * num_rows))
        step = max(1, (num_tokens - FIRST_POSITION) // num_drafts)
        columns = range(FIRST_POSITION, num_tokens, step)[:num_drafts]
        chosen = torch.stack([self._last.logits(output[:, column]).argmax(-1).cpu() for column in columns], 1)
        self._kept.append(_HeldOut(x.cpu(), e.cpu(), y.cpu(), columns, chosen))

    @torch.inference_mode()
    def agreement(self, content: ShortcutMap) -> Agreement:
        """Drafts as `drafting.shortcut` makes them where nothing is under way, by what was held out."""
        last, num_right, num_drafts = self._last, 0, 0
        dtype = last.decoder.config.dtype
        weights, bias = content.weights.to(last.device, dtype), content.bias.to(last.device, dtype)
        head = last.cut_head(content.likely_ids.long())
        for kept in self._kept:
            x, e, y = (states.to(last.device) for states in (kept.x, kept.e, kept.y))
            num_rows, num_tokens, _ = y.shape
            last.open_slots(num_rows, num_tokens)
            last.forward(y, rows=[Row(slot, 0) for slot in range(num_rows)])
            # The last ones first: a draft crops its slot to where it begins.
            for column, chosen in reversed(list(zip(kept.columns, kept.chosen.T, strict=True))):
                states = estimate(x[:, column], e[:, column], y[:, column - 1], weights, bias)
                output = last.forward(states[:, None], rows=[Row(slot, column) for slot in range(num_rows)])[:, 0]
                if head is None:
                    drafts = last.logits(output).argmax(-1).cpu()
                else:
                    drafts = content.likely_ids[head(output).argmax(-1).cpu()]
                num_right += int((drafts == chosen).sum())
                num_drafts += num_rows
            last.close_slots()
        return Agreement(num_right, num_drafts)


def calibrate_shortcut(config: RunConfig, deployment: Deployment, out: Path) -> Agreement | None:
    """Write the map's file; every rank calls it. Returns, on rank 0, how good it is on held-out text, and prints it.

    Raises ValueError where the text is too short, and AttentionError for a model that cannot be drafted with.
    """
    control, text, plan = deployment.control, deployment.text, deployment.plan
    windows = make_run_windows(config, text.ids, text.bos_id)
    microbatches = whole_windows(make_microbatches(windows, config.batch_size))
    if (length := microbatches[0].shape[1]) <= FIRST_POSITION + 1:
        raise ValueError(f"windows of {length} tokens are too short for it; raise dataset.max_length or --tokens")
    fitting, model_config = None, deployment.model.config
    if control.world.rank == 0:
        last = deployment.stages[plan.stages[-1].stage_index]
        last.open_slots(1, microbatches[0].shape[1])  # raises now where it would later
        last.close_slots()
        fitting = _Fitting(last, model_config.hidden_size, held_out_microbatches(microbatches), len(microbatches))
    with tqdm(
        total=len(microbatches), desc="calibrating", unit="batch", disable=fitting is None, dynamic_ncols=True
    ) as bar:
        GradientPass(
            deployment,
            microbatches,
            dtype=TORCH_DTYPES[config.model.dtype],
            objective=None,
            seen=Observers(
                on_forward=(lambda *_: None) if fitting is None else fitting.take,
                on_finished=lambda _: bar.update(),
            ),
        ).run()
    agreement = None
    if fitting is not None:
        control.report("fitting the shortcut")
        tokens = TokenWindows(text.ids, microbatches, text.bos_id)
        counts = token_counts(tokens, model_config.vocab_size)
        eos_ids = read_generation_defaults(deployment.model.directory, model_config).eos_ids
        weights, bias = fitting.sums.solve()
        content = ShortcutMap(weights=weights, bias=bias, likely_ids=likely_ids(counts, eos_ids))
        path = write_shortcut(
            out,
            content,
            plan,
            checkpoint=deployment.model.checkpoint_digest,
            text_sha256=text.text_sha256,
            num_tokens=fitting.sums.num_tokens,
        )
        print(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
        control.report("trying the shortcut")
        agreement = fitting.agreement(content)
        share = agreement.num_right / agreement.num_drafts
        where = "on held-out text" if not fitting.is_only_one else "on this text, which is too short to hold some out,"
        print(f"first drafts {where} that are the model's own choice: {share:.1%} of {agreement.num_drafts}")
    control.barrier()
    return agreement


def likely_ids(counts: torch.Tensor, eos_ids: Sequence[int]) -> torch.Tensor:
    """The `NUM_LIKELY` most frequent token ids, of equals the lower ones, and `eos_ids`; int32 [K], rising."""
    likeliest = counts.argsort(descending=True, stable=True)[:NUM_LIKELY].tolist()
    possible = [token_id for token_id in eos_ids if token_id < len(counts)]
    return torch.tensor(sorted({*likeliest, *possible}), dtype=torch.int32)
