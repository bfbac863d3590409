"""Runs that fail while they go on: killed, interrupted, hanging, with codecs that raise; and how they resume.

`benchmarks/kill_ranks.py` kills at random moments and many times; here are a few chosen ones.
"""

import contextlib
import json
import fcntl
import os
import re
import resource
import signal
import time

import pytest

from benchmarks.kill_ranks import Bench, Kill
from pipeline.records.store import read_per_token, read_record
from tests.helpers.bad_codecs import DUE
from tests.helpers.launch import call_on_ranks, run_alone, run_ranks, start_ranks, start_torchrun, store_process
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import tiny_arguments

NUM_RANKS = 4
TIMEOUT_S = round(allowed_s(3.0), 1)
SLACK_S = allowed_s(5.0)
NUM_TOKENS = 1200
NUM_TOKENS_OF_KILLED = 4000  # long enough to be killed in the middle
LAST_MESSAGE = re.compile(r"^(?:error|rank \d+ stops): .*$", re.MULTILINE)
RESUME_HINT = "the same command with --resume goes on from them"


def arguments(exp_dir, *more, num_tokens=NUM_TOKENS):
    timeouts = ("--set", f"runtime.timeout_s={TIMEOUT_S}", "--set", "runtime.load_timeout_s=60")
    return tiny_arguments(exp_dir, *timeouts, *more, num_tokens=num_tokens)


def last_messages(stderrs):
    """Each rank's last message; there must be exactly one."""
    found = [LAST_MESSAGE.findall(stderr) for stderr in stderrs]
    assert [len(messages) for messages in found] == [1] * len(found), found
    return [messages[0] for messages in found]


def wait_until(condition, timeout_s=60):
    deadline = time.monotonic() + allowed_s(timeout_s)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_finished(exp_dir):
    return sum(path.read_bytes().count(b'{"finished"') for path in exp_dir.glob("*.journal"))


def outcome(exp_dir):
    """Results, traffic and losses of the folder's one record; its journal must be gone."""
    assert list(exp_dir.glob("*.journal")) == []
    (path,) = exp_dir.glob("*.json")
    record = read_record(path)
    keys = ("results", "traffic_totals", "traffic_per_link")
    return {key: getattr(record, key) for key in keys}, read_per_token(path)["loss"].tobytes()


def num_resent(exp_dir):
    (path,) = exp_dir.glob("*.json")
    resumed = read_record(path).resumed
    assert resumed.num_sessions == 2
    return resumed.resent_microbatches


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Outcome of a run to which nothing happens."""
    exp_dir = tmp_path_factory.mktemp("uninterrupted")
    for one in run_ranks([arguments(exp_dir)] * NUM_RANKS):
        one.check()
    return outcome(exp_dir)


@pytest.fixture(scope="module")
def benches():
    """By launcher: forked ranks of which the first hosts the store, and torchrun."""
    common = {"timeout_s": TIMEOUT_S, "load_timeout_s": 60.0, "num_tokens": NUM_TOKENS_OF_KILLED}
    return {"forked": Bench(by_torchrun=False, **common), "torchrun": Bench(by_torchrun=True, **common)}


@pytest.fixture(scope="module")
def reference(benches, tmp_path_factory):
    return benches["forked"].run_uninterrupted(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    ("launcher", "kill"),
    [
        ("forked", Kill(victim=2, signal=signal.SIGKILL, continued=False, loading=False, moment=0.4)),
        ("forked", Kill(victim=0, signal=signal.SIGKILL, continued=False, loading=False, moment=0.5)),
        ("forked", Kill(victim=0, signal=signal.SIGSTOP, continued=True, loading=False, moment=0.5)),
        ("forked", Kill(victim=3, signal=signal.SIGSTOP, continued=False, loading=True, moment=0.8)),
        ("torchrun", Kill(victim=1, signal=signal.SIGKILL, continued=False, loading=False, moment=0.2)),
    ],
    ids=str,
)
def test_a_killed_rank_is_named_and_the_run_resumes(launcher, kill, benches, reference, tmp_path):
    verdict = benches[launcher].try_kill(kill, reference, tmp_path)
    assert verdict is not None, "the run was over before the kill"
    assert verdict.faults == []
    if not kill.loading:
        assert verdict.num_finished > 0
        # The last heartbeat may be from before the first micro-batch.
        place = r"(stage \d, micro-batch \d+|timing a token)"
        assert re.search(rf"rank {kill.victim} \(last at {place}\)", verdict.cause)
    assert benches["forked"].check_resume(tmp_path, reference) == []


def test_ctrl_c_under_torchrun(tmp_path, benches, reference):
    with start_torchrun(NUM_RANKS, *arguments(tmp_path, num_tokens=NUM_TOKENS_OF_KILLED)) as torchrun:
        wait_until(lambda: num_finished(tmp_path) > 0, timeout_s=120)
        torchrun.interrupt()
        start_s = time.monotonic()
        assert torchrun.wait(60).returncode != 0
        assert time.monotonic() - start_s < 2 * SLACK_S  # torchrun's own end included
        messages = last_messages([torchrun.rank_stderr(rank) for rank in range(NUM_RANKS)])
    assert all("interrupted" in message and RESUME_HINT in message for message in messages)
    assert benches["forked"].check_resume(tmp_path, reference) == []


def test_ctrl_c_in_one_process(tmp_path):
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    # Seconds for what one process else has done before the signal comes.
    slow = ("--compressor", "tests.helpers.bad_codecs:SlowToDecode(rank=-1, seconds=0.008)")
    command = [arguments(interrupted, *slow, num_tokens=NUM_TOKENS_OF_KILLED)]
    with start_ranks(command, distributed=False) as alone:
        wait_until(lambda: num_finished(interrupted) > 0)
        os.kill(alone.rank_pids()[0], signal.SIGINT)
        (ended,) = alone.wait(SLACK_S)
    assert ended.returncode == 130
    (message,) = last_messages([ended.stderr])
    assert message.startswith("error: interrupted") and RESUME_HINT in message
    assert "Traceback" not in ended.stderr
    for folder in (interrupted, whole):
        run_alone(*arguments(folder, "--resume", *slow, num_tokens=NUM_TOKENS_OF_KILLED)).check()
    assert outcome(interrupted) == outcome(whole)
    assert num_resent(interrupted) <= 1


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_codec_that_raises(rank, tmp_path, uninterrupted):
    repaired = {"BAD_CODEC_REPAIRED": str(tmp_path / "repaired")}
    command = arguments(tmp_path / "runs", "--compressor", f"tests.helpers.bad_codecs:Raising(rank={rank})")
    ended = run_ranks([command] * NUM_RANKS, env=repaired, timeout_s=60)
    messages = last_messages([one.stderr for one in ended])
    assert all(one.returncode == 1 for one in ended)
    assert max(one.wall_s for one in ended) - min(one.wall_s for one in ended) < TIMEOUT_S
    cause = r"codec raising on \S+: ArithmeticError: no more bits"
    expected = rf"rank \d stops: rank {rank}, stage {rank}, micro-batch {DUE - 2}: {cause}; .*{RESUME_HINT}"
    assert [message for message in messages if not re.fullmatch(expected, message)] == []
    # Where it was raised, only the rank that raised it tells.
    assert [("in _go_wrong" in one.stderr) for one in ended] == [r == rank for r in range(NUM_RANKS)]
    if rank != 2:  # once is enough
        return
    (tmp_path / "repaired").touch()
    for one in run_ranks([[*command, "--resume"]] * NUM_RANKS, env=repaired):
        one.check()
    assert outcome(tmp_path / "runs") == uninterrupted


def test_a_codec_that_raises_where_nobody_reads_what_its_rank_says(tmp_path):
    command = arguments(tmp_path, "--compressor", "tests.helpers.bad_codecs:Raising(rank=1)")
    ended = call_on_ranks(NUM_RANKS, run_on_a_full_pipe, command, 1, timeout_s=60)
    assert all(one.returncode == 1 for one in ended)
    for one in ended[:1] + ended[2:]:
        (message,) = last_messages([one.stderr])
        assert re.search(rf"rank 1, stage 1, micro-batch {DUE - 2}: codec .*: ArithmeticError: no more bits", message)


def run_on_a_full_pipe(rank, command, silenced):
    import run_pipeline

    if rank == silenced:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x")
        os.set_blocking(writer, True)
        os.dup2(writer, 2)
    return run_pipeline.main(command)


def test_a_codec_that_raises_in_one_process(tmp_path):
    command = arguments(tmp_path, "--compressor", "tests.helpers.bad_codecs:Raising(rank=0)")
    ended = run_alone(*command, env={"RANK": "0"})
    assert ended.returncode == 1 and "in _go_wrong" in ended.stderr
    (message,) = last_messages([ended.stderr])
    cause = r"codec \S+ on \S+: ArithmeticError: no more bits; "
    assert re.match(rf"error: stage 0, micro-batch {DUE - 2}: {cause}", message)


@pytest.mark.parametrize(
    ("codec", "cause"),
    [
        (
            "TooLarge",
            "rank 1, stage 1, micro-batch 2: ValueError: link layer:1:node1->node2: "
            "the payload has 16385 bytes, its codec's max_nbytes promised at most 16384",
        ),
        (
            "WrongShape",
            "rank 1, stage 1, micro-batch 2: ValueError: link layer:1:node1->node2: Payload.shape is (1, 64, 64)",
        ),
        ("ShortBytes", "rank 2, stage 2, micro-batch 2: codec short_bytes on layer:1:node1->node2: RuntimeError: "),
    ],
    ids=["too large", "wrong shape", "short bytes"],
)
def test_a_codec_that_breaks_its_word(codec, cause, tmp_path):
    command = arguments(tmp_path, "--compressor", f"tests.helpers.bad_codecs:{codec}(rank=1)")
    if codec == "WrongShape":  # of other width than the hidden states, so that the two differ
        command += ["--max_length", "32"]
        cause = cause.replace("(1, 64, 64)", "(1, 64, 32), the input had (1, 32, 64)")
    ended = run_ranks([command] * NUM_RANKS, timeout_s=60)
    for message, one in zip(last_messages([one.stderr for one in ended]), ended, strict=True):
        assert cause in message
        assert one.returncode == 1


@pytest.mark.parametrize("damaged", ["base", "body", "tail"])
def test_a_frame_that_is_damaged_on_the_way(damaged, tmp_path):
    ended = call_on_ranks(NUM_RANKS, damage_a_frame, arguments(tmp_path), damaged, timeout_s=60)
    for message, one in zip(last_messages([one.stderr for one in ended]), ended, strict=True):
        # What the frame was for is as uncertain as the rest of it; its rank had got as far as the one before.
        assert re.search(
            r"rank 2, stage 2, micro-batch 2: link layer:1:node1->node2, frame 3: the checksum does not match",
            message,
        )
        assert one.returncode == 1


def damage_a_frame(rank, command, damaged):
    """Rank 1 changes a bit of its fourth frame, just before it is sent."""
    import run_pipeline
    from pipeline.comm.mailbox import PeerOutbox
    from pipeline.comm.wire import BASE_NBYTES

    post, posted = PeerOutbox.post, []

    def damaging_post(self, buffer, nbytes, device_nbytes):
        posted.append(nbytes)
        if len(posted) == 4:
            buffer.host[{"base": BASE_NBYTES - 2, "body": nbytes // 2, "tail": nbytes - 1}[damaged]] ^= 4
        post(self, buffer, nbytes, device_nbytes)

    if rank == 1:
        PeerOutbox.post = damaging_post
    return run_pipeline.main(command)


@pytest.mark.parametrize(
    ("rank", "more"),
    [
        *((rank, ()) for rank in range(NUM_RANKS)),
        # Rank 0 waits to send, since as many passes are in flight as the links hold.
        (1, ("--set", "runtime.in_flight=7", "--set", "runtime.receives_ahead=1")),
    ],
)
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(rank, more, tmp_path):
    command = arguments(tmp_path, "--compressor", f"tests.helpers.bad_codecs:Hanging(rank={rank})", *more)
    start_s = time.monotonic()
    ended = run_ranks([command] * NUM_RANKS, timeout_s=60)
    cause = f"the others wait for rank {rank} (last at stage {rank}, micro-batch {DUE - 2}), or "
    if rank == 0:  # which times the passes, and knows that it is busy itself
        cause = f"rank 0, stage 0, micro-batch {DUE - 2}: at it for {TIMEOUT_S:g} s, or "
    for message, one in zip(last_messages([one.stderr for one in ended]), ended, strict=True):
        assert cause in message
        assert one.returncode == 1
    running_s = max(one.wall_s for one in ended) - min(one.wall_s for one in ended)
    assert running_s < SLACK_S
    assert time.monotonic() - start_s < TIMEOUT_S + 4 * SLACK_S  # with the start


@pytest.mark.parametrize("signal_name", ["SIGSTOP", "SIGKILL"])
def test_the_process_that_hosts_the_store_is_lost(signal_name, tmp_path):
    """As when torchrun itself is stopped or killed: its ranks are in sessions of their own and live on."""
    with store_process() as (host, env):
        with start_ranks([arguments(tmp_path)] * NUM_RANKS, env=env) as ranks:
            wait_until(lambda: num_finished(tmp_path) > 0)
            os.kill(host.pid, signal.Signals[signal_name])
            start_s = time.monotonic()
            ended = ranks.wait(60)
            assert time.monotonic() - start_s < TIMEOUT_S + SLACK_S
    cause = "has ended" if signal_name == "SIGKILL" else f"has not answered for {TIMEOUT_S:g} s"
    for message, one in zip(last_messages([one.stderr for one in ended]), ended, strict=True):
        assert re.search(rf"rank (\d) stops: rank \1, .*: torchrun's rendezvous store {cause}", message)
        assert one.returncode == 1


@pytest.mark.parametrize(
    "codec",
    [
        # Holds the interpreter lock, and with it the heartbeat, for most of the timeout.
        f"Slow(rank=1, seconds={TIMEOUT_S * 2 / 3})",
        # Loads for longer than the timeout, while the others wait.
        f"SlowToLoad(rank=2, seconds={TIMEOUT_S * 4 / 3})",
    ],
)
def test_a_slow_rank_is_no_alarm(codec, tmp_path, uninterrupted):
    command = arguments(tmp_path, "--compressor", f"tests.helpers.bad_codecs:{codec}")
    for one in run_ranks([command] * NUM_RANKS):
        one.check()
    assert outcome(tmp_path) == uninterrupted


def test_a_rank_hears_at_once_that_nothing_more_comes(tmp_path):
    """Rank 0 decodes for longer than the timeout after its first stage has sent its last frame."""
    slow = f"tests.helpers.bad_codecs:SlowToDecode(rank=0, seconds={0.3 * TIMEOUT_S})"
    codecs = json.dumps({"layer:4:node3->node0": slow})
    command = arguments(tmp_path, "--stride", "64", "--first_k_tokens", "400", "--set", f"compressor_per_link={codecs}")
    for one in run_ranks([command] * NUM_RANKS):
        one.check()
        assert one.wall_s > 2 * TIMEOUT_S


def test_a_rank_that_starts_late_is_no_alarm(tmp_path, uninterrupted):
    for one in call_on_ranks(NUM_RANKS, start_late, arguments(tmp_path), TIMEOUT_S + 1):
        one.check()
    assert outcome(tmp_path) == uninterrupted


def start_late(rank, command, delay_s):
    import run_pipeline

    if rank == 1:
        time.sleep(delay_s)
    return run_pipeline.main(command)


def test_torchrun_starts_the_ranks_anew(tmp_path, uninterrupted):
    """As --max_restarts does: the same command, which goes on with what was finished."""
    repaired = {"BAD_CODEC_REPAIRED": str(tmp_path / "repaired")}
    command = arguments(tmp_path / "runs", "--compressor", "tests.helpers.bad_codecs:Raising(rank=1)")
    assert {one.returncode for one in run_ranks([command] * NUM_RANKS, env=repaired)} == {1}
    (tmp_path / "repaired").touch()
    for one in run_ranks([command] * NUM_RANKS, env={**repaired, "TORCHELASTIC_RESTART_COUNT": "1"}):
        one.check()
    assert outcome(tmp_path / "runs") == uninterrupted
    assert num_resent(tmp_path / "runs") > 0


def test_a_resumed_run_says_what_else_it_ran_on(tmp_path):
    repaired = {"BAD_CODEC_REPAIRED": str(tmp_path / "repaired")}
    command = arguments(tmp_path / "runs", "--compressor", "tests.helpers.bad_codecs:Raising(rank=0)")
    one_thread, two_threads = (["--set", f"runtime.threads={n}"] for n in (1, 2))
    assert run_alone(*command, *one_thread, env={**repaired, "RANK": "0"}).returncode == 1
    (tmp_path / "repaired").touch()
    resumed = run_alone(*command, *two_threads, "--resume", env={**repaired, "RANK": "0"}).check()
    (path,) = (tmp_path / "runs").glob("*.json")
    record = read_record(path)
    ((first, before), (second, now)) = ((s.from_microbatch, s.others["threads"]) for s in record.resumed.environments)
    assert (first, before, now, record.environment["threads"]) == (0, "1", "2", "2") and second > 0
    told = f"micro-batches from {second} on ran on something else than those before, which may change losses: threads 2"
    assert any(note.startswith(told) for note in record.notes) and told in resumed.stderr


@pytest.mark.parametrize("damage", ["held", "damaged"])
def test_a_journal_in_the_way_is_found_before_weights_load(damage, tmp_path):
    repaired = {"BAD_CODEC_REPAIRED": str(tmp_path / "repaired"), "RANK": "0"}
    command = arguments(tmp_path / "runs", "--compressor", "tests.helpers.bad_codecs:Raising(rank=0)")
    run_alone(*command, env=repaired)
    (path,) = (tmp_path / "runs").glob("*.journal")
    with open(path, "r+b") as file:
        if damage == "held":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            file.write(b"x" * 60 + b"\n")
            file.flush()
        (ended,) = call_on_ranks(1, run_without_weights, [*command, "--resume"], env=repaired, distributed=False)
    (message,) = last_messages([ended.stderr])
    cause = {"held": "is still going on: wait for its end", "damaged": "is damaged; delete the file to start over"}
    assert ended.returncode == 1 and str(path) in message and cause[damage] in message


def run_without_weights(rank, command):
    import run_pipeline
    from pipeline.runtime import deployment

    def load(*_, **__):
        raise AssertionError("weights are loaded")

    deployment.load_stage = load
    return run_pipeline.main(command)


def test_a_disk_without_room_for_the_record(tmp_path, uninterrupted):
    """Every micro-batch was finished: nothing is left to send."""
    ended = call_on_ranks(NUM_RANKS, run_out_of_room_at_the_record, arguments(tmp_path))
    for message in last_messages([one.stderr for one in ended]):
        assert re.search(r"rank 0, collecting results: the record .* cannot be written: .*File too large", message)
        assert RESUME_HINT in message
    assert list(tmp_path.glob("*.json")) == []
    for one in run_ranks([arguments(tmp_path, "--resume")] * NUM_RANKS):
        one.check()
    assert outcome(tmp_path) == uninterrupted
    assert num_resent(tmp_path) == 0


def run_out_of_room_at_the_record(rank, command):
    import run_pipeline
    from pipeline.evaluation import recorder as head

    write_record = head.write_record

    def write_to_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        return write_record(*arguments)

    head.write_record = write_to_a_full_disk
    return run_pipeline.main(command)
