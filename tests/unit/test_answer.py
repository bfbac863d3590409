"""An answer while it comes: why it ends, and what it says of its times."""

import itertools
import json

import pytest

from pipeline.generation import answer as module
from pipeline.generation.answer import Answer, quantile, refusal_line
from pipeline.generation.requests import RefusedRequest, Request
from pipeline.models.sampling import Sampled, SamplingOptions
from tests.unit.test_text_stream import KINDS, whole

EURO = (0xE2, 0x82, 0xAC)  # token ids of its bytes


def asked(*, stop=(), max_new_tokens=4, on_finish=lambda answer: None, **options):
    """Of a tokenizer whose byte tokens have no text before a token of another kind comes."""
    request = Request(
        line=1,
        text="?",
        prompt_ids=(1,),
        max_new_tokens=max_new_tokens,
        sampling=SamplingOptions(),
        stop=stop,
        eos_ids=(),
        deadline_s=None,
        **{"logprobs": None, **options},
    )
    answer = Answer(request, KINDS["gemma"](), link_names=["a", "b"], on_finish=on_finish)
    answer.begin()
    return answer


def give(answer, ids, *, tokens_per_pass=1):
    for place, token_id in enumerate(ids):
        was_draft = place % tokens_per_pass > 0
        if not was_draft:
            answer.count([0, 0], brings_tokens=True)
        answer.take(Sampled(token_id, -0.5, ((token_id, -0.5), (7, -2.0))), was_draft=was_draft)


LETTER = KINDS["gemma"]().convert_tokens_to_ids("a")


@pytest.mark.parametrize("stop, text, reason", [(("€",), "a", "stop"), ((), "a€", "length"), (("b",), "a€", "length")])
def test_a_stop_string_in_text_that_waited_for_its_next_token(stop, text, reason):
    answer = asked(stop=stop)
    give(answer, [LETTER, *EURO])
    assert (answer.text, answer.finish_reason) == (text, reason)
    assert whole(KINDS["gemma"](), answer.token_ids) == "a€"


@pytest.mark.parametrize("reason, error, expected", [("deadline", None, "stop"), ("error", "no bits", "error")])
def test_such_a_stop_string_ends_an_answer_that_has_run_out_of_time_but_hides_no_error(reason, error, expected):
    answer = asked(stop=("€",), max_new_tokens=9)
    give(answer, [LETTER, *EURO])
    assert not answer.is_finished
    answer.finish(reason, error)
    assert (answer.text, answer.finish_reason, answer.error) == ("a", expected, error)


def test_times_by_hand(monkeypatch):
    """Asked at 10, a slot at 11, tokens at 13.5, 14, 16 and 16.5."""
    times = itertools.chain([10.0, 11.0, 13.5, 14.0, 16.0, 16.5])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    answer = asked()
    give(answer, [LETTER] * 4)
    line = answer.as_line()
    assert (line["queued_s"], line["ttft_s"]) == (1.0, 2.5)
    assert answer.token_gaps_s == [0.5, 2.0, 0.5] and line["tpot_s"] == {"median": 0.5, "p95": 2.0}
    assert (line["num_passes"], line["num_drafts_accepted"]) == (4, 0)


def test_tokens_of_one_pass_share_its_time(monkeypatch):
    """The first token at 3; two at 5, and two at 9."""
    times = itertools.chain([1.0, 2.0, 3.0, 5.0, 5.0, 9.0, 9.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    answer = asked(max_new_tokens=9)
    give(answer, [LETTER])
    answer.count([5, 5], brings_tokens=False)
    give(answer, [LETTER] * 4, tokens_per_pass=2)
    answer.count([5, 5], brings_tokens=True)  # that another has ended before
    assert answer.token_gaps_s == [1.0, 1.0, 2.0, 2.0]
    answer.finish("deadline")
    line = answer.as_line()
    assert (line["num_passes"], line["num_drafts_accepted"], line["ttft_s"]) == (4, 2, 1.0)


@pytest.mark.parametrize("share, expected", [(0.5, 10), (0.95, 19), (0.951, 20), (1.0, 20), (0.0, 1)])
def test_a_quantile_is_a_value_that_was_there(share, expected):
    assert quantile(range(20, 0, -1), share) == expected


def test_bytes_are_added_up_link_by_link():
    answer = asked()
    answer.count([10, 1], brings_tokens=False)
    answer.count([2.5, 0.25], brings_tokens=True)
    assert answer.bytes_per_link == {"a": 12.5, "b": 1.25}


def test_passes_and_accepted_drafts_are_counted_before_it_ends():
    told = []
    answer = asked(on_finish=lambda answer: told.append((answer.num_passes, answer.num_drafts_accepted)))
    give(answer, [LETTER])
    answer.count([1, 1], brings_tokens=True)
    for was_draft in (True, True, False):
        answer.take(Sampled(LETTER, -0.5), was_draft=was_draft)
    assert told == [(2, 2)]


def test_log_probabilities_are_told_where_they_are_asked_for():
    silent, told = asked(), asked(logprobs=2)
    for answer in (silent, told):
        give(answer, [LETTER] * 2)
    assert silent.as_line()["logprobs"] is None
    assert json.loads(json.dumps(told.as_line()["logprobs"])) == {
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [[[LETTER, -0.5], [7, -2.0]]] * 2,
    }


def test_a_refusal_has_the_keys_of_an_answer():
    answer = asked()
    answer.finish("error", "x")
    assert refusal_line(RefusedRequest(3, "line 3: no")).keys() == answer.as_line().keys()


def test_of_a_prompt_the_log_probabilities_are_told_and_no_token():
    answer = asked(max_new_tokens=0, logprobs=1, scored_from=1)
    assert (answer.scored_from, answer.num_wanted) == (1, 0)
    for token_id in (3, 4):
        answer.take_prompt([Sampled(token_id, -0.5, ((7, -0.25),))])
    answer.finish("length")
    line = answer.as_line()
    assert json.loads(json.dumps(line["prompt_logprobs"])) == {
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [[[7, -0.25]]] * 2,
    }
    assert (line["text"], line["token_ids"], line["ttft_s"], line["tpot_s"]) == ("", [], None, None)
    assert asked().as_line()["prompt_logprobs"] is None
