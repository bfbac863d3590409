"""What one evaluation computes: micro-batches, codecs, metrics and frames, derived alike on every rank.

Between a deployment, which outlives it, and `evaluation.py`, which runs it.
"""

from __future__ import annotations

from pipeline.comm.link import LinkSpec
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.windows import make_microbatches
from pipeline.importance.files import TokenOwner
from pipeline.models.loading import TORCH_DTYPES
from pipeline.partition.schedule import passes_in_flight
from pipeline.runtime.codecs import (
    CodecFacts,
    LinkCodecs,
    codec_requests,
    make_codecs,
    make_decode_codecs,
    make_link_parts,
    run_digest,
    window_tokens,
)
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.emulation import check_emulation, emulated_links, receives_ahead_of
from pipeline.runtime.link_specs import Workload, id_nbytes, link_specs
from pipeline.runtime.placement import credits_of
from pipeline.runtime.text import make_run_windows

__all__ = ["Job"]


class Job:
    """One config on one deployment; every rank makes it alike.

    `codecs` are the deployment's where those serve. `metrics` and `specs` (of frames) are those of this rank's ends, by
    link index; `importance` describes the metrics of all links, `emulated_links` their networks, by index in the chain.
    `digest` is of all that changes numbers or bytes: a resumed run recognises itself.

    Raises ValueError, on all ranks if on one, for what this model, plan or text cannot serve.
    """

    def __init__(self, config: RunConfig, deployment: Deployment) -> None:
        self.config, self.deployment = config, deployment
        self.plan, self.control = deployment.plan, deployment.control
        check_emulation(config, self.control.world)  # a sweep's points have links of their own
        self.emulated_links = emulated_links(config, self.plan)
        self.hidden_size = deployment.model.config.hidden_size
        self.text = text = deployment.text.cut(config.dataset.first_k_tokens)
        self.windows = make_run_windows(config, text.ids, text.bos_id)
        self.microbatches = make_microbatches(self.windows, config.batch_size)
        requests = codec_requests(
            config,
            self.plan,
            hidden_size=self.hidden_size,
            max_tokens=window_tokens(config),
            checkpoint=deployment.model.checkpoint_digest,
        )
        self.decodes = config.evaluation.mode == "decode"
        self.measures_error = config.measure_error and not self.decodes
        if deployment.codecs.serve(requests, measure_error=self.measures_error):
            self.codecs = deployment.codecs
        else:
            self.codecs = make_codecs(requests, self.plan, self.control, measure_error=self.measures_error)
        self.decode_codecs = self._decode_codecs() if self.decodes else self.codecs
        parts = make_link_parts(
            config,
            self.plan,
            self.control,
            self.codecs,
            self.microbatches,
            model_config=deployment.model.config,
            owner=TokenOwner.of(config.dataset, deployment.model.checkpoint_digest, text.ids_sha256),
        )
        self.metrics, self.specs, self.importance = parts.metrics, parts.specs, parts.importance
        if self.decodes:
            self.specs = self._decode_specs()
        self.digest = run_digest(
            config,
            self.plan,
            self.codecs,
            parts,
            checkpoint=deployment.model.checkpoint_digest,
            ids_sha256=text.ids_sha256,
            bos_id=text.bos_id,
        )

    @property
    def all_facts(self) -> list[CodecFacts]:
        """Of the codecs of all passes."""
        return [*self.codecs.facts, *self.decode_codecs.facts]

    def passes_in_flight(self) -> int:
        """Raises ScheduleError for a setting that would deadlock."""
        runtime = self.config.runtime
        return passes_in_flight(
            self.plan,
            runtime.in_flight,
            receives_ahead=runtime.receives_ahead,
            world_size=self.control.world.world_size,
        )

    def receives_ahead(self) -> int:
        """Receives posted per link."""
        credits = credits_of(self.config, self.plan, self.control.world)
        return receives_ahead_of(self.config, self.emulated_links, credits=credits)

    def _decode_codecs(self) -> LinkCodecs:
        for facts in self.codecs.facts:
            if facts.importance_metric is not None:
                raise ConfigError(
                    f"codec {facts.name} needs the importance of tokens, which evaluation.mode=decode does not compute"
                )
        return make_decode_codecs(
            self.config,
            self.plan,
            self.control,
            self.codecs,
            hidden_size=self.hidden_size,
            max_tokens=window_tokens(self.config),
            checkpoint=self.deployment.model.checkpoint_digest,
        )

    def _decode_specs(self) -> dict[int, LinkSpec]:
        windows = self.microbatches
        workload = Workload(
            microbatches=windows, max_rows=self.config.batch_size, max_tokens=max(m.num_tokens for m in windows)
        )
        return link_specs(
            self.plan,
            self.codecs.ends,
            workload,
            hidden_size=self.hidden_size,
            dtype=TORCH_DTYPES[self.config.model.dtype],
            decoding=self.decode_codecs.ends,
            id_nbytes=id_nbytes(self.deployment.model.config.vocab_size),
        )
