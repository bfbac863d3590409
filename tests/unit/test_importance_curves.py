import json

import numpy as np
import pytest
from safetensors.numpy import save_file

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
    points = {(p["metric"], p["seed"]): p for p in curves["points"]}
    norm = points["norm", None]
    assert norm["ppl_over_uniform_bits"] == pytest.approx(30 / np.sqrt(80 * 20))
    assert norm["ppl_over_random"] == pytest.approx(30 / np.sqrt(60 * 54))
    assert norm["ppl_over_none"] == 3.0
    assert curves["mean_log_ratio"]["random"]["ppl_over_random"] == pytest.approx(0, abs=1e-12)
    assert [u["bits_per_value"] for u in curves["uniform"]] == [4, 6, 8]  # nf4 is of another family
    assert not norm["causal"] and points["random", 0]["causal"]
    json.dumps(curves, allow_nan=False)


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
    points = {(p["metric"], p["seed"]): p for p in curves["points"]}
    assert points["norm", None]["ppl_over_first_random_interval"] == pytest.approx([np.exp(-0.1)] * 2, rel=1e-5)
    assert points["random", 1]["ppl_over_first_random_interval"] == pytest.approx([np.exp(0.5)] * 2, rel=1e-5)
    assert curves["problems"] == []
    norm = tmp_path / "token_mixed-norm-0.25-0.safetensors"
    for damage in (lambda: norm.write_bytes(norm.read_bytes()[:-1]), norm.unlink, lambda: write_per_token(norm, base)):
        damage()
        curves = collect(files(tmp_path, records))
        points = {(p["metric"], p["seed"]): p for p in curves["points"]}
        assert points["norm", None]["ppl_over_first_random_interval"] is None
        assert [p.partition(":")[0] for p in curves["problems"]] == ["token_mixed-norm-0.25-0 has no interval"]


@pytest.mark.parametrize(
    "codec",
    [{}, {"high": []}, {"low": {"name": 3}}, {"fraction": None}, {"fraction": "x"}, {"metric": {}}, {"metric": None}],
    ids=str,
)
def test_a_choice_that_cannot_be_read_is_named_and_skipped(codec, tmp_path):
    odd = record("token_mixed", 5.0, 70.0, metric="last_row", fraction=0.25, options=codec)
    whole, curves = (collect(files(tmp_path, r)) for r in (RECORDS, [*RECORDS, odd]))
    assert curves["points"] == whole["points"]
    assert [p.partition(":")[0] for p in curves["problems"] if "skipped" in p] == [
        f"{tmp_path / odd.run_id}.json is skipped"
    ]
