"""A process's place among the ranks, from torchrun's environment. Needed before torch, so without it."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["World"]


@dataclass(frozen=True, kw_only=True)
class World:
    """`local` counts within this machine, `attempt` how often torchrun has started the ranks anew.

    `store_host` is the rank that hosts the rendezvous store, None where torchrun does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store_host: int | None = None
    attempt: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun's variables say; one process without them. Raises ValueError for half of them."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start the ranks with torchrun")
        world_size = int(os.environ["WORLD_SIZE"])
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            store_host=None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0,
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )

    @property
    def hosts_store(self) -> bool:
        return self.store_host == self.rank

    def rank_of(self, node: int) -> int:
        """The rank that plays a node of a plan; one process plays all of them."""
        return 0 if self.world_size == 1 else node
