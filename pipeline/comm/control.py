"""Process group, and what ranks tell each other beside the links.

`Control` is a run's second channel: ranks compare their configs, wait for each other and exchange small JSON
values through the rendezvous store, never through pickled objects. What watches for ranks that die or hang is
`watchdog.py`.

The groups have neither authentication nor encryption; see docs/security.md.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.comm.mailbox import LinkError
from pipeline.comm.network import SEVERAL_MACHINES, Endpoint, bind_links, listen, reach_all, reach_store
from pipeline.comm.watchdog import Watchdog
from pipeline.comm.world import World

__all__ = ["AgreementError", "Control"]

T = TypeVar("T")

_MAX_TOKENS = 2**30
_LEAVING_TIME = datetime.timedelta(seconds=5)
# torchrun starts all ranks at once; what is left is the import of torch on the slowest machine.
_JOIN_TIME = datetime.timedelta(seconds=120)


class AgreementError(ValueError):
    """Ranks were started with different configs or checkpoints."""


class Control:
    """Start and end of a run's process group, agreement between ranks, and the watch over them.

    With one process it does none of that.

    Args:
        timeout_s: of a frame, and of another rank's silence.
        load_timeout_s: for ranks that wait for each other while they load.
        interface: network interface of the links; None for loopback where all ranks are on one machine.
        watchdog: where one was started before this module's imports.
    """

    def __init__(
        self,
        world: World,
        *,
        timeout_s: float,
        load_timeout_s: float,
        interface: str | None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.world = world
        self.host = socket.gethostname()
        self.timeout_s = timeout_s
        self.watchdog = watchdog or Watchdog(world, timeout_s)
        self._load_timeout = datetime.timedelta(seconds=load_timeout_s)
        self._rounds = 0
        self._posted: dict[str, Any] = {}  # with one process
        if world.world_size == 1:
            return
        self._store = self._connect(is_host=world.hosts_store)
        # A client of its own: a blocking call of the main thread must not hold up the heartbeats.
        self.watchdog.join(dist.PrefixStore("watch", self._connect(is_host=False)))
        self._meet(interface)
        self._form_group()

    def report(self, where: str, *, waiting: bool = False, due: bool = False) -> str:
        """Take down what this rank does and whether it waits for another; returns it with the rank's name.

        `due`: passes are under way, so that this must be called again within the timeout.
        """
        self.watchdog.move(where, waiting=waiting, due=due)
        return self.watchdog.place

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank.

        Waits up to the load timeout; raises LinkError naming the ranks that have not come by then.
        """
        return self._gather(value, self._load_timeout, "(runtime.load_timeout_s)")

    def _gather(self, value: Any, timeout: datetime.timedelta, limit: str) -> list[Any]:
        if self.world.world_size == 1:
            return [value]
        self._rounds += 1
        keys = [f"gather/{self._rounds}/{rank}" for rank in range(self.world.world_size)]
        self.watchdog.waiting = True
        try:
            self._store.set(keys[self.world.rank], json.dumps(value))
            self._store.wait(keys, timeout)
            values = [json.loads(text) for text in self._store.multi_get(keys)]
        except RuntimeError as e:
            why = self._why_no_gather(keys, e, f"{timeout.total_seconds():g} s {limit}")
            raise LinkError(f"waiting for the other ranks: {why}") from e
        self.watchdog.waiting = False
        return values

    def post(self, key: str, value: Any) -> None:
        """Leave a JSON value for a rank that will `take` it; does not wait. Keys are valid until the next `gather`."""
        if self.world.world_size == 1:
            self._posted[key] = value
            return
        try:
            self._store.set(f"post/{self._rounds}/{key}", json.dumps(value))
        except RuntimeError as e:
            raise LinkError(f"the rendezvous store has ended: {_first_line(e)}") from e

    def take(self, keys: Sequence[str]) -> list[Any]:
        """The values that ranks have posted, once they have."""
        if self.world.world_size == 1:
            return [self._posted.pop(key) for key in keys]
        stored = [f"post/{self._rounds}/{key}" for key in keys]
        try:
            self._store.wait(stored, self._load_timeout)
            values = [json.loads(text) for text in self._store.multi_get(stored)]
            for key in stored:
                self._store.delete_key(key)
        except RuntimeError as e:
            raise LinkError(f"waiting for what other ranks post: {_first_line(e)}") from e
        return values

    def barrier(self) -> None:
        """Wait for all ranks, up to the load timeout."""
        self.gather(None)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do something on one rank after the other, so that ranks on one machine do not slow each other down.

        What it raises is raised when all have had their turn.
        """
        for _ in range(self.world.rank):
            self.barrier()
        try:
            return work()
        finally:
            for _ in range(self.world.rank, self.world.world_size):
                self.barrier()

    def together(self, work: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
        """What `work` gives on this rank, and the JSON value that goes with it of every rank.

        Where it raises on a rank, that rank raises the same and the others a ValueError which names it.
        """
        try:
            result, told = work()
            told = json.loads(json.dumps(told))
        except Exception as e:
            self.gather({"error": str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"})
            raise
        everyone = self.gather({"told": told})
        for rank, value in enumerate(everyone):
            if "error" in value:
                raise ValueError(f"rank {rank}: {value['error']}")
        return result, [value["told"] for value in everyone]

    def agree(self, what: str, value: dict[str, Any]) -> None:
        """Raise AgreementError, naming rank and key, unless every rank has the same flat mapping."""
        for rank, other in enumerate(self.gather(value)):
            for key in sorted(value.keys() | other.keys()):
                if value.get(key) != other.get(key):
                    raise AgreementError(
                        f"rank {rank} was started with another {what}: {key} is {other.get(key)!r} there and "
                        f"{value.get(key)!r} on rank {self.world.rank}; start all ranks alike"
                    )

    def broadcast_ids(self, ids: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's int64 token ids on every rank; sent once, as int32, before anything is counted."""
        if self.world.world_size == 1:
            assert ids is not None
            return ids
        count = self.gather(None if ids is None else ids.numel())[0]
        if not 0 <= count <= _MAX_TOKENS:
            raise ValueError(f"rank 0 announces {count} token ids, at most {_MAX_TOKENS} are possible")
        buffer = torch.empty(count, dtype=torch.int32) if ids is None else ids.to(torch.int32)
        dist.broadcast(buffer, src=0)
        return buffer.to(torch.int64)

    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrite `x`, of one shape and dtype on the CPU, with rank 0's."""
        if self.world.world_size > 1:
            dist.broadcast(x, src=0)

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, of one shape and dtype on the CPU, on every rank; `x` itself is overwritten."""
        if self.world.world_size > 1:
            dist.all_reduce(x)
        return x

    def close(self) -> None:
        """End a successful run: wait for the others, then take down watch and group."""
        if self.world.world_size == 1:
            return
        self.report("ending", waiting=True)
        self.barrier()
        self.watchdog.stop()
        dist.destroy_process_group()
        # Rank 0 may host the store, so it goes last. A rank that is lost now takes nothing with it.
        with contextlib.suppress(RuntimeError):
            if self.world.rank != 0:
                self._store.set(f"left/{self.world.rank}", "")
            else:
                self._store.wait([f"left/{rank}" for rank in range(1, self.world.world_size)], _LEAVING_TIME)

    def _meet(self, interface: str | None) -> None:
        """Wait until all ranks have started, and try the connections that Gloo will make.

        Gloo itself waits no longer than for a frame, and ranks may start far apart unless torchrun starts them.
        """
        timeout, limit = self._load_timeout, "(runtime.load_timeout_s)"
        if self.world.store_host is None and timeout > _JOIN_TIME:
            timeout, limit = _JOIN_TIME, "(torchrun starts all ranks at once)"
        if self.world.local_world_size < self.world.world_size:
            limit += f"; see what their machines print; {SEVERAL_MACHINES}"
        self._gather(None, timeout, limit)
        here = bind_links(interface, self.world)
        with listen(here, self.world.world_size) as endpoint:
            reach_all(here, [Endpoint(**other) for other in self.gather(endpoint)])
            self.barrier()

    def _form_group(self) -> None:
        """Connect all ranks by Gloo."""
        self.report("connecting", waiting=True)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.world.rank,
                world_size=self.world.world_size,
                timeout=datetime.timedelta(seconds=self.timeout_s),
            )
        except RuntimeError as e:
            used = os.environ.get("GLOO_SOCKET_IFNAME", "the default")
            raise LinkError(
                f"the ranks cannot connect to each other through interface {used} (runtime.interface): {_first_line(e)}"
            ) from e
        self.report("starting")

    def _connect(self, *, is_host: bool) -> dist.Store:
        """A client of the rendezvous store, and on its host, if that is a rank, the store itself."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not is_host:
            reach_store(self.world, address, port, self._load_timeout.total_seconds())
        try:
            store = dist.TCPStore(address, port, is_master=is_host, timeout=self._load_timeout, wait_for_workers=False)
        except RuntimeError as e:
            doing = "opened" if is_host else "reached"
            raise LinkError(f"the rendezvous store {address}:{port} cannot be {doing}: {_first_line(e)}") from e
        # The store's values outlive an attempt when torchrun restarts the ranks.
        return dist.PrefixStore(f"thinwire/{self.world.attempt}", store)

    def _why_no_gather(self, keys: Sequence[str], error: RuntimeError, limit: str) -> str:
        try:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        except RuntimeError:
            return f"the rendezvous store has ended: {_first_line(error)}"
        names = " and ".join(map(self.watchdog.last_known, missing))
        return f"{names} did not come within {limit}" if missing else _first_line(error)


def _first_line(error: BaseException) -> str:
    """Torch appends a C++ stack to its messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
