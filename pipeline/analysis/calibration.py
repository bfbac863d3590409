"""What `calibrate.py` does on every rank for `klt`: statistics of states and gradients at its links, and their files.

Each rank sums products of what it sends and of the gradients there (`compressors.klt.fit`), and writes the files of its
own links. Every sixth micro-batch, up to 8192 tokens, is held out to fit the entropy models and to measure rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from compressors.klt.calibration_file import TokenTable, write_calibration, write_token_table
from compressors.klt.fit import CHUNK, LinkStatistics, fit, make_token_table
from compressors.klt.models import SampleRow
from pipeline.config.schema import RunConfig
from pipeline.data.windows import MicroBatch, make_microbatches
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.stage import TokenWindows
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.gradients import GradientPass
from pipeline.runtime.text import make_run_windows

__all__ = ["calibrate", "held_out_microbatches", "token_counts", "whole_windows"]

HELD_OUT_EVERY = 6  # micro-batches
MAX_HELD_OUT_TOKENS = 8192


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
    table = _shared_token_table(deployment, counts) if use_token_ids else TokenTable.empty()
    statistics = {
        link.index: LinkStatistics(hidden_size, table.codes.shape[1], deployment.devices[link.index])
        for link in own_links
    }
    samples: dict[int, list[SampleRow]] = {link.index: [] for link in own_links}

    def take(link_index: int, m: int, hidden_states: torch.Tensor, gradient: torch.Tensor) -> None:
        ids = tokens.input_ids(m)
        if m in held_out:
            samples[link_index] += [SampleRow(x.clone(), row.int()) for x, row in zip(hidden_states, ids, strict=True)]
        if m not in held_out or len(microbatches) == len(held_out):
            features = table.features(ids.reshape(-1)) if use_token_ids else torch.zeros(ids.numel(), 0)
            features = features.view(*ids.shape, -1).to(hidden_states.device)
            statistics[link_index].add(hidden_states, gradient, features)

    with tqdm(
        total=len(microbatches), desc="calibrating", unit="batch", disable=control.world.rank != 0, dynamic_ncols=True
    ) as bar:
        GradientPass(
            deployment,
            microbatches,
            dtype=TORCH_DTYPES[config.model.dtype],
            on_gradient=take,
            on_finished=lambda _: bar.update(),
        ).run()
    written = _write(deployment, out, statistics, samples, table if use_token_ids else None)
    control.barrier()
    return written


def _write(
    deployment: Deployment,
    out: Path,
    statistics: Mapping[int, LinkStatistics],
    samples: Mapping[int, Sequence[SampleRow]],
    table: TokenTable | None,
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
    if table is not None and control.world.rank == 0:
        written.append(write_token_table(out, table, **origin))
    for link in deployment.plan.links:
        if link.index in statistics:
            control.report(f"fitting {link.name}")
            of_link = statistics[link.index]
            calibration = fit(of_link, samples[link.index], TokenTable.empty() if table is None else table)
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


def _shared_token_table(deployment: Deployment, counts: torch.Tensor) -> TokenTable:
    """The token table, made on rank 0, which has the embedding, and sent to all ranks."""
    table = TokenTable.empty()
    if 0 in deployment.stages:
        stage = deployment.stages[0]

        def embeddings() -> Iterator[torch.Tensor]:
            for ids in torch.arange(len(counts)).split(CHUNK):
                with torch.no_grad():
                    yield stage.embed(ids.unsqueeze(0))[0].float().cpu()

        deployment.control.report("making the token table")
        table = make_token_table(embeddings, counts)
    if deployment.control.world.world_size == 1:
        return table
    num_ids, num_features, num_lengths = deployment.control.gather([*table.codes.shape, len(table.rank_starts)])[0]
    tensors = [
        torch.empty(num_ids, num_features, dtype=torch.int8),
        torch.empty(num_features),
        torch.empty(num_ids, dtype=torch.int32),
        torch.empty(num_lengths, dtype=torch.int32),
    ]
    if 0 in deployment.stages:
        tensors = [table.codes, table.scales, table.ranks, table.rank_starts]
    for tensor in tensors:
        deployment.control.broadcast(tensor)
    codes, scales, ranks, rank_starts = tensors
    return TokenTable(codes=codes, scales=scales, ranks=ranks, rank_starts=rank_starts)
