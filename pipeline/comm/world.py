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
        """What torchrun's variables say; one process without them.

        Raises ValueError for half of them, and for one that cannot be, by its name.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start the ranks with torchrun")
        world_size = _number("WORLD_SIZE", 1)
        _number("MASTER_PORT", 1, 65535)
        if not os.environ["MASTER_ADDR"].strip():
            raise ValueError("the environment variable MASTER_ADDR is empty; start the ranks with torchrun")
        local_world_size = _number("LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
        return cls(
            rank=_number("RANK", 0, world_size - 1),
            world_size=world_size,
            local_rank=_number("LOCAL_RANK", 0, local_world_size - 1, default=0),
            local_world_size=local_world_size,
            store_host=None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0,
            attempt=_number("TORCHELASTIC_RESTART_COUNT", 0, default=0),
        )

    @property
    def hosts_store(self) -> bool:
        return self.store_host == self.rank

    def rank_of(self, node: int) -> int:
        """The rank that plays a node of a plan; one process plays all of them."""
        return 0 if self.world_size == 1 else node


def _number(name: str, low: int, high: int = 2**31 - 1, *, default: int | None = None) -> int:
    """An integer of the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit() or not low <= int(text[:11]) <= high:
        raise ValueError(
            f"the environment variable {name} is {text!r}, allowed are {low} to {high}; start the ranks with torchrun"
        )
    return int(text)
