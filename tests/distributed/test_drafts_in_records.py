"""What a run's record says of its drafts is what its answers say, and a report shows it."""

import re

import pytest

from pipeline.records.store import read_generation
from pipeline.report.summary import print_summary
from tests.distributed.test_drafts import NUM_TOKENS, generate, known
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Answers and folders without drafts, and with drafts of which six in ten are right."""
    folder, model = tmp_path_factory.mktemp("drafts"), tiny_model()
    plain, _ = generate(model, folder / "plain")
    drafted, _ = generate(model, folder / "drafted", drafts=known(folder, model, plain))
    return (plain, folder / "plain"), (drafted, folder / "drafted")


def the_record(folder):
    (path,) = folder.glob("*-generation-*.json")
    return read_generation(path)


def test_without_a_drafter_each_token_has_a_pass(runs):
    record = the_record(runs[0][1])
    assert record.drafts is None
    for request in record.requests:
        assert (request.num_passes, request.num_drafts_accepted) == (request.num_tokens, 0)


def test_counts_are_those_of_the_answers(runs):
    answers, folder = runs[1]
    record = the_record(folder)
    drafts, requests = record.drafts, record.requests
    assert sum(NUM_TOKENS) == record.results.generated_tokens == drafts.tokens + len(requests)
    assert drafts.num_right == sum(request.num_drafts_accepted for request in requests) > 0
    # A prompt's last pass brings the first token, and a pass of no use none.
    assert drafts.passes - drafts.void == sum(request.num_passes for request in requests) - len(requests)
    assert drafts.void > 0 and drafts.num_right < drafts.num_judged
    assert drafts.limits.model_dump() == {"depth": 4, "passes": 3, "adapts": False}
    (drafter,) = drafts.drafters
    assert drafter.spec.startswith("tests.helpers.drafters:Knowing(") and drafter.by_depth[0].judged > 0
    assert {(r.num_passes, r.num_drafts_accepted) for r in requests} == {
        (a["num_passes"], a["num_drafts_accepted"]) for a in answers.values()
    }


def test_the_console_shows_them(runs, capsys):
    print_summary([folder for _, folder in runs])
    console = capsys.readouterr().out
    drafts = the_record(runs[1][1]).drafts
    assert "tokens/pass" in console.splitlines()[0]
    assert re.search(rf" {drafts.tokens_per_pass:.2f} .* {drafts.void / drafts.passes:.1%} ", console)
