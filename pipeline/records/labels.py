"""Short names of models, codecs and emulated networks, for tables, figures and the names of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import ModelConfig
from pipeline.records.generation_record import GenerationRecord
from pipeline.records.run_record import RESULT_LINK, EmulatedLink, Emulation, RunRecord, WeightBlocks
from pipeline.records.tasks_record import TasksRecord

__all__ = [
    "blocks_text",
    "chain_names",
    "codec_label",
    "codec_labels",
    "config_label",
    "emulation_label",
    "emulation_labels",
    "model_label",
    "network_text",
    "slowdown_text",
    "weights_key",
    "weights_label",
]


def codec_label(record: RunRecord | GenerationRecord | TasksRecord) -> str:
    """The codecs of a run for tables: what the user wrote, and what differs on single links."""
    if not record.codecs:
        return "unsplit"
    config = record.args.config
    return _label(config.compressor, config.compressor_per_link, config.compressor_decode)


def codec_labels(records: Sequence[RunRecord | TasksRecord]) -> list[str]:
    """Labels of runs that stand together, without the paths of calibrations if these do not tell any two apart."""
    labels = [codec_label(record) for record in records]
    short = [re.sub(r"calibration=[^,)]*, ", "", label) for label in labels]
    return short if len(set(short)) == len(set(labels)) else labels


def config_label(config: Mapping[str, Any]) -> str:
    """`codec_label` of a config that has not been run (`RunConfig.as_dict`)."""
    return _label(config["compressor"], config["compressor_per_link"], config["compressor_decode"])


def chain_names(record: RunRecord | GenerationRecord | TasksRecord) -> tuple[str, ...]:
    """Of all links of a lap, that of results included where there is one (`partition.Plan.chain_names`)."""
    first, last = record.plan[0].node, record.plan[-1].node
    result = () if first == last else (f"{RESULT_LINK}node{last}->node{first}",)
    return (*record.traffic_per_link, *result)


def emulation_label(emulation: Emulation | None, chain: Sequence[str]) -> str:
    """`over 10 Mbit/s, 20 ms, nodes x1 x3`: what was emulated, delays from one end to the other; empty: nothing."""
    links = emulation.links if emulation else {}
    if len(set(links.values())) > 1:
        return _emulation_text(f"{len(chain)} unlike links", emulation)
    return _emulation_text(network_text(emulation, chain, short=True), emulation)


def emulation_labels(records: Sequence[RunRecord]) -> list[str]:
    """Labels of runs that stand together, with every link of all where the short form does not tell two apart."""
    labels = [emulation_label(record.emulation, chain_names(record)) for record in records]
    whole = [
        _emulation_text(network_text(record.emulation, chain_names(record)), record.emulation) for record in records
    ]
    return labels if len(set(labels)) == len(set(whole)) else whole


def network_text(emulation: Emulation | None, chain: Sequence[str], *, short: bool = False) -> str:
    """The links' rates and delays, link by link where not all are alike, or `short`, how many are emulated; empty where
    none is.
    """
    links = emulation.links if emulation else {}
    if len(set(links.values())) == 1 and (short or len(links) == len(chain)):
        some = "" if len(links) == len(chain) else f" on {len(links)} of {len(chain)} links"
        return _way_text(next(iter(links.values()))) + some
    return "; ".join(f"{name}: {_way_text(way)}" for name, way in links.items())


def slowdown_text(emulation: Emulation | None) -> str:
    """`x1 x1 x3 x1`: how many times as long each node took; empty where none was slowed down."""
    slowdown = emulation.slowdown if emulation else ()
    return " ".join(f"x{times:g}" for times in slowdown) if any(times != 1 for times in slowdown) else ""


def model_label(name: str) -> str:
    """The last part of a model's name or path, without `.gguf`."""
    return Path(name).name.removesuffix(".gguf")


def weights_label(record: RunRecord | GenerationRecord | TasksRecord) -> str:
    """How weights were held: `bf16 8-bit weights (threshold 0)`, `fp32, Q4_1 and Q8_0 blocks`."""
    args, threshold = record.args, record.args.config.model.load_in_8bit_threshold
    held = " 8-bit weights" if args.load_in_8bit else " 4-bit weights" if args.load_in_4bit else ""
    if threshold != ModelConfig.load_in_8bit_threshold:
        held += f" (threshold {threshold:g})"
    return f"{args.dtype}{held}{blocks_text(record.model.blocks)}"


def blocks_text(blocks: WeightBlocks | None) -> str:
    """`, Q4_1 blocks made at load`, to stand behind a dtype; empty where there are none."""
    if blocks is None:
        return ""
    *others, last = blocks.types
    types = f"{', '.join(others)} and {last}" if others else last
    return f", {types} blocks{' made at load' if blocks.made_at_load else ''}"


def weights_key(record: RunRecord | GenerationRecord | TasksRecord) -> list[Any]:
    """Equal for runs of the same weights, held alike: for digests of settings."""
    args = record.args
    precision = [args.dtype, args.load_in_8bit, args.load_in_4bit, args.config.model.load_in_8bit_threshold]
    return [*precision, record.model.model_dump()]


def _emulation_text(network: str, emulation: Emulation | None) -> str:
    slowdown = slowdown_text(emulation)
    return ", ".join([*([f"over {network}"] if network else []), *([f"nodes {slowdown}"] if slowdown else [])])


def _way_text(way: EmulatedLink) -> str:
    jitter = f" ± {1e3 * way.jitter_s:g}" if way.jitter_s else ""
    rate = [] if way.bits_per_s is None else [_rate_text(way.bits_per_s)]
    delay = [f"{1e3 * way.delay_s:g}{jitter} ms"] if way.delay_s or jitter else []
    return ", ".join([*rate, *delay]) or "no limit"


def _rate_text(bits_per_s: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:g} {unit}"
    return f"{bits_per_s:g} bit/s"


def _label(compressor: Any, per_link: Mapping[str, Any], decode: Any) -> str:
    own = [f"{name}: {_spec_label(spec)}" for name, spec in per_link.items()]
    decoding = [] if decode is None else [f"decoding {_spec_label(decode)}"]
    return ", ".join([_spec_label(compressor), *own, *decoding])


def _spec_label(spec: Any) -> str:
    """A codec spec in its short form; what has no name is no spec and stays as it is."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        return str(spec)
    options = [f"{key}={_spec_label(value)}" for key, value in spec.items() if key != "name"]
    return f"{spec['name']}({', '.join(options)})" if options else str(spec["name"])
