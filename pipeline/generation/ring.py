"""A deployed model with slots open: what every rank sets up to generate, and its share of the work.

Rank 0 hands in a source of passes; the others follow frames.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pipeline.comm.link import LinkSpec
from pipeline.comm.link_ends import forward_hops, open_links
from pipeline.comm.mailbox import LinkError
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.drafting.drafter import Drafter, DrafterContext
from pipeline.drafting.policy import Drafting, DraftLimits
from pipeline.drafting.registry import make_drafters
from pipeline.generation.scheduler import Scheduler
from pipeline.models.loading import TORCH_DTYPES, WeightFormat
from pipeline.models.sampling import read_generation_defaults
from pipeline.models.stage import TokenWindows
from pipeline.runtime.codecs import CodecFacts, make_decode_codecs
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.emulation import check_emulation, emulated_links, receives_ahead_of, slowdown_of
from pipeline.runtime.engine import Engine
from pipeline.runtime.head import Head
from pipeline.runtime.link_specs import generation_workload, id_nbytes, link_specs
from pipeline.runtime.pass_costs import measure_pass_costs, ranks_at_once
from pipeline.runtime.placement import credits_of
from pipeline.runtime.rank_report import rank_report
from pipeline.runtime.stage_times import StageTimes
from pipeline.runtime.together import warm_up
from pipeline.runtime.worker import EndCodecs, StageWorker

__all__ = ["GenerationRing"]


class GenerationRing:
    """One config on one deployment; every rank makes it alike.

    Attributes:
        slot_length: positions of a slot.
        prefill_chunk: tokens of a prompt in one pass.
        passes: of sampled tokens that are worth having under way at once.
        emulated_links: conditions of the network, by index in the chain.
        defaults, eos_ids, notes: what the checkpoint says of generation.
        drafting: on rank 0, where drafters are configured.
        mixes_tokens: whether the model itself computes a token otherwise beside others, be it those of other sequences.

    Raises ConfigError, on all ranks, for codecs and drafters that it cannot use.
    """

    def __init__(self, config: RunConfig, deployment: Deployment) -> None:
        self.config, self.deployment = config, deployment
        plan, control, generation = deployment.plan, deployment.control, config.generation
        self.workload = generation_workload(config, deployment.model.config)
        positions = getattr(deployment.model.config, "max_position_embeddings", None)
        self.slot_length = generation.slot_length(positions)
        self.prefill_chunk = min(generation.prefill_chunk or self.slot_length, self.slot_length)
        told = {
            "max_slots": generation.max_slots,
            "max_length": self.slot_length,
            "prefill_chunk": self.prefill_chunk,
            "draft": list(generation.draft),
            "draft_depth": generation.draft_depth,
        }
        control.agree("config", {f"generation.{key}": value for key, value in told.items()})
        self.codecs = deployment.codecs
        self.decode_codecs = make_decode_codecs(
            config,
            plan,
            control,
            self.codecs,
            hidden_size=deployment.model.config.hidden_size,
            max_tokens=self.workload.max_tokens,
            checkpoint=deployment.model.checkpoint_digest,
        )
        for facts in (*self.codecs.facts, *self.decode_codecs.facts):
            _check_codec(facts)
        self.mixes_tokens = WeightFormat.from_config(config.model).mixes_tokens
        if generation.draft and self.mixes_tokens:
            raise ConfigError(
                f"generation.draft is {list(generation.draft)}, but 8-bit weights let the tokens of a pass change "
                "each other, so drafts would change answers; leave generation.draft out, or load other weights"
            )
        self.credits = credits_of(config, plan, control.world)
        check_emulation(config, control.world)  # the deployment's config may have had other links
        self.emulated_links = emulated_links(config, plan)
        self.receives_ahead = receives_ahead_of(config, self.emulated_links, credits=self.credits)
        at_once = ranks_at_once(deployment)
        self.passes = min(self.credits, generation.passes or sum(at_once.values()))
        defaults = read_generation_defaults(deployment.model.directory, deployment.model.config)
        self.defaults, self.eos_ids, self.notes = defaults, defaults.eos_ids, defaults.notes
        dtype = TORCH_DTYPES[config.model.dtype]
        hidden_size = deployment.model.config.hidden_size
        for codecs in dict.fromkeys((self.codecs, self.decode_codecs)):
            warm_up(control, codecs, deployment.devices, hidden_size, dtype)
        for stage in deployment.stages.values():
            stage.open_slots(generation.max_slots, self.slot_length)
        tokens = TokenWindows(deployment.text.ids, (), None)
        result_link = len(plan.links) if plan.last_node != 0 else None
        end_codecs = EndCodecs.make(plan, self.codecs, self.decode_codecs)
        self._worker = StageWorker(
            deployment.stages,
            end_codecs,
            Head(tokens, result_link),
            dtype=dtype,
            slowdown=slowdown_of(config, control.world),
        )
        self.drafting = self._make_drafting(end_codecs, at_once) if generation.draft else None

    @property
    def times(self) -> dict[int, StageTimes]:
        """Of this rank's stages, over all runs."""
        return self._worker.times

    @property
    def cache_nbytes(self) -> int:
        """Of this rank's caches."""
        return sum(stage.slots.nbytes for stage in self.deployment.stages.values() if stage.slots is not None)

    def run(self, scheduler: Scheduler | None) -> list[dict[str, Any]]:
        """Until the scheduler, rank 0's, is done; returns what every rank tells of it, on every rank."""
        deployment, control = self.deployment, self.deployment.control
        ends = open_links(
            forward_hops(deployment.plan, devices=deployment.devices, channels=deployment.channels),
            self._specs(),
            control.world,
            receives_ahead=self.receives_ahead,
            groups=deployment.groups,
            emulated=self.emulated_links,
        )
        if scheduler is not None:
            scheduler.wake = ends.wake
        try:
            control.barrier()
            control.end_pause()
            start_s = time.perf_counter()
            Engine(self._worker, ends, control.report, source=scheduler, credits=self.credits).run()
        except LinkError as e:
            if control.may_form_again(e):
                control.break_connections()
                ends.abandon()
            raise
        run_s = time.perf_counter() - start_s
        report = rank_report(deployment, self._worker.times, ends)
        return control.gather({**report, "run_s": run_s, "cache_bytes": self.cache_nbytes})

    def close(self) -> None:
        """Free the slots."""
        for stage in self.deployment.stages.values():
            stage.close_slots()

    def _make_drafting(self, codecs: EndCodecs, at_once: Mapping[str, int]) -> Drafting | None:
        """With the drafters of the config; None on other ranks than 0. Every rank calls it."""
        config, deployment, generation = self.config, self.deployment, self.config.generation
        control, model = deployment.control, deployment.model
        is_first = control.world.rank == 0

        def make() -> tuple[list[Drafter], None]:
            if not is_first:
                return [], None
            context = DrafterContext(
                plan=deployment.plan,
                stages=deployment.stages,
                model_config=model.config,
                checkpoint_digest=model.checkpoint_digest,
                eos_ids=self.eos_ids,
                watch=self._worker.watch,
            )
            return make_drafters(generation.draft, context), None

        control.report("making drafters")
        drafters, _ = control.together(make)
        costs = measure_pass_costs(
            deployment.stages,
            codecs,
            control,
            at_once=at_once,
            depth=generation.draft_depth,
            slowdown=slowdown_of(config, control.world),
        )
        limits = DraftLimits(
            depth=generation.draft_depth,
            passes=generation.draft_passes or self.credits,
            adapts=generation.draft_adapts,
        )
        if not is_first:
            return None
        num_links = len(deployment.plan.links)
        return Drafting(drafters, costs, limits, num_links=num_links, vocab_size=model.config.vocab_size)

    def _specs(self) -> dict[int, LinkSpec]:
        deployment = self.deployment
        return link_specs(
            deployment.plan,
            self.codecs.ends,
            self.workload,
            hidden_size=deployment.model.config.hidden_size,
            dtype=TORCH_DTYPES[self.config.model.dtype],
            decoding=self.decode_codecs.ends,
            id_nbytes=id_nbytes(deployment.model.config.vocab_size),
        )


def _check_codec(facts: CodecFacts) -> None:
    if not facts.frame_invariant:
        raise ConfigError(
            f"codec {facts.name} cannot be used to generate: what it makes of a token depends on the tokens that share "
            "its frame, so an answer would depend on what else is under way. Codecs that treat every token alike (nf4, "
            "int8, hadamard(int4), klt, ...) can: see frame_invariant in docs/writing_a_codec.md"
        )
    if "importance" in facts.needs:
        raise ConfigError(f"codec {facts.name} needs the importance of tokens, which generation does not compute")

