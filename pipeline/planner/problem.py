"""What a placement is chosen from: costs of the layers, the nodes and links of the ring, and what is asked for.

Seconds are per token. The order of nodes is fixed: 0, 1, ..., N-1 and, with `wrap`, 0 again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LayerCosts", "LinkFigures", "NodeFigures", "PlannerError", "Problem"]

# So that no sum of them, nor a quotient, leaves the numbers of a float.
_MAX_S = 1e9
_MAX_SPEED = 1e6


class PlannerError(ValueError):
    """Figures that no placement can be made from, or limits that none can keep."""


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Seconds per token on a node of speed 1, and bytes, of every layer in order, the embedding and the head.

    Seconds of the head are per token that passes the layers, of which perhaps not all pass the head.
    `tied_bytes` are those that the two ends share where one node holds both, and is counted twice otherwise.
    """

    layer_s: tuple[float, ...]
    embedding_s: float
    head_s: float
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    tied_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.layer_s or len(self.layer_s) != len(self.layer_bytes):
            raise PlannerError(f"{len(self.layer_s)} layers have seconds, {len(self.layer_bytes)} bytes")
        for seconds in (*self.layer_s, self.embedding_s, self.head_s):
            _check_s("a cost", seconds)
        if min(*self.layer_bytes, self.embedding_bytes, self.head_bytes, self.tied_bytes) < 0:
            raise PlannerError("bytes cannot be negative")


@dataclass(frozen=True, kw_only=True)
class NodeFigures:
    """`fixed_s` are seconds per token at this node that no placement changes, its codecs' say, whatever its speed."""

    speed: float = 1.0
    memory_bytes: int | None = None
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 / _MAX_SPEED <= self.speed <= _MAX_SPEED:
            raise PlannerError(f"a node's speed must be from {1 / _MAX_SPEED:g} to {_MAX_SPEED:g}, got {self.speed!r}")
        _check_s("a node's fixed_s", self.fixed_s)


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """`s_per_token`: bits of a token over bits per second; `delay_s`: one way, once for each micro-batch."""

    s_per_token: float = 0.0
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        _check_s("a link's s_per_token", self.s_per_token)
        _check_s("a link's delay_s", self.delay_s)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A placement that is `objective`:

    * `prefill`, the highest rate over a long text, of micro-batches of `microbatch_tokens`, `in_flight` at once;
    * `decode`, the shortest time of one token behind another.

    `links` are those of the chain, in its order: as many as nodes with `wrap`, one less without, none of one node.
    `return_delay_s` is that of the way from the last node back to node 0, where the head is not there.
    """

    costs: LayerCosts
    nodes: tuple[NodeFigures, ...]
    links: tuple[LinkFigures, ...]
    wrap: bool = True
    objective: str = "prefill"
    microbatch_tokens: int = 1
    in_flight: int = 1
    return_delay_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.nodes:
            raise PlannerError("there is no node")
        if len(self.links) != len(self.stage_nodes) - 1:
            raise PlannerError(f"{len(self.stage_nodes)} stages have {len(self.links)} links")
        if self.objective not in ("prefill", "decode"):
            raise PlannerError(f"objective must be prefill or decode, got {self.objective!r}")
        if self.microbatch_tokens < 1 or self.in_flight < 1:
            raise PlannerError("microbatch_tokens and in_flight must be at least 1")
        _check_s("return_delay_s", self.return_delay_s)

    @property
    def num_layers(self) -> int:
        return len(self.costs.layer_s)

    @property
    def wraps(self) -> bool:
        """Whether node 0 holds both ends in two stages, which takes a second node."""
        return self.wrap and len(self.nodes) > 1

    @property
    def stage_nodes(self) -> tuple[int, ...]:
        """The node of each stage of the chain."""
        return (*range(len(self.nodes)), *([0] if self.wraps else []))

    @property
    def last_node(self) -> int:
        return self.stage_nodes[-1]

    @property
    def microbatch_s(self) -> float:
        """Of a lap, what no placement changes, in seconds for a micro-batch (`objective` prefill)."""
        on_links = sum(link.s_per_token for link in self.links) + sum(node.fixed_s for node in self.nodes)
        return self.microbatch_tokens * on_links + self.delays_s

    @property
    def delays_s(self) -> float:
        returned = 0.0 if self.last_node == 0 else self.return_delay_s
        return sum(link.delay_s for link in self.links) + returned

    def end_s(self, node: int) -> float:
        """Seconds, at speed 1, of what a node holds of the ends of the model."""
        embedding = self.costs.embedding_s if node == 0 else 0.0
        return embedding + (self.costs.head_s if node == self.last_node else 0.0)

    def end_bytes(self, node: int) -> int:
        costs = self.costs
        embedding, head = node == 0, node == self.last_node
        shared = costs.tied_bytes if embedding and head else 0
        return embedding * costs.embedding_bytes + head * costs.head_bytes - shared


def _check_s(what: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and 0 <= seconds <= _MAX_S):
        raise PlannerError(f"{what} must be from 0 to {_MAX_S:g} seconds, got {seconds!r}")
