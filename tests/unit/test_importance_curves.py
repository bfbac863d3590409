import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.records.run_record import CodecConfig
from pipeline.report.importance_curves import collect, plot_curves
from tests.helpers.records import HIDDEN_SIZE, PLAN, make_record


def record(codec, bits, ppl, *, metric=None, fraction=None, seed=0, model="tiny", options=None):
    """A record of nine windows; `options` change those of `token_mixed`, or are all of them where they are empty."""
    config = {"name": codec}
    if metric:
        own = {"metric": metric, "fraction": fraction, "high": {"name": "int8"}, "low": {"name": "int4"}}
        config = {"name": "token_mixed"} | (own | options if options else own if options is None else {})
    return make_record(
        codec,
        run_id=f"{codec}-{metric}-{fraction}-{seed}",
        args={"model_name": model, "config": {"importance": {"seed": seed}}},
        model={"checkpoint_fingerprint": model},
        codecs={link.name: config for link in PLAN.links},
        causal=metric in (None, "random"),
        nbytes=round(bits * HIDDEN_SIZE / 8),
        results={"avg_ppl": ppl, "total_loss_tokens": 90},
    )


def files(folder, records):
    return [(folder / f"{r.run_id}.json", r) for r in records]


RECORDS = [
    record("none", 32.0, 10.0),
    *(record(f"int{n}", float(n), ppl) for n, ppl in ((4, 80.0), (6, 20.0), (8, 11.0))),
    record("token_mixed", 5.0, 60.0, metric="random", fraction=0.25),
    record("token_mixed", 5.0, 54.0, metric="random", fraction=0.25, seed=1),
    record("token_mixed", 5.0, 30.0, metric="norm", fraction=0.25),
    record("nf4", 4.5, 12.0),
]


def test_ratios_are_against_random_and_interpolated_uniform_bits(tmp_path):
    curves = collect(files(tmp_path, RECORDS))
    points = {(p.metric, p.seed): p for p in curves.points}
    norm = points["norm", None]
    assert norm.ppl_over_uniform_bits == pytest.approx(30 / np.sqrt(80 * 20))
    assert norm.ppl_over_random == pytest.approx(30 / np.sqrt(60 * 54))
    assert norm.ppl_over_none == 3.0
    assert curves.mean_log_ratio["random"].ppl_over_random == pytest.approx(0, abs=1e-12)
    assert [u.bits_per_value for u in curves.uniform] == [4, 6, 8]  # nf4 is of another family
    assert not norm.causal and points["random", 0].causal
    json.dumps(curves.model_dump(), allow_nan=False)


def test_settings_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="several models"):
        collect(files(tmp_path, [*RECORDS, record("int8", 8.0, 9.0, model="other")]))


def test_a_folder_without_choices_is_named(tmp_path):
    with pytest.raises(ValueError, match="token_mixed"):
        collect(files(tmp_path, RECORDS[:4]))


def test_figure(tmp_path):
    plot_curves(collect(files(tmp_path, RECORDS)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def write_per_token(path, loss):
    window = np.repeat(np.arange(9, dtype=np.int32), 10)
    save_file({"loss": loss, "top1": np.zeros(90, np.int32), "window": window}, path)


def test_intervals_are_paired_with_the_first_random_choice(tmp_path):
    base = np.random.default_rng(0).random(90, np.float32)
    records = []
    for one in RECORDS:
        if one.run_id.startswith("token_mixed"):
            change = -0.1 if "norm" in one.run_id else 0.5 * one.run_id.endswith("-1")
            loss = base + np.float32(change)
            write_per_token(tmp_path / f"{one.run_id}.safetensors", loss)
            ppl = float(np.exp(loss.mean(dtype=np.float64)))
            one = one.model_copy(update={"results": one.results.model_copy(update={"avg_ppl": ppl})})
        records.append(one)
    curves = collect(files(tmp_path, records))
    points = {(p.metric, p.seed): p for p in curves.points}
    assert points["norm", None].ppl_over_first_random_interval == pytest.approx([np.exp(-0.1)] * 2, rel=1e-5)
    assert points["random", 1].ppl_over_first_random_interval == pytest.approx([np.exp(0.5)] * 2, rel=1e-5)
    assert curves.problems == ()
    norm = tmp_path / "token_mixed-norm-0.25-0.safetensors"
    for damage in (lambda: norm.write_bytes(norm.read_bytes()[:-1]), norm.unlink, lambda: write_per_token(norm, base)):
        damage()
        curves = collect(files(tmp_path, records))
        points = {(p.metric, p.seed): p for p in curves.points}
        assert points["norm", None].ppl_over_first_random_interval is None
        assert [p.partition(":")[0] for p in curves.problems] == ["token_mixed-norm-0.25-0 has no interval"]


@pytest.mark.parametrize(
    ("codec", "told"),
    [
        ({}, "it lacks metric"),
        ({"high": []}, "high is '[]': input should be"),
        ({"low": {"name": 3}}, "low.name is '3': input should be a valid string"),
        ({"high": {"name": "hadamard", "inner": {}}}, "it lacks high.inner.name"),
        ({"fraction": None}, "fraction is 'None': input should be a valid number"),
        ({"fraction": "x"}, "fraction is 'x': input should be a valid number"),
        ({"fraction": 1.5}, "fraction is '1.5': input should be less than or equal to 1"),
        ({"metric": {}}, "metric is '{}': input should be a valid string"),
        ({"metric": None}, "metric is 'None': input should be a valid string"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_read_is_named_and_skipped(codec, told, tmp_path):
    odd = record("token_mixed", 5.0, 70.0, metric="last_row", fraction=0.25, options=codec)
    check_skipped(odd, f"codec token_mixed: {told}", tmp_path)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("results", "its perplexity is not finite"),
        ("traffic_totals", "nothing has crossed its links"),
        ("codecs", "its links have codecs with different options"),
        ("args", "it does not tell the seed of its random choice"),
    ],
)
def test_a_run_that_lacks_a_figure_is_named_and_skipped(part, told, tmp_path):
    """No number of it would be that of one choice on all links."""
    odd = record("token_mixed", 5.0, 70.0, metric="random", fraction=0.25, seed=None if part == "args" else 9)
    first, *others = odd.codecs
    of_one_link = odd.codecs[first].model_copy(update={"fraction": 0.5})
    changes = {
        "results": {"results": odd.results.model_copy(update={"avg_ppl": None})},
        "traffic_totals": {"traffic_totals": odd.traffic_totals.model_copy(update={"bits_per_value": None})},
        "codecs": {"codecs": {first: of_one_link} | {name: odd.codecs[name] for name in others}},
        "args": {},
    }
    check_skipped(odd.model_copy(update=changes[part]), told, tmp_path)


def check_skipped(odd, told, folder):
    whole, curves = (collect(files(folder, r)) for r in (RECORDS, [*RECORDS, odd]))
    assert curves.points == whole.points
    (problem,) = [p for p in curves.problems if "skipped" in p]
    assert problem.startswith(f"{folder / odd.run_id}.json is skipped: {told}")


def test_a_uniform_line_has_only_runs_with_one_codec(tmp_path):
    mixture = record("int5", 5.0, 40.0)
    first = next(iter(mixture.codecs))
    mixture = mixture.model_copy(update={"codecs": mixture.codecs | {first: CodecConfig(name="int6")}})
    assert collect(files(tmp_path, [*RECORDS, mixture])).uniform == collect(files(tmp_path, RECORDS)).uniform
