import math

import numpy as np
import pytest

from pipeline.records.perplexity import perplexity, sum_nll
from pipeline.records.traffic import LinkTraffic, link_record, link_totals
from pipeline.runtime.memory import peak_rss_bytes


def test_perplexity():
    assert perplexity(math.log(7) * 10, 10) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(0.0, 0))
    assert math.isnan(perplexity(math.nan, 3))


def test_the_published_record_of_none():
    # Qwen3-32B, bf16, 10,000 tokens at 2048/512: 138,304 tokens over four links in 36 transfers, 10,240 bytes each.
    links = {str(i): LinkTraffic() for i in range(4)}
    for traffic in links.values():
        for num_tokens in [4096] * 8 + [1808]:
            traffic.add(num_tokens=num_tokens, payload_bytes=10_240 * num_tokens, header_bytes=60)
    totals = link_totals(links.values(), hidden_size=5120, num_scored=9_999)
    assert totals.model_dump() == {
        "total_bytes": 10_240 * 138_304,
        "total_tokens": 138_304,
        "total_tx": 36,
        "bytes_per_token": 10_240.0,
        "bits_per_value": 16.0,
        "payload_bytes_per_scored_token": 10_240 * 138_304 / 9_999,
        "header_bytes": 36 * 60,
        "padding_bytes": 0,
    }
    assert link_record(links["0"], 5120).bytes_per_token == 10_240.0


def test_no_traffic_has_no_ratio():
    totals = link_totals([], hidden_size=64, num_scored=0)
    assert totals.bytes_per_token is totals.bits_per_value is totals.payload_bytes_per_scored_token is None


def test_sum_does_not_depend_on_grouping():
    losses = np.random.default_rng(0).exponential(3, 10_000).astype(np.float32).tolist()
    assert sum_nll(losses) == sum_nll(sorted(losses)) == sum_nll(reversed(losses))


def test_peak_rss_is_that_of_this_process():
    before = peak_rss_bytes()
    block = np.ones(before + 2**26, dtype=np.uint8)
    assert peak_rss_bytes() >= before + 2**26
    del block
