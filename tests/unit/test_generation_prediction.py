"""What generating should have taken on an emulated network, by hand."""

import pytest

from pipeline.records.store import read_any
from pipeline.report.generation import GeneratedRun
from pipeline.report.generation_prediction import MAX_SPREAD, predicted_tpot_s, predicted_ttft_s
from tests.helpers.records import PLAN, make_drafts, write_generation_point

NAMES = PLAN.chain_names  # five stages on four nodes, four links
NUM_PASSES = 200  # of sampled tokens


def generated(folder, *, requests=1, prompt=8, rows=1, rate=1e6, delay=0.02, seconds=0.001, header=25, **changes):
    """`rows` of `requests` at a time, each of which takes `NUM_PASSES` passes; a pass takes every stage `seconds`."""
    rounds = requests // rows
    frames, tokens = requests + rounds * NUM_PASSES, requests * (prompt + NUM_PASSES)
    link = {"payload_bytes": 1000 * tokens, "header_bytes": header * frames, "control_bytes": 0}
    link |= {"frames": frames, "tokens": tokens}
    link |= {"bytes_per_token": 1000.0, "header_bytes_per_token": header * frames / tokens}
    spread = {"median": 0.2, "p95": 0.3}
    request = {"finish_reason": "length", "num_prompt_tokens": prompt, "num_tokens": NUM_PASSES + 1, "queued_s": 0.0}
    request |= {"ttft_s": 0.5, "tpot_s": spread, "bytes_per_link": {}, "num_passes": NUM_PASSES}
    request |= {"num_drafts_accepted": 0, "error": None}
    parts = dict.fromkeys(("compute_s", "head_s", "compress_s", "decompress_s"), seconds * rounds * NUM_PASSES / 4)
    stages = {str(s.stage_index): _IDLE | parts for s in PLAN.stages}
    record = {
        "requests": [request | {"line": line + 1} for line in range(requests)],
        "results": {
            "num_requests": requests,
            "num_failed": 0,
            "num_taken_over": 0,
            "prompt_tokens": requests * prompt,
            "generated_tokens": requests * (NUM_PASSES + 1),
            "tokens_per_s": 5.0,
            "ttft_s": {"median": 0.5, "p95": 0.5},
            "tpot_s": spread,
        },
        "stages": stages,
        "traffic_per_link": dict.fromkeys(NAMES, link),
        "codecs_decode": dict.fromkeys(NAMES, {"name": "nf4"}),
        "schedule": _SCHEDULE | {"max_slots": rows},
        "emulation": {
            "links": {name: {"bits_per_s": rate, "delay_s": delay, "jitter_s": 0.0} for name in NAMES},
            "slowdown": [],
        },
    }
    return read_any(write_generation_point(folder, "generation", **(record | changes)))


_IDLE = {"device": "cpu", "importance_s": 0.0, "wait_s": 9.0, "measure_s": 0.0}
_SCHEDULE = {"slot_length": 2048, "prefill_chunk": 256, "passes": 1, "in_flight": 6, "receives_ahead": 6}


def test_one_sequence_computes_crosses_and_waits_for_every_link(tmp_path):
    record = generated(tmp_path)
    network_s = 4 * (8 * 1025 / 1e6 + 0.02)
    # The prompt of 8 tokens has cost between 1 and 8 of 201 to 208 passes.
    compute_s = 5 * 0.001 * (200 / 201 + 200 / 208) / 2
    assert predicted_tpot_s(record) == pytest.approx(network_s + compute_s)
    run = GeneratedRun.of(record)
    assert run.label.endswith(" over 1 Mbit/s, 20 ms") and run.predicted_tpot_s == predicted_tpot_s(record)


def test_the_first_token_waits_for_the_whole_prompt(tmp_path):
    record = generated(tmp_path)
    network_s = 4 * (8 * (8 * 1000 + 25) / 1e6 + 0.02)
    compute_s = 5 * 0.001 * 200 * (1 / 201 + 8 / 208) / 2
    assert predicted_ttft_s(record) == pytest.approx(network_s + compute_s)
    schedule = _SCHEDULE | {"max_slots": 1, "prefill_chunk": 4}
    assert predicted_ttft_s(generated(tmp_path, schedule=schedule)) is None  # in two passes, of which one is missing


def test_unlike_links_count_each_by_itself(tmp_path):
    links = {name: {"bits_per_s": None, "delay_s": 0.0, "jitter_s": 0.0} for name in NAMES}
    links[NAMES[1]] = {"bits_per_s": 1e5, "delay_s": 0.1, "jitter_s": 0.0}
    links[NAMES[3]] = {"bits_per_s": None, "delay_s": 0.3, "jitter_s": 0.05}
    record = generated(tmp_path, emulation={"links": links, "slowdown": []}, seconds=0.0)
    assert predicted_tpot_s(record) == pytest.approx(8 * 1025 / 1e5 + 0.1 + 0.3)


def test_requests_one_after_the_other_are_one_sequence_at_a_time(tmp_path):
    alone, in_turn = (generated(tmp_path, requests=n) for n in (1, 3))
    assert predicted_tpot_s(in_turn) == pytest.approx(predicted_tpot_s(alone))
    assert predicted_ttft_s(in_turn) == pytest.approx(predicted_ttft_s(alone))


def test_rows_share_the_delay_and_add_up_on_the_links(tmp_path):
    record = generated(tmp_path, requests=4, rows=4)
    # Four prompts of 8 tokens have cost between 4 / 4 and 4 * 2 passes of four rows, beside the 200.
    compute_s = 5 * 0.001 * (200 / 201 + 200 / 208) / 2
    assert predicted_tpot_s(record) == pytest.approx(4 * (8 * 4025 / 1e6 + 0.02) + compute_s)
    assert predicted_ttft_s(record) is None  # four prompts follow each other


def test_passes_overlap_until_a_link_is_full(tmp_path):
    """Two passes of two rows: on a thin link each waits for the other's frames, on a far one for its own lap."""
    two = {"requests": 2, "rows": 1, "seconds": 0.0, "header": 0, "schedule": _SCHEDULE | {"max_slots": 2, "passes": 2}}
    assert predicted_tpot_s(generated(tmp_path, rate=1e6, **two)) == pytest.approx(4 * (8e-3 + 0.02))
    links = dict.fromkeys(NAMES, {"bits_per_s": 1e9, "delay_s": 0.0, "jitter_s": 0.0})
    links[NAMES[2]] = {"bits_per_s": 1e5, "delay_s": 0.01, "jitter_s": 0.0}
    thin = generated(tmp_path, emulation={"links": links, "slowdown": []}, **two)
    assert predicted_tpot_s(thin) == pytest.approx(2 * 8000 / 1e5)


@pytest.mark.parametrize(
    "changes",
    [
        {"emulation": None},
        {"codecs_decode": dict.fromkeys(NAMES, {"name": "int8"})},
        {"drafts": make_drafts()},
        {"prompt": 200},  # may have cost as much as all tokens
        {"requests": 4, "rows": 2},  # prompts are under way between tokens of others
        {"requests": 2, "schedule": _SCHEDULE | {"max_slots": 2}},  # rows of one pass, but each went alone
        {"schedule": _SCHEDULE | {"max_slots": 1, "prefill_chunk": 4}},
    ],
)
def test_what_the_record_does_not_tell_is_left_out(tmp_path, changes):
    seconds = {} if changes.get("prompt") is None else {"seconds": 0.1}
    assert predicted_tpot_s(generated(tmp_path)) is not None
    assert predicted_tpot_s(generated(tmp_path, **changes, **seconds)) is None


def test_a_drafter_without_a_draft_changes_nothing(tmp_path):
    silent = {"passes": NUM_PASSES, "void": 0, "tokens": NUM_PASSES, "tokens_per_pass": 1.0}
    silent |= {"rows_by_tokens": [NUM_PASSES], "rows_by_in_flight": [NUM_PASSES]}
    drafters = [{"name": "ngram", "spec": "ngram", "draft_s": 0.0, "by_depth": []}]
    record = generated(tmp_path, drafts=make_drafts(drafters=drafters, **silent))
    assert predicted_tpot_s(record) == predicted_tpot_s(generated(tmp_path)) is not None
    assert predicted_ttft_s(record) == predicted_ttft_s(generated(tmp_path)) is not None
    assert predicted_ttft_s(generated(tmp_path, drafts=make_drafts())) is None


@pytest.mark.parametrize("key", ["num_taken_over", "num_failed"])
def test_answers_of_another_session_and_failures_are_left_out(tmp_path, key):
    record = generated(tmp_path)
    other = record.results.model_copy(update={key: 1})
    assert predicted_tpot_s(record.model_copy(update={"results": other})) is None


def test_what_prompts_cost_may_leave_a_tenth_open(tmp_path):
    known = [generated(tmp_path, prompt=n, rate=None, delay=0.0, seconds=0.01) for n in (20, 24)]
    assert MAX_SPREAD == 0.1 and predicted_tpot_s(known[0]) is not None and predicted_tpot_s(known[1]) is None
