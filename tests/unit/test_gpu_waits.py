"""Nothing waits for a GPU as a whole: an NCCL receive is work on it, too, and ends only when another rank has sent.

A rank that waits for the device before it sends, as the next one does, waits for ever. Streams and events are waited
for instead; the rule is kept by looking at the code, since no machine without GPUs could show the hang.
"""

import ast

import torch

from pipeline.runtime.timing import wait_for_stream
from tests.helpers.sources import ROOT, nodes_of, sources

# Of torch.cuda, torch.accelerator and torch: all wait until the device has nothing left to do.
DEVICE_WIDE = {"synchronize", "empty_cache", "ipc_collect"}
MODULES = {"cuda", "accelerator", "mps", "xpu"}


def device_wide_waits(nodes):
    """(line, name) of what waits for a device, of a syntax tree's nodes."""
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in DEVICE_WIDE:
            owner = node.value
            if getattr(owner, "attr", getattr(owner, "id", None)) in MODULES:
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] in MODULES:
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in DEVICE_WIDE)


def test_no_wait_for_a_whole_device():
    paths = [ROOT / "run_pipeline.py", *sources("pipeline", "compressors", "benchmarks")]
    found = [(path, wait) for path in paths for wait in device_wide_waits(nodes_of(path))]
    assert found == [], "wait for a stream or an event instead (wait_for_stream)"


def test_the_rule_sees_what_it_forbids():
    source = """
import torch
from torch.cuda import empty_cache
torch.cuda.synchronize()
torch.cuda.synchronize(device)
cuda.empty_cache()
torch.accelerator.synchronize()
torch.cuda.current_stream(device).synchronize()
event.synchronize()
"""
    assert [line for line, _ in device_wide_waits(ast.walk(ast.parse(source)))] == [3, 4, 5, 6, 7]


class Gpu:
    """Stands in for torch.cuda: a receive that no one has sent for is pending on a stream of its own."""

    def __init__(self):
        self.pending = {"mine": 2, "nccl": 1}

    def current_stream(self, device):
        gpu = self

        class Stream:
            def synchronize(self):
                gpu.pending["mine"] = 0

        return Stream()

    def synchronize(self, device=None):
        raise AssertionError(f"hangs: {self.pending}")


def test_waiting_for_a_stream_leaves_a_posted_receive_alone(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.current_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    wait_for_stream(torch.device("cpu"))
    assert gpu.pending == {"mine": 2, "nccl": 1}
    wait_for_stream(torch.device("cuda:0"))
    assert gpu.pending == {"mine": 0, "nccl": 1}
