import json

import numpy as np
import pytest

from pipeline.importance_curves import collect, plot_curves


def record(codec, bits, ppl, *, metric=None, fraction=None, seed=0, model="tiny"):
    """As much of a record as the curves read."""
    if metric:
        config = {"name": "token_mixed", "metric": metric, "fraction": fraction, "high": {"name": "int8"}, "low": {"name": "int4"}}
    else:
        config = {"name": codec}
    return {
        "run_id": f"{codec}-{metric}-{fraction}",
        "args": {
            **{"model_name": model, "dtype": "fp32", "load_in_8bit": False, "load_in_4bit": False},
            "config": {"importance": {"seed": seed}},
        },
        "model": model,
        "dataset": {"num_tokens": 10},
        "protocol": {"max_length": 8, "stride": 8},
        "codecs": {"link": config},
        "causal": metric in (None, "random"),
        "traffic_totals": {"bits_per_value": bits},
        "results": {"avg_ppl": ppl},
    }


RECORDS = [
    record("none", 32.0, 10.0),
    *(record(f"int{n}", float(n), ppl) for n, ppl in ((4, 80.0), (6, 20.0), (8, 11.0))),
    record("token_mixed", 5.0, 60.0, metric="random", fraction=0.25),
    record("token_mixed", 5.0, 54.0, metric="random", fraction=0.25, seed=1),
    record("token_mixed", 5.0, 30.0, metric="norm", fraction=0.25),
    record("nf4", 4.5, 12.0),
]


def test_ratios_are_against_random_and_interpolated_uniform_bits():
    curves = collect(RECORDS)
    points = {(p["metric"], p["seed"]): p for p in curves["points"]}
    norm = points["norm", None]
    assert norm["ppl_over_uniform_bits"] == pytest.approx(30 / np.sqrt(80 * 20))
    assert norm["ppl_over_random"] == pytest.approx(30 / np.sqrt(60 * 54))
    assert norm["ppl_over_none"] == 3.0
    assert curves["mean_log_ratio"]["random"]["ppl_over_random"] == pytest.approx(0, abs=1e-12)
    assert [u["bits_per_value"] for u in curves["uniform"]] == [4, 6, 8]  # nf4 is of another family
    assert not norm["causal"] and points["random", 0]["causal"]
    json.dumps(curves, allow_nan=False)


def test_settings_do_not_mix():
    with pytest.raises(ValueError, match="several models"):
        collect([*RECORDS, record("int8", 8.0, 9.0, model="other")])


def test_a_folder_without_choices_is_named():
    with pytest.raises(ValueError, match="token_mixed"):
        collect(RECORDS[:4])


def test_figure(tmp_path):
    plot_curves(collect(RECORDS), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
