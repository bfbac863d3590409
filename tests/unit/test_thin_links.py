"""What the benchmark of thin links makes of its measurements; a run of it is not a test's business."""

import itertools

import pytest

from benchmarks.thin_links import draw, main, table

LINKS = [(None, "0"), *itertools.product(("1mbit", "100mbit"), ("1ms", "20ms"))]
ROWS = [
    {
        "codec": codec,
        "rate": rate,
        "delay": delay,
        "ttft_s": 1.234 * nbytes,
        "tpot_s": 0.1,
        "predicted_tpot_s": 0.0987,
        "tokens_per_s_of_four": 7.5,
        "prompt_tokens_per_s": None if delay == "1ms" else 250.4,
        "bytes_per_token_per_link": nbytes,
    }
    for (rate, delay), (codec, nbytes) in itertools.product(LINKS, (("bf16", 1172.0), ("nf4", 344.4)))
]


def test_a_row_of_the_table():
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[3] == "| loopback, `nf4` | 344 | 424.99 | 100 | 99 | 7.50 | 250 |"
    assert lines[4] == "| 1mbit, 1ms, `bf16` | 1172 | 1446.25 | 100 | 99 | 7.50 |  |"


@pytest.mark.slow
def test_the_figure_is_a_picture(tmp_path):
    draw(ROWS, tmp_path / "thin.png")
    assert (tmp_path / "thin.png").read_bytes().startswith(b"\x89PNG")


def test_a_calibration_is_asked_for(capsys):
    try:
        main(["--config", "demo.yaml"])
    except SystemExit as e:
        assert e.code == 2
    assert "--calibration is missing" in capsys.readouterr().err
