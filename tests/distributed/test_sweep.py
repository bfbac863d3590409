"""Sweeps: many points on one model, failing ones among them, killed, started again."""

import json
import os
import re
import signal
import time

import pytest

from pipeline.records.store import read_failure, read_per_token, read_record
from tests.helpers.launch import run_alone, run_ranks, run_torchrun, start_torchrun
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import tiny_arguments

NUM_TOKENS = 500
BAD = "tests.helpers.bad_codecs"
GOOD_POINTS = ["none", "nf4"]


def write_sweep(folder, *points, name="test"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "points": points}))
    return path


def command(exp_dir, sweep, *more, num_ranks=4, num_tokens=NUM_TOKENS):
    timeouts = ("--set", "runtime.timeout_s=20", "--set", "runtime.load_timeout_s=60")
    nodes = ("--set", f"partition.num_nodes={num_ranks}")
    return tiny_arguments(exp_dir, *timeouts, *nodes, "--sweep", str(sweep), *more, num_tokens=num_tokens)


def run(exp_dir, sweep, *more, num_ranks=4, env=None, num_tokens=NUM_TOKENS):
    return run_ranks(
        [command(exp_dir, sweep, *more, num_ranks=num_ranks, num_tokens=num_tokens)] * num_ranks, timeout_s=120, env=env
    )


def records(exp_dir):
    """By codec as the user wrote it: results, traffic and losses. No point may have two records."""
    found = {}
    for path in exp_dir.glob("*.json"):
        if read_failure(path) is None:
            record = read_record(path)
            config = record.args.config
            label = json.dumps([config.compressor, config.compressor_per_link, record.protocol.max_length])
            assert label not in found, "a point was computed twice"
            keys = ("digest", "results", "traffic_totals", "traffic_per_link", "reconstruction")
            found[label] = ({key: getattr(record, key) for key in keys}, read_per_token(path)["loss"].tobytes())
    return found


def failures(exp_dir):
    return [failure for path in sorted(exp_dir.glob("failed-*.json")) if (failure := read_failure(path))]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The good points' records, each of a run of its own."""
    folder = tmp_path_factory.mktemp("healthy")
    for one in run(folder / "runs", write_sweep(folder, *({"compressor": c} for c in GOOD_POINTS))):
        one.check()
    return records(folder / "runs")


def test_two_sweeps_of_the_same_points_are_bit_equal_and_the_second_start_runs_nothing(tmp_path, healthy):
    sweep = write_sweep(tmp_path, *({"compressor": c} for c in GOOD_POINTS))
    runs = tmp_path / "runs"
    first = run(runs, sweep)
    assert [one.check().returncode for one in first] == [0] * 4
    assert records(runs) == healthy
    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert {path.suffix for path in before} == {".json", ".safetensors", ".html", ".md", ".csv"}
    again = run(runs, sweep)
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == before
    assert "2/2: nf4: perplexity" in again[0].check().stderr and "done before" in again[0].stderr
    assert table(again[0].stdout) == table(first[0].stdout)


def table(stdout):
    """The final table without the columns of times."""
    lines = stdout.partition("\nrecord")[0].splitlines()
    return [line[: lines[0].index("encode, µs/token")] for line in lines]


def test_a_point_equals_a_run_of_its_own(tmp_path, healthy):
    arguments = command(tmp_path, "unused")
    position = arguments.index("--sweep")
    del arguments[position : position + 2]
    for one in run_ranks([[*arguments, "--compressor", "nf4", "--set", "measure_error=true"]] * 4):
        one.check()
    ((label, outcome),) = records(tmp_path).items()
    assert outcome == healthy[label]


def test_one_process_gives_what_four_ranks_give(tmp_path, healthy):
    sweep = write_sweep(tmp_path, *({"compressor": c} for c in GOOD_POINTS))
    run_alone(*command(tmp_path / "runs", sweep)).check()
    assert records(tmp_path / "runs") == healthy


LINKS = {2: ["layer:0:node0->node1", "layer:3:node1->node0"], 4: [
    "embed:node0->node1", "layer:1:node1->node2", "layer:3:node2->node3", "layer:4:node3->node0"
]}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("method", ["compress", "decompress"])
def test_points_that_fail_leave_the_links_as_new(num_ranks, method, tmp_path):
    """A codec raises on every link in turn: before, at the first, a later and the last frame, and after; good points
    between."""
    num_microbatches = 15
    links = LINKS[4 if num_ranks == 1 else num_ranks]
    calls = [1, 2, 5, num_microbatches + 1, num_microbatches + 2]
    points = [{"compressor": "none"}]
    for link in links:
        for call in calls:
            bad = f"{BAD}:RaisingWhere(method={method}, call={call})"
            points.append({"compressor": "none", "compressor_per_link": {link: bad}})
        points.append({"compressor": "none", "compressor_per_link": {link: "nf4"}})
    sweep = write_sweep(tmp_path, *points)
    runs = tmp_path / "runs"
    unmeasured = ("--set", "measure_error=false")  # or the sender would decode, and fail, as well
    if num_ranks == 1:
        ended = [run_alone(*command(runs, sweep, *unmeasured), timeout_s=120)]
    else:
        ended = run(runs, sweep, *unmeasured, num_ranks=num_ranks)
    assert [one.returncode for one in ended] == [3, 0, 0, 0][:num_ranks], ended[0].stderr
    assert len(failures(runs)) == len(links) * len(calls)
    for failure in failures(runs):
        assert f"ArithmeticError: no more {method}" in failure.error and failure.kind == "failed point"
    places = {re.match(r"(?:rank \d, )?(.*?):", failure.error)[1] for failure in failures(runs)}
    stages = range(len(links)) if method == "compress" else range(1, len(links) + 1)
    expected = {f"stage {stage}, micro-batch {m}" for stage in stages for m in (0, 3, num_microbatches - 1)}
    assert places == expected | {"warming up codecs", "timing a token"}
    found = records(runs)
    assert len(found) == 1 + len(links)
    reference = tmp_path / "reference"
    good = [p for p in points if BAD not in str(p)]
    good_sweep = write_sweep(tmp_path, *good, name="good")
    for one in run(reference, good_sweep, *unmeasured, num_ranks=4 if num_ranks == 1 else num_ranks):
        one.check()
    assert found == records(reference)


@pytest.mark.parametrize("codec", ["TooLarge", "WrongShape", "ShortBytes", "Raising", "Unmakeable"])
@pytest.mark.parametrize("plan", ["wrap", "chain"])
def test_other_failures(codec, plan, tmp_path):
    points = [{"compressor": f"{BAD}:{codec}(rank={rank})", "dataset.max_length": 48} for rank in range(4)]
    sweep = write_sweep(tmp_path, *points, {"compressor": "none"})
    env = {"BAD_CODEC_REPAIRED": str(tmp_path / "repaired")}
    more = ("--set", f"partition.wrap={str(plan == 'wrap').lower()}")
    ended = run(tmp_path / "runs", sweep, *more, env=env)
    # In a chain, the last rank encodes nothing; it has a decoder only.
    num_failed = 4 if plan == "wrap" or codec == "Unmakeable" else 3
    assert [one.returncode for one in ended] == [3, 0, 0, 0]
    assert len(failures(tmp_path / "runs")) == num_failed and len(records(tmp_path / "runs")) == 5 - num_failed
    (tmp_path / "repaired").touch()
    for one in run(tmp_path / "runs", sweep, *more, env=env):
        one.check()
    assert failures(tmp_path / "runs") == [] and len(records(tmp_path / "runs")) == 5


def test_bad_configs_are_failed_points(tmp_path):
    sweep = write_sweep(
        tmp_path,
        {"compressor": "nf4(absmax=int3)"},
        {"compressor": "none", "dataset.stride": 65},
        {"compressor": "none", "dataset.max_length": 4096},
        {"compressor": "none", "compressor_per_link": {"layer:77:node0->node1": "nf4"}},
        {"compressor": "none", "compressor_per_link": "nf4"},
        {"compressor": {"nbits": 4}},
        {"compressor": "none", "batch_size": 3, "dataset.first_k_tokens": 300},
    )
    ended = run(tmp_path / "runs", sweep)
    assert [one.returncode for one in ended] == [3, 0, 0, 0]
    told = sorted(failure.error for failure in failures(tmp_path / "runs"))
    for words in (
        *("absmax", "layer:77", "positions for 512 tokens", "dataset.stride must be at most 64"),
        *("compressor_per_link must be a mapping", "{'nbits': 4}"),
    ):
        assert sum(words in error for error in told) == 1, (words, told)
    assert len(told) == 6 and len(records(tmp_path / "runs")) == 1
    assert ended[0].stderr.count("\nfailed: ") == 6


def test_failed_points_under_torchrun(tmp_path):
    """torchrun ends the other ranks when one fails; the table and the report come first."""
    sweep = write_sweep(tmp_path, {"compressor": f"{BAD}:Raising(rank=1)"}, {"compressor": "none"})
    ended = run_torchrun(2, *command(tmp_path / "runs", sweep, num_ranks=2))
    assert ended.returncode != 0 and "exitcode  : 3" in ended.stderr
    assert len(records(tmp_path / "runs")) == 1 and "none " in ended.stdout
    assert "failed: tests.helpers.bad_codecs:Raising(rank=1): rank 1, stage 1, micro-batch 2: " in ended.stderr
    assert (tmp_path / "runs" / "report-test.html").exists()


def test_a_record_that_lacks_the_error_is_made_anew(tmp_path):
    sweep = write_sweep(tmp_path, {"compressor": "nf4"})
    without = run_alone(*command(tmp_path / "runs", sweep, "--set", "measure_error=false")).check()
    (path,) = (tmp_path / "runs").glob("*.json")
    assert read_record(path).reconstruction is None
    run_alone(*command(tmp_path / "runs", sweep)).check()
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    with_error = run_alone(*command(tmp_path / "runs", sweep)).check()
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    assert "done before" in with_error.stderr and table(with_error.stdout) == table(without.stdout)


def test_killed_in_mid_sweep_and_started_again(tmp_path):
    """Killed under torchrun, as a user has it: same table, no point computed twice."""
    points = [{"compressor": c} for c in ("none", "int8", "nf4", "zstd(int8)", "fp4", "int4")]
    sweep, num_tokens = write_sweep(tmp_path, *points), 2500
    reference = run(tmp_path / "reference", sweep, num_tokens=num_tokens)
    runs = tmp_path / "runs"
    with start_torchrun(4, *command(runs, sweep, num_tokens=num_tokens)) as torchrun:
        deadline = time.monotonic() + allowed_s(100)
        while not (len(list(runs.glob("*.json"))) >= 2 and b"finished" in journal(runs)):
            ended = torchrun.process.poll() is not None
            assert time.monotonic() < deadline and not ended, [torchrun.rank_stderr(rank) for rank in range(4)]
            time.sleep(0.005)
        os.kill(torchrun.rank_pids()[2], signal.SIGKILL)
        assert torchrun.wait(60).returncode != 0
        assert "the same command goes on from them" in torchrun.rank_stderr(0)
    finished = {read_record(path).run_id for path in runs.glob("*.json")}
    assert 2 <= len(finished) < len(points)
    first = [one.check() for one in run(runs, sweep, num_tokens=num_tokens)][0]
    assert first.stderr.count("done before") == len(finished)
    assert finished <= {read_record(path).run_id for path in runs.glob("*.json")}
    assert records(runs) == records(tmp_path / "reference")
    assert table(first.stdout) == table(reference[0].stdout)
    assert list(runs.glob("*.journal*")) == []


def test_tracking_offline_has_a_run_per_point_and_the_report(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    sweep = write_sweep(tmp_path, {"compressor": "nf4"}, {"compressor": f"{BAD}:Raising(rank=0)"}, name="tracked")
    runs = tmp_path / "runs"
    tracking = ("--wandb", "--set", "wandb.mode=offline")
    env = {"WANDB_SILENT": "true", "RANK": "0"}
    ended = run_alone(*command(runs, sweep, *tracking), env=env)
    assert ended.returncode == 3 and "W&B is switched off" not in ended.stderr
    found = [path.read_bytes() for path in (runs / "wandb").glob("offline-run-*/*.wandb")]
    assert len(found) == 3
    assert all(b"tracked" in content for content in found)  # the group
    whole = (b"window_ppl", b"payload_bytes/embed:node0->node1", b"tokens_processed", b"avg_ppl")
    assert [all(key in content for key in whole) for content in found].count(True) == 1
    assert [b"report-tracked.html" in content for content in found].count(True) == 1


def test_tracking_that_fails_does_not_end_a_sweep(tmp_path):
    sweep = write_sweep(tmp_path, {"compressor": "nf4"}, {"compressor": "none"})
    # A project name that W&B refuses, at every point.
    ended = run_alone(*command(tmp_path, sweep, "--wandb", "--wandb_project", "a/b:c", "--set", "wandb.mode=offline"))
    assert ended.check().stderr.count("W&B is switched off from here on") == 1
    assert len(records(tmp_path)) == 2


def journal(folder):
    return b"".join(path.read_bytes() for path in folder.glob("*.journal"))
