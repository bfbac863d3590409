"""How an emulated network is called."""

import pytest

from pipeline.partition.plan import default_plan
from pipeline.records.labels import chain_names, emulation_label, emulation_labels, network_text, slowdown_text
from pipeline.records.run_record import Emulation
from tests.helpers.records import PLAN, make_record

CHAIN = PLAN.chain_names


def link(rate=None, delay=0.0, jitter=0.0):
    return {"bits_per_s": rate, "delay_s": delay, "jitter_s": jitter}


def emulation(links, slowdown=()):
    return Emulation.from_plain({"links": links, "slowdown": slowdown})


@pytest.mark.parametrize(
    ("links", "slowdown", "expected"),
    [
        (dict.fromkeys(CHAIN, link(1e7, 0.02)), (), "over 10 Mbit/s, 20 ms"),
        (dict.fromkeys(CHAIN, link(1e7)), (1.0,) * 4, "over 10 Mbit/s"),
        (dict.fromkeys(CHAIN, link(None, 0.05, 0.005)), (), "over 50 ± 5 ms"),
        (dict.fromkeys(CHAIN, link(None, 0.0, 0.0015)), (), "over 0 ± 1.5 ms"),
        (dict.fromkeys(CHAIN, link(2.5e9)), (), "over 2.5 Gbit/s"),
        (dict.fromkeys(CHAIN, link(64e3)), (), "over 64 kbit/s"),
        (dict.fromkeys(CHAIN, link(300.0)), (), "over 300 bit/s"),
        ({CHAIN[0]: link(1e6), CHAIN[2]: link(1e6)}, (), "over 1 Mbit/s on 2 of 4 links"),
        (dict.fromkeys(CHAIN, link(1e7)) | {CHAIN[1]: link(1e6)}, (), "over 4 unlike links"),
        ({}, (1.0, 1.0, 3.0, 1.5), "nodes x1 x1 x3 x1.5"),
        (dict.fromkeys(CHAIN, link(1e7)), (1.0, 1.0, 3.0, 1.0), "over 10 Mbit/s, nodes x1 x1 x3 x1"),
    ],
)
def test_what_was_emulated_has_a_short_name(links, slowdown, expected):
    assert emulation_label(emulation(links, slowdown), CHAIN) == expected


def test_nothing_has_no_name():
    assert emulation_label(None, CHAIN) == network_text(None, CHAIN) == slowdown_text(None) == ""


def test_links_that_differ_are_named_one_by_one():
    unlike = emulation({CHAIN[0]: link(1e6), CHAIN[1]: link(None, 0.02)})
    assert network_text(unlike, CHAIN) == f"{CHAIN[0]}: 1 Mbit/s; {CHAIN[1]}: 20 ms"
    assert network_text(emulation(dict.fromkeys(CHAIN, link(1e6))), CHAIN) == "1 Mbit/s"


def test_the_link_of_results_belongs_to_the_chain():
    plan = default_plan(8, 4, wrap=False)
    record = make_record(plan=plan, emulation={"links": dict.fromkeys(plan.chain_names, link(1e6)), "slowdown": []})
    assert chain_names(record) == plan.chain_names and plan.chain_names[-1].startswith("result:")
    assert emulation_label(record.emulation, chain_names(record)) == "over 1 Mbit/s"
    without = emulation(dict.fromkeys(plan.chain_names[:-1], link(1e6)))
    assert emulation_label(without, plan.chain_names) == "over 1 Mbit/s on 3 of 4 links"


def test_unlike_links_are_told_apart_where_they_stand_together():
    first = {"links": dict.fromkeys(CHAIN, link(1e7)) | {CHAIN[0]: link(1e6)}, "slowdown": []}
    second = {"links": dict.fromkeys(CHAIN, link(1e7)) | {CHAIN[1]: link(1e6)}, "slowdown": []}
    records = [make_record(), make_record(emulation=first), make_record(emulation=second)]
    labels = emulation_labels(records)
    assert labels[0] == "" and len(set(labels)) == 3
    assert labels[1].startswith(f"over {CHAIN[0]}: 1 Mbit/s; {CHAIN[1]}: 10 Mbit/s; ")
    assert emulation_labels(records[:2]) == ["", "over 4 unlike links"]
