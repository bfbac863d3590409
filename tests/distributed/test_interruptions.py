"""Rings that break while they generate and are formed again: answers are those of a ring that did not.

`benchmarks/broken_rings.py` does it at random moments and many times; here are a few chosen ones. Ranks are started
again as a torchrun of each rank's own would.
"""

import os
import re
import signal
import time
from datetime import timedelta
from random import Random

import pytest
import torch
import torch.distributed as dist

from benchmarks.broken_rings import NUM_RANKS, break_connection, command, differences, read_answers, write_prompts
from pipeline.comm.control import Control, RingBroken
from pipeline.comm.epochs import Epoch
from pipeline.comm.world import World
from pipeline.records.store import read_generation
from tests.helpers.launch import call_on_ranks, run_ranks, start_ranks, start_torchrun, store_process
from tests.helpers.patience import allowed_s

NUM_PROMPTS, NUM_TOKENS = 12, 40


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = write_prompts(folder / "prompts.jsonl", NUM_PROMPTS, NUM_TOKENS)
    for one in run_ranks([command(folder, prompts, rejoin_s=0)] * NUM_RANKS):
        one.check()
    return folder


def words(undisturbed, exp_dir, *more, rejoin_s=60.0):
    given = command(exp_dir, undisturbed / "prompts.jsonl", rejoin_s=rejoin_s)
    return [*given, *(word for setting in more for word in ("--set", setting))]


def wait_until(condition, timeout_s=60):
    deadline = time.monotonic() + allowed_s(timeout_s)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def the_record(folder):
    (path,) = folder.glob("*-generation-*.json")
    return read_generation(path)


def has_answers(folder):
    return lambda: bool(read_answers(folder))


@pytest.mark.parametrize("what", ["a connection", "rank 2", "rank 1 stopped"])
def test_answers_go_on(what, undisturbed, tmp_path):
    more = ["runtime.timeout_s=3"] if "stopped" in what else []
    with store_process() as (_, env), start_ranks([words(undisturbed, tmp_path, *more)] * NUM_RANKS, env=env) as ranks:
        wait_until(has_answers(tmp_path))
        before = ranks.rank_pids()
        if what == "a connection":
            assert break_connection(Random(0), before, env)
        else:
            os.kill(before[2 if what == "rank 2" else 1], signal.SIGKILL if what == "rank 2" else signal.SIGSTOP)
        if "stopped" in what:  # it counts as lost, and is back when it goes on
            wait_until(lambda: "formed again" in ranks.rank_stderr(0))
            os.kill(before[1], signal.SIGCONT)
        if what == "rank 2":
            wait_until(lambda: ranks.restart_failed() == [2])
        for one in ranks.wait(180):
            one.check()
    assert differences(undisturbed, tmp_path, NUM_PROMPTS) == []
    record = the_record(tmp_path)
    assert (record.interruptions.count, record.interruptions.started_again) == (1, False)
    assert record.interruptions.tokens_prefilled_again > 0 and 0 < record.interruptions.pause_s < record.time_run_s
    assert record.results.num_requests == NUM_PROMPTS
    assert any("formed again 1 times" in note for note in record.notes)


def test_answers_go_on_with_a_lossy_codec(undisturbed, tmp_path):
    """It treats a token alike in any frame: what is sent again in a prompt is what was sent alone."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for one in run_ranks([[*words(undisturbed, whole), "--compressor", "hadamard(int4)"]] * NUM_RANKS):
        one.check()
    given = [*words(undisturbed, broken), "--compressor", "hadamard(int4)"]
    with store_process() as (_, env), start_ranks([given] * NUM_RANKS, env=env) as ranks:
        wait_until(has_answers(broken))
        assert break_connection(Random(0), ranks.rank_pids(), env)
        for one in ranks.wait(180):
            one.check()
    assert differences(whole, broken, NUM_PROMPTS) == []
    assert differences(undisturbed, broken, NUM_PROMPTS) != [] and the_record(broken).interruptions.count == 1


def test_answers_go_on_with_drafts(undisturbed, tmp_path):
    """What was assumed is forgotten, and the new ring has drafters of its own."""
    given = words(undisturbed, tmp_path, "generation.draft=ngram", "generation.draft_adapts=false")
    with store_process() as (_, env), start_ranks([given] * NUM_RANKS, env=env) as ranks:
        wait_until(has_answers(tmp_path))
        assert break_connection(Random(0), ranks.rank_pids(), env)
        for one in ranks.wait(180):
            one.check()
    assert differences(undisturbed, tmp_path, NUM_PROMPTS) == []
    assert the_record(tmp_path).interruptions.count == 1


def test_rank_0_is_started_again(undisturbed, tmp_path):
    """It takes over the file of answers; the others keep their weights."""
    with store_process() as (_, env), start_ranks([words(undisturbed, tmp_path)] * NUM_RANKS, env=env) as ranks:
        wait_until(has_answers(tmp_path))
        before = ranks.rank_pids()
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: ranks.restart_failed() == [0])
        assert {rank: pid for rank, pid in ranks.rank_pids().items() if rank} == {r: before[r] for r in (1, 2, 3)}
        for one in ranks.wait(180):
            one.check()
    assert differences(undisturbed, tmp_path, NUM_PROMPTS) == []
    record = the_record(tmp_path)
    assert record.interruptions.started_again and record.results.num_taken_over > 0
    assert record.results.num_requests + record.results.num_taken_over == NUM_PROMPTS
    assert not list(tmp_path.glob("*.old*"))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_text_that_is_shown(rank, undisturbed, tmp_path):
    """It goes on where it was, or, where rank 0 is lost, a line says that it begins anew."""
    given = words(undisturbed, tmp_path, "generation.max_new_tokens=200", "generation.temperature=0.8")
    given[given.index("--generate") + 1] = "the lock"
    with store_process() as (_, env), start_ranks([given] * NUM_RANKS, env=env) as ranks:
        wait_until(lambda: len(ranks.rank_stdout(0)) > 60)
        os.kill(ranks.rank_pids()[rank], signal.SIGKILL)
        wait_until(lambda: ranks.restart_failed() == [rank])
        for one in ranks.wait(180):
            one.check()
        shown = ranks.rank_stdout(0)
    (answer,) = read_answers(tmp_path)
    assert len(answer["token_ids"]) == 200
    line = "[rank 0 was started again; an answer that was not finished begins anew]\n"
    before, marker, after = shown.rpartition(line)
    assert bool(marker) == (rank == 0) and after.startswith(f"the lock{answer['text']}\n")
    # What was shown, and the end of its line; the text may have had one of its own there.
    assert not marker or before.endswith("\n") and f"the lock{answer['text']}".startswith(before[:-1])


def test_a_rank_that_does_not_come_back_ends_the_run(undisturbed, tmp_path):
    with store_process() as (_, env), start_ranks(
        [words(undisturbed, tmp_path, rejoin_s=2.0)] * NUM_RANKS, env=env
    ) as ranks:
        wait_until(has_answers(tmp_path))
        os.kill(ranks.rank_pids()[3], signal.SIGKILL)
        ended = ranks.wait(90)
    for one in ended[:3]:
        assert one.returncode == 1 and "rank 3 (not started) did not come within 2 s (runtime.rejoin_s)" in one.stderr
        assert len(re.findall(r"^rank \d stops: ", one.stderr, re.MULTILINE)) == 1


def test_who_is_back_first_waits_for_other_lost_ranks_as_long_as_all(undisturbed, tmp_path):
    with store_process() as (_, env):
        store = dist.PrefixStore("thinwire", dist.TCPStore("127.0.0.1", int(env["MASTER_PORT"]), is_master=False))
        for rank in range(NUM_RANKS):
            Epoch.enter(store, rank)  # all have been there before
        env |= {"WORLD_SIZE": str(NUM_RANKS), "LOCAL_WORLD_SIZE": str(NUM_RANKS)}
        given = words(undisturbed, tmp_path, "runtime.load_timeout_s=3", rejoin_s=5.0)
        for one in run_ranks([given] * (NUM_RANKS - 1), env=env):
            assert one.returncode == 1
            assert "rank 3 (not started) did not come within 5 s (runtime.rejoin_s)" in one.stderr


def end_while_connecting(rank):
    control = Control(World.from_environment(), timeout_s=20, load_timeout_s=60, interface=None, rejoin_s=60.0)
    init = dist.init_process_group

    def init_and_end(*arguments, **named):
        init(*arguments, **named)
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        dist.PrefixStore("thinwire", store).compare_set("epoch", "0", "1")
        wait_until(lambda: control.watchdog.epoch_is_over)

    dist.init_process_group = init_and_end
    with pytest.raises(RingBroken, match="before it was whole") as broken:
        control.form()
    dist.init_process_group = init
    control.leave_ring(broken.value, None)
    control.form()
    control.close()


def test_an_epoch_that_ends_while_ranks_connect():
    """Its end is told once, and might find no connection to be broken."""
    for one in call_on_ranks(2, end_while_connecting):
        one.check()


def connect_after_a_failure(rank):
    control = Control(World.from_environment(), timeout_s=10, load_timeout_s=60, interface=None, rejoin_s=60.0)
    control.form()
    control.barrier()
    control.leave_ring(RingBroken("broken"), None)
    if rank == 0:
        with pytest.raises(RuntimeError):  # nobody comes
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=1))
    control.form()
    control.close()


def test_ranks_of_which_some_could_not_connect_meet_again():
    for one in call_on_ranks(2, connect_after_a_failure):
        one.check()


def connect_pairs(rank):
    control = Control(World.from_environment(), timeout_s=20, load_timeout_s=60, interface=None, rejoin_s=60.0)
    for again in (False, True):
        control.form()
        groups = control.connect([(0, 1), (1, 2), (2, 0), (1, 0), (1, 1)])
        members = {other: dist.get_process_group_ranks(group) for other, group in groups.items()}
        assert members == {other: sorted((rank, other)) for other in range(3) if other != rank}
        control.barrier()
        if not again:
            control.leave_ring(RingBroken("broken"), None)
    with pytest.raises(RuntimeError):
        control.break_connections()
        dist.recv(torch.zeros(1), (rank + 1) % 3, groups[(rank + 1) % 3])
    control.close()


def test_no_third_rank_shares_the_group_of_two_that_a_link_joins():
    """In a larger one a send over a lost connection may never return: Gloo then waits for itself."""
    for one in call_on_ranks(3, connect_pairs):
        one.check()


def interrupted_between_epochs(rank, moment):
    """Rank 1 is in the next epoch, or has just ended the one that rank 0's main thread has not left."""
    control = Control(World.from_environment(), timeout_s=10, load_timeout_s=60, interface=None, rejoin_s=60.0)
    control.form()
    control.barrier()
    if rank == 0:
        if moment == "after":
            wait_until(lambda: control.watchdog.epoch_is_over)
        control.watchdog.abort(KeyboardInterrupt())
    if moment == "before":
        wait_until(lambda: not control.may_form_again(RingBroken("broken")))
    try:
        control.leave_ring(RingBroken("broken"), None)
        control.form()
    except RingBroken as e:
        control.watchdog.abort(e)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_between_two_rings_ends_all_ranks(moment):
    first, second = call_on_ranks(2, interrupted_between_epochs, moment, timeout_s=30)
    assert first.returncode == 130 and second.returncode == 1
    assert "rank 0, starting: interrupted" in first.stderr and "rank 0, starting: interrupted" in second.stderr


def test_ctrl_c_during_the_pause(undisturbed, tmp_path):
    with store_process() as (_, env), start_ranks([words(undisturbed, tmp_path)] * NUM_RANKS, env=env) as ranks:
        wait_until(has_answers(tmp_path))
        os.kill(ranks.rank_pids()[3], signal.SIGKILL)
        wait_until(lambda: "formed again" in ranks.rank_stderr(0))
        os.kill(ranks.rank_pids()[0], signal.SIGINT)
        ended = ranks.wait(90)
    assert ended[0].returncode == 130
    assert all("interrupted" in one.stderr for one in ended[:3])


def test_a_rank_that_comes_back_with_another_config_ends_the_run(undisturbed, tmp_path):
    """What ranks agree on at the start is agreed on again."""
    config = tmp_path / "config.yaml"
    config.write_text("compressor: none\n")
    commands = [["--config", str(config), *words(undisturbed, tmp_path)]] * NUM_RANKS
    with store_process() as (_, env), start_ranks(commands, env=env) as ranks:
        wait_until(has_answers(tmp_path))
        config.write_text("compressor: bf16\n")
        os.kill(ranks.rank_pids()[2], signal.SIGKILL)
        wait_until(lambda: ranks.restart_failed() == [2])
        ended = ranks.wait(120)
    assert all(one.returncode == 1 and "was started with another config: compressor" in one.stderr for one in ended)


def test_a_rank_that_had_not_joined_before_all_were_started_again(undisturbed, tmp_path):
    """Without `rejoin_s`: it is no member of an epoch of those that have ended, whose cause it must not read either."""
    with store_process() as (_, env):
        store = dist.TCPStore("127.0.0.1", int(env["MASTER_PORT"]), is_master=False)
        left_over = dist.PrefixStore("thinwire", store)
        Epoch.enter(left_over, 0)  # the rank of a first attempt that the others never met
        dist.PrefixStore("watch", dist.PrefixStore("0", left_over)).set("cause", "of the first attempt")
        again = {**env, "TORCHELASTIC_RESTART_COUNT": "1"}
        for one in run_ranks([words(undisturbed, tmp_path, rejoin_s=0)] * NUM_RANKS, env=again):
            one.check()
    assert differences(undisturbed, tmp_path, NUM_PROMPTS) == []


def test_who_has_left_the_ring_while_the_run_ended_does_not_wait_for_it(undisturbed, tmp_path):
    """The last rank may find all others at the end although one of them has been started again since."""
    with store_process() as (_, env):
        store = dist.PrefixStore("thinwire", dist.TCPStore("127.0.0.1", int(env["MASTER_PORT"]), is_master=False))
        env |= {"WORLD_SIZE": str(NUM_RANKS), "LOCAL_WORLD_SIZE": str(NUM_RANKS)}
        with start_ranks([words(undisturbed, tmp_path)] * (NUM_RANKS - 1), env=env) as ranks:
            wait_until(lambda: store.check([f"0/gather/1/{rank}" for rank in range(NUM_RANKS - 1)]))
            store.set("finished", "")
            for one in ranks.wait(30):
                one.check()
                assert "the run has come to its end meanwhile" in one.stderr


@pytest.mark.slow
def test_a_ring_that_breaks_again_and_again_without_a_token_ends_the_run(undisturbed, tmp_path):
    given = words(undisturbed, tmp_path, "model.dtype=fp32", "compressor=tests.helpers.bad_codecs:Dying(rank=2)")
    num_deaths = 0
    with store_process() as (_, env), start_ranks([given] * NUM_RANKS, env=env) as ranks:
        while 0 in ranks.rank_pids():
            if list(ranks.rank_pids()) == [0, 1, 3]:
                num_deaths += ranks.restart_failed() == [2]
            time.sleep(0.02)
        ended = ranks.wait(180)
    assert "the ring was formed 5 times in a row without a new token; at last: link " in ended[0].stderr
    assert [one.returncode for one in ended[:2]] == [1, 1] and num_deaths in (5, 6)


@pytest.mark.slow
def test_one_torchrun_starts_all_ranks_again(undisturbed, tmp_path):
    with start_torchrun(NUM_RANKS, *words(undisturbed, tmp_path), more=["--max_restarts=3"]) as torchrun:
        wait_until(has_answers(tmp_path), timeout_s=120)
        before = read_answers(tmp_path)
        os.kill(torchrun.rank_pids()[1], signal.SIGKILL)
        torchrun.wait(240).check()
    assert differences(undisturbed, tmp_path, NUM_PROMPTS) == []
    assert read_answers(tmp_path)[: len(before)] == before
    assert the_record(tmp_path).interruptions.started_again


def test_standard_input_is_not_lost_without_a_word(undisturbed, tmp_path):
    """As torchrun starts the same command again: the store knows that there was one before."""
    given = [*words(undisturbed, tmp_path)[:-1], "-"]
    with store_process() as (_, env):
        ended = [run_ranks([given] * NUM_RANKS, env=env)[0] for _ in range(2)]
    assert "there is no line in it" in ended[0].stderr  # forked ranks have an empty one
    assert "cannot read standard input once more" in ended[1].stderr
    assert [one.returncode for one in ended] == [1, 1]
