"""Runs over two machines, which are network namespaces: the script, wrong interfaces and names, what gets lost."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import ROOT, run_alone
from tests.helpers.machines import CABLE, two_machines, why_no_machines
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import tiny_arguments

pytestmark = pytest.mark.skipif(why_no_machines() is not None, reason=str(why_no_machines()))

SCRIPT = "torchrun_scripts/multi_node.sh"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
PORT = 29531
TIMEOUT_S = 4
START_S = 120  # torch's import on a busy machine


@pytest.fixture(scope="module")
def machines():
    with two_machines() as both:
        yield both


def run_script(machines, folder, rendezvous, *, interface=CABLE, more=()):
    """The script on both machines with two ranks each; returns what both printed."""
    config = folder / "empty.yaml"
    config.write_text("{}\n")
    variables = {"RENDEZVOUS": rendezvous, "INTERFACE": interface, "NUM_NODES": "2", "RANKS_PER_NODE": "2"}
    variables |= {"CONFIG": str(config), **ENVIRONMENT}
    command = ("sh", SCRIPT, *tiny_arguments(folder / "records", "--compressor", "int8", *more))
    started = [machine.start(*command, env=variables) for machine in machines]
    return [machine.wait(one, 2 * START_S).check().stdout for machine, one in zip(machines, started, strict=True)]


def start_ranks(machines, folder, more=((), ()), *, address=None, env=None, num_tokens=700):
    """One rank on each machine, with the variables that torchrun would set; rank 0 hosts the store."""
    started = []
    for rank, machine in enumerate(machines):
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": address or machines[0].address, "MASTER_PORT": str(PORT), **ENVIRONMENT}
        settings = {"partition.num_nodes": 2, "runtime.timeout_s": TIMEOUT_S, "runtime.load_timeout_s": START_S}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        arguments = tiny_arguments(folder, *words, *more[rank], num_tokens=num_tokens)
        started.append(machine.start(sys.executable, "run_pipeline.py", *arguments, env={**variables, **(env or {})}))
    return started


def interfaces(*names):
    return [["--set", f"runtime.interface={name}"] for name in names]


def last_message(text):
    (message,) = re.findall(r"^rank \d stops: (.*)$", text, re.MULTILINE)
    return message


def losses(folder):
    (path,) = folder.glob("*.json")
    return read_per_token(path)["loss"].tobytes(), read_record(path).traffic_totals


@pytest.mark.parametrize("version", [4, 6])
def test_the_script_gives_the_losses_of_one_process(version, machines, tmp_path):
    alpha = machines[0]
    rendezvous = f"{alpha.address}:{PORT}" if version == 4 else f"[{alpha.address6}]:{PORT}"
    if version == 6:
        for machine in machines:
            machine.ip("addr", "del", f"{machine.address}/24", "dev", CABLE)
    try:
        printed = run_script(machines, tmp_path, rendezvous)
    finally:
        if version == 6:
            for machine in machines:
                machine.ip("addr", "add", f"{machine.address}/24", "dev", CABLE)
    run_alone(*tiny_arguments(tmp_path / "alone", "--compressor", "int8")).check()
    assert losses(tmp_path / "records") == losses(tmp_path / "alone")
    assert "hosts the rendezvous" in printed[0] and "hosts the rendezvous" not in printed[1]


def test_the_links_listen_on_their_interface_only(machines, tmp_path):
    slow = ("--compressor", "tests.helpers.bad_codecs:SlowToDecode(rank=-1, seconds=0.02)")
    started = start_ranks(machines, tmp_path, [[*words, *slow] for words in interfaces(CABLE, CABLE)], num_tokens=3000)
    beta = machines[1]
    deadline = time.monotonic() + allowed_s(START_S)
    while not list(tmp_path.glob("*.journal")):
        assert time.monotonic() < deadline and started[0].poll() is None, beta.output(started[0])
        time.sleep(0.1)
    listening = {line.split()[3].rsplit(":", 1)[0] for line in beta.run("ss", "-Hltn").splitlines()}
    assert listening == {beta.address}
    for machine in machines:
        machine.kill()


def test_a_store_known_by_a_host_name_that_means_this_machine(machines, tmp_path):
    """As Debian's /etc/hosts has it, and as torchrun names the store without --local_addr."""
    alpha, beta = machines
    as_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    beta.hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {alpha.host}\n")
    more = [["--set", "runtime.load_timeout_s=3", *words] for words in interfaces(CABLE)]
    (started,) = start_ranks([beta], tmp_path, more, address=alpha.host, env={**as_torchrun, "RANK": "1"})
    ended = beta.wait(started, START_S)
    message = last_message(ended.stdout)
    assert ended.returncode == 1 and "Traceback" not in ended.stdout
    assert f"the rendezvous store alpha:{PORT} (MASTER_ADDR, MASTER_PORT) cannot be reached in 3 s" in message
    assert f"Here alpha is 127.0.1.1. This machine, beta, has {CABLE} {beta.address} {beta.address6}, lo " in message
    for cure in ("--local_addr=ADDRESS", "--rdzv_conf is_host=true", "runtime.interface", SCRIPT):
        assert cure in message


@pytest.mark.parametrize(
    ("chosen", "pattern"),
    [
        ((CABLE, "lo"), r"no connection from .* at (127\.0\.0\.1|10\.99\.7\.1) \((lo|cable0) of .*refused.*multi_node"),
        ((CABLE, "nope0"), r"rank 1, .*interface 'nope0' \(runtime\.interface\) of beta is none of this machine's"),
        ((CABLE, "empty0"), r"rank 1, .*interface 'empty0' .* has no address; there are cable0 10\.99\.7\.2"),
        ((CABLE, "down0"), r"rank 1, .*interface 'down0' .* is down or not connected"),
        ((CABLE, "other0"), r"no connection from .*10\.99\.8\.1.*runtime\.interface"),
        ((None, None), r"no connection from .*127\.0\.1\.1 \(runtime\.interface is not set: by host name of "),
    ],
    ids=["loopback", "unknown", "without address", "down", "without a way", "not set"],
)
def test_a_wrong_interface(chosen, pattern, machines, tmp_path):
    beta = machines[1]
    beta.hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {beta.host}\n")
    for name, address in (("empty0", None), ("down0", "10.99.9.1/24"), ("other0", "10.99.8.1/24")):
        if name in chosen:
            beta.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
            if address:
                beta.ip("addr", "add", address, "dev", name)
            if name != "down0":
                for end in (name, f"{name}-peer"):
                    beta.ip("link", "set", end, "up")
    more = [[] if name is None else interfaces(name)[0] for name in chosen]
    started = start_ranks(machines, tmp_path, more)
    for machine, one in zip(machines, started, strict=True):
        ended = machine.wait(one, 2 * START_S)
        assert ended.returncode == 1 and "Traceback" not in ended.stdout
        assert re.search(pattern, last_message(ended.stdout)), ended.stdout


@pytest.mark.parametrize("what", ["machine", "link"])
def test_what_is_lost_while_a_run_goes_on(what, tmp_path):
    slow = ("--compressor", "tests.helpers.bad_codecs:SlowToDecode(rank=-1, seconds=0.02)")
    with two_machines() as machines:
        alpha, beta = machines
        more = [[*words, *slow] for words in interfaces(CABLE, CABLE)]
        started = start_ranks(machines, tmp_path, more, num_tokens=6000)
        deadline = time.monotonic() + allowed_s(START_S)
        while not any(b'{"finished"' in path.read_bytes() for path in tmp_path.glob("*.journal")):
            assert time.monotonic() < deadline and started[0].poll() is None, alpha.output(started[0])
            time.sleep(0.1)
        if what == "machine":
            beta.kill()
        else:
            alpha.ip("link", "set", CABLE, "down")
        lost_s = time.monotonic()
        ended = [alpha.wait(started[0], 60)] + ([beta.wait(started[1], 60)] if what == "link" else [])
        assert time.monotonic() - lost_s < TIMEOUT_S + allowed_s(8)
        assert all(one.returncode == 1 for one in ended)
        assert re.search(r"rank 1 \(last at ", last_message(ended[0].stdout))
        if what == "link":
            assert re.search(r"rank 0 \(last at |store", last_message(ended[1].stdout))


def script(**variables):
    return subprocess.run(
        ["sh", SCRIPT], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize(
    ("variables", "pattern"),
    [
        ({"INTERFACE": "lo"}, "RENDEZVOUS: set it to HOST:PORT of one of the machines"),
        ({"RENDEZVOUS": "10.0.0.1:1"}, "INTERFACE: set it to the network interface"),
        ({"RENDEZVOUS": "10.0.0.1:1", "INTERFACE": "nope0"}, r"INTERFACE=nope0 is none of this machine's: .*\blo\b"),
        ({"RENDEZVOUS": "10.0.0.1", "INTERFACE": "lo"}, "RENDEZVOUS=10.0.0.1 has no port; write 10.0.0.1:29500"),
        ({"RENDEZVOUS": "fd00::1:29500", "INTERFACE": "lo"}, r"in brackets, \[ADDRESS\]:29500"),
        ({"RENDEZVOUS": "[fd00::1]", "INTERFACE": "lo"}, "ends in no port"),
    ],
    ids=str,
)
def test_the_script_refuses(variables, pattern):
    ended = script(**variables)
    assert ended.returncode == 2 and re.search(pattern, ended.stderr), ended.stderr


def test_the_script_without_ip(tmp_path):
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    ended = script(RENDEZVOUS="10.0.0.1:1", INTERFACE="lo", PATH=str(tmp_path))
    assert ended.returncode == 2 and "no ip command" in ended.stderr and "install iproute2" in ended.stderr


def test_the_script_with_an_interface_without_address(machines):
    alpha, _ = machines
    alpha.ip("link", "add", "bare0", "type", "veth")
    started = alpha.start("sh", SCRIPT, env={"RENDEZVOUS": "10.0.0.1:1", "INTERFACE": "bare0", **ENVIRONMENT})
    ended = alpha.wait(started, 30)
    assert ended.returncode == 2 and "INTERFACE=bare0 has no address" in ended.stdout
