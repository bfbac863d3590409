"""Codecs are made where they are used, once; the rest is told."""

import json
import re
from collections import Counter

import pytest

from pipeline.records.run_record import CodecConfig
from pipeline.records.store import read_record
from tests.helpers.launch import run_ranks
from tests.helpers.tiny_models import tiny_arguments

WATCHED = "tests.helpers.watched_codecs"
LINKS = ["embed:node0->node1", "layer:1:node1->node2", "layer:3:node2->node3", "layer:4:node3->node0"]


def run(folder, codec, *more, num_ranks=4):
    """What the ranks end with, and what their codecs have written down."""
    log = folder / "log"
    log.touch()
    arguments = tiny_arguments(
        folder / "exp", "--set", "partition.num_nodes=4", "--compressor", f"{WATCHED}:{codec}", *more, num_tokens=500
    )
    env = {"WATCHED_CODECS": str(log)}
    ended = run_ranks([arguments] * num_ranks, env=env, distributed=num_ranks > 1, timeout_s=120)
    return ended, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("measure_error", ["false", "true"])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_one_object_an_end(num_ranks, measure_error, tmp_path):
    ended, told = run(tmp_path, "Watched", "--set", f"measure_error={measure_error}", num_ranks=num_ranks)
    for one in ended:
        one.check()
    made = Counter((line["rank"], line["link"]) for line in told if line["what"] == "make")
    expected = Counter()
    for index, link in enumerate(LINKS):
        sender, receiver = (index, (index + 1) % 4) if num_ranks == 4 else (0, 0)
        expected[sender, link] += 1 + (measure_error == "true")
        expected[receiver, link] += 1
    assert made == expected
    used = {what: {(line["rank"], line["object"]) for line in told if line["what"] == what} for what in (
        "compress", "decompress"
    )}  # fmt: skip
    assert not used["compress"] & used["decompress"]
    assert len(used["compress"]) + len(used["decompress"]) == made.total()
    (path,) = (tmp_path / "exp").glob("*.json")
    record = read_record(path)
    assert record.codecs == {link: CodecConfig(name="watched") for link in LINKS} and record.causal
    assert record.one_token.links.keys() == set(LINKS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_max_tokens_is_that_of_the_largest_frame(batch_size, tmp_path):
    ended, told = run(tmp_path, "Watched", "--set", f"batch_size={batch_size}", "--max_length", "48", num_ranks=1)
    ended[0].check()
    assert {line["max_tokens"] for line in told} == {batch_size * 48}
    assert max(line.get("num_tokens", 0) for line in told) == batch_size * 48


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("OtherFormat", r"two ends of layer:1:node1->node2 differ in their codec, {'format_config': .*machines"),
        ("OtherBound", r"two ends of layer:1:node1->node2 differ in their bounds on frames, {.*machines"),
        ("LackingAFile", r"rank 2.*: no calibration for link layer:\d:node2->node3"),
    ],
)
def test_what_one_rank_has_otherwise_ends_all_before_weights_are_loaded(codec, message, tmp_path):
    ended, told = run(tmp_path, codec)
    for one in ended:
        assert one.returncode not in (0, None)
        assert re.search(message, one.stderr), one.stderr
        assert "making codecs" in one.stderr and "Traceback" not in one.stderr
    assert {line["what"] for line in told} == {"make"}
