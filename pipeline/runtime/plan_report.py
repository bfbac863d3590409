"""`--plan`: what a config would do, from config and headers. Loads no weights and starts no process group.

Prints stages and their weights, links and their bytes per token, and per rank the memory that is certain: weights,
link buffers, one chunk of logits; for generation, what the cache takes for each token of each slot. Activations, the
allocator's slack and the interpreter come on top. Then the default plan beside the balanced one (`plan_comparison`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressors import Compressor
from pipeline.comm.emulation import Conditions
from pipeline.comm.link_ends import SEND_DEPTH
from pipeline.comm.mailbox import FrameMemory
from pipeline.comm.wire import WireFormat, header_nbytes
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.models.blocks.storage import block_types
from pipeline.models.cache import cache_bytes_per_token
from pipeline.models.checkpoint import read_checkpoint
from pipeline.models.gguf_header import header_types
from pipeline.models.loading import TORCH_DTYPES, WeightFormat
from pipeline.models.matrix_types import choose_matrix_types, stored_types
from pipeline.models.model_config import load_model_config
from pipeline.models.sizes import embedding_bytes, stage_parameter_bytes
from pipeline.models.source import local_path
from pipeline.models.stage import MAX_LOGITS_NBYTES
from pipeline.partition.plan import Plan, default_plan
from pipeline.partition.schedule import passes_in_flight
from pipeline.planner.problem import LinkFigures
from pipeline.records.labels import blocks_text
from pipeline.records.node_costs import NodeCosts
from pipeline.runtime.balance import is_measured
from pipeline.runtime.codecs import codec_requests, make_codec, window_tokens
from pipeline.runtime.emulation import emulated_links, planned_link, receives_ahead_of
from pipeline.runtime.measured_nodes import kept_nodes
from pipeline.runtime.placement import make_plan
from pipeline.runtime.plan_comparison import comparison_lines, gib
from pipeline.runtime.record_parts import weight_blocks
from pipeline.runtime.text import check_max_length

__all__ = ["PlannedRun", "plan_run", "plan_text"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A config with what its model's headers say; `measured` are costs of nodes that an earlier run has left, and
    `emulated` what the config says of links, by index in the chain.
    """

    config: RunConfig
    model_config: Any
    notes: tuple[str, ...]
    measured: NodeCosts | None
    plan: Plan
    codecs: tuple[Compressor, ...]
    emulated: Mapping[int, Conditions]

    @property
    def network(self) -> tuple[Conditions, ...] | None:
        """Of each link of the chain, that of results included; None where the config says nothing of any."""
        if not self.emulated:
            return None
        return tuple(self.emulated.get(index, Conditions()) for index in range(len(self.plan.chain_names)))

    def check_order(self) -> None:
        """Raise ConfigError unless nodes come in the planner's order, so that links are those of its plans."""
        ring = default_plan(self.plan.num_layers, self.plan.num_nodes, wrap=self.config.partition.wrap)
        own, known = ([stage.node for stage in plan.stages] for plan in (self.plan, ring))
        if own != known:
            raise ConfigError(
                f"the layers of partition.nodes pass nodes {own}, links are reckoned with for {known} only: leave the "
                "layers out, or set partition.wrap to what they are"
            )

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Of the largest micro-batch: [B, T, H]."""
        config = self.config
        return (config.batch_size, config.dataset.max_length, self.model_config.hidden_size)

    def header_nbytes(self, link_index: int) -> int:
        bounds = [codec.max_nbytes(self.frame_shape) for codec in self.codecs[:link_index]]
        return header_nbytes(is_indexed=True, trail=bounds)

    def link_figures(self, network: Sequence[Conditions]) -> list[LinkFigures]:
        """Of each link of the chain under these conditions: payload, at most, and header, of a long text's tokens or,
        where `partition.objective` is `decode`, of one that was sampled and has a frame of its own; of results only
        the delay.

        Raises ConfigError for another order of nodes than the planner's.
        """
        self.check_order()
        if self.config.partition.objective == "decode":
            nbytes: list[float] = [*self._one_token_nbytes()]
        else:
            frames = [codec.max_nbytes(self.frame_shape) for codec in self.codecs]
            nbytes = [(n + self.header_nbytes(i)) / window_tokens(self.config) for i, n in enumerate(frames)]
        results = [0.0] * (len(network) - len(nbytes))
        return [planned_link(link, 8 * own) for link, own in zip(network, [*nbytes, *results], strict=True)]

    def _one_token_nbytes(self) -> list[int]:
        """Of a sampled token's frame on each link, at most."""
        hidden_size = self.model_config.hidden_size
        requests = codec_requests(
            self.config, self.plan, hidden_size=hidden_size, max_tokens=window_tokens(self.config), decode=True
        )
        payloads = [make_codec(request).max_nbytes((1, 1, hidden_size)) for request in requests]
        return [n + header_nbytes(num_rows=1, trail=payloads[:i]) for i, n in enumerate(payloads)]


def plan_run(config: RunConfig) -> PlannedRun:
    """Raises ValueError where the config cannot be run or says too little."""
    model_dir = Path(config.model.name) if Path(config.model.name).is_dir() else None
    model_config = load_model_config(model_dir, config.model.architecture)
    notes: list[str] = []
    has_weights = model_dir is not None and any(model_dir.glob("*.safetensors"))
    if model_dir is not None and has_weights:
        checkpoint = read_checkpoint(model_dir, model_config)
        model_config.tie_word_embeddings = checkpoint.is_tied
        notes += checkpoint.notes

    def stored() -> dict[str, Any] | None:
        if model_dir is None or not has_weights:
            return _header_types(config.model.name, model_config, notes)
        return stored_types(read_checkpoint(model_dir, model_config, block_types(model_dir)))

    on_cpu = all(_device_type(config, node) == "cpu" for node in range(config.partition.num_nodes))
    model_config.matrix_types = choose_matrix_types(config.model, model_config, stored, on_cpu=on_cpu)
    check_max_length(config, model_config)
    measured = kept_nodes(config, model_config) if is_measured(config) else None
    plan = make_plan(config, model_config, measured)
    requests = codec_requests(
        config, plan, hidden_size=model_config.hidden_size, max_tokens=window_tokens(config)
    )
    return PlannedRun(
        config=config,
        model_config=model_config,
        notes=tuple(notes),
        measured=measured,
        plan=plan,
        codecs=tuple(make_codec(request) for request in requests),
        emulated=emulated_links(config, plan),
    )


def _header_types(name: str, model_config: Any, notes: list[str]) -> dict[str, Any] | None:
    """Of a GGUF file's blocks; a note where `name` is one that is not on this machine."""
    if not name.lower().endswith(".gguf"):
        return None
    try:
        path = local_path(name)
    except ValueError:  # no such package
        path = None
    if path is not None and path.is_file():
        return header_types(path, model_config)
    notes.append(f"{name} is not on this machine, so nothing is known of its blocks: sizes are those of float32")
    return None


def plan_text(run: PlannedRun, links: Sequence[LinkFigures] | None = None) -> str:
    """The plan as text; `links` are what the comparison of plans reckons with."""
    weights = _stage_weights(run)
    return "\n".join(
        [
            *_stage_lines(run, weights),
            *_link_lines(run),
            *_memory_lines(run, weights),
            *_generation_lines(run),
            *comparison_lines(run.config, run.model_config, run.plan, run.measured, links),
            *(f"note: {note}" for note in run.notes),
        ]
    )


def _stage_weights(run: PlannedRun) -> list[int]:
    """Bytes by stage; what two stages of a node share counts with the first."""
    config, plan, dtype = run.config, run.plan, TORCH_DTYPES[run.config.model.dtype]
    weights = [
        stage_parameter_bytes(run.model_config, stage, WeightFormat.from_config(config.model))
        for stage in plan.stages
    ]
    if len(plan.stages) > 1 and plan.last_node == 0 and run.model_config.tie_word_embeddings:
        weights[-1] -= embedding_bytes(run.model_config, dtype)
    return weights


def _stage_lines(run: PlannedRun, weights: Sequence[int]) -> list[str]:
    model, plan = run.config.model, run.plan
    lines = [f"{model.name}: {plan.num_layers} layers, hidden size {run.model_config.hidden_size}, {_held(run)}"]
    lines += ["", "stage  node  layers      weights"]
    for stage in plan.stages:
        extra = "".join([" + embedding" if stage.is_first else "", " + norm and head" if stage.is_last else ""])
        layers = f"{stage.start}-{stage.end - 1}" if stage.num_layers else "none"
        lines.append(
            f"{stage.stage_index:<5}  {stage.node:<4}  {layers:<10}  {gib(weights[stage.stage_index])}{extra}"
        )
    return lines


def _held(run: PlannedRun) -> str:
    """How weights are held: `bf16, 8-bit weights`, `fp32, Q4_1 and Q8_0 blocks`."""
    model = run.config.model
    quantised = ", 8-bit weights" if model.load_in_8bit else ", 4-bit weights" if model.load_in_4bit else ""
    return f"{model.dtype}{quantised}{blocks_text(weight_blocks(model, run.model_config))}"


def _link_lines(run: PlannedRun) -> list[str]:
    if not run.plan.links:
        return []
    shape, num_tokens = run.frame_shape, window_tokens(run.config)
    lines = ["", "link                       codec       payload bytes/token  bits/value  header bytes/frame"]
    for link, codec in zip(run.plan.links, run.codecs, strict=True):
        nbytes = codec.max_nbytes(shape)
        bound = "" if codec.fixed_size else "at most "
        per_token = f"{bound}{nbytes / num_tokens:.1f}"
        bits = f"{bound}{8 * nbytes / (num_tokens * shape[2]):.3f}"
        lines.append(
            f"{link.name:<25}  {codec.name:<10}  {per_token:<19}  {bits:<10}  {run.header_nbytes(link.index)}"
        )
    return lines


def _memory_lines(run: PlannedRun, weights: Sequence[int]) -> list[str]:
    config, plan = run.config, run.plan
    buffers = _buffer_bytes(run)
    lines = ["", "rank  weights      link buffers  logits      sum         cache"]
    for node in range(plan.num_nodes):
        own = sum(weights[stage.stage_index] for stage in plan.stages_of_node(node))
        chunk = MAX_LOGITS_NBYTES[_device_type(config, node)]
        logits = max(chunk, 4 * run.model_config.vocab_size) if node == plan.last_node else 0
        cells = [gib(nbytes) for nbytes in (own, buffers[node], logits, own + buffers[node] + logits)]
        num_layers = sum(stage.num_layers for stage in plan.stages_of_node(node))
        cache = cache_bytes_per_token(run.model_config, num_layers, TORCH_DTYPES[config.model.dtype])
        cells.append(f"{cache} bytes a slot and token")
        lines.append(f"{node:<4}  {cells[0]:<11}  {cells[1]:<12}  {cells[2]:<10}  {cells[3]:<10}  {cells[4]}")
    return lines


def _buffer_bytes(run: PlannedRun) -> list[int]:
    """Of link buffers, by node."""
    config, runtime = run.config, run.config.runtime
    credits = passes_in_flight(run.plan, runtime.in_flight, receives_ahead=runtime.receives_ahead, world_size=1)
    ahead = receives_ahead_of(config, run.emulated, credits=credits)
    buffers = [0] * run.plan.num_nodes
    for link, codec in zip(run.plan.links, run.codecs, strict=True):
        wire = WireFormat(link_index=link.index, num_trail=link.index, codec_ids=())
        tail = wire.max_tail_nbytes(max_rows=0, max_ids=window_tokens(config))
        frame = FrameMemory(codec.max_nbytes(run.frame_shape), tail).host_nbytes
        buffers[link.src_node] += SEND_DEPTH * frame
        buffers[link.dst_node] += ahead * frame
    return buffers


def _generation_lines(run: PlannedRun) -> list[str]:
    generation, model_config, shape = run.config.generation, run.model_config, run.frame_shape
    slots = generation.max_slots
    slot_length = generation.slot_length(getattr(model_config, "max_position_embeddings", None))
    dtype = TORCH_DTYPES[run.config.model.dtype]
    cache = slots * slot_length * cache_bytes_per_token(model_config, run.plan.num_layers, dtype)
    lines = ["", f"to generate: {slots} slots of {slot_length} tokens, {gib(cache)} of cache on all ranks"]
    lines += [f"a micro-batch has up to {shape[0]} windows of {shape[1]} tokens"]
    if getattr(model_config, "sliding_window", None) is not None:
        lines.append("the cache of layers with a sliding window has room for whole sequences too")
    return lines


def _device_type(config: RunConfig, node: int) -> str:
    """`cpu` or `cuda`, without asking whether the device is there; `auto` is what it would be on this machine."""
    own = config.partition.nodes[node].device if config.partition.nodes else None
    setting = own or config.runtime.device
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if setting.startswith("cuda") else "cpu"
