"""What one evaluation computes: micro-batches, codecs, metrics, schedule and frames, derived alike on every rank.

Between a deployment, which outlives it, and `evaluation.py`, which runs it.
"""

from __future__ import annotations

from compressors import Compressor
from pipeline.comm.link_ends import frame_specs
from pipeline.comm.mailbox import FrameSpec
from pipeline.config.schema import RunConfig
from pipeline.data.windows import make_microbatches
from pipeline.importance.selection import make_metrics
from pipeline.models.loading import TORCH_DTYPES
from pipeline.partition.schedule import Action, dry_run, make_schedule
from pipeline.records.store import digest_of
from pipeline.runtime.codecs import make_codecs
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.text import make_run_windows

__all__ = ["Job"]


class Job:
    """One config on one deployment. `digest` is of all that changes numbers or bytes: a resumed run recognises itself.

    Raises ValueError for what this model, plan or text cannot serve.
    """

    def __init__(self, config: RunConfig, deployment: Deployment) -> None:
        self.config, self.deployment = config, deployment
        self.plan, self.control = deployment.plan, deployment.control
        self.hidden_size = deployment.model_config.hidden_size
        self.text = text = deployment.text.cut(config.dataset.first_k_tokens)
        self.windows = make_run_windows(config, text.ids, text.bos_id)
        self.microbatches = make_microbatches(self.windows, config.batch_size)
        self.encoders, self.decoders = self.make_codecs(), self.make_codecs()
        self.metrics = make_metrics(
            config,
            self.plan,
            self.encoders,
            self.microbatches,
            model_config=deployment.model_config,
            checkpoint_digest=deployment.checkpoint_digest,
            ids_sha256=text.ids_sha256,
        )
        self.in_flight = config.runtime.in_flight or self.plan.num_nodes + 2
        self.digest = digest_of(
            {
                **config.numerics(),
                "compressor": [codec.format_config() for codec in self.encoders],
                **dict.fromkeys(("compressor_per_link", "importance.layers", "importance.seed")),
                "importance": {str(index): metric.describe() for index, metric in self.metrics.items()},
                "checkpoint": deployment.checkpoint_digest,
                "ids": text.ids_sha256,
                "bos_id": text.bos_id,
            }
        )

    def make_codecs(self) -> list[Compressor]:
        """New codec objects, one per link."""
        max_tokens = max(m.num_tokens for m in self.microbatches)
        return make_codecs(
            self.config,
            self.plan,
            hidden_size=self.hidden_size,
            max_tokens=max_tokens,
            checkpoint=self.deployment.checkpoint_digest,
        )

    def make_actions(self, first: int) -> list[Action]:
        """This rank's actions from micro-batch `first` on. Raises ScheduleError for one that would deadlock."""
        world = self.control.world
        schedule = make_schedule(
            self.plan,
            len(self.microbatches),
            world_size=world.world_size,
            in_flight=self.in_flight,
            first_microbatch=first,
        )
        dry_run(schedule, receives_ahead=self.config.runtime.receives_ahead)
        return schedule[world.rank]

    def frame_specs(self) -> list[FrameSpec]:
        """What both ends of each link know of its frames."""
        dtype = TORCH_DTYPES[self.config.model.dtype]
        return frame_specs(self.plan, self.encoders, self.microbatches, hidden_size=self.hidden_size, dtype=dtype)
