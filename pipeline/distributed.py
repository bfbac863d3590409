"""Process group, devices, and the watch over the other ranks.

`Control` is a run's second channel beside the links: ranks compare their configs, wait for each other and exchange
small JSON values through the rendezvous store, never through pickled objects. Its watchdog thread makes every live
rank end with one message when another dies, hangs or fails:

* each rank writes a heartbeat with its position (stage, micro-batch) and reads those of the others; one that stands
  still longer than the timeout is named;
* a rank that fails publishes its cause; the first one published is what every rank prints;
* SIGTERM (torchrun sends it to the survivors of a dead rank) starts a short search for the cause, also while the main
  thread is blocked inside a receive, where Python runs no signal handlers.

The groups have neither authentication nor encryption; see the README.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pipeline.mailbox import LinkError

__all__ = ["AgreementError", "Control", "World", "choose_device", "link_backend"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
_MAX_VALUE_NBYTES = 64 * 2**20
_GRACE_S = 3.0  # between a sign of failure and the exit, for the cause to become known


class AgreementError(ValueError):
    """Ranks were started with different configs or checkpoints."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place, as torchrun's environment gives it; one process without it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        if "WORLD_SIZE" not in os.environ:
            return cls()
        world_size = int(os.environ["WORLD_SIZE"])
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )


def choose_device(setting: str, world: World) -> torch.device:
    """`auto` takes a GPU per local rank (sharing them when there are fewer), or the CPU.

    Raises ValueError for a device that this machine lacks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        setting = "cuda" if num_gpus else "cpu"
    try:
        device = torch.device(setting)
    except RuntimeError as e:
        raise ValueError(f"device {setting!r} is not one of auto, cpu, cuda, cuda:N") from e
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {setting!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not num_gpus:
            raise ValueError(f"device {setting!r}: this machine has no usable GPU")
        device = torch.device("cuda", world.local_rank % num_gpus if device.index is None else device.index)
        if device.index >= num_gpus:
            raise ValueError(f"device {setting!r}: this machine has {num_gpus} GPUs")
    return device


def link_backend(setting: str, devices: list[tuple[str, str]]) -> str:
    """`gloo` or `nccl` for the links, from (host, device) of every rank.

    NCCL takes one rank per GPU. Raises ValueError when it is asked for without that.
    """
    fit = all(device != "cpu" for _, device in devices) and len(set(devices)) == len(devices)
    if setting == "nccl" and not (fit and dist.is_nccl_available()):
        raise ValueError(f"runtime.backend is nccl, which needs one GPU per rank; the ranks have {devices}")
    if setting == "auto":
        return "nccl" if fit and dist.is_nccl_available() else "gloo"
    return setting


class Control:
    """Start and end of a run's process group, agreement between ranks, and the watchdog.

    With one process it does none of that and `abort` only prints. `where` is this rank's position, which the
    runner keeps up to date.
    """

    def __init__(self, world: World, *, timeout_s: float, load_timeout_s: float, interface: str | None) -> None:
        self.world = world
        self.where = "starting"
        self.host = socket.gethostname()
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._rounds = 0
        self._watchdog: _Watchdog | None = None
        if world.world_size == 1:
            return
        _set_interface(interface, world)
        # The store's values outlive an attempt when torchrun restarts the ranks.
        prefix = f"thinwire/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=load_timeout_s)))
        self._store = dist.PrefixStore(prefix, store)
        # A client of its own: a blocking call of the main thread must not hold up the heartbeats.
        watch_client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        self._watchdog = _Watchdog(self, dist.PrefixStore(f"{prefix}/watch", watch_client), timeout_s)
        self._watchdog.start()
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=world.rank,
            world_size=world.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank. Waits for all of them, up to the load timeout."""
        if self.world.world_size == 1:
            return [value]
        self._rounds += 1
        prefix = f"gather/{self._rounds}"
        self._store.set(f"{prefix}/{self.world.rank}", json.dumps(value))
        keys = [f"{prefix}/{rank}" for rank in range(self.world.world_size)]
        self._store.wait(keys, datetime.timedelta(seconds=self._load_timeout_s))
        return [json.loads(self._store.get(key)) for key in keys]

    def barrier(self) -> None:
        """Wait for all ranks, up to the load timeout."""
        self.gather(None)

    def agree(self, what: str, value: dict[str, Any]) -> None:
        """Raise AgreementError, naming rank and key, unless every rank has the same flat mapping."""
        for rank, other in enumerate(self.gather(value)):
            for key in sorted(value.keys() | other.keys()):
                if value.get(key) != other.get(key):
                    raise AgreementError(
                        f"rank {rank} was started with another {what}: {key} is {other.get(key)!r} there and "
                        f"{value.get(key)!r} on rank {self.world.rank}"
                    )

    def broadcast_ids(self, ids: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's int64 token ids on every rank; sent once, as int32, before anything is timed or counted."""
        if self.world.world_size == 1:
            return ids
        count = self.gather(None if ids is None else ids.numel())[0]
        if not 0 <= 4 * count <= _MAX_VALUE_NBYTES * 64:
            raise ValueError(f"rank 0 announces {count} token ids")
        buffer = torch.empty(count, dtype=torch.int32) if ids is None else ids.to(torch.int32)
        dist.broadcast(buffer, src=0)
        return buffer.to(torch.int64)

    def close(self) -> None:
        """End a successful run: wait for the others, then take down watchdog and group."""
        if self._watchdog is None:
            return
        self.barrier()
        self._watchdog.stop()
        dist.destroy_process_group()

    def abort(self, error: BaseException, hint: str = "") -> None:
        """Print the cause of the end, tell the other ranks, and exit this process.

        Exits without running destructors: those of a process group whose peer is gone may block.
        """
        interrupted = isinstance(error, KeyboardInterrupt)
        own = "interrupted" if interrupted else str(error) or type(error).__name__
        message = f"{self.place()}: {own}" if self.world.world_size > 1 else own
        if self._watchdog is not None:
            message = self._watchdog.first_cause(message, symptom=isinstance(error, LinkError))
            self._watchdog.leave(message, EXIT_INTERRUPTED if interrupted else EXIT_FAILED, hint)
        _print_cause(f"error: {message}{hint}")
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED if interrupted else EXIT_FAILED)

    def place(self) -> str:
        return f"rank {self.world.rank}, {self.where}"


class _Watchdog(threading.Thread):
    """Heartbeats and failure notices through the store; see the module docstring."""

    def __init__(self, control: Control, store: dist.Store, timeout_s: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._control = control
        self._store = store
        self._timeout_s = timeout_s
        self._interval_s = min(0.5, timeout_s / 8)
        self._stopping = threading.Event()
        self._leaving = threading.Lock()
        self._last: dict[int, tuple[bytes, float]] = {}
        self._signal_reader, writer = socket.socketpair()
        self._signal_writer = writer
        writer.setblocking(False)
        # The wakeup descriptor is written at C level, also while the main thread sits in a blocking call.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)

    def stop(self) -> None:
        """End the thread; signals get their usual meaning again."""
        self._stopping.set()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.join()

    def first_cause(self, own: str, *, symptom: bool) -> str:
        """Publish `own` as the run's cause of failure and return the cause that was published first.

        A `symptom`, such as a peer's closed connection, waits a moment: the peer may be about to say why.
        """
        try:
            if symptom:
                deadline = time.monotonic() + _GRACE_S / 2
                while not self._store.check(["cause"]) and time.monotonic() < deadline:
                    time.sleep(0.05)
            return self._store.compare_set("cause", "", own).decode(errors="replace")
        except (RuntimeError, OSError):
            return own

    def leave(self, message: str, code: int, hint: str = "") -> None:
        """Print once and exit, whichever thread comes first."""
        with self._leaving:
            _print_cause(f"rank {self._control.world.rank} stops: {message}{hint}")
            sys.stdout.flush()
            os._exit(code)

    def run(self) -> None:
        beat = 0
        while not self._stopping.is_set():
            ready, _, _ = select.select([self._signal_reader], [], [], self._interval_s)
            received = set(self._signal_reader.recv(64)) if ready else set()
            if signal.SIGINT in received:
                # The main thread raises KeyboardInterrupt unless it is blocked.
                time.sleep(1.0)
                self.leave("interrupted", EXIT_INTERRUPTED)
            try:
                beat += 1
                self._store.set(f"beat/{self._control.world.rank}", f"{beat} {self._control.where}")
                if self._store.check(["cause"]):
                    self._leave_for(self._store.get("cause").decode(errors="replace"))
                silent = self._silent_ranks(self._timeout_s)
                if silent:
                    self._leave_for(self.first_cause(f"{silent} for {self._timeout_s:g} s", symptom=False))
            except (RuntimeError, OSError):
                if not self._stopping.is_set():
                    self._leave_for("the rendezvous store is gone: the process that hosts it has ended")
            if signal.SIGTERM in received:
                self._search_cause()

    def _leave_for(self, cause: str) -> None:
        """Exit, after a moment in which the main thread may do so itself."""
        self._stopping.wait(0.3)
        if not self._stopping.is_set():
            self.leave(cause, EXIT_FAILED)

    def _search_cause(self) -> None:
        """After SIGTERM: wait for a published cause, then for a silent rank, then give up."""
        deadline = time.monotonic() + _GRACE_S
        try:
            while time.monotonic() < deadline and not self._store.check(["cause"]):
                self._silent_ranks(self._timeout_s)
                time.sleep(0.1)
            if self._store.check(["cause"]):
                cause = self._store.get("cause").decode(errors="replace")
            else:
                silent = self._silent_ranks(_GRACE_S * 0.8)
                cause = self.first_cause(silent or "ended by SIGTERM, no rank told why", symptom=False)
        except (RuntimeError, OSError):
            cause = "ended by SIGTERM"
        self.leave(cause, EXIT_FAILED)

    def _silent_ranks(self, limit_s: float) -> str:
        """Ranks whose heartbeat has not changed for `limit_s`, in words, or an empty string."""
        now = time.monotonic()
        silent = []
        for rank in range(self._control.world.world_size):
            key = f"beat/{rank}"
            started = self._store.check([key])
            value = self._store.get(key) if started else b"0 not started"
            if rank not in self._last or self._last[rank][0] != value:
                self._last[rank] = (value, now)
            elif started and now - self._last[rank][1] > limit_s and rank != self._control.world.rank:
                silent.append(f"rank {rank} (last at {value.decode(errors='replace').partition(' ')[2]})")
        return f"{', '.join(silent)} has not answered" if silent else ""


def _print_cause(text: str) -> None:
    """One write, so that lines of several ranks do not mix."""
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()


def _set_interface(interface: str | None, world: World) -> None:
    """Choose the interface that Gloo and NCCL bind to: the user's, or loopback when all ranks are on one machine.

    Left alone when the user has set the libraries' own variables.
    """
    if interface is None and world.local_world_size == world.world_size:
        names = [name for _, name in socket.if_nameindex()]
        interface = next((name for name in ("lo", "lo0") if name in names), None)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
