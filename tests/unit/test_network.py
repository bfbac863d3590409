import socket
import time

import pytest

from pipeline.comm import network
from pipeline.comm.network import Connections, NetworkError, bind_links, listen, reach_all, reach_store
from pipeline.comm.world import World
from tests.helpers.patience import allowed_s

HERE = World(rank=1, world_size=2, local_world_size=2)
APART = World(rank=1, world_size=2, local_world_size=1)


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def test_one_machine_binds_to_loopback(monkeypatch):
    assert bind_links(None, HERE).address == "127.0.0.1"
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_config_goes_before_the_environment(monkeypatch):
    """A cluster's GLOO_SOCKET_IFNAME must not move links off the private network that the config names."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert bind_links("lo", APART).interface == "lo"
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_environment_goes_before_loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    with pytest.raises(
        NetworkError, match=r"'nope0' \(runtime\.interface\) .* is none of this machine's; there are .*lo"
    ):
        bind_links(None, HERE)


@pytest.mark.parametrize("world", [HERE, APART], ids=["here", "apart"])
def test_a_store_that_nobody_hosts(world, unused_port):
    start_s = time.monotonic()
    with pytest.raises(NetworkError, match=rf"127\.0\.0\.1:{unused_port} .* in 0.5 s: .*refused.*--local_addr=ADDRESS"):
        reach_store(world, "127.0.0.1", unused_port, timeout_s=0.5)
    assert time.monotonic() - start_s < allowed_s(5)


def test_a_store_with_an_unknown_name(unused_port):
    with pytest.raises(NetworkError, match=r"Nothing here knows the name nowhere\.invalid\."):
        reach_store(HERE, "nowhere.invalid", unused_port, timeout_s=0.5)


def test_a_store_that_comes_late(monkeypatch, unused_port):
    """A rank that hosts it may start long after the others, torchrun's must be there."""
    monkeypatch.setattr(network, "CONNECT_S", 0.5)
    waits = []
    monkeypatch.setattr(network, "reach", lambda address, port, wait_s: waits.append(wait_s))
    reach_store(World(rank=1, world_size=2, store_host=0), "127.0.0.1", unused_port, timeout_s=7)
    reach_store(World(rank=1, world_size=2), "127.0.0.1", unused_port, timeout_s=7)
    assert waits == [7, 0.5]


def test_ranks_reach_each_other(monkeypatch):
    monkeypatch.setattr(network, "CONNECT_S", 0.5)
    here = bind_links(None, HERE)
    with listen(here, 2) as first, listen(here, 2) as second:
        ranks = [network.Endpoint(**endpoint) for endpoint in (first, second)]
        reach_all(here, ranks)
    with pytest.raises(
        NetworkError, match=r"no connection from 127\.0\.0\.1 \(lo of .*\) to rank 0 at 127\.0\.0\.1 \(lo"
    ):
        reach_all(here, ranks)


def connected():
    """A listener and both ends of a connection to it."""
    listener = socket.create_server(("127.0.0.1", 0))
    here = socket.create_connection(listener.getsockname())
    return listener, here, listener.accept()[0]


def test_connections_are_broken_below_whoever_opened_them():
    connections, (_, before, before_far) = Connections(), connected()
    with connections.taking(but_ports={1}):
        listener, here, far = connected()
    with connections.taking(but_ports={listener.getsockname()[1]}):  # as of the rendezvous store
        spared = socket.create_connection(listener.getsockname())
        spared_far = listener.accept()[0]
    for one in (here, far, spared, spared_far):
        one.settimeout(5)
    connections.break_all()
    connections.break_all()
    assert here.recv(1) == far.recv(1) == b""
    spared.sendall(b"x")
    before.sendall(b"y")
    assert (spared_far.recv(1), before_far.recv(1)) == (b"x", b"y")
    socket.create_connection(listener.getsockname()).close()  # what listens goes on
    connections.forget()
    connections.break_all()


def test_a_descriptor_that_has_become_another_sockets_is_taken():
    connections, (listener, old, _) = Connections(), connected()
    with connections.taking(but_ports={1}):
        descriptor = old.fileno()
        old.close()
        here = socket.create_connection(listener.getsockname())
        assert here.fileno() == descriptor
    connections.break_all()
    here.settimeout(5)
    assert here.recv(1) == b""
    connections.forget()
