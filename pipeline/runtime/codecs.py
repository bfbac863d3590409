"""The codecs of a run's links: made where they are used, once, and described to the other ranks.

A rank makes the encoders of the links that leave it and the decoders of those that reach it, one object each, in one
process too, where both ends are here. What the others need to know of a link's codec (its canonical options, its id,
whether it is causal, ...) is plain JSON and is gathered; both ends of a link must tell the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compressors import Compressor, LinkInfo, make_compressor
from pipeline.comm.control import Control
from pipeline.comm.link import LinkSpec
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.windows import MicroBatch
from pipeline.importance.files import TokenOwner
from pipeline.importance.metrics import METRICS, Metric
from pipeline.importance.selection import make_metrics
from pipeline.models.loading import TORCH_DTYPES
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.plan import Plan
from pipeline.records.identity import digest_of
from pipeline.runtime.link_specs import Workload, link_specs
from pipeline.runtime.placement import balanced_layers

__all__ = [
    "CodecError",
    "CodecFacts",
    "CodecRequest",
    "LinkCodecs",
    "LinkParts",
    "cause_in_words",
    "codec_requests",
    "make_codec",
    "make_codecs",
    "make_decode_codecs",
    "make_link_parts",
    "naming",
    "run_digest",
    "window_tokens",
]

_MAX_CAUSE = 400  # characters
SIDE_INPUTS = ("importance", "token_ids")


@dataclass(frozen=True)
class CodecRequest:
    """What a link's codec is made from: the user's spec and what it may know of the link."""

    spec: str | Mapping[str, Any]
    link: LinkInfo


@dataclass(frozen=True, kw_only=True)
class CodecFacts:
    """What every rank knows of a link's codec; JSON types only."""

    name: str
    config: dict[str, Any]
    format_config: dict[str, Any]
    codec_id: int
    causal: bool
    fixed_size: bool
    frame_invariant: bool
    needs: list[str]
    decoder_needs: list[str]
    importance_metric: str | None

    @classmethod
    def of(cls, codec: Compressor) -> CodecFacts:
        return cls(
            name=codec.name,
            config=codec.config(),
            format_config=codec.format_config(),
            codec_id=codec.codec_id(),
            causal=codec.causal,
            fixed_size=codec.fixed_size,
            frame_invariant=codec.frame_invariant,
            needs=list(codec.needs),
            decoder_needs=list(codec.decoder_needs),
            importance_metric=codec.importance_metric,
        )


class CodecError(Exception):
    """What a codec raised, with its name in front."""


@contextmanager
def naming(codec: Compressor) -> Iterator[None]:
    """Make what the codec raises in the enclosed work a CodecError, with the start of messages that fill pages."""
    try:
        yield
    except Exception as e:
        told = str(e) if isinstance(e, ValueError) else " ".join(str(e).split())
        told = told if len(told) <= _MAX_CAUSE else f"{told[:_MAX_CAUSE]} ..."
        where = "" if codec.link is None else f" on {codec.link.name}"
        raise CodecError(f"codec {codec.name}{where}: {type(e).__name__}: {told}") from e


def cause_in_words(error: Exception) -> str:
    """`KeyError: 'x'`; a CodecError speaks for itself."""
    return str(error) if isinstance(error, CodecError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkCodecs:
    """The codecs of all links: this rank's ends as objects, by link index, and facts of each, in link order.

    `probes` are decoders of their own at this rank's sending ends, for runs that measure the reconstruction.
    """

    requests: Sequence[CodecRequest]
    measure_error: bool
    encoders: Mapping[int, Compressor]
    decoders: Mapping[int, Compressor]
    probes: Mapping[int, Compressor]
    facts: Sequence[CodecFacts]

    @property
    def ends(self) -> dict[int, Compressor]:
        """One of this rank's codec objects for each link that it has an end of."""
        return {**self.decoders, **self.encoders}

    def serve(self, requests: Sequence[CodecRequest], *, measure_error: bool) -> bool:
        """Whether these are what `requests` ask for; the same on every rank."""
        # In words, where 1, 1.0 and True differ as they do in a codec's options.
        return self.measure_error >= measure_error and list(map(repr, self.requests)) == list(map(repr, requests))


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkParts:
    """What goes with a link's codecs in one evaluation: this rank's metrics and link specs, by link index.

    `importance` describes the metrics of all links that have one.
    """

    metrics: Mapping[int, Metric]
    specs: Mapping[int, LinkSpec]
    importance: Mapping[int, Mapping[str, Any]]


def codec_requests(
    config: RunConfig,
    plan: Plan,
    *,
    hidden_size: int,
    max_tokens: int,
    checkpoint: str | None = None,
    decode: bool = False,
) -> list[CodecRequest]:
    """Of all links, in link order; with `decode` those of sampled tokens. A frame has at most `max_tokens` tokens.

    Raises ConfigError for a link that the plan does not have.
    """
    names = [link.name for link in plan.links]
    unknown = sorted(config.compressor_per_link.keys() - set(names), key=str)
    if unknown:
        raise ConfigError(
            f"compressor_per_link has {unknown[0]!r}; this plan's links are: {', '.join(names) or 'none'}"
        )
    return [
        CodecRequest(
            config.codec_of(name, decode=decode),
            LinkInfo(
                name=name,
                hidden_size=hidden_size,
                max_tokens=max_tokens,
                dtype=TORCH_DTYPES[config.model.dtype],
                checkpoint=checkpoint,
            ),
        )
        for name in names
    ]


def window_tokens(config: RunConfig) -> int:
    """Tokens of the largest micro-batch that a config can make."""
    return config.batch_size * config.dataset.max_length


def make_codec(request: CodecRequest) -> Compressor:
    """A new codec object. Raises ConfigError or another ValueError for what cannot be made or served."""
    codec = make_compressor(request.spec, request.link)
    missing = sorted(set(codec.needs) - set(SIDE_INPUTS))
    if missing:
        raise ConfigError(f"codec {codec.name} needs {', '.join(missing)}, which no stage computes")
    if "importance" in codec.needs and codec.importance_metric not in METRICS:
        wanted = f"the importance metric {codec.importance_metric!r}"
        raise ConfigError(f"codec {codec.name} wants {wanted}; there are: {', '.join(METRICS)}")
    return codec


def make_codecs(
    requests: Sequence[CodecRequest], plan: Plan, control: Control, *, measure_error: bool
) -> LinkCodecs:
    """This rank's ends, and what the other ranks tell of theirs; every rank calls it.

    Raises on every rank where a codec cannot be made on one, or where a link's ends differ.
    """
    sends = [link.index for link in plan.links if control.world.rank_of(link.src_node) == control.world.rank]
    takes = [link.index for link in plan.links if control.world.rank_of(link.dst_node) == control.world.rank]

    def make(indices: Iterable[int]) -> dict[int, Compressor]:
        return {index: make_codec(requests[index]) for index in indices}

    def make_ends() -> tuple[tuple[dict[int, Compressor], ...], list[dict[str, Any]]]:
        encoders, decoders = make(sends), make(takes)
        told = [{str(i): dataclasses.asdict(CodecFacts.of(c)) for i, c in end.items()} for end in (encoders, decoders)]
        return (encoders, decoders, make(sends if measure_error else ())), told

    (encoders, decoders, probes), told = control.together(make_ends)
    _check_ends_agree(plan, [ends for rank in told for ends in rank], "codec")
    by_link = {index: facts for sent, _ in told for index, facts in sent.items()}
    return LinkCodecs(
        requests=requests,
        measure_error=measure_error,
        encoders=encoders,
        decoders=decoders,
        probes=probes,
        facts=[CodecFacts(**by_link[str(link.index)]) for link in plan.links],
    )


def make_decode_codecs(
    config: RunConfig,
    plan: Plan,
    control: Control,
    codecs: LinkCodecs,
    *,
    hidden_size: int,
    max_tokens: int,
    checkpoint: str,
) -> LinkCodecs:
    """Those of DECODE passes: `codecs` where they are asked for alike. Every rank calls it; raises as `make_codecs`."""
    requests = codec_requests(
        config, plan, hidden_size=hidden_size, max_tokens=max_tokens, checkpoint=checkpoint, decode=True
    )
    if codecs.serve(requests, measure_error=False):
        return codecs
    return make_codecs(requests, plan, control, measure_error=False)


def make_link_parts(
    config: RunConfig,
    plan: Plan,
    control: Control,
    codecs: LinkCodecs,
    microbatches: Sequence[MicroBatch],
    *,
    model_config: Any,
    owner: TokenOwner,
) -> LinkParts:
    """Metrics and link specs at this rank's ends, and what metrics the other ranks have; every rank calls it.

    `owner` is this run, for which files of importance have to be made. Raises on every rank where they cannot be made
    on one, or where a link's ends differ.
    """

    def make() -> tuple[tuple[dict[int, Metric], dict[int, LinkSpec]], list[dict[str, Any]]]:
        metrics = make_metrics(
            config, plan, codecs.encoders, microbatches, model_config=model_config, owner=owner
        )
        specs = link_specs(
            plan,
            codecs.ends,
            Workload(microbatches=microbatches),
            hidden_size=model_config.hidden_size,
            dtype=TORCH_DTYPES[config.model.dtype],
        )
        shapes = {microbatch.shape: microbatch.index for microbatch in microbatches}
        bounds = {
            str(link): {str(shape): specs[link].expect(_score(index))[1] for shape, index in shapes.items()}
            for link in codecs.ends
        }
        return (metrics, specs), [{str(index): metric.describe() for index, metric in metrics.items()}, bounds]

    largest = max(m.num_tokens for m in microbatches)
    assert all(largest <= request.link.max_tokens for request in codecs.requests)
    (metrics, specs), told = control.together(make)
    _check_ends_agree(plan, [bounds for _, bounds in told], "bounds on frames")
    importance = {int(index): facts for described, _ in told for index, facts in described.items()}
    for key in ("head_weights", "oracle"):
        digests = {facts[key] for facts in importance.values() if key in facts}
        if len(digests) > 1:
            raise ConfigError(
                f"importance.{key}={getattr(config.importance, key)!r} is not the same file on all machines: SHA-256 "
                f"{' and '.join(sorted(digests))}"
            )
    return LinkParts(metrics=metrics, specs=specs, importance=dict(sorted(importance.items())))


def _score(microbatch_index: int) -> Pass:
    return Pass(kind=PassKind.SCORE, microbatch_index=microbatch_index)


def _check_ends_agree(plan: Plan, told: Iterable[Mapping[str, Any]], what: str) -> None:
    """Raise ConfigError unless all that is told of a link, by its index as text, is the same."""
    known: dict[str, Any] = {}
    for by_link in told:
        for index, value in by_link.items():
            first = known.setdefault(index, value)
            if first != value:
                differ = [key for key in value if value[key] != first.get(key)]
                found = " and ".join(str({key: one.get(key) for key in differ}) for one in (first, value))
                raise ConfigError(
                    f"the two ends of {plan.links[int(index)].name} differ in their {what}, {found}: all machines need "
                    "the same version, plug-ins and calibration files"
                )


def run_digest(
    config: RunConfig,
    plan: Plan,
    codecs: LinkCodecs,
    parts: LinkParts,
    *,
    checkpoint: str,
    ids_sha256: str,
    bos_id: int | None,
) -> str:
    """Of all that changes a run's numbers or bytes."""
    return digest_of(
        {
            **config.numerics(balanced_layers(config, plan)),
            "compressor": [facts.format_config for facts in codecs.facts],
            **dict.fromkeys(("compressor_per_link", "importance.layers", "importance.seed")),
            "importance": {str(index): metric for index, metric in parts.importance.items()},
            "checkpoint": checkpoint,
            "ids": ids_sha256,
            "bos_id": bos_id,
        }
    )
