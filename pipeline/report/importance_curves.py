"""Which importance metric pays? Perplexity against average bits per value, from the records of a sweep.

    python -m pipeline.report.importance_curves results/demo_importance

prints a table and writes curves/importance.json and curves/importance.png into the folder. At a rate (a pair of codecs
and a fraction) all metrics send the same number of bytes, so their perplexities compare directly. The lines to beat
are a random choice of the tokens, and uniform bits: the same family of codecs for all tokens, its log perplexity
interpolated linearly between the neighbouring numbers of bits.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from compressors.console import run_command
from pipeline.config.options import OptionParser, path_option
from pipeline.records.base import Amount, OpenPart, Part, Words, finite_or_none, problem_in
from pipeline.records.files import check_writable, write_figure, write_json
from pipeline.records.labels import model_label
from pipeline.records.run_record import CodecConfig, Dataset, Protocol, RunRecord
from pipeline.report.measured_point import is_uncompressed
from pipeline.report.quality import compare
from pipeline.report.results import load_files, read_own_per_token, setting_key

__all__ = ["CurvePoint", "ImportanceCurves", "MeanLogRatios", "UniformRun", "collect", "plot_curves"]

SCHEMA_VERSION: Final = 1

Pair = tuple[str, str]  # labels of the codecs for important tokens and for the rest


class UniformRun(Part):
    """A run with one plain codec for all tokens."""

    family: str
    bits_per_value: Amount
    ppl: float


class CurvePoint(Part):
    """A run with `token_mixed`.

    `seed` is that of a random choice, null for other metrics. `ppl_over_random` is the ratio to the geometric mean of
    the random choices at its rate, the 95% interval that to the first of them. Null: what would be compared is missing.
    """

    run_id: str
    metric: str
    seed: int | None
    high: str
    low: str
    family: str
    fraction: float
    bits_per_value: Amount
    ppl: float
    causal: bool
    ppl_over_uniform_bits: float | None
    ppl_over_random: float | None
    ppl_over_first_random_interval: tuple[float, float] | None
    ppl_over_none: float | None

    @property
    def pair(self) -> Pair:
        return self.high, self.low


class MeanLogRatios(Part):
    """Of one metric, the means over its points of the logarithms of both ratios; null without any."""

    ppl_over_random: float | None
    ppl_over_uniform_bits: float | None


class ImportanceCurves(Part):
    """What `importance.json` holds. `problems` tell which records were skipped and which points lack an interval."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["thinwire importance curves"] = "thinwire importance curves"
    model: Words
    dataset: Dataset
    protocol: Protocol
    ppl_uncompressed: float | None
    points: tuple[CurvePoint, ...]
    uniform: tuple[UniformRun, ...]
    mean_log_ratio: Mapping[str, MeanLogRatios]
    problems: tuple[Words, ...]


class _Codec(OpenPart):
    """A codec as records hold it; one that wraps another has it as `inner`."""

    name: str
    inner: _Codec | None = None

    @property
    def label(self) -> str:
        return self.name if self.inner is None else f"{self.name}({self.inner.label})"

    @property
    def family(self) -> str:
        """The label with its number of bits left open: hadamard(int#)."""
        return re.sub(r"\d+", "#", self.label)


class _Choice(OpenPart):
    """The options of `token_mixed`."""

    metric: str
    fraction: Annotated[float, Field(ge=0, le=1)]
    high: _Codec
    low: _Codec


@dataclass(frozen=True, kw_only=True)
class _MixedRun:
    """A record with `token_mixed` that can stand in the table, and what the table needs of it."""

    path: Path
    record: RunRecord
    choice: _Choice
    seed: int | None
    bits_per_value: float
    ppl: float

    @property
    def rate(self) -> tuple[str, str, float]:
        return self.choice.high.label, self.choice.low.label, self.choice.fraction


def collect(files: Sequence[tuple[Path, RunRecord]]) -> ImportanceCurves:
    """The curves from records of one model, text and protocol and their paths.

    `points` has one entry per run with `token_mixed`; `uniform` the runs of plain codecs of the same families. The 95%
    interval of a point's ratio to the first random choice at its rate is that of a paired bootstrap over windows
    (`quality.compare`), None where the windows are few or per-token files cannot be used, which `problems` tells, as
    well as the records that were skipped. Raises ValueError when records of several settings are mixed, or none has a
    choice of tokens.
    """
    if len({setting_key(record) for _, record in files}) > 1:
        raise ValueError("the folder has records of several models, texts or protocols; give each a folder of its own")
    records = [record for _, record in files]
    runs, problems = [], []
    for path, record in files:
        if _is_mixed(record):
            try:
                runs.append(_mixed_run(path, record))
            except ValueError as e:
                problems.append(f"{path} is skipped: {e}")
    if not runs:
        none_fits = "no record has the codec token_mixed on its links, and a finite perplexity"
        raise ValueError("; ".join([none_fits, *problems]))
    uniform = _uniform_runs(records, families={run.choice.high.family for run in runs})
    none = next((record.results.avg_ppl for record in records if is_uncompressed(record)), None)
    points, lacking = _points(runs, uniform, none)
    first = runs[0].record
    return ImportanceCurves(
        model=model_label(first.args.model_name),
        dataset=first.dataset,
        protocol=first.protocol,
        ppl_uncompressed=none,
        points=tuple(sorted(points, key=lambda p: (p.pair, p.bits_per_value, p.ppl))),
        uniform=tuple(sorted(uniform, key=lambda u: (u.family, u.bits_per_value))),
        mean_log_ratio=_means(points),
        problems=(*problems, *lacking),
    )


def _is_mixed(record: RunRecord) -> bool:
    codecs = record.codecs.values()
    return bool(codecs) and all(codec.name == "token_mixed" for codec in codecs)


def _mixed_run(path: Path, record: RunRecord) -> _MixedRun:
    """Raises ValueError for a record with `token_mixed` that lacks what the table needs, and other reports do not."""
    codec = _one_codec(record)
    if codec is None:
        raise ValueError("its links have codecs with different options")
    try:
        choice = _Choice.model_validate(codec.others)
    except ValidationError as e:
        raise ValueError(f"codec token_mixed: {problem_in(e)}") from e
    bits, ppl = record.traffic_totals.bits_per_value, record.results.avg_ppl
    if ppl is None:
        raise ValueError("its perplexity is not finite")
    if bits is None:
        raise ValueError("nothing has crossed its links")
    seed = record.args.config.importance.seed if choice.metric == "random" else None
    if choice.metric == "random" and seed is None:
        raise ValueError("it does not tell the seed of its random choice")
    return _MixedRun(path=path, record=record, choice=choice, seed=seed, bits_per_value=bits, ppl=ppl)


def _one_codec(record: RunRecord) -> CodecConfig | None:
    """That of all links; None where there is none, or links differ."""
    codecs = list(record.codecs.values())
    return codecs[0] if codecs and all(codec == codecs[0] for codec in codecs) else None


def _uniform_runs(records: Iterable[RunRecord], *, families: set[str]) -> list[UniformRun]:
    runs = []
    for record in records:
        codec, bits, ppl = _one_codec(record), record.traffic_totals.bits_per_value, record.results.avg_ppl
        if codec is None or not bits or ppl is None:
            continue
        try:
            family = _Codec.model_validate(codec.model_dump()).family
        except ValidationError:  # a plug-in, whose `inner` is something else
            continue
        if family in families:
            runs.append(UniformRun(family=family, bits_per_value=bits, ppl=ppl))
    return runs


def _points(
    runs: Sequence[_MixedRun], uniform: Sequence[UniformRun], none: float | None
) -> tuple[list[CurvePoint], list[str]]:
    """Every run beside those that it is compared with, and why which have no interval."""
    random = defaultdict(list)
    for run in sorted((run for run in runs if run.seed is not None), key=lambda run: run.seed or 0):
        random[run.rate].append(run)
    points, lacking = [], []
    for run in runs:
        choices = random[run.rate]
        interval = None
        if choices:
            try:
                tokens = [read_own_per_token(r.path, r.record) for r in (choices[0], run)]
                interval = compare(*tokens).ppl_interval
            except ValueError as e:  # RecordError too
                lacking.append(f"{run.record.run_id} has no interval: {e}")
        points.append(
            CurvePoint(
                run_id=run.record.run_id,
                metric=run.choice.metric,
                seed=run.seed,
                high=run.choice.high.label,
                low=run.choice.low.label,
                family=run.choice.high.family,
                fraction=run.choice.fraction,
                bits_per_value=run.bits_per_value,
                ppl=run.ppl,
                causal=run.record.causal,
                ppl_over_uniform_bits=_ratio(run.ppl, _uniform_ppl(run, uniform)),
                ppl_over_random=_ratio(run.ppl, _mean_ppl([choice.ppl for choice in choices])),
                ppl_over_first_random_interval=interval,
                ppl_over_none=_ratio(run.ppl, none),
            )
        )
    return points, lacking


def _uniform_ppl(run: _MixedRun, uniform: Iterable[UniformRun]) -> float | None:
    """Perplexity of uniform bits at the run's bits per value; None outside of those that were measured."""
    line = sorted((u.bits_per_value, np.log(u.ppl)) for u in uniform if u.family == run.choice.high.family)
    if len(line) < 2 or not line[0][0] <= run.bits_per_value <= line[-1][0] + 0.05:
        return None
    bits, log_ppl = zip(*line, strict=True)
    return float(np.exp(np.interp(run.bits_per_value, bits, log_ppl)))


def _mean_ppl(ppls: Sequence[float]) -> float | None:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(ppls)))) if ppls else None


def _ratio(ppl: float, reference: float | None) -> float | None:
    return None if reference is None else finite_or_none(ppl / reference)


def _means(points: Sequence[CurvePoint]) -> dict[str, MeanLogRatios]:
    """By metric."""
    return {
        metric: MeanLogRatios(
            ppl_over_random=_mean_log(p.ppl_over_random for p in points if p.metric == metric),
            ppl_over_uniform_bits=_mean_log(p.ppl_over_uniform_bits for p in points if p.metric == metric),
        )
        for metric in sorted({p.metric for p in points})
    }


def _mean_log(ratios: Iterable[float | None]) -> float | None:
    logs = [np.log(ratio) for ratio in ratios if ratio is not None]
    return float(np.mean(logs)) if logs else None


def plot_curves(curves: ImportanceCurves, path: Path) -> None:
    """One panel per pair of codecs, a line per metric, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = sorted({p.pair for p in curves.points})
    metrics = sorted({p.metric for p in curves.points})
    figure = Figure(figsize=(6.4 * len(pairs), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, pair in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs, strict=True):
        points = [p for p in curves.points if p.pair == pair]
        low, high = (f(p.bits_per_value for p in points) for f in (min, max))
        own_family = [u for u in curves.uniform if u.family == points[0].family]
        line = [u for u in own_family if low - 1.1 <= u.bits_per_value <= high + 1.1]
        axes.plot(*_xy(line), color="black", linestyle="--", marker="s", label="uniform bits")
        for number, metric in enumerate(metrics):
            own = [p for p in points if p.metric == metric]
            causal = own and own[0].causal
            label = metric if causal else f"{metric} (not causal)"
            axes.plot(*_xy(own), color=f"C{number}", marker="o" if causal else "x", label=label)
        if curves.ppl_uncompressed:
            axes.axhline(curves.ppl_uncompressed, color="0.5", linewidth=1, label="not compressed")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(f"{pair[0]} for important tokens, {pair[1]} for the rest")
        axes.set_xlabel("bits per value, side information included")
        axes.grid(color="0.9")
    axes.legend(fontsize=8)
    figure.get_axes()[0].set_ylabel("perplexity")
    figure.suptitle(
        f"{curves.model}, {curves.dataset.num_tokens} tokens, windows "
        f"{curves.protocol.max_length}/{curves.protocol.stride}"
    )
    write_figure(path, figure, dpi=110)


def _xy(points: Iterable[CurvePoint | UniformRun]) -> tuple[list[float], list[float]]:
    """Bits and perplexities; several runs at one rate (seeds) as their geometric mean."""
    rates = defaultdict(list)
    for point in points:
        rates[round(point.bits_per_value, 6)].append(np.log(point.ppl))
    return list(sorted(rates)), [float(np.exp(np.mean(rates[x]))) for x in sorted(rates)]


def _print(curves: ImportanceCurves) -> None:
    rows: list[tuple[str, ...]] = [
        ("high / low", "fraction", "bits/value", "metric", "perplexity", "over none")
        + ("over random", "95% interval, first seed", "over uniform bits")
    ]
    rows += map(_print_row, curves.points)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("* not causal: the choice of tokens looks at later ones")
    for problem in curves.problems:
        print(problem)


def _print_row(p: CurvePoint) -> tuple[str, ...]:
    interval = p.ppl_over_first_random_interval
    return (
        (f"{p.high} / {p.low}", f"{p.fraction:g}", f"{p.bits_per_value:.3f}")
        + (p.metric + ("" if p.causal else " *"), f"{p.ppl:.4f}")
        + (_ratio_text(p.ppl_over_none), _ratio_text(p.ppl_over_random))
        + (f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-", _ratio_text(p.ppl_over_uniform_bits))
    )


def _ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main() -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=path_option, help="records of a sweep over metrics")
    folder = parser.parse_args().folder
    try:
        curves = collect(load_files([folder]))
        _print(curves)
        check_writable(folder / "curves")
        write_json(folder / "curves" / "importance.json", curves.model_dump())
        plot_curves(curves, folder / "curves" / "importance.png")
    except ValueError as e:
        print(f"error: {folder}: {e}", file=sys.stderr)
        return 2
    print(f"written: {folder}/curves/importance.json, importance.png")
    return 0


if __name__ == "__main__":
    run_command(main)
