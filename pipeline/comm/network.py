"""Which of this machine's addresses the links use, and whether the ranks can reach each other over them.

Torch waits long and says little when an address is wrong: its store for the whole load timeout, Gloo for that of a
frame. Here the same connections are tried first, for seconds, and what failed is told in words. No torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from pipeline.comm.world import World

__all__ = [
    "SEVERAL_MACHINES",
    "Connections",
    "Endpoint",
    "NetworkError",
    "bind_links",
    "listen",
    "reach_all",
    "reach_store",
]

# Enough for four tries of a connection whose packets get lost.
CONNECT_S = 15.0
_RETRY_S = 0.25
SEVERAL_MACHINES = (
    "on several machines start torchrun with --local_addr=ADDRESS, each machine's own on the network of the links, on "
    "the one of the rendezvous endpoint also with --rdzv_conf is_host=true, and set runtime.interface on all; "
    "torchrun_scripts/multi_node.sh does that. No firewall may stop TCP between them: ports are chosen at random"
)


class NetworkError(ValueError):
    """An interface or an address does not lead where it should."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a rank's links end. `interface` is in words: a name, or why this address where none is set."""

    host: str
    interface: str
    address: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.address} ({self.interface} of {self.host})"


def bind_links(interface: str | None, world: World) -> Endpoint:
    """Choose the interface that Gloo and NCCL bind to, and return the address that this gives.

    It is the user's (`runtime.interface`, else the libraries' own variables), or loopback for ranks on one machine, or
    else what Gloo takes by itself, the address of the host's name. Raises NetworkError for an interface that does not
    exist, is down or has no address.
    """
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    elif world.local_world_size == world.world_size:
        for name in ("lo", "lo0"):
            if name in psutil.net_if_stats():
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    host = socket.gethostname()
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if names:
        address = [_address(name) for name in names.split(",")][0]
        return Endpoint(host=host, interface=names, address=address)
    return Endpoint(host=host, interface="runtime.interface is not set: by host name", address=_address_of_host(host))


def reach_store(world: World, address: str, port: int, timeout_s: float) -> None:
    """Return once the rendezvous store can be connected to. Raises NetworkError when it cannot in time.

    torchrun's store is there before any rank starts, so it answers at once or never; where a rank hosts it, that
    rank may start later than the others, by up to `timeout_s`.
    """
    wait_s = min(timeout_s, CONNECT_S) if world.store_host is None else timeout_s
    try:
        reach(address, port, wait_s)
    except OSError as e:
        raise NetworkError(
            f"the rendezvous store {address}:{port} (MASTER_ADDR, MASTER_PORT) cannot be reached in {wait_s:g} s: {e}. "
            f"{_meaning_here(address)}This machine, {socket.gethostname()}, has {_interfaces_in_words()}; "
            f"{SEVERAL_MACHINES}"
        ) from e


def reach(address: str, port: int, timeout_s: float = CONNECT_S) -> None:
    """Return once a connection could be opened, and closed again; raises the last try's OSError if none can in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            left_s = max(_RETRY_S, deadline - time.monotonic())
            with socket.create_connection((address, port), timeout=left_s) as connection:
                # A port that nobody listens on may connect to itself.
                if connection.getsockname() != connection.getpeername():
                    return
                raise ConnectionRefusedError("nobody listens there")
        except OSError:
            if time.monotonic() + _RETRY_S > deadline:
                raise
        time.sleep(_RETRY_S)


@contextlib.contextmanager
def listen(here: Endpoint, num_ranks: int) -> Iterator[dict[str, Any]]:
    """Let the other ranks `reach_all` this one; yields the endpoint with its port, as JSON."""
    try:
        family = socket.AF_INET6 if ":" in here.address else socket.AF_INET
        with socket.socket(family) as listener:
            listener.bind((here.address, 0))
            listener.listen(num_ranks)  # what stands in its queue counts as connected
            yield {**asdict(here), "port": listener.getsockname()[1]}
    except OSError as e:
        raise NetworkError(f"the address {here} cannot be listened on: {e}") from e


def reach_all(here: Endpoint, ranks: Sequence[Endpoint]) -> None:
    """Connect to every rank's endpoint, which must be listening. Raises NetworkError for the first that fails."""
    for rank, endpoint in enumerate(ranks):
        try:
            reach(endpoint.address, endpoint.port, CONNECT_S)
        except OSError as e:
            raise NetworkError(
                f"no connection from {here} to rank {rank} at {endpoint}: {e}. This machine has "
                f"{_interfaces_in_words()}; {SEVERAL_MACHINES}"
            ) from e


class Connections:
    """TCP connections of a library that gives no hold on them, so that they can be broken below it.

    Whatever waits for one of them then gets an error, on both of its ends. Each is held by a descriptor of its own:
    what is broken is never another's.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    @contextlib.contextmanager
    def taking(self, *, but_ports: Container[int]) -> Iterator[None]:
        """Take down what is connected meanwhile in this process, but for connections to and from these ports."""
        before = _open_sockets()
        try:
            yield
        finally:
            for descriptor, _ in _open_sockets() - before:
                self._hold(descriptor, but_ports)

    def break_all(self) -> None:
        """From any thread, and more than once."""
        for held in self._held:
            with contextlib.suppress(OSError):  # the other end was first
                held.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        held, self._held = self._held, []
        for one in held:
            one.close()

    def _hold(self, descriptor: int, but_ports: Container[int]) -> None:
        try:
            own = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            return  # closed meanwhile
        try:
            ports = (own.getsockname()[1], own.getpeername()[1])
        except (OSError, IndexError):  # it listens: to shut it down would end the process
            own.close()
            return
        if any(port in but_ports for port in ports):
            own.close()
        else:
            self._held.append(own)


def _open_sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of each: a descriptor may have become another socket's."""
    found = set()
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(name), status.st_ino))
    return found


def _address(interface: str) -> str:
    """The address that Gloo takes of an interface: the first IPv4 one, else IPv6."""
    found = _addresses().get(interface)
    if found is None:
        problem = "is none of this machine's"
    elif not found:
        problem = "has no address"
    elif not psutil.net_if_stats()[interface].isup:
        problem = "is down or not connected"
    else:
        return found[0]
    raise NetworkError(
        f"the network interface {interface!r} (runtime.interface) of {socket.gethostname()} {problem}; there are "
        f"{_interfaces_in_words()}"
    )


def _address_of_host(host: str) -> str:
    """The first address of the host's name that is this machine's; loopback if there is none."""
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family) as probe:
                probe.bind(address)
                return str(address[0])
    return "127.0.0.1"


def _addresses() -> dict[str, list[str]]:
    """IP addresses by interface, without those of IPv6 that mean nothing on another machine."""
    by_interface: dict[str, list[str]] = {name: [] for name in psutil.net_if_stats()}
    for name, entries in psutil.net_if_addrs().items():
        found = by_interface.setdefault(name, [])
        for entry in entries:
            is_ip = entry.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and not entry.address.startswith("fe80:"):
                found.append(entry.address)
    return by_interface


def _interfaces_in_words() -> str:
    return ", ".join(f"{name} {' '.join(found)}" for name, found in sorted(_addresses().items()) if found) or "none"


def _meaning_here(address: str) -> str:
    """What a host name means on this machine; nothing for an address."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, None)})
    except OSError:
        return f"Nothing here knows the name {address}. "
    return "" if found == [address] else f"Here {address} is {' '.join(found)}. "
