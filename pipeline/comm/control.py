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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.comm.epochs import Epoch
from pipeline.comm.mailbox import LinkError
from pipeline.comm.network import (
    SEVERAL_MACHINES,
    Connections,
    Endpoint,
    NetworkError,
    bind_links,
    listen,
    reach_all,
    reach_store,
)
from pipeline.comm.watchdog import PipelineError, RunFinished, Watchdog, tell
from pipeline.comm.world import World

__all__ = ["AgreementError", "Control", "RingBroken"]

T = TypeVar("T")

_MAX_TOKENS = 2**30
_LEAVING_TIME = datetime.timedelta(seconds=5)
# torchrun starts all ranks at once; what is left is the import of torch on the slowest machine.
_JOIN_TIME = datetime.timedelta(seconds=120)
_FINISHED = "finished"
_MAX_FRUITLESS = 5  # formings of the ring in a row without any progress
_SLICE = datetime.timedelta(seconds=0.5)


class RingBroken(LinkError):
    """The ring of this epoch is over, or could not be formed: another forming may be due."""


class AgreementError(ValueError):
    """Ranks were started with different configs or checkpoints."""


class Control:
    """Start and end of a run's process group, agreement between ranks, and the watch over them.

    With one process it does none of that. `form` connects the ranks; where that has come to an end and
    `may_form_again`, `leave_ring` and `form` do so anew, and all that ranks have agreed on is to be agreed on again.

    Args:
        timeout_s: of a frame, and of another rank's silence.
        load_timeout_s: for ranks that wait for each other while they load.
        interface: network interface of the links; None for loopback where all ranks are on one machine.
        watchdog: where one was started before this module's imports.
        rejoin_s: how long a lost rank is waited for; 0: what is lost ends the run.

    Attributes:
        num_interruptions: how often this process has formed the ring again.
        pause_s: for how long no passes could go around meanwhile.
        own_ports: where this process listens for others than ranks, whose connections outlive a ring.
    """

    def __init__(
        self,
        world: World,
        *,
        timeout_s: float,
        load_timeout_s: float,
        interface: str | None,
        watchdog: Watchdog | None = None,
        rejoin_s: float = 0.0,
    ) -> None:
        self.world = world
        self.host = socket.gethostname()
        self.timeout_s = timeout_s
        self.watchdog = watchdog or Watchdog(world, timeout_s)
        self.num_interruptions, self.pause_s = 0, 0.0
        self.own_ports: set[int] = set()
        self._load_timeout = datetime.timedelta(seconds=load_timeout_s)
        self._group_timeout = datetime.timedelta(seconds=timeout_s)
        self._rejoin_time = datetime.timedelta(seconds=rejoin_s)
        self._interface = interface
        self._rounds = 0
        self._posted: dict[str, Any] = {}  # with one process
        self._connections = Connections()
        self._broken_s: float | None = None
        self._last_progress: int | None = 0
        self._num_fruitless, self._last_error = 0, ""
        self._first_epoch: int | None = None
        if world.world_size == 1:
            return
        self._root = self._connect(is_host=world.hosts_store)
        # A client of its own: a blocking call of the main thread must not hold up the heartbeats.
        self._watch_root = self._connect(is_host=False)
        if rejoin_s > 0:
            self.watchdog.on_over = self._connections.break_all
            self.watchdog.over_limit_s = load_timeout_s

    @property
    def was_restarted(self) -> bool:
        """Whether torchrun has started this process in the place of one that had joined the others."""
        return self.world.attempt > 0 or bool(self._first_epoch)

    @property
    def _is_formed_again(self) -> bool:
        return bool(self._rejoin_time) and self._epoch.number > 0

    def form(self) -> None:
        """Connect all ranks.

        Raises LinkError naming who has not come, NetworkError where there is no way to a rank, and RunFinished.
        """
        if self.world.world_size == 1:
            return
        if self._root.check([_FINISHED]):
            raise RunFinished
        root, watch_root = self._of_attempt(self._root), self._of_attempt(self._watch_root)
        self._epoch = Epoch.enter(root, self.world.rank)
        if self._first_epoch is None:
            self._first_epoch = self._epoch.number
        number = str(self._epoch.number)
        self._store, self._rounds = dist.PrefixStore(number, root), 0
        watch = dist.PrefixStore("watch", dist.PrefixStore(number, watch_root))
        self.watchdog.join(watch, Epoch(watch_root, self._epoch.number))
        if self._num_fruitless > _MAX_FRUITLESS:
            raise PipelineError(
                f"the ring was formed {_MAX_FRUITLESS} times in a row without a new token; at last: {self._last_error}"
            )
        self._meet()
        self._form_group()

    def connect(self, pairs: Iterable[tuple[int, int]]) -> dict[int, dist.ProcessGroup]:
        """Gloo groups of two for the pairs of ranks that links join; returns this rank's, by the other one. All ranks
        call it with the same pairs.

        A send that fails holds a lock of its Gloo group while it waits for the group's reading thread, which may be
        waiting for that lock on behalf of another rank, and both wait for good. Where there is no third rank they do
        not.
        """
        if self.world.world_size == 1:
            return {}
        groups = {}
        with self._connecting():
            for first, second in sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}):
                # Torch names groups by their number, so that ranks outside of one count it, too.
                group = dist.new_group([first, second], backend="gloo", timeout=self._group_timeout)
                if self.world.rank in (first, second):
                    groups[first + second - self.world.rank] = group
        return groups

    def may_form_again(self, error: LinkError) -> bool:
        """Whether the loss of a rank or a connection is no reason to end the run: no rank has told a cause for one."""
        if not self._rejoin_time or self.world.world_size == 1:
            return False
        if error.peer is None and not isinstance(error, RingBroken):
            return False
        try:
            return not self._store.check(["watch/cause"])
        except RuntimeError:
            return False

    def leave_ring(self, error: LinkError, progress: int | None) -> None:
        """End the epoch for all ranks, and what connects this one to the others.

        Raises the error where a rank has told a cause for the run's end meanwhile: before the epoch ended, or it would
        have been passed on to the next one.
        `progress` is rank 0's: if it has not grown several times in a row, `form` ends the run. None: nothing was due.
        """
        if self._broken_s is None:
            self._broken_s = time.monotonic()
            self.num_interruptions += 1
        if self.world.rank == 0:
            is_fruitless = progress is not None and progress == self._last_progress
            self._num_fruitless = self._num_fruitless + 1 if is_fruitless else 0
            self._last_progress, self._last_error = progress, str(error)
        self.report("forming the ring again", waiting=True)
        tell(f"\nrank {self.world.rank}: {error}; the ring is formed again\n")
        self._epoch.end()
        if not self.may_form_again(error):
            raise error
        self.break_connections()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._connections.forget()

    def break_connections(self) -> None:
        """Whatever waits for another rank's bytes gets an error, on both ends."""
        self._connections.break_all()

    def end_pause(self) -> None:
        """Passes can go around, again or for the first time."""
        if self._broken_s is not None:
            pause_s = time.monotonic() - self._broken_s
            self.pause_s, self._broken_s = self.pause_s + pause_s, None
            tell(f"rank {self.world.rank}: the ring goes on after {pause_s:.1f} s\n")

    def came_before(self, what: str) -> bool:
        """Whether a process under this torchrun has asked so before; for rank 0."""
        if self.world.world_size == 1:
            return self.world.attempt > 0
        own = os.urandom(16).hex()
        return self._root.compare_set(f"first/{what}", "", own) != own.encode()

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
            self._wait(keys, timeout)
            values = [json.loads(text) for text in self._store.multi_get(keys)]
        except RingBroken:
            raise
        except RuntimeError as e:
            why = self._why_no_gather(keys, e, f"{timeout.total_seconds():g} s {limit}")
            raise LinkError(f"waiting for the other ranks: {why}") from e
        self.watchdog.waiting = False
        return values

    def _wait(self, keys: list[str], timeout: datetime.timedelta) -> None:
        """Raises RuntimeError after the timeout, RingBroken once the epoch is over, and RunFinished for those who have
        left it for the next one while the last that the run waited for came.
        """
        if not self._rejoin_time:
            self._store.wait(keys, timeout)
            return
        end_s = time.monotonic() + timeout.total_seconds()
        while True:
            if self.watchdog.epoch_is_over and not self._store.check(keys):
                raise RingBroken("another rank has lost its connection, or was started again")
            try:
                self._store.wait(keys, min(_SLICE, timeout))
                return
            except dist.DistStoreError:
                if self._root.check([_FINISHED]) and not self._store.check(keys):
                    raise RunFinished from None
                if time.monotonic() > end_s:
                    raise

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
            self._wait(stored, self._load_timeout)
            values = [json.loads(text) for text in self._store.multi_get(stored)]
            for key in stored:
                self._store.delete_key(key)
        except RingBroken:
            raise
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
        with contextlib.suppress(RuntimeError):
            self._root.set(_FINISHED, "")
        self.watchdog.stop()
        dist.destroy_process_group()
        self._connections.forget()
        # Rank 0 may host the store, so it goes last. A rank that is lost now takes nothing with it.
        with contextlib.suppress(RuntimeError):
            if self.world.rank != 0:
                self._store.set(f"left/{self.world.rank}", "")
            else:
                self._store.wait([f"left/{rank}" for rank in range(1, self.world.world_size)], _LEAVING_TIME)

    def _meet(self) -> None:
        """Wait until all ranks have started, and try the connections that Gloo will make.

        Gloo itself waits no longer than for a frame, and ranks may start far apart unless torchrun starts them.
        """
        timeout, limit = self._load_timeout, "(runtime.load_timeout_s)"
        if self.world.store_host is None and timeout > _JOIN_TIME:
            timeout, limit = _JOIN_TIME, "(torchrun starts all ranks at once)"
        if self.num_interruptions or (self._is_formed_again and timeout < self._rejoin_time):
            timeout, limit = self._rejoin_time, "(runtime.rejoin_s)"
        elif self.world.local_world_size < self.world.world_size:
            limit += f"; see what their machines print; {SEVERAL_MACHINES}"
        self._gather(None, timeout, limit)
        here = bind_links(self._interface, self.world)
        with listen(here, self.world.world_size) as endpoint:
            try:
                reach_all(here, [Endpoint(**other) for other in self.gather(endpoint)])
            except NetworkError as e:
                if not self._is_formed_again:
                    raise
                raise RingBroken(str(e)) from e  # who has just come may be gone again
            self.barrier()

    def _form_group(self) -> None:
        """Connect all ranks by Gloo."""
        with self._connecting():
            if self._is_formed_again:
                _forget_failed_groups()
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.world.rank,
                world_size=self.world.world_size,
                timeout=self._group_timeout,
            )
        self.report("starting")

    @contextlib.contextmanager
    def _connecting(self) -> Iterator[None]:
        """What Gloo connects meanwhile can be broken; its errors become ours."""
        self.report("connecting", waiting=True)
        try:
            if not self._rejoin_time:  # a second descriptor would keep open what Gloo closes
                yield
            else:
                with self._connections.taking(but_ports={int(os.environ["MASTER_PORT"]), *self.own_ports}):
                    yield
        except RuntimeError as e:
            was_whole = bool(self._rejoin_time) and dist.is_initialized()
            if was_whole or self._is_formed_again:
                raise RingBroken(f"the ranks cannot connect to each other: {_first_line(e)}") from e
            used = os.environ.get("GLOO_SOCKET_IFNAME", "the default")
            raise LinkError(
                f"the ranks cannot connect to each other through interface {used} (runtime.interface): {_first_line(e)}"
            ) from e
        if self._rejoin_time and self.watchdog.epoch_is_over:  # told when there was no connection yet to be broken
            raise RingBroken("the ring was to be formed again before it was whole")

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
        return dist.PrefixStore("thinwire", store)

    def _of_attempt(self, root: dist.Store) -> dist.Store:
        """Where no rank waits for another to come back, torchrun starts all of them again, and the store's values
        outlive that: a rank that had not joined before must not find its place beside those that have ended.
        """
        if self._rejoin_time or self.world.attempt == 0:
            return root
        return dist.PrefixStore(f"attempt/{self.world.attempt}", root)

    def _why_no_gather(self, keys: Sequence[str], error: RuntimeError, limit: str) -> str:
        try:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        except RuntimeError:
            return f"the rendezvous store has ended: {_first_line(error)}"
        names = " and ".join(map(self.watchdog.last_known, missing))
        return f"{names} did not come within {limit}" if missing else _first_line(error)


def _forget_failed_groups() -> None:
    """Torch numbers the groups of a process, a failed one too, looks for the other ranks under that number, and begins
    anew when a group is destroyed: ranks of which only some could connect would never meet again.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    """Torch appends a C++ stack to its messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
