"""Is an emulated link what a shaped one is? Rate against the kernel's token bucket, delay against a relay.

    python -m benchmarks.shaped_links

Two ranks send frames one way, by the mailboxes that runs use: over an emulated wire, and over the loopback interface of
a network namespace that `tc ... tbf` shapes (root and iproute2 are needed, else that half is left out). Rate is
8 x bytes of all frames but the first, over the time from the first frame's arrival to the last's. What a shaped
interface carries besides (TCP/IP headers, acknowledgements, and Gloo's announcement of each message) is read from its
counters. A delay has no shaper in every kernel: a relay that holds what it has received stands in for it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from compressors.console import run_command
from pipeline.config.options import OptionParser
from pipeline.config.units import parse_rate

NAMESPACE = "thinwire-shaped"
SIZES = ((300, 400), (4_096, 100), (65_536, 30), (600_000, 6))  # bytes of a frame, frames
BASE_NBYTES = 12


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """`count` frames of `nbytes`, one each `pause_s`, over an emulated wire where it has a rate or delay."""

    nbytes: int
    count: int
    bits_per_s: float | None = None
    delay_s: float = 0.0
    pause_s: float = 0.0


def send_and_receive(rank: int, exchange: Exchange, folder: Path) -> None:
    """One of two ranks; rank 1 writes (when handed over, when arrived), nanoseconds, of each frame."""
    import torch
    import torch.distributed as dist

    from pipeline.comm.emulation import Conditions, EmulatedWire
    from pipeline.comm.mailbox import Arrivals, FrameMemory, PeerAddress, PeerInbox, PeerOutbox

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store, timeout = f"file://{folder / 'store'}", datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    nbytes, count, wire = exchange.nbytes, exchange.count, None
    if exchange.bits_per_s is not None or exchange.delay_s:
        wire = EmulatedWire(Conditions(bits_per_s=exchange.bits_per_s, delay_s=exchange.delay_s))
    memory = FrameMemory(nbytes - BASE_NBYTES, 0, stamped=wire is not None)
    address = PeerAddress("shaped", 1 - rank, 3)
    if rank == 0:
        outbox = PeerOutbox(address, memory, depth=2, wire=wire)
        dist.barrier()
        for _ in range(count):
            buffer = outbox.acquire()
            buffer.host.fill_(1)  # no END
            stamp = bytearray(time.monotonic_ns().to_bytes(8, "little"))
            buffer.host[BASE_NBYTES : BASE_NBYTES + 8] = torch.frombuffer(stamp, dtype=torch.uint8)
            outbox.post(buffer, nbytes, 0)
            time.sleep(exchange.pause_s)
        outbox.flush()
    else:
        arrivals = Arrivals()
        inbox = PeerInbox(0, address, memory, arrivals, depth=8)
        dist.barrier()
        times = []
        for _ in range(count):
            taken = arrivals.take()
            assert taken is not None
            now_ns, buffer = time.monotonic_ns(), taken[1]
            sent = buffer.host[BASE_NBYTES : BASE_NBYTES + 8].numpy().tobytes()
            times.append((int.from_bytes(sent, "little"), now_ns))
            if len(times) + 8 <= count:
                inbox.recycle(buffer)
        (folder / "times").write_text(json.dumps(times))
    dist.barrier()
    os._exit(0)  # the inbox still waits for END


def run_exchange(exchange: Exchange, prefix: Sequence[str] = ()) -> list[tuple[int, int]]:
    """What `send_and_receive` writes, of two processes started behind `prefix`."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*prefix, sys.executable, "-m", "benchmarks.shaped_links", "--exchange", json.dumps(asdict(exchange))]
        ranks = [subprocess.Popen([*words, "--folder", folder, "--rank", str(rank)]) for rank in (0, 1)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank has failed")
        return json.loads((Path(folder) / "times").read_text())


def rate_of(exchange: Exchange, prefix: Sequence[str] = ()) -> float:
    arrived = [came for _, came in run_exchange(exchange, prefix)]
    return 8e9 * exchange.nbytes * (exchange.count - 1) / (arrived[-1] - arrived[0])


class Shaped:
    """A network namespace whose loopback has a rate."""

    prefix = ("ip", "netns", "exec", NAMESPACE)

    def __enter__(self) -> Shaped:
        _do("ip", "netns", "add", NAMESPACE)
        _do(*self.prefix, "ip", "link", "set", "lo", "mtu", "1500", "up")
        return self

    def __exit__(self, *exc: object) -> None:
        _do("ip", "netns", "del", NAMESPACE)

    def shape(self, rate: str) -> None:
        # The bucket holds two packets: what it lets through at once is not of the rate.
        bucket = ("tbf", "rate", rate, "burst", "3100", "latency", "2s")
        _do(*self.prefix, "tc", "qdisc", "replace", "dev", "lo", "root", *bucket)

    def sent_nbytes(self) -> int:
        """Of all that has crossed."""
        told = _do(*self.prefix, "cat", "/proc/net/dev")
        (line,) = (line for line in told.splitlines() if line.strip().startswith("lo:"))
        return int(line.split(":")[1].split()[0])


def _do(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def compare_rates(rates: Sequence[str], shaped: Shaped | None) -> None:
    print("| rate | frame, bytes | emulated / rate | shaped / rate | emulated / shaped | on the shaped link / frame |")
    print("|---|---|---|---|---|---|")
    for rate in rates:
        bits_per_s = parse_rate(rate)
        for nbytes, count in SIZES:
            exchange = Exchange(nbytes=nbytes, count=count)
            emulated = rate_of(replace(exchange, bits_per_s=bits_per_s)) / bits_per_s
            cells = [rate, f"{nbytes:,}", f"{emulated:.4f}"]
            if shaped is not None:
                shaped.shape(rate)
                before = shaped.sent_nbytes()
                real = rate_of(exchange, shaped.prefix) / bits_per_s
                overhead = (shaped.sent_nbytes() - before) / (nbytes * count)
                cells += [f"{real:.4f}", f"{emulated / real:.4f}", f"{overhead:.3f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def compare_delays(delays_ms: Sequence[float], count: int) -> None:
    print("| delay, ms | emulated, median (95%) | relay, median (95%) |")
    print("|---|---|---|")
    for delay_ms in delays_ms:
        exchange = Exchange(nbytes=300, count=count, delay_s=delay_ms / 1e3, pause_s=delay_ms / 1e3 + 0.01)
        emulated = [(came - sent) / 1e6 for sent, came in run_exchange(exchange)]
        cells = [f"{delay_ms:g}"]
        for times in (emulated, relayed_ms(delay_ms / 1e3, count)):
            cells.append(f"{statistics.median(times):.2f} ({statistics.quantiles(times, n=20)[-1]:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)


def relayed_ms(delay_s: float, count: int) -> list[float]:
    """One-way times of small messages through a relay that holds each for `delay_s`."""
    receiver, relay = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    times: list[float] = []

    def forward() -> None:
        source, _ = relay.accept()
        onward = socket.create_connection(receiver.getsockname())
        onward.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            message = source.recv(8, socket.MSG_WAITALL)
            due_s = time.monotonic() + delay_s
            while (left_s := due_s - time.monotonic()) > 0:
                time.sleep(left_s)
            onward.sendall(message)

    def take() -> None:
        source, _ = receiver.accept()
        for _ in range(count):
            sent_ns = int.from_bytes(source.recv(8, socket.MSG_WAITALL), "little")
            times.append((time.monotonic_ns() - sent_ns) / 1e6)

    threads = [threading.Thread(target=each, daemon=True) for each in (forward, take)]
    for thread in threads:
        thread.start()
    sender = socket.create_connection(relay.getsockname())
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(count):
        sender.sendall(time.monotonic_ns().to_bytes(8, "little"))
        time.sleep(delay_s + 0.01)
    for thread in threads:
        thread.join()
    return times


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="1mbit,10mbit,100mbit")
    parser.add_argument("--delays_ms", default="1,20,50")
    parser.add_argument("--messages", type=int, default=100, help="of a delay")
    for own in ("--exchange", "--folder", "--rank"):  # of the two processes that this one starts
        parser.add_argument(own, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank is not None:
        send_and_receive(int(arguments.rank), Exchange(**json.loads(arguments.exchange)), Path(arguments.folder))
    compare_delays([float(text) for text in arguments.delays_ms.split(",")], arguments.messages)
    rates = arguments.rates.split(",")
    if os.geteuid() == 0 and shutil.which("tc"):
        with Shaped() as shaped:
            compare_rates(rates, shaped)
    else:
        print("no shaped interface: that takes root and iproute2's tc", file=sys.stderr)
        compare_rates(rates, None)
    return 0


if __name__ == "__main__":
    run_command(main)
