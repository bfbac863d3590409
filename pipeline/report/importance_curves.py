"""Which importance metric pays? Perplexity against average bits per value, from the records of a sweep.

    python -m pipeline.report.importance_curves results/demo_importance

prints a table and writes curves/importance.json and curves/importance.png into the folder. At a rate (a pair of codecs
and a fraction) all metrics send the same number of bytes, so their perplexities compare directly. The lines to beat
are a random choice of the tokens, and uniform bits: the same family of codecs for all tokens, its log perplexity
interpolated linearly between the neighbouring numbers of bits.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.options import OptionParser, path_option
from pipeline.records.store import RecordError, model_label, read_per_token
from pipeline.report.quality import compare
from pipeline.report.results import is_uncompressed, load_records, setting_key

__all__ = ["collect", "plot_curves"]

SCHEMA_VERSION = 1


def collect(records: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The JSON that `importance.json` holds, from records of one model, text and protocol in `folder`.

    `points` has one entry per run with `token_mixed`; `uniform` the runs of plain codecs of the same families. The 95%
    interval of a point's ratio to the first random choice at its rate is that of a paired bootstrap over windows
    (`quality.compare`), None where the per-token files are missing or the windows few. Raises ValueError when records
    of several settings are mixed, or none has a choice of tokens.
    """
    if len({setting_key(record) for record in records}) > 1:
        raise ValueError("the folder has records of several models, texts or protocols; give each a folder of its own")
    mixed = [r for r in records if all(codec["name"] == "token_mixed" for codec in r["codecs"].values())]
    mixed = [r for r in mixed if r["codecs"] and r["results"]["avg_ppl"] is not None]
    if not mixed:
        raise ValueError("no record has the codec token_mixed on its links, and a finite perplexity")
    families = {_family(_codec(r)["high"]) for r in mixed}
    uniform = [
        {"family": _family(_codec(r)), "bits_per_value": _bits(r), "ppl": _ppl(r)}
        for r in records
        if r not in mixed and r["codecs"] and _family(_codec(r)) in families and _ppl(r) is not None
    ]
    none = next((_ppl(r) for r in records if is_uncompressed(r)), None)
    points = [_point(r, uniform) for r in mixed]
    random = defaultdict(list)
    for point in points:
        if point["metric"] == "random":
            random[_rate(point)].append(point)
    for point in points:
        choices = sorted(random[_rate(point)], key=lambda p: p["seed"])
        mean = np.exp(np.mean([np.log(p["ppl"]) for p in choices])) if choices else None
        point["ppl_over_random"] = float(point["ppl"] / mean) if choices else None
        point["ppl_over_first_random_interval"] = _interval(folder, choices[0], point) if choices else None
        point["ppl_over_none"] = point["ppl"] / none if none else None
    first = mixed[0]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "thinwire importance curves",
        "model": model_label(first["args"]["model_name"]),
        "dataset": first["dataset"],
        "protocol": first["protocol"],
        "ppl_uncompressed": none,
        "points": sorted(points, key=lambda p: (_pair(p), p["bits_per_value"], p["ppl"])),
        "uniform": sorted(uniform, key=lambda u: (u["family"], u["bits_per_value"])),
        "mean_log_ratio": _means(points),
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
    figure.savefig(path, dpi=110)


def _codec(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(record["codecs"].values()))


def _ppl(record: Mapping[str, Any]) -> float | None:
    return record["results"]["avg_ppl"]


def _bits(record: Mapping[str, Any]) -> float:
    return record["traffic_totals"]["bits_per_value"]


def _label(codec: Any) -> str:
    inner = codec.get("inner")
    return codec["name"] if inner is None else f"{codec['name']}({_label(inner)})"


def _family(codec: Mapping[str, Any]) -> str:
    """The codec's short name with its number of bits left open: hadamard(int#)."""
    return re.sub(r"\d+", "#", _label(codec))


def _point(record: Mapping[str, Any], uniform: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    codec = _codec(record)
    family = _family(codec["high"])
    line = sorted((u["bits_per_value"], np.log(u["ppl"])) for u in uniform if u["family"] == family)
    bits, ppl = _bits(record), _ppl(record)
    inside = len(line) > 1 and line[0][0] <= bits <= line[-1][0] + 0.05
    return {
        "run_id": record["run_id"],
        "metric": codec["metric"],
        "seed": record["args"]["config"]["importance"]["seed"] if codec["metric"] == "random" else None,
        "high": _label(codec["high"]),
        "low": _label(codec["low"]),
        "family": family,
        "fraction": codec["fraction"],
        "bits_per_value": bits,
        "ppl": ppl,
        "causal": record["causal"],
        "ppl_over_uniform_bits": float(ppl / np.exp(np.interp(bits, *zip(*line, strict=True)))) if inside else None,
    }


def _interval(folder: Path, base: Mapping[str, Any], point: Mapping[str, Any]) -> tuple[float, float] | None:
    try:
        tokens = [read_per_token(folder / f"{p['run_id']}.json") for p in (base, point)]
    except RecordError:
        return None
    return compare(*tokens).ppl_interval


def _pair(point: Mapping[str, Any]) -> tuple[str, str]:
    return point["high"], point["low"]


def _rate(point: Mapping[str, Any]) -> tuple[str, str, float]:
    return (*_pair(point), point["fraction"])


def _means(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By metric, the mean over rates of the logarithm of both ratios."""
    means = {}
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
    rows = [
        ("high / low", "fraction", "bits/value", "metric", "perplexity", "over none")
        + ("over random", "95% interval, first seed", "over uniform bits")
    ]
    for p in curves["points"]:
        interval = p["ppl_over_first_random_interval"]
        rows.append(
            (f"{p['high']} / {p['low']}", f"{p['fraction']:g}", f"{p['bits_per_value']:.3f}")
            + (p["metric"] + ("" if p["causal"] else " *"), f"{p['ppl']:.4f}")
            + (_ratio(p["ppl_over_none"]), _ratio(p["ppl_over_random"]))
            + (f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-", _ratio(p["ppl_over_uniform_bits"]))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("* not causal: the choice of tokens looks at later ones")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main() -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=path_option, help="records of a sweep over metrics")
    folder = parser.parse_args().folder
    try:
        curves = collect(load_records([folder]), folder)
    except ValueError as e:
        print(f"error: {folder}: {e}", file=sys.stderr)
        return 2
    _print(curves)
    (folder / "curves").mkdir(exist_ok=True)
    (folder / "curves" / "importance.json").write_text(json.dumps(curves, indent=1, allow_nan=False), encoding="utf-8")
    plot_curves(curves, folder / "curves" / "importance.png")
    print(f"written: {folder}/curves/importance.json, importance.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
