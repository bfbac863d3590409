"""What the console shows of a sweep: two bars on a terminal, a line per point elsewhere."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np

from pipeline.config.schema import WandbConfig
from pipeline.evaluation.progress import Progress, SweepProgress
from pipeline.evaluation.tracking import Tracker

ROOT = Path(__file__).parents[2]


class Log:
    """Stands in for a tracker."""

    def __init__(self):
        self.logged = []

    def log(self, values, *, num_tokens):
        self.logged.append((num_tokens, values))


def show_a_sweep():
    """Two points of two micro-batches, the first done before."""
    sweep = SweepProgress("quick", 2)
    sweep.begin("none")
    sweep.end("perplexity 8.0000, done before", was_run=False)
    sweep.begin("nf4")
    tracker = Tracker(WandbConfig(), run_id="r", config={}, folder=Path())
    progress = Progress(num_tokens=20, link_names=["a", "b"], tracker=tracker, in_sweep=True)
    for _ in range(2):
        progress.add(num_tokens=10, loss=np.full(5, np.log(8.5), np.float32), payload_bytes=(30, 10))
    progress.close()
    sweep.end("perplexity 8.5000", was_run=True)
    sweep.close()


def run_script(stderr):
    code = "from tests.unit.test_progress import show_a_sweep; show_a_sweep()"
    env = {**os.environ, "TQDM_MININTERVAL": "0"}  # every state of a bar is shown
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=stderr, text=True, env=env)


def test_a_line_per_point_where_there_is_no_terminal():
    process = run_script(subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert told.splitlines() == [
        "quick 0/2: none ...",
        "quick 1/2: none: perplexity 8.0000, done before",
        "quick 1/2: nf4 ...",
        "quick 2/2: nf4: perplexity 8.5000",
    ]


def test_two_bars_on_a_terminal():
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    process = run_script(slave)
    os.close(slave)
    told = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        told += part
    os.close(master)
    assert process.wait(60) == 0
    text = told.decode()
    assert re.search(r"quick: 1/2 points \|.*\|, nf4", text)
    assert re.search(r"20\.0/20\.0 .*ppl=8\.5, window_ppl=8\.5, bytes_per_token=2,", text)
    assert "perplexity 8.5000" not in text


def test_curves_have_the_bytes_of_every_link():
    log = Log()
    progress = Progress(num_tokens=20, link_names=["a", "b"], tracker=log, in_sweep=True)
    for nbytes in (30, 32):
        progress.add(num_tokens=10, loss=np.zeros(5, np.float32), payload_bytes=(nbytes, 10))
    progress.close()
    assert [n for n, _ in log.logged] == [10, 20]
    assert [(v["payload_bytes/a"], v["payload_bytes/b"]) for _, v in log.logged] == [(30, 10), (62, 20)]
    assert log.logged[1][1]["bytes_per_token"] == 82 / 40 and log.logged[1][1]["window_ppl"] == 1.0


def test_remaining_time_counts_only_points_that_were_run(monkeypatch, capsys):
    now = iter([0.0, 30.0, 30.0])
    monkeypatch.setattr("pipeline.evaluation.progress.time.monotonic", lambda: next(now))
    sweep = SweepProgress("s", 4)
    sweep.begin("a")
    sweep.end("", was_run=False)
    sweep.begin("b")
    sweep.end("", was_run=True)
    sweep.begin("c")
    begun = [line for line in capsys.readouterr().err.splitlines() if "..." in line]
    assert begun == ["s 0/4: a ...", "s 1/4: b ...", "s 2/4: c ... 01:00 left"]
