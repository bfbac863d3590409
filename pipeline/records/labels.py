"""Short names of models and codecs, for tables, figures and the names of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records.generation_record import GenerationRecord
from pipeline.records.run_record import RunRecord

__all__ = ["codec_label", "codec_labels", "config_label", "model_label"]


def codec_label(record: RunRecord | GenerationRecord) -> str:
    """The codecs of a run for tables: what the user wrote, and what differs on single links."""
    if not record.codecs:
        return "unsplit"
    config = record.args.config
    return _label(config.compressor, config.compressor_per_link, config.compressor_decode)


def codec_labels(records: Sequence[RunRecord]) -> list[str]:
    """Labels of runs that stand together, without the paths of calibrations if these do not tell any two apart."""
    labels = [codec_label(record) for record in records]
    short = [re.sub(r"calibration=[^,)]*, ", "", label) for label in labels]
    return short if len(set(short)) == len(set(labels)) else labels


def config_label(config: Mapping[str, Any]) -> str:
    """`codec_label` of a config that has not been run (`RunConfig.as_dict`)."""
    return _label(config["compressor"], config["compressor_per_link"], config["compressor_decode"])


def model_label(name: str) -> str:
    """The last part of a model's name or path, without `.gguf`."""
    return Path(name).name.removesuffix(".gguf")


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
