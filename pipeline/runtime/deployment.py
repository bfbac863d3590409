"""A model over the ranks, ready to evaluate: what is decided, checked and loaded once per start.

What can be wrong is looked for in the order of what it costs to find out: config, model files, plan, text, codecs,
and only then weights.
"""

from __future__ import annotations

import copy
import datetime
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from pipeline.comm.control import Control
from pipeline.comm.link_ends import forward_hops
from pipeline.comm.mailbox import BodyChannel
from pipeline.comm.watchdog import tell
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.data.windows import make_microbatches
from pipeline.importance.files import TokenOwner
from pipeline.models.blocks.storage import BLOCKS_FILE, block_types
from pipeline.models.checkpoint import read_checkpoint
from pipeline.models.loading import TORCH_DTYPES, WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.matrix_types import choose_matrix_types, stored_types, types_label
from pipeline.models.source import resolve_model
from pipeline.models.weight_files import checkpoint_fingerprint, file_fingerprint
from pipeline.models.stage import Stage
from pipeline.partition.plan import Plan
from pipeline.records.environment import Environment
from pipeline.runtime.balance import is_measured
from pipeline.runtime.codecs import (
    LinkCodecs,
    codec_requests,
    make_codecs,
    make_link_parts,
    run_digest,
    window_tokens,
)
from pipeline.runtime.devices import (
    available_cores,
    choose_device,
    choose_threads,
    gpu_identity,
    link_backend,
    shared_gpus,
    stage_devices,
)
from pipeline.runtime.environment import gather_environment
from pipeline.runtime.link_specs import generation_workload
from pipeline.runtime.emulation import check_emulation, emulated_links
from pipeline.runtime.measured_nodes import measured_nodes
from pipeline.runtime.placement import balanced_layers, check_world_size, make_plan
from pipeline.runtime.text import (
    NO_TEXT,
    TokenizedText,
    check_bos,
    check_max_length,
    make_run_windows,
    tokenize_once,
)
from pipeline.runtime.timing import time_one_token

__all__ = ["DeployedModel", "Deployment", "LoadedStages", "deploy", "generation_codecs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DeployedModel:
    """Which model: its directory, transformers' config, and the fingerprint of its checkpoint.

    `block_types` names the types of the blocks that its matrices are held as, None for none, `blocks_digest` is the
    fingerprint of their file, where they come from one. `notes` are what a reader
    of numbers must know of the checkpoint (`checkpoint.Checkpoint`).
    """

    directory: Path
    config: PretrainedConfig
    checkpoint_digest: str
    block_types: str | None
    blocks_digest: str | None
    notes: tuple[str, ...]

    @property
    def weights_digest(self) -> str:
        """Of the weights as they are held, which decide over a run's numbers."""
        parts = (self.checkpoint_digest, self.block_types, self.blocks_digest)
        return " ".join(part for part in parts if part is not None)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What outlives one evaluation.

    `codecs` are those of the config that it was deployed with. `gpus` has the identity of every rank's GPU, None for a
    CPU, `groups` a Gloo group for each rank at the other end of a link, `channels` an NCCL group per link where bodies
    use NCCL, `one_token_compute_s` the seconds that each stage of
    this rank takes for a single token.
    """

    control: Control
    plan: Plan
    model: DeployedModel
    text: TokenizedText
    codecs: LinkCodecs
    stages: dict[int, Stage]
    devices: dict[int, torch.device]
    gpus: list[str | None]
    backend: str
    groups: dict[int, dist.ProcessGroup]
    channels: dict[int, BodyChannel]
    threads: int
    environment: Environment
    one_token_compute_s: dict[int, float]


@dataclass
class LoadedStages:
    """What of a deployment serves the next one, when the ring is formed again: this rank's weights, of a plan."""

    weights_digest: str = ""
    plan: Plan | None = None
    stages: dict[int, Stage] = field(default_factory=dict)
    one_token_compute_s: dict[int, float] = field(default_factory=dict)


def deploy(
    config: RunConfig,
    control: Control,
    check: Callable[[Plan, Any], None] | None = None,
    claim: Callable[[str], None] | None = None,
    *,
    with_text: bool = True,
    loaded: LoadedStages | None = None,
) -> Deployment:
    """Agree, resolve, plan, tokenise, check codecs and load this rank's stages.

    Without a text to score, codecs are those of generation. `check(plan, model_config)` may raise where they do not
    serve what is to be done, and `claim(digest)`, on rank 0, where the run with this digest cannot be recorded.
    `loaded` is filled, or taken over where weights and plan are the same. Raises ValueError (ConfigError, PlanError,
    ModelError, ...) with a message for the user.
    """
    world = control.world
    check_world_size(config, world)
    check_emulation(config, world)
    control.agree("config", config.numerics())
    threads = _set_threads(config, control)
    control.report("resolving the model")
    directory, model_config = _resolve(config.model, control)
    _choose_matrix_types(config, directory, model_config, control)
    if with_text:
        check_max_length(config, model_config)
    plan = _plan(config, directory, model_config, control)
    if check is not None:
        check(plan, model_config)
    devices = stage_devices(config, plan, world)
    loaded = loaded or LoadedStages()
    model = _identify(config.model, control, directory, model_config, is_told=not loaded.stages)
    if with_text:
        text, codecs = _prepare_text(config, control, plan, model, claim)
    else:
        text, codecs = NO_TEXT, generation_codecs(config, control, plan, model)
    environment = gather_environment(control, devices, threads)
    hops = forward_hops(plan, devices={}, channels={})
    groups = control.connect((world.rank_of(hop.src_node), world.rank_of(hop.dst_node)) for hop in hops)
    gpus, backend, channels = _open_channels(config, control, plan, devices)
    control.report("loading weights")
    if (loaded.weights_digest, loaded.plan) != (model.weights_digest, plan):
        loaded.stages.clear()
        loaded.one_token_compute_s.clear()
        loaded.stages.update(_load_stages(config, plan, model, devices))
        loaded.weights_digest, loaded.plan = model.weights_digest, plan
    control.barrier()
    control.report("timing a token")
    control.in_turn(lambda: _time_one_token(loaded, model_config.hidden_size, TORCH_DTYPES[config.model.dtype]))
    return Deployment(
        control=control,
        plan=plan,
        model=model,
        text=text,
        codecs=codecs,
        stages=loaded.stages,
        devices=devices,
        gpus=gpus,
        backend=backend,
        groups=groups,
        channels=channels,
        threads=threads,
        environment=environment,
        one_token_compute_s=loaded.one_token_compute_s,
    )


def _resolve(model: ModelConfig, control: Control) -> tuple[Path, PretrainedConfig]:
    """The model's directory on this machine, and its config. One rank of a machine shows how far a download is."""
    directory = resolve_model(
        model.name,
        cache_dir=model.dir,
        stage_to=model.stage_to,
        revision=model.revision,
        show_progress=control.world.local_rank == 0,
    )
    return directory, load_model_config(directory, model.architecture, trust_remote_code=model.trust_remote_code)


def _choose_matrix_types(
    config: RunConfig, directory: Path, model_config: PretrainedConfig, control: Control
) -> None:
    """Put into a model's config how matrices are held; blocks only where all ranks compute on CPUs."""
    world, nodes = control.world, config.partition.nodes
    own = [node for node in range(config.partition.num_nodes) if world.rank_of(node) == world.rank]
    settings = [nodes[node].device if nodes else None for node in own]
    on_cpu = all(choose_device(setting or config.runtime.device, world).type == "cpu" for setting in settings)

    def stored() -> dict[str, Any] | None:  # a checkpoint without blocks is read later, once the plan is known to do
        types = block_types(directory)
        return stored_types(read_checkpoint(directory, model_config, types)) if types else None

    model_config.matrix_types = choose_matrix_types(
        config.model, model_config, stored, on_cpu=all(control.gather(on_cpu))
    )
    control.agree("checkpoint", {"blocks": types_label(model_config)})


def _identify(
    model: ModelConfig, control: Control, directory: Path, model_config: PretrainedConfig, *, is_told: bool
) -> DeployedModel:
    """The checkpoint that all ranks have, every tensor of it accounted for; what is odd about it `is_told`."""
    digest = checkpoint_fingerprint(directory)
    has_stored = types_label(model_config) is not None and model.weights == "auto"
    blocks_digest = file_fingerprint(directory / BLOCKS_FILE) if has_stored else None
    control.agree("checkpoint", {"fingerprint": digest, "blocks' fingerprint": blocks_digest})
    notes = read_checkpoint(directory, model_config).notes
    if control.world.rank == 0 and is_told:
        for note in notes:
            logger.warning("%s", note)
    return DeployedModel(
        directory=directory,
        config=model_config,
        checkpoint_digest=digest,
        block_types=types_label(model_config),
        blocks_digest=blocks_digest,
        notes=notes,
    )


def _plan(config: RunConfig, directory: Path, model_config: PretrainedConfig, control: Control) -> Plan:
    """The plan that the config asks for, or comes to. Raises ConfigError for links that it does not have, too."""
    measured = measured_nodes(config, model_config, control) if is_measured(config) else None
    is_balanced = config.partition.plan == "balanced"
    if is_balanced:  # what nodes have room for is a matter of the tensors; config.json may tie ends that differ
        is_tied = read_checkpoint(directory, model_config).is_tied
        model_config = copy.copy(model_config)
        model_config.tie_word_embeddings = is_tied
    plan = make_plan(config, model_config, measured)
    emulated_links(config, plan)
    if is_balanced and control.world.rank == 0:
        tell(f"balanced plan: layers by node {balanced_layers(config, plan)}\n")
    return plan
def _time_one_token(loaded: LoadedStages, hidden_size: int, dtype: torch.dtype) -> None:
    for index in loaded.stages.keys() - loaded.one_token_compute_s.keys():
        loaded.one_token_compute_s[index] = time_one_token(loaded.stages[index], hidden_size, dtype)


def _load_stages(
    config: RunConfig, plan: Plan, model: DeployedModel, devices: Mapping[int, torch.device]
) -> dict[int, Stage]:
    """This rank's stages. Those of one device share the embedding, where both have it."""
    weights = WeightFormat.from_config(config.model)
    stages: dict[int, Stage] = {}
    embedding, holder = None, None
    for index, device in devices.items():
        stage_model = load_stage(
            model.directory,
            model.config,
            plan.stages[index],
            weights,
            device=device,
            embedding=embedding if holder == device else None,
        )
        if stage_model.embedding is not None:
            embedding, holder = stage_model.embedding, device
        stages[index] = Stage(plan.stages[index], stage_model, device, model.config.vocab_size)
    return stages


def _prepare_text(
    config: RunConfig,
    control: Control,
    plan: Plan,
    model: DeployedModel,
    claim: Callable[[str], None] | None,
) -> tuple[TokenizedText, LinkCodecs]:
    """The text's ids, and codecs that can carry its windows."""
    control.report("tokenising")
    text = tokenize_once(config, control, model.directory, vocab_size=model.config.vocab_size)
    check_bos(config, text.bos_id)
    control.report("making codecs")
    requests = codec_requests(
        config,
        plan,
        hidden_size=model.config.hidden_size,
        max_tokens=window_tokens(config),
        checkpoint=model.checkpoint_digest,
    )
    codecs = make_codecs(requests, plan, control, measure_error=config.measure_error)
    parts = make_link_parts(
        config,
        plan,
        control,
        codecs,
        make_microbatches(make_run_windows(config, text.ids, text.bos_id), config.batch_size),
        model_config=model.config,
        owner=TokenOwner.of(config.dataset, model.checkpoint_digest, text.ids_sha256),
    )
    if claim is not None and control.world.rank == 0:
        claim(
            run_digest(
                config,
                plan,
                codecs,
                parts,
                checkpoint=model.weights_digest,
                ids_sha256=text.ids_sha256,
                bos_id=text.bos_id,
            )
        )
    return text, codecs


def generation_codecs(config: RunConfig, control: Control, plan: Plan, model: DeployedModel) -> LinkCodecs:
    """Codecs that can carry prompts. Every rank calls it; raises ConfigError, on all ranks if on one."""
    control.report("making codecs")
    requests = codec_requests(
        config,
        plan,
        hidden_size=model.config.hidden_size,
        max_tokens=generation_workload(config, model.config).max_tokens,
        checkpoint=model.checkpoint_digest,
    )
    return make_codecs(requests, plan, control, measure_error=False)


def _set_threads(config: RunConfig, control: Control) -> int:
    threads = choose_threads(config.runtime.threads, control.world)
    torch.set_num_threads(threads)
    cores = available_cores()
    if threads * control.world.local_world_size > max(cores, control.world.local_world_size):
        logger.warning(
            "%d ranks with %d threads each share %d cores; more threads than cores can be several times slower",
            control.world.local_world_size,
            threads,
            cores,
        )
    return threads


# NCCL's own watchdog ends the process at the group's timeout, counted from posting. Ours comes first, naming the link.
_NCCL_TIMEOUT = datetime.timedelta(days=1)


def _open_channels(
    config: RunConfig, control: Control, plan: Plan, devices: dict[int, torch.device]
) -> tuple[list[str | None], str, dict[int, BodyChannel]]:
    """The ranks' GPUs, the links' backend, and with NCCL one group per link: operations of a pair share a stream."""
    world = control.world
    device = next(iter(devices.values()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    gpus = control.gather(gpu_identity(device))
    if world.world_size == 1:
        return gpus, "loopback", {}
    backend = link_backend(config.runtime.backend, gpus)
    if world.rank == 0:
        _tell_backend(config.runtime.backend, backend, gpus)
    channels = {}
    if backend == "nccl":
        for link in plan.links:
            src, dst = world.rank_of(link.src_node), world.rank_of(link.dst_node)
            group = dist.new_group([src, dst], backend="nccl", timeout=_NCCL_TIMEOUT)
            channels[link.index] = BodyChannel(group, device, config.runtime.timeout_s)
            _connect(group, src, dst, world.rank, device)
    return gpus, backend, channels


def _tell_backend(setting: str, backend: str, gpus: list[str | None]) -> None:
    logger.info("links go over %s (runtime.backend is %s)", backend, setting)
    for gpu, ranks in shared_gpus(gpus).items():
        logger.warning("ranks %s share GPU %s: each one's times contain the others' work", ranks, gpu)
    if setting == "auto" and None not in gpus and not shared_gpus(gpus):
        logger.warning("links go over Gloo with pinned buffers; NCCL has to be asked for: runtime.backend=nccl")


def _connect(group: dist.ProcessGroup, src: int, dst: int, rank: int, device: torch.device) -> None:
    """Send one byte over a new NCCL group: it connects a pair at its first operation, which takes seconds."""
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    if rank == src:
        dist.send(byte, dst, group=group)
    elif rank == dst:
        dist.recv(byte, src, group=group)
