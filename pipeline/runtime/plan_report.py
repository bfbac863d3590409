"""`--plan`: what a config would do, from config and headers. Loads no weights and starts no process group.

Prints stages and their weights, links and their bytes per token, and per rank the memory that is certain: weights,
link buffers, one chunk of logits; for generation, what the cache takes for each token of each slot. Activations, the
allocator's slack and the interpreter come on top.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.comm.link_ends import SEND_DEPTH
from pipeline.comm.mailbox import FrameMemory
from pipeline.comm.wire import WireFormat, header_nbytes
from pipeline.config.schema import RunConfig
from pipeline.models.cache import cache_bytes_per_token
from pipeline.models.checkpoint import read_checkpoint
from pipeline.models.loading import TORCH_DTYPES, embedding_bytes, load_model_config, stage_parameter_bytes
from pipeline.models.stage import MAX_LOGITS_NBYTES
from pipeline.runtime.codecs import codec_requests, make_codec
from pipeline.runtime.placement import make_plan
from pipeline.runtime.text import check_max_length

__all__ = ["plan_text"]

_GIB = 2**30


def plan_text(config: RunConfig) -> str:
    """The plan as text. Raises ValueError where the config cannot be run or says too little."""
    model_dir = Path(config.model.name) if Path(config.model.name).is_dir() else None
    model_config = load_model_config(model_dir, config.model.architecture)
    notes: tuple[str, ...] = ()
    if model_dir is not None and any(model_dir.glob("*.safetensors")):
        checkpoint = read_checkpoint(model_dir, model_config)
        notes, model_config.tie_word_embeddings = checkpoint.notes, checkpoint.is_tied
    check_max_length(config, model_config)
    plan = make_plan(config, model_config)
    dtype = TORCH_DTYPES[config.model.dtype]
    shape = (config.batch_size, config.dataset.max_length, model_config.hidden_size)
    num_tokens = shape[0] * shape[1]
    requests = codec_requests(config, plan, hidden_size=model_config.hidden_size, max_tokens=num_tokens)
    codecs = [make_codec(request) for request in requests]
    weights = {
        stage.stage_index: stage_parameter_bytes(
            model_config,
            stage,
            dtype=dtype,
            load_in_8bit=config.model.load_in_8bit,
            load_in_4bit=config.model.load_in_4bit,
        )
        for stage in plan.stages
    }
    if len(plan.stages) > 1 and plan.last_node == 0 and model_config.tie_word_embeddings:
        weights[plan.stages[-1].stage_index] -= embedding_bytes(model_config, dtype)

    lines = [
        f"{config.model.name}: {plan.num_layers} layers, hidden size {model_config.hidden_size}, {config.model.dtype}"
    ]
    lines += ["", "stage  node  layers      weights"]
    for stage in plan.stages:
        extra = "".join([" + embedding" if stage.is_first else "", " + norm and head" if stage.is_last else ""])
        layers = f"{stage.start}-{stage.end - 1}" if stage.num_layers else "none"
        lines.append(
            f"{stage.stage_index:<5}  {stage.node:<4}  {layers:<10}  {weights[stage.stage_index] / _GIB:.2f} GiB{extra}"
        )
    buffers = dict.fromkeys(range(plan.num_nodes), 0)
    if plan.links:
        lines += ["", "link                       codec       payload bytes/token  bits/value  header bytes/frame"]
    for link, codec in zip(plan.links, codecs, strict=True):
        nbytes = codec.max_nbytes(shape)
        bound = "" if codec.fixed_size else "at most "
        per_token = f"{bound}{nbytes / num_tokens:.1f}"
        bits = f"{bound}{8 * nbytes / (num_tokens * shape[2]):.3f}"
        header = header_nbytes(is_indexed=True, trail=[codec.max_nbytes(shape) for codec in codecs[: link.index]])
        lines.append(f"{link.name:<25}  {codec.name:<10}  {per_token:<19}  {bits:<10}  {header}")
        wire = WireFormat(link_index=link.index, num_trail=link.index, codec_ids=())
        frame = FrameMemory(nbytes, wire.max_tail_nbytes(max_rows=0, max_ids=num_tokens)).host_nbytes
        buffers[link.src_node] += SEND_DEPTH * frame
        buffers[link.dst_node] += config.runtime.receives_ahead * frame
    lines += ["", "rank  weights      link buffers  logits      sum         cache"]
    for node in range(plan.num_nodes):
        own = sum(weights[stage.stage_index] for stage in plan.stages_of_node(node))
        chunk = MAX_LOGITS_NBYTES[_device_type(config, node)]
        logits = max(chunk, 4 * model_config.vocab_size) if node == plan.last_node else 0
        cells = [f"{nbytes / _GIB:.2f} GiB" for nbytes in (own, buffers[node], logits, own + buffers[node] + logits)]
        num_layers = sum(stage.num_layers for stage in plan.stages_of_node(node))
        cells.append(f"{cache_bytes_per_token(model_config, num_layers, dtype)} bytes a slot and token")
        lines.append(f"{node:<4}  {cells[0]:<11}  {cells[1]:<12}  {cells[2]:<10}  {cells[3]:<10}  {cells[4]}")
    slots = config.generation.max_slots
    slot_length = config.generation.slot_length(getattr(model_config, "max_position_embeddings", None))
    cache = slots * slot_length * cache_bytes_per_token(model_config, plan.num_layers, dtype)
    lines += ["", f"to generate: {slots} slots of {slot_length} tokens, {cache / _GIB:.2f} GiB of cache on all ranks"]
    lines += [f"a micro-batch has up to {shape[0]} windows of {shape[1]} tokens"]
    if getattr(model_config, "sliding_window", None) is not None:
        lines.append("the cache of layers with a sliding window has room for whole sequences too")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def _device_type(config: RunConfig, node: int) -> str:
    """`cpu` or `cuda`, without asking whether the device is there; `auto` is what it would be on this machine."""
    own = config.partition.nodes[node].device if config.partition.nodes else None
    setting = own or config.runtime.device
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if setting.startswith("cuda") else "cpu"
