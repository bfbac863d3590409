"""Two machines made of network namespaces with a cable between them, for tests of runs over several machines.

Each has a host name and an /etc/hosts of its own that maps the name to 127.0.1.1, as Debian's installer leaves it. No
traffic leaves the namespaces, and at the end they are deleted with all their processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.helpers.launch import ROOT, Finished

__all__ = ["CABLE", "Machine", "two_machines", "why_no_machines"]

CABLE = "cable0"
_COUNT = itertools.count()
_SETUP = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def why_no_machines() -> str | None:
    """The reason why network namespaces cannot be made here; None where they can."""
    missing = [name for name in ("ip", "unshare", "mount", "hostname") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux, mount, hostname)"
    name = f"thinwire-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    try:
        cable = ["ip", "-n", name, "link", "add", CABLE, "type", "veth"]
        inside = ["ip", "netns", "exec", name, "unshare", "--uts", "hostname", "probe"]
        for command in (cable, inside):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(command)} failed: {done.stderr.strip()}"
    finally:
        _ip("netns", "del", name)
    return None


class Machine:
    """One namespace: `address` and `address6` on its end of the cable, `host` its name."""

    def __init__(self, name: str, host: str, number: int, folder: Path) -> None:
        self.name, self.host = name, host
        self.address, self.address6 = f"10.99.7.{number}", f"fd99:7::{number}"
        self._folder = folder
        self.hosts = folder / f"{host}.hosts"
        self.hosts.write_text(f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {host}\n")
        self._processes: list[subprocess.Popen] = []

    def ip(self, *words: str) -> str:
        return _ip("-n", self.name, *words)

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start a command on this machine; stdout and stderr go to one file, see `wait`."""
        path = self._folder / f"{self.host}-{len(self._processes)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*self._enter(), *command],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log, process.start_s = path, time.monotonic()
        self._processes.append(process)
        return process

    def wait(self, process: subprocess.Popen, timeout_s: float) -> Finished:
        """Wait for the end of what `start` has started; `stdout` holds both streams."""
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.host} did not end within {timeout_s} s\n{self.output(process)}") from None
        wall_s = time.monotonic() - process.start_s
        return Finished(returncode=process.returncode, stdout=self.output(process), stderr="", wall_s=wall_s)

    @staticmethod
    def output(process: subprocess.Popen) -> str:
        return process.log.read_text(errors="replace")

    def run(self, *command: str) -> str:
        return subprocess.run([*self._enter(), *command], cwd=ROOT, capture_output=True, text=True).stdout

    def kill(self) -> None:
        """End every process on this machine at once."""
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        for process in self._processes:
            process.wait()

    def _enter(self) -> list[str]:
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts"]
        return [*inside, "sh", "-c", _SETUP, "sh", self.host, str(self.hosts)]


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines `alpha` and `beta` with a cable between them, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="machines_") as folder, contextlib.ExitStack() as stack:
        machines, prefix = [], f"thinwire-{os.getpid()}-{next(_COUNT)}"
        for number, host in enumerate(("alpha", "beta"), 1):
            machine = Machine(f"{prefix}-{host}", host, number, Path(folder))
            _ip("netns", "add", machine.name)
            stack.callback(_ip, "netns", "del", machine.name)
            stack.callback(machine.close)
            machines.append(machine)
        alpha, beta = machines
        alpha.ip("link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", beta.name)
        for machine in machines:
            machine.ip("link", "set", "lo", "up")
            machine.ip("link", "set", CABLE, "up")
            machine.ip("addr", "add", f"{machine.address}/24", "dev", CABLE)
            machine.ip("-6", "addr", "add", f"{machine.address6}/64", "dev", CABLE, "nodad")
        yield alpha, beta


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
