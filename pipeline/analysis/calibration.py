"""What `calibrate.py` does on every rank for `klt`: statistics of states and gradients at its links, and their files.

Each rank sums products of what it sends and of the gradients there (`compressors.klt.fit`), and writes the files of its
own links. Every sixth micro-batch, up to 8192 tokens, is held out to fit the entropy models and to measure rates.
Gradients, which cost twice what the states do, are taken of GRADIENT_TOKENS tokens, spread over the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from compressors.klt.calibration_file import write_calibration, write_token_table
from compressors.klt.fit import LinkStatistics, fit, token_importance
from compressors.klt.models import SampleRow
from compressors.klt.token_table import CHUNK, NarrowTable, TokenTable, make_token_table, narrow_token_table
from pipeline.comm.control import Control
from pipeline.config.schema import RunConfig
from pipeline.data.windows import MicroBatch, make_microbatches
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.stage import Objective, TokenWindows
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.gradients import GradientPass
from pipeline.runtime.text import make_run_windows

__all__ = ["calibrate", "held_out_microbatches", "token_counts", "whole_windows"]

HELD_OUT_EVERY = 6  # micro-batches
MAX_HELD_OUT_TOKENS = 8192
GRADIENT_TOKENS = 12_288


def calibrate(config: RunConfig, deployment: Deployment, out: Path, *, use_token_ids: bool) -> list[Path]:
    """Calibrate all links; every rank calls it. Returns the files that this rank wrote.

    Raises ValueError where the text is too short or gives no gradients.
    """
    control, text, plan = deployment.control, deployment.text, deployment.plan
    microbatches = whole_windows(make_microbatches(make_run_windows(config, text.ids, text.bos_id), config.batch_size))
    held_out = held_out_microbatches(microbatches)
    tokens = TokenWindows(text.ids, microbatches, text.bos_id)
    hidden_size, vocab_size = deployment.model.config.hidden_size, deployment.model.config.vocab_size
    counts = token_counts(tokens, vocab_size)
    own_links = [link for link in plan.links if link.index in deployment.stages]
    table = _wide_table(deployment, counts) if use_token_ids else TokenTable.empty()
    statistics = {
        link.index: LinkStatistics(hidden_size, table.num_features, deployment.devices[link.index])
        for link in own_links
    }
    samples: dict[int, list[SampleRow]] = {link.index: [] for link in own_links}

    fitted = [m for m in range(len(microbatches)) if m not in held_out] or [0]
    graded = spread(fitted, [microbatches[m].num_tokens for m in fitted], GRADIENT_TOKENS)

    def take_states(link_index: int, m: int, hidden_states: torch.Tensor) -> None:
        ids = tokens.input_ids(m)
        if m in held_out:
            samples[link_index] += [SampleRow(x.clone(), row.int()) for x, row in zip(hidden_states, ids, strict=True)]
        if m in fitted:
            features = table.features(ids.reshape(-1)) if use_token_ids else torch.zeros(ids.numel(), 0)
            statistics[link_index].add(hidden_states, features.view(*ids.shape, -1).to(hidden_states.device))

    def run(chosen: Sequence[int], objective: Objective | None) -> None:
        def take(stage_index: int, index: int, _: torch.Tensor, hidden_states: torch.Tensor) -> None:
            if stage_index in statistics:
                take_states(stage_index, chosen[index], hidden_states)

        GradientPass(
            deployment,
            [microbatches[m] for m in chosen],
            dtype=TORCH_DTYPES[config.model.dtype],
            objective=objective,
            on_forward=take,
            on_gradient=lambda link_index, _, x, gradient: statistics[link_index].add_gradients(x, gradient),
            on_finished=lambda _: bar.update(),
        ).run()

    with tqdm(
        total=len(microbatches), desc="calibrating", unit="batch", disable=control.world.rank != 0, dynamic_ncols=True
    ) as bar:
        run(graded, Objective.NLL)
        if others := [m for m in range(len(microbatches)) if m not in graded]:
            run(others, None)
    narrow = _narrow_table(deployment, table, counts, statistics.values()) if use_token_ids else None
    written = _write(deployment, out, statistics, samples, narrow)
    control.barrier()
    return written


def _write(
    deployment: Deployment,
    out: Path,
    statistics: Mapping[int, LinkStatistics],
    samples: Mapping[int, Sequence[SampleRow]],
    tokens: NarrowTable | None,
) -> list[Path]:
    """Fit and write this rank's links, by link index, and on rank 0 the token table."""
    control = deployment.control
    text = deployment.text
    origin = {
        "checkpoint": deployment.model.checkpoint_digest,
        "text_sha256": text.text_sha256,
        "text": text.description,
    }
    written = []
    if tokens is not None and control.world.rank == 0:
        written.append(write_token_table(out, tokens.table, **origin))
    for link in deployment.plan.links:
        if link.index in statistics:
            control.report(f"fitting {link.name}")
            of_link = statistics[link.index]
            calibration = fit(of_link, samples[link.index], tokens or NarrowTable.empty())
            path = write_calibration(
                out, calibration, link_name=link.name, num_tokens=of_link.num_tokens, **origin
            )
            written.append(path)
    for path in written:
        print(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return written


def token_counts(tokens: TokenWindows, vocab_size: int) -> torch.Tensor:
    """How often each token goes in, int64 [vocab_size]."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for m in range(len(tokens.microbatches)):
        counts += torch.bincount(tokens.input_ids(m).reshape(-1), minlength=vocab_size)
    return counts


def whole_windows(microbatches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Micro-batches without the text's shorter last window, unless it is the only one."""
    longest = microbatches[0].shape[1]
    return [m for m in microbatches if m.shape[1] == longest]


def held_out_microbatches(microbatches: Sequence[MicroBatch]) -> set[int]:
    """Indices of micro-batches that are kept apart from the statistics; the only one serves for both."""
    if len(microbatches) == 1:
        return {0}
    chosen: set[int] = set()
    num_tokens = 0
    for m in range(HELD_OUT_EVERY - 1 if len(microbatches) >= HELD_OUT_EVERY else 1, len(microbatches), HELD_OUT_EVERY):
        num_tokens += microbatches[m].num_tokens
        if chosen and num_tokens > MAX_HELD_OUT_TOKENS:
            break
        chosen.add(m)
    return chosen


def spread(indices: Sequence[int], num_tokens: Sequence[int], wanted: int) -> list[int]:
    """Of micro-batches of `num_tokens` tokens those that together have about `wanted`, or all, evenly spread."""
    share = min(1.0, wanted / sum(num_tokens))
    count = max(1, round(share * len(indices)))
    return [indices[i * len(indices) // count] for i in range(count)]


def _wide_table(deployment: Deployment, counts: torch.Tensor) -> TokenTable:
    """The wide token table, made on rank 0, which has the embedding, and sent to all ranks."""
    table = TokenTable.empty()
    if 0 in deployment.stages:
        stage = deployment.stages[0]

        def embeddings() -> Iterator[torch.Tensor]:
            for ids in torch.arange(len(counts)).split(CHUNK):
                with torch.no_grad():
                    yield stage.embed(ids.unsqueeze(0))[0].float().cpu()

        deployment.control.report("making the token table")
        table = make_token_table(embeddings, counts)
    return _broadcast_table(deployment.control, table)


def _narrow_table(
    deployment: Deployment, wide: TokenTable, counts: torch.Tensor, statistics: Iterable[LinkStatistics]
) -> NarrowTable:
    """The narrow one, made on rank 0 by what the features are worth to the links of all ranks, and sent to all."""
    control = deployment.control
    importance = torch.zeros(wide.num_features, wide.num_features, dtype=torch.float64)
    for of_link in statistics:
        importance += token_importance(of_link)
    control.sum_over_ranks(importance)
    tokens = NarrowTable.empty()
    if control.world.rank == 0:
        control.report("narrowing the token table")
        tokens = narrow_token_table(wide, counts, importance)
    table = _broadcast_table(control, tokens.table)
    d = wide.num_features
    shapes = [[table.num_features, d], [d], [d, d]]
    back, mean, errors = _broadcast(control, [tokens.back, tokens.mean, tokens.errors], shapes)
    return NarrowTable(table=table, back=back, mean=mean, errors=errors)


def _broadcast_table(control: Control, table: TokenTable) -> TokenTable:
    names = [f.name for f in dataclasses.fields(TokenTable)]
    tensors = [getattr(table, name) for name in names]
    shapes = control.gather([list(tensor.shape) for tensor in tensors])[0]
    return TokenTable(**dict(zip(names, _broadcast(control, tensors, shapes), strict=True)))


def _broadcast(
    control: Control, tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Rank 0's `tensors`, whose shapes all ranks know, on every rank; others give tensors of the same dtypes."""
    shared = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        x = tensor.contiguous() if control.world.rank == 0 else tensor.new_empty(shape)
        control.broadcast(x)
        shared.append(x)
    return shared
