"""One codec per link, from the config."""

from __future__ import annotations

from compressors import Compressor, LinkInfo, make_compressor
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.importance.metrics import METRICS
from pipeline.models.loading import TORCH_DTYPES
from pipeline.partition.plan import Plan

__all__ = ["make_codecs"]

SIDE_INPUTS = ("importance", "token_ids")


def make_codecs(
    config: RunConfig, plan: Plan, *, hidden_size: int, max_tokens: int, checkpoint: str | None = None
) -> list[Compressor]:
    """One new codec object per link, in link order. Raises ConfigError or ValueError for what cannot be made."""
    names = [link.name for link in plan.links]
    unknown = sorted(config.compressor_per_link.keys() - set(names))
    if unknown:
        raise ConfigError(
            f"compressor_per_link has {unknown[0]!r}; this plan's links are: {', '.join(names) or 'none'}"
        )
    codecs = []
    for name in names:
        info = LinkInfo(
            name=name,
            hidden_size=hidden_size,
            max_tokens=max_tokens,
            dtype=TORCH_DTYPES[config.model.dtype],
            checkpoint=checkpoint,
        )
        codec = make_compressor(config.compressor_per_link.get(name, config.compressor), info)
        missing = sorted(set(codec.needs) - set(SIDE_INPUTS))
        if missing:
            raise ConfigError(f"codec {codec.name} needs {', '.join(missing)}, which no stage computes")
        if "importance" in codec.needs and codec.importance_metric not in METRICS:
            wanted = f"the importance metric {codec.importance_metric!r}"
            raise ConfigError(f"codec {codec.name} wants {wanted}; there are: {', '.join(METRICS)}")
        codecs.append(codec)
    return codecs
