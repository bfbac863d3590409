"""What nodes were measured to take, kept beside a run's records so that the plan made of it stays the same.

A small JSON file, no record: reports do not look at it. Its name has a digest of what the figures depend on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from pipeline.records.base import Part, Timestamp, Words, problem_in
from pipeline.records.files import RecordError, disk_problem, write_whole

__all__ = ["COSTS_KIND", "MeasuredNode", "NodeCosts", "costs_path", "read_node_costs", "write_node_costs"]

COSTS_KIND: Final = "thinwire node costs"
_MAX_BYTES = 1 << 20
_MAX_NODES, _MAX_LAYERS = 4096, 4096

Seconds = Annotated[float, Field(gt=0, le=1e6)]


class MeasuredNode(Part):
    """Least seconds for one micro-batch and for one token, of one layer of each kind and of the head, which is measured
    where it will lie (null elsewhere).
    """

    host: Words
    layer_s: Annotated[tuple[Seconds, ...], Field(min_length=1, max_length=_MAX_LAYERS)]
    head_s: Seconds | None
    one_token_layer_s: Annotated[tuple[Seconds, ...], Field(min_length=1, max_length=_MAX_LAYERS)]
    one_token_head_s: Seconds | None


class NodeCosts(Part):
    """By node. Layers of one kind have one shape and attention; kinds come in the order of their first layers."""

    schema_version: Literal[1] = 1
    kind: Literal["thinwire node costs"] = COSTS_KIND
    measured_at: Timestamp
    microbatch_tokens: Annotated[int, Field(ge=1, le=10**15)]
    nodes: Annotated[tuple[MeasuredNode, ...], Field(min_length=1, max_length=_MAX_NODES)]


def costs_path(folder: Path, digest: str) -> Path:
    """Where the costs with this digest are kept."""
    return folder / f"nodes-{digest[:16]}.costs"


def read_node_costs(path: Path, *, num_nodes: int, num_kinds: int, head_node: int) -> NodeCosts | None:
    """None where there is no such file. Raises RecordError for one that is damaged or of another model or ring."""
    advice = "; delete it, and the nodes are measured again"
    try:
        if not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise RecordError(f"{path} is no file of node costs{advice}")
        costs = NodeCosts.model_validate_json(path.read_bytes())
    except OSError as e:
        raise RecordError(f"{path} cannot be read: {disk_problem(e)}") from e
    except ValidationError as e:
        raise RecordError(f"{path} is no file of node costs: {problem_in(e)}{advice}") from e
    if len(costs.nodes) != num_nodes:
        raise RecordError(f"{path} has {len(costs.nodes)} nodes, the ring {num_nodes}{advice}")
    for node in costs.nodes:
        if {len(node.layer_s), len(node.one_token_layer_s)} != {num_kinds}:
            raise RecordError(f"{path} has costs of other kinds of layers than the model's {num_kinds}{advice}")
    if None in (costs.nodes[head_node].head_s, costs.nodes[head_node].one_token_head_s):
        raise RecordError(f"{path} lacks the head's costs on node {head_node}{advice}")
    return costs


def write_node_costs(path: Path, costs: NodeCosts) -> None:
    """Raises RecordError when the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(costs.model_dump(mode="json"), indent=1, allow_nan=False).encode())
    except OSError as e:
        raise RecordError(f"the nodes' costs {path} cannot be written: {disk_problem(e)}") from e
