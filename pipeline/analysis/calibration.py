"""What `calibrate.py` does on every rank for `klt`: statistics of states and gradients at its links, and their files.

Each rank sums products of what it sends and of the gradients there (`compressors.klt.fit`), and writes the files of its
own links. Every sixth micro-batch, up to 8192 tokens, is held out to fit the entropy models and to measure rates.
Gradients, which cost more than the states do, are taken of GRADIENT_TOKENS tokens, spread over the text. What takes
longer than some minutes goes on where it was interrupted (`analysis.unfinished`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from compressors.klt.calibration_file import FORMAT, Origin, file_name, write_calibration, write_token_table
from compressors.klt.fit import LinkStatistics, fit, token_importance
from compressors.klt.token_table import CHUNK, NarrowTable, TokenTable, make_token_table, narrow_token_table
from pipeline.analysis.gathering import Division, Gathered
from pipeline.analysis.unfinished import UnfinishedFiles, tensors_digest
from pipeline.comm.control import Control
from pipeline.config.schema import RunConfig
from pipeline.data.windows import MicroBatch, make_microbatches
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.stage import Objective, TokenWindows
from pipeline.records.files import check_writable
from pipeline.records.identity import digest_of
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.gradients import GradientPass, Observers
from pipeline.runtime.placement import balanced_layers
from pipeline.runtime.text import make_run_windows

__all__ = ["calibrate", "held_out_microbatches", "token_counts", "whole_windows"]

HELD_OUT_EVERY = 6  # micro-batches
MAX_HELD_OUT_TOKENS = 8192
GRADIENT_TOKENS = 49_152


def calibrate(config: RunConfig, deployment: Deployment, out: Path, *, use_token_ids: bool) -> list[Path]:
    """Calibrate all links; every rank calls it. Returns the files that this rank has, of which it says what it wrote.

    What an interrupted one has left in `out` is taken up. Raises ValueError where the text is too short or gives no
    gradients, or a rank cannot write there.
    """
    _check_writable(deployment.control, out)
    text, dtype = deployment.text, TORCH_DTYPES[config.model.dtype]
    microbatches = whole_windows(make_microbatches(make_run_windows(config, text.ids, text.bos_id), config.batch_size))
    division = divide(microbatches)
    tokens = TokenWindows(text.ids, microbatches, text.bos_id)
    counts = token_counts(tokens, deployment.model.config.vocab_size)
    table = _wide_table(deployment, counts) if use_token_ids else TokenTable.empty()
    gathered = Gathered(deployment, tokens, division, table, dtype)
    digest = _digest(config, deployment, division, table)
    unfinished = UnfinishedFiles(out, digest, gathered, deployment.control)
    is_continued = unfinished.load()
    _gather(deployment, microbatches, dtype, gathered, unfinished)
    narrow = _narrow_table(deployment, table, counts, gathered.statistics.values()) if use_token_ids else None
    written = _write(deployment, out, gathered, narrow, digest, is_continued=is_continued)
    unfinished.remove()
    return written


def _check_writable(control: Control, out: Path) -> None:
    """Raise ValueError on every rank unless each one can write to `out`, on its machine."""

    def check() -> tuple[None, None]:
        check_writable(out)
        return None, None

    control.together(check)


def _gather(
    deployment: Deployment,
    microbatches: Sequence[MicroBatch],
    dtype: torch.dtype,
    gathered: Gathered,
    unfinished: UnfinishedFiles,
) -> None:
    """What is missing, in passes of a few micro-batches each."""
    division = gathered.division

    def run(chosen: Sequence[int]) -> None:
        def take(stage_index: int, index: int, _: torch.Tensor, hidden_states: torch.Tensor) -> None:
            if stage_index in gathered.statistics:
                gathered.take_states(stage_index, chosen[index], hidden_states)

        GradientPass(
            deployment,
            [microbatches[m] for m in chosen],
            dtype=dtype,
            objective=Objective.NLL if gathered.num_done < len(division.graded) else None,
            seen=Observers(
                on_forward=take,
                on_gradient=lambda link_index, _, x, gradient: gathered.take_gradients(link_index, x, gradient),
                on_finished=lambda _: bar.update(),
            ),
        ).run()
        gathered.num_done += len(chosen)

    with tqdm(
        total=len(microbatches),
        initial=gathered.num_done,
        desc="calibrating",
        unit="batch",
        disable=deployment.control.world.rank != 0,
        dynamic_ncols=True,
    ) as bar:
        while chosen := division.next_pass(gathered.num_done):
            run(chosen)
            unfinished.save_if_due()


def _digest(config: RunConfig, deployment: Deployment, division: Division, table: TokenTable) -> str:
    """Of all that decides what is gathered and what is made of it."""
    text = deployment.text
    return digest_of(
        {
            **config.numerics(balanced_layers(config, deployment.plan)),
            "format": FORMAT,
            "links": [link.name for link in deployment.plan.links],
            "checkpoint": deployment.model.weights_digest,
            "text": text.text_sha256,
            "ids": text.ids_sha256,
            "bos_id": text.bos_id,
            "division": [sorted(division.held_out), sorted(division.fitted), division.graded, division.others],
            # Features may come out rotated on another machine, and sums of both would mean nothing.
            "table": tensors_digest(_tensors(table)),
        }
    )


def _write(
    deployment: Deployment,
    out: Path,
    gathered: Gathered,
    tokens: NarrowTable | None,
    digest: str,
    *,
    is_continued: bool,
) -> list[Path]:
    """Fit and write this rank's links, and on rank 0 the token table.

    Where an interrupted calibration is continued, links that it has written are left as they are.
    """
    control, text = deployment.control, deployment.text
    origin = Origin(
        checkpoint=deployment.model.checkpoint_digest, text_sha256=text.text_sha256, text=text.description
    )
    narrow = tokens or NarrowTable.empty()
    fitted_from = digest_of([digest, tensors_digest(_tensors(narrow.table))])
    paths = []
    if tokens is not None and control.world.rank == 0:
        paths.append(write_token_table(out, tokens.table, origin))
        _tell_written(paths[-1])
    for link in gathered.links:
        path = out / file_name(link.name)
        if not (is_continued and _is_fitted(path, fitted_from)):
            control.report(f"fitting {link.name}")
            statistics = gathered.statistics[link.index]
            calibration = fit(statistics, gathered.samples[link.index], narrow)
            write_calibration(
                out,
                calibration,
                origin,
                link_name=link.name,
                num_tokens=statistics.num_tokens,
                fitted_from=fitted_from,
            )
            _tell_written(path)
        paths.append(path)
    return paths


def _is_fitted(path: Path, fitted_from: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fitted_from") == fitted_from
    except (OSError, SafetensorError, RuntimeError):
        return False


def _tell_written(path: Path) -> None:
    print(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


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


def divide(microbatches: Sequence[MicroBatch]) -> Division:
    """What micro-batches are for; the only one serves for everything."""
    held_out = held_out_microbatches(microbatches)
    fitted = [m for m in range(len(microbatches)) if m not in held_out] or [0]
    graded = spread(fitted, [microbatches[m].num_tokens for m in fitted], GRADIENT_TOKENS)
    return Division(
        held_out=frozenset(held_out),
        fitted=frozenset(fitted),
        graded=tuple(graded),
        others=tuple(m for m in range(len(microbatches)) if m not in graded),
    )


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
    tensors = _tensors(table)
    shapes = control.gather([list(tensor.shape) for tensor in tensors.values()])[0]
    return TokenTable(**dict(zip(tensors, _broadcast(control, list(tensors.values()), shapes), strict=True)))


def _tensors(table: TokenTable) -> dict[str, torch.Tensor]:
    return {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}


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
