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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressors.console import run_command
from pipeline.config.options import OptionParser, path_option
from pipeline.records.files import check_writable, write_figure, write_json
from pipeline.records.labels import model_label
from pipeline.records.run_record import CodecConfig, RunRecord
from pipeline.report.quality import compare
from pipeline.report.measured_point import is_uncompressed
from pipeline.report.results import load_files, read_own_per_token, setting_key

__all__ = ["collect", "plot_curves"]

SCHEMA_VERSION = 1


def collect(files: Sequence[tuple[Path, RunRecord]]) -> dict[str, Any]:
    """The JSON that `importance.json` holds, from records of one model, text and protocol and their paths.

    `points` has one entry per run with `token_mixed`; `uniform` the runs of plain codecs of the same families. The 95%
    interval of a point's ratio to the first random choice at its rate is that of a paired bootstrap over windows
    (`quality.compare`), None where the windows are few or per-token files cannot be used, which `problems` tells, as
    well as the records that were skipped. Raises ValueError when records of several settings are mixed, or none has a
    choice of tokens.
    """
    if len({setting_key(record) for _, record in files}) > 1:
        raise ValueError("the folder has records of several models, texts or protocols; give each a folder of its own")
    records = [record for _, record in files]
    mixed, problems = [], []
    for path, record in files:
        if _is_mixed(record) and _ppl(record) is not None:
            if problem := _problem(record):
                problems.append(f"{path} is skipped: {problem}")
            else:
                mixed.append((path, record))
    if not mixed:
        none_fits = "no record has the codec token_mixed on its links, and a finite perplexity"
        raise ValueError("; ".join([none_fits, *problems]))
    families = {_family(_options(r)["high"]) for _, r in mixed}
    uniform = [
        {"family": _family(_codec(r).model_dump()), "bits_per_value": _bits(r), "ppl": _ppl(r)}
        for r in records
        if not _is_mixed(r) and r.codecs and _ppl(r) is not None and _bits(r)
        and _family_or_none(_codec(r).model_dump()) in families
    ]  # fmt: skip
    none = next((_ppl(r) for r in records if is_uncompressed(r)), None)
    points = [_point(r, uniform) for _, r in mixed]
    file_of = {id(point): file for point, file in zip(points, mixed, strict=True)}
    random = defaultdict(list)
    for point in points:
        if point["metric"] == "random":
            random[_rate(point)].append(point)
    for point in points:
        choices = sorted(random[_rate(point)], key=lambda p: p["seed"])
        mean = np.exp(np.mean([np.log(p["ppl"]) for p in choices])) if choices else None
        point["ppl_over_random"] = float(point["ppl"] / mean) if choices else None
        interval = None
        if choices:
            try:
                tokens = [read_own_per_token(*file_of[id(p)]) for p in (choices[0], point)]
                interval = compare(*tokens).ppl_interval
            except ValueError as e:  # RecordError too
                problems.append(f"{point['run_id']} has no interval: {e}")
        point["ppl_over_first_random_interval"] = interval
        point["ppl_over_none"] = point["ppl"] / none if none else None
    first = mixed[0][1]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "thinwire importance curves",
        "model": model_label(first.args.model_name),
        "dataset": first.dataset.model_dump(),
        "protocol": first.protocol.model_dump(),
        "ppl_uncompressed": none,
        "points": sorted(points, key=lambda p: (_pair(p), p["bits_per_value"], p["ppl"])),
        "uniform": sorted(uniform, key=lambda u: (u["family"], u["bits_per_value"])),
        "mean_log_ratio": _means(points),
        "problems": problems,
    }


def plot_curves(curves: Mapping[str, Any], path: Path) -> None:
    """One panel per pair of codecs, a line per metric, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = sorted({_pair(p) for p in curves["points"]})
    metrics = sorted({p["metric"] for p in curves["points"]})
    figure = Figure(figsize=(6.4 * len(pairs), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, pair in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs, strict=True):
        points = [p for p in curves["points"] if _pair(p) == pair]
        low, high = (f(p["bits_per_value"] for p in points) for f in (min, max))
        family = points[0]["family"]
        own_family = [u for u in curves["uniform"] if u["family"] == family]
        line = [u for u in own_family if low - 1.1 <= u["bits_per_value"] <= high + 1.1]
        axes.plot(*_xy(line), color="black", linestyle="--", marker="s", label="uniform bits")
        for number, metric in enumerate(metrics):
            own = [p for p in points if p["metric"] == metric]
            causal = own and own[0]["causal"]
            label = metric if causal else f"{metric} (not causal)"
            axes.plot(*_xy(own), color=f"C{number}", marker="o" if causal else "x", label=label)
        if curves["ppl_uncompressed"]:
            axes.axhline(curves["ppl_uncompressed"], color="0.5", linewidth=1, label="not compressed")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(f"{pair[0]} for important tokens, {pair[1]} for the rest")
        axes.set_xlabel("bits per value, side information included")
        axes.grid(color="0.9")
    axes.legend(fontsize=8)
    figure.get_axes()[0].set_ylabel("perplexity")
    figure.suptitle(
        f"{curves['model']}, {curves['dataset']['num_tokens']} tokens, windows "
        f"{curves['protocol']['max_length']}/{curves['protocol']['stride']}"
    )
    write_figure(path, figure, dpi=110)


def _codec(record: RunRecord) -> CodecConfig:
    return next(iter(record.codecs.values()))


def _is_mixed(record: RunRecord) -> bool:
    codecs = record.codecs.values()
    return bool(codecs) and all(codec.name == "token_mixed" for codec in codecs)


def _ppl(record: RunRecord) -> float | None:
    return record.results.avg_ppl


def _options(record: RunRecord) -> Mapping[str, Any]:
    return _codec(record).others


def _bits(record: RunRecord) -> float | None:
    return record.traffic_totals.bits_per_value


def _problem(record: RunRecord) -> str | None:
    """Why a record with `token_mixed` cannot stand in the table, which reads keys that other reports do not."""
    try:
        point = _point(record, [])
        _print_row(point | {"ppl_over_none": None, "ppl_over_random": None, "ppl_over_first_random_interval": None})
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    wanted: dict[str, Any] = {"metric": str, "high": str, "low": str, "fraction": float, "bits_per_value": (int, float)}
    wanted |= {"seed": int} if point["metric"] == "random" else {}
    odd = [key for key, kind in wanted.items() if not isinstance(point[key], kind)]
    return f"{odd[0]} is {str(point[odd[0]])[:40]!r}" if odd else None


def _label(codec: Any) -> str:
    inner = codec.get("inner")
    return codec["name"] if inner is None else f"{codec['name']}({_label(inner)})"


def _family(codec: Mapping[str, Any]) -> str:
    """The codec's short name with its number of bits left open: hadamard(int#)."""
    return re.sub(r"\d+", "#", _label(codec))


def _family_or_none(codec: Mapping[str, Any]) -> str | None:
    try:
        return _family(codec)
    except (AttributeError, KeyError, TypeError, RecursionError):
        return None


def _point(record: RunRecord, uniform: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    codec = _options(record)
    family = _family(codec["high"])
    line = sorted((u["bits_per_value"], np.log(u["ppl"])) for u in uniform if u["family"] == family)
    bits, ppl = _bits(record), _ppl(record)
    assert bits is not None and ppl is not None, "points without are left out before"
    x, log_y = zip(*line, strict=True) if line else ((), ())
    inside = len(line) > 1 and line[0][0] <= bits <= line[-1][0] + 0.05
    return {
        "run_id": record.run_id,
        "metric": codec["metric"],
        "seed": record.args.config.importance.seed if codec["metric"] == "random" else None,
        "high": _label(codec["high"]),
        "low": _label(codec["low"]),
        "family": family,
        "fraction": codec["fraction"],
        "bits_per_value": bits,
        "ppl": ppl,
        "causal": record.causal,
        "ppl_over_uniform_bits": float(ppl / np.exp(np.interp(bits, x, log_y))) if inside else None,
    }


def _pair(point: Mapping[str, Any]) -> tuple[str, str]:
    return point["high"], point["low"]


def _rate(point: Mapping[str, Any]) -> tuple[str, str, float]:
    return (*_pair(point), point["fraction"])


def _means(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By metric, the mean over rates of the logarithm of both ratios."""
    means: dict[str, dict[str, float | None]] = {}
    for metric in sorted({p["metric"] for p in points}):
        own = [p for p in points if p["metric"] == metric]
        means[metric] = {}
        for key in ("ppl_over_random", "ppl_over_uniform_bits"):
            values = [np.log(p[key]) for p in own if p[key] is not None]
            means[metric][key] = float(np.mean(values)) if values else None
    return means


def _xy(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Bits and perplexities; several runs at one rate (seeds) as their geometric mean."""
    rates = defaultdict(list)
    for point in points:
        rates[round(point["bits_per_value"], 6)].append(np.log(point["ppl"]))
    return list(sorted(rates)), [float(np.exp(np.mean(rates[x]))) for x in sorted(rates)]


def _print(curves: Mapping[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [
        ("high / low", "fraction", "bits/value", "metric", "perplexity", "over none")
        + ("over random", "95% interval, first seed", "over uniform bits")
    ]
    rows += map(_print_row, curves["points"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("* not causal: the choice of tokens looks at later ones")
    for problem in curves["problems"]:
        print(problem)


def _print_row(p: Mapping[str, Any]) -> tuple[str, ...]:
    interval = p["ppl_over_first_random_interval"]
    return (
        (f"{p['high']} / {p['low']}", f"{p['fraction']:g}", f"{p['bits_per_value']:.3f}")
        + (p["metric"] + ("" if p["causal"] else " *"), f"{p['ppl']:.4f}")
        + (_ratio(p["ppl_over_none"]), _ratio(p["ppl_over_random"]))
        + (f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-", _ratio(p["ppl_over_uniform_bits"]))
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main() -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=path_option, help="records of a sweep over metrics")
    folder = parser.parse_args().folder
    try:
        curves = collect(load_files([folder]))
        _print(curves)
        check_writable(folder / "curves")
        write_json(folder / "curves" / "importance.json", curves)
        plot_curves(curves, folder / "curves" / "importance.png")
    except ValueError as e:
        print(f"error: {folder}: {e}", file=sys.stderr)
        return 2
    print(f"written: {folder}/curves/importance.json, importance.png")
    return 0


if __name__ == "__main__":
    run_command(main)
