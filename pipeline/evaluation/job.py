"""What one evaluation computes: micro-batches, codecs, metrics and frames, derived alike on every rank.

Between a deployment, which outlives it, and `evaluation.py`, which runs it.
"""

from __future__ import annotations

from pipeline.config.schema import RunConfig
from pipeline.data.windows import make_microbatches
from pipeline.partition.schedule import passes_in_flight
from pipeline.runtime.codecs import codec_requests, make_codecs, make_link_parts, run_digest, window_tokens
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.text import make_run_windows

__all__ = ["Job"]


class Job:
    """One config on one deployment; every rank makes it alike.

    `codecs` are the deployment's where those serve. `metrics` and `specs` (of frames) are those of this rank's ends, by
    link index; `importance` describes the metrics of all links. `digest` is of all that changes numbers or bytes: a
    resumed run recognises itself.

    Raises ValueError, on all ranks if on one, for what this model, plan or text cannot serve.
    """

    def __init__(self, config: RunConfig, deployment: Deployment) -> None:
        self.config, self.deployment = config, deployment
        self.plan, self.control = deployment.plan, deployment.control
        self.hidden_size = deployment.model_config.hidden_size
        self.text = text = deployment.text.cut(config.dataset.first_k_tokens)
        self.windows = make_run_windows(config, text.ids, text.bos_id)
        self.microbatches = make_microbatches(self.windows, config.batch_size)
        requests = codec_requests(
            config,
            self.plan,
            hidden_size=self.hidden_size,
            max_tokens=window_tokens(config),
            checkpoint=deployment.checkpoint_digest,
        )
        if deployment.codecs.serve(requests, measure_error=config.measure_error):
            self.codecs = deployment.codecs
        else:
            self.codecs = make_codecs(requests, self.plan, self.control, measure_error=config.measure_error)
        parts = make_link_parts(
            config,
            self.plan,
            self.control,
            self.codecs,
            self.microbatches,
            model_config=deployment.model_config,
            checkpoint_digest=deployment.checkpoint_digest,
            ids_sha256=text.ids_sha256,
        )
        self.metrics, self.specs, self.importance = parts.metrics, parts.specs, parts.importance
        self.digest = run_digest(
            config,
            self.codecs,
            parts,
            checkpoint=deployment.checkpoint_digest,
            ids_sha256=text.ids_sha256,
            bos_id=text.bos_id,
        )

    def passes_in_flight(self) -> int:
        """Raises ScheduleError for a setting that would deadlock."""
        runtime = self.config.runtime
        return passes_in_flight(
            self.plan,
            runtime.in_flight,
            receives_ahead=runtime.receives_ahead,
            world_size=self.control.world.world_size,
        )
