"""Configuration -> the parts of a run: plan, codecs, stages, links.

Each function builds one part from config and plan, so that what the ranks must agree on is derived in one place.
Running the parts is `evaluation`'s business.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compressors import Compressor, LinkInfo, make_compressor
from pipeline.comm.control import choose_device
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import FrameSpec, Loopback, PeerInbox, PeerOutbox, SizeRule
from pipeline.comm.world import World
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.windows import MicroBatch, Window, make_windows
from pipeline.importance.files import file_digest, read_head_relevance, read_token_importance
from pipeline.importance.metrics import METRICS, Metric, MetricSetting
from pipeline.models.loading import TORCH_DTYPES, check_attention_readable
from pipeline.partition.plan import Plan, StagePlan, default_plan, explicit_plan

__all__ = [
    "LinkEnds",
    "check_bos",
    "check_max_length",
    "choose_threads",
    "frame_specs",
    "make_codecs",
    "make_gradient_links",
    "make_links",
    "make_metrics",
    "make_plan",
    "make_run_windows",
    "stage_devices",
]

SEND_DEPTH = 2  # frames of a link that may be on their way while the next one is made
SIDE_INPUTS = ("importance", "token_ids")


def make_plan(config: RunConfig, num_layers: int) -> Plan:
    """The plan that `partition` asks for."""
    partition = config.partition
    layers = [node.layers for node in partition.nodes if node.layers is not None]
    if layers:
        return explicit_plan(num_layers, layers)
    return default_plan(num_layers, partition.num_nodes, wrap=partition.wrap)


def check_world_size(config: RunConfig, world: World) -> None:
    """Raise ConfigError unless there is one process per node, or one for all."""
    num_nodes = config.partition.num_nodes
    if world.world_size not in (1, num_nodes):
        raise ConfigError(
            f"partition.num_nodes is {num_nodes}, but torchrun started {world.world_size} processes: use "
            f"--nproc_per_node={num_nodes} (one process per node, counted over all machines), "
            f"--nproc_per_node=1, or --set partition.num_nodes={world.world_size}"
        )


def check_max_length(config: RunConfig, model_config: Any) -> None:
    """Raise ConfigError where the windows are longer than the model's positions."""
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.dataset.max_length > longest:
        raise ConfigError(
            f"dataset.max_length is {config.dataset.max_length}, the model has positions for {longest} tokens"
        )


def check_bos(config: RunConfig, bos_id: int | None) -> None:
    """Raise ConfigError where windows are to begin with a token that the model has not."""
    if config.dataset.bos == "window" and bos_id is None:
        raise ConfigError("dataset.bos is window, but the model's tokenizer has no BOS token")


def choose_threads(setting: int, world: World) -> int:
    """Threads per rank: the setting, or the cores divided among the ranks of this machine."""
    return setting or max(1, available_cores() // world.local_world_size)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_of(node: int, world: World) -> int:
    """The rank that plays a node; one process plays all of them."""
    return 0 if world.world_size == 1 else node


def stage_devices(config: RunConfig, plan: Plan, world: World) -> dict[int, torch.device]:
    """Device of each stage that this rank holds, by stage index."""
    devices = {}
    for stage in plan.stages:
        if rank_of(stage.node, world) == world.rank:
            own = config.partition.nodes[stage.node].device if config.partition.nodes else None
            devices[stage.stage_index] = choose_device(own or config.runtime.device, world)
    return devices


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


def make_run_windows(config: RunConfig, ids: torch.Tensor, bos_id: int | None) -> list[Window]:
    """The windows over the text's ids, int64 [num_tokens]."""
    return make_windows(
        ids.numel(),
        config.dataset.max_length,
        config.dataset.stride,
        window_bos=config.dataset.bos == "window",
        text_has_bos=bos_id is not None and ids[0].item() == bos_id,
    )


def make_metrics(
    config: RunConfig,
    plan: Plan,
    codecs: Sequence[Compressor],
    microbatches: Sequence[MicroBatch],
    *,
    model_config: Any,
    checkpoint_digest: str,
    ids_sha256: str,
) -> dict[int, Metric]:
    """What computes the importance for the codecs that need it, by link index.

    Raises ConfigError or another ValueError for what this model, plan, text or kernel cannot give.
    """
    metrics = {}
    for link, codec in zip(plan.links, codecs):
        if "importance" not in codec.needs:
            continue
        cls, stage, section = METRICS[codec.importance_metric], plan.stages[link.index], config.importance
        options: dict[str, Any] = {"seed": section.seed, "microbatches": microbatches, "first_layer": stage.start}
        if "layers" in cls.setting_keys:
            check_attention_readable(model_config, trust_remote_code=config.model.trust_remote_code)
            options["layers"] = _layers_to_read(section.layers, stage, cls.name)
        for key in {"head_weights", "oracle"}.intersection(cls.setting_keys):
            if getattr(section, key) is None:
                raise ConfigError(f"metric {cls.name} needs a file: set importance.{key}")
            path = Path(getattr(section, key)).expanduser()
            options["file_digest"] = file_digest(path)
            if key == "head_weights":
                options["head_relevance"] = read_head_relevance(
                    path,
                    checkpoint_fingerprint=checkpoint_digest,
                    num_layers=plan.num_layers,
                    num_heads=model_config.num_attention_heads,
                )
            else:
                options["token_importance"] = read_token_importance(
                    path,
                    link.name,
                    checkpoint_fingerprint=checkpoint_digest,
                    ids_sha256=ids_sha256,
                    max_length=config.dataset.max_length,
                    stride=config.dataset.stride,
                    bos=config.dataset.bos,
                )
        metrics[link.index] = cls(MetricSetting(**options))
    return metrics


def _layers_to_read(setting: str | Sequence[int], stage: StagePlan, metric: str) -> list[int]:
    """Of the sending stage's layers, those that `importance.layers` asks for."""
    own = range(stage.start, stage.end)
    chosen = list(own[-1:] if setting == "last" else own if setting == "all" else sorted(set(setting) & set(own)))
    if not chosen:
        holds = f"layers {stage.start} to {stage.end - 1}" if own else "no layers"
        raise ConfigError(
            f"metric {metric} reads attention, but stage {stage.stage_index} holds {holds}, and importance.layers "
            f"is {setting!r}"
        )
    return chosen


@dataclass(frozen=True)
class LinkEnds:
    """This rank's ends of all links, by link index; the link behind the last stage carries losses."""

    senders: Mapping[int, FrameSender]
    receivers: Mapping[int, FrameReceiver]


def make_links(
    plan: Plan,
    codecs: Sequence[Compressor],
    specs: Sequence[FrameSpec],
    world: World,
    *,
    devices: Mapping[int, torch.device],
    backend: str,
    receives_ahead: int,
    first_microbatch: int,
    groups: Mapping[int, dist.ProcessGroup],
) -> LinkEnds:
    """Open this rank's link ends, of which `specs` come from `frame_specs`, and post their receives.

    `groups` has one NCCL group per link where the backend is nccl. Losses always travel over Gloo.
    """
    hops = {}
    for link, codec in zip(plan.links, codecs):
        if backend != "nccl":
            size_rule = SizeRule.SHORTER_ALLOWED
        else:
            size_rule = SizeRule.EXACT if codec.fixed_size else SizeRule.HEADER_FIRST
        i = link.index
        hops[i] = _Hop(
            specs[i], link.src_node, link.dst_node, devices.get(i), devices.get(i + 1), size_rule, groups.get(i)
        )
    if plan.last_node != 0:
        end = len(plan.links)
        hops[end] = _Hop(specs[end], plan.last_node, 0, devices.get(end))
    return _open(hops, world, receives_ahead=receives_ahead, first_microbatch=first_microbatch)


def make_gradient_links(
    plan: Plan,
    microbatches: Sequence[MicroBatch],
    world: World,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    devices: Mapping[int, torch.device],
) -> LinkEnds:
    """Links for raw hidden states forward and raw float32 gradients back, always over Gloo.

    With S stages, link i < S - 1 leads from stage i to stage i + 1, and link S - 1 + i from there back.
    """
    shapes = [(*m.shape, hidden_size) for m in microbatches]
    num_links = len(plan.links)
    hops = {}
    for link in plan.links:
        ends = [(link.src_node, devices.get(link.index)), (link.dst_node, devices.get(link.index + 1))]
        for index, what, its_dtype, (src, dst) in (
            (link.index, "raw", dtype, ends),
            (num_links + link.index, "gradient", torch.float32, ends[::-1]),
        ):
            spec = FrameSpec(
                name=f"{what}:{link.name}",
                stage_index=index,
                num_trail=0,
                codec_id=0,
                dtype=its_dtype,
                shapes=shapes,
                max_nbytes=[its_dtype.itemsize * math.prod(shape) for shape in shapes],
            )
            hops[index] = _Hop(spec, src[0], dst[0], src[1], dst[1])
    return _open(hops, world, receives_ahead=1, first_microbatch=0)


@dataclass(frozen=True)
class _Hop:
    """One direction of one link; devices are known for this rank's stages only."""

    spec: FrameSpec
    src_node: int
    dst_node: int
    src_device: torch.device | None = None
    dst_device: torch.device | None = None
    size_rule: SizeRule = SizeRule.SHORTER_ALLOWED
    group: dist.ProcessGroup | None = None


def _open(hops: Mapping[int, _Hop], world: World, *, receives_ahead: int, first_microbatch: int) -> LinkEnds:
    """This rank's ends, receives posted."""
    senders: dict[int, FrameSender] = {}
    receivers: dict[int, FrameReceiver] = {}
    for index, hop in hops.items():
        src, dst, spec = rank_of(hop.src_node, world), rank_of(hop.dst_node, world), hop.spec
        if src == dst == world.rank:
            loopback = Loopback(spec)
            senders[index] = FrameSender(spec, loopback, first_microbatch=first_microbatch)
            receivers[index] = FrameReceiver(spec, loopback, first_microbatch=first_microbatch)
            continue
        common: dict[str, Any] = {"tag": index, "group": hop.group, "size_rule": hop.size_rule}
        on_gpu = hop.group is not None
        if src == world.rank:
            place = _buffer_place(hop.src_device, on_gpu)
            outbox = PeerOutbox(spec, peer=dst, depth=SEND_DEPTH, **common, **place)
            senders[index] = FrameSender(spec, outbox, first_microbatch=first_microbatch, receives_ahead=receives_ahead)
        if dst == world.rank:
            place = _buffer_place(hop.dst_device, on_gpu)
            inbox = PeerInbox(
                spec, peer=src, depth=receives_ahead, first_microbatch=first_microbatch, **common, **place
            )
            receivers[index] = FrameReceiver(spec, inbox, first_microbatch=first_microbatch)
    return LinkEnds(senders, receivers)


def frame_specs(
    plan: Plan,
    codecs: Sequence[Compressor],
    microbatches: Sequence[MicroBatch],
    *,
    hidden_size: int,
    dtype: torch.dtype,
) -> list[FrameSpec]:
    """What both ends know of each link's frames; the last spec is that of the losses."""
    shapes = [(*m.shape, hidden_size) for m in microbatches]
    specs = [
        FrameSpec(
            name=link.name,
            stage_index=link.index,
            num_trail=link.index,
            codec_id=codec.codec_id(),
            dtype=dtype,
            shapes=shapes,
            max_nbytes=[codec.max_nbytes(shape) for shape in shapes],
        )
        for link, codec in zip(plan.links, codecs)
    ]
    num_links = len(plan.links)
    result = FrameSpec(
        name=f"result:node{plan.last_node}->node0",
        stage_index=num_links,
        num_trail=num_links,
        codec_id=0,
        dtype=torch.float32,
        shapes=[(1, m.num_scored, 2) for m in microbatches],
        max_nbytes=[8 * m.num_scored for m in microbatches],
    )
    return [*specs, result]


def _buffer_place(stage_device: torch.device | None, on_gpu: bool) -> dict[str, Any]:
    """Where a link's buffers lie: on the GPU for NCCL, else in host memory, pinned for a GPU stage."""
    is_cuda = stage_device is not None and stage_device.type == "cuda"
    if on_gpu:
        return {"device": stage_device, "pin_memory": False}
    return {"device": torch.device("cpu"), "pin_memory": is_cuda}
