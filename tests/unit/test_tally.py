"""Requests added up for a record, all of them or the last ones."""

import pytest

from pipeline.generation.answer import refusal_line
from pipeline.generation.record import Tally
from pipeline.generation.requests import RefusedRequest


def line(number, **fields):
    figures = {"error": None, "finish_reason": "length", "num_prompt_tokens": 3, "token_ids": [1, 2], "ttft_s": number}
    return refusal_line(RefusedRequest(number, "no")) | figures | fields


@pytest.mark.parametrize(("max_listed", "listed", "median_s"), [(None, [1, 2, 3, 4], 2.5), (2, [3, 4], 3.5)])
def test_totals_are_of_all_and_figures_of_those_listed(max_listed, listed, median_s):
    tally = Tally(max_listed)
    for number in (1, 2, 3, 4):
        tally.add(line(number), [0.5])
    assert [figures.line for figures in tally.listed] == listed
    results = tally.results(num_taken_over=0, run_s=2.0)
    assert (results.num_requests, results.prompt_tokens, results.generated_tokens) == (4, 12, 8)
    assert (results.tokens_per_s, results.ttft_s.median, results.tpot_s.median) == (4.0, median_s, 0.5)
    assert bool(tally.notes) == (max_listed is not None)


def test_a_request_that_failed():
    tally = Tally()
    tally.add(refusal_line(RefusedRequest(1, "no")))
    results = tally.results(num_taken_over=0, run_s=1.0)
    assert (results.num_requests, results.num_failed, results.ttft_s, results.tpot_s) == (1, 1, None, None)
