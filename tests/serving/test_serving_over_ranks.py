"""The endpoint on four ranks: the answers of one process, and an end that any rank can ask for."""

import concurrent.futures
import signal

import pytest

from tests.helpers.launch import store_process
from tests.helpers.serving import serving


def ask(server, number):
    options = {"model": "tiny-chat", "max_tokens": 20, "seed": number, "temperature": number % 2, "stream": True}
    chunks = server.client().completions.create(prompt=f"The canal {number % 3}", **options)
    return "".join(chunk.choices[0].text for chunk in chunks)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("alone")) as server:
        return [ask(server, number) for number in range(8)]


def test_answers_are_those_of_one_process(alone, tmp_path):
    """And SIGINT at rank 2 alone lets rank 0 finish what is under way."""
    with serving(tmp_path, num_ranks=4) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert [*pool.map(lambda number: ask(server, number), range(8))] == alone
            late = pool.submit(ask, server, 0)
            server.wait_for("thinwire_slots_in_use", 1)
            server.signal(signal.SIGINT, rank=2)
            assert late.result() == alone[0]
        finished = server.ranks.wait(60)
    assert [one.returncode for one in finished] == [130] * 4, finished[0].stderr
    assert "dropped" not in finished[0].stderr and len(list(tmp_path.glob("*.json"))) == 1


def test_answers_go_on_when_a_rank_is_started_again(alone, tmp_path):
    """Clients keep their connections meanwhile."""
    settings = ("runtime.rejoin_s=100", "runtime.timeout_s=30")
    with store_process() as (_, env), serving(tmp_path, *settings, num_ranks=4, env=env) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, server, number) for number in range(8)]
            server.wait_for("thinwire_slots_in_use", 2, or_more=True)
            server.signal(signal.SIGKILL, rank=2)
            while not all(answer.done() for answer in answers):
                server.ranks.restart_failed()
                concurrent.futures.wait(answers, timeout=0.05)
            assert [answer.result() for answer in answers] == alone
        server.signal()
        finished = server.ranks.wait(60)
    assert [one.returncode for one in finished] == [130] * 4
