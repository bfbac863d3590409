"""Payload bytes per token at hidden size 5120 equal the original benchmark's published figures.

Source: run records of github.com/XudongOliverShen/decentralized-inference-exp, Qwen3-32B, WikiText-2,
`max_length` 2048 (17 windows of the first 10,000 tokens, the last 1808 long), bytes per token per link. Its
nf4, fp4 and hqq figures contain a code table, a few bytes a transfer, which both ends know here.
"""

from __future__ import annotations

import pytest
import torch

from compressors import LinkInfo, make_compressor

HIDDEN_SIZE = 5120
PUBLISHED = {
    "none": 10240.0,
    "fp8_e4m3": 5124.0,
    "int8": 5124.0,
    "int7": 4484.0,
    "int6": 3844.0,
    "int5": 3204.0,
    "int4": 2564.0,
    "int3": 1924.0,
    "int2": 1284.0,
    "nf4": 2880.0166589541877,
    "fp4": 2880.0166589541877,
    "hqq4": 2880.0179604349837,
    "hqq3": 2368.0179604349837,
    "hqq2": 1600.0179604349837,
    "hqq1": 960.0179604349838,
    "block_rowcol_mean(block_tokens=2, block_channels=2)": 10240.0,
    "block_rowcol_mean(block_tokens=4, block_channels=4)": 5120.0,
    "block_rowcol_mean(block_tokens=6, block_channels=6)": 3422.7181860249884,
    "block_rowcol_mean(block_tokens=2, block_channels=8)": 6400.0,
    "block_rowcol_mean(block_tokens=2, block_channels=16)": 5760.0,
    "block_rowcol_mean(block_tokens=8, block_channels=2)": 6400.0,
    "block_rowcol_mean(block_tokens=16, block_channels=2)": 5760.0,
}
WINDOWS = [2048] * 16 + [1808]


@pytest.mark.parametrize(("spec", "published"), PUBLISHED.items())
def test_bytes_per_token(spec, published):
    link = LinkInfo(name="test", hidden_size=HIDDEN_SIZE, max_tokens=2048, dtype=torch.bfloat16)
    codec = make_compressor(spec, link)
    total = sum(codec.max_nbytes((1, length, HIDDEN_SIZE)) for length in WINDOWS)
    assert codec.fixed_size, "so that max_nbytes is what is sent, which the next lines check once"
    x = torch.randn(1, 48, HIDDEN_SIZE).to(torch.bfloat16)
    assert codec.compress(x).nbytes == codec.max_nbytes(x.shape)
    assert total / sum(WINDOWS) == pytest.approx(published, abs=0.02)


def test_side_information_that_is_shared_by_a_frame():
    sizes = {"int4(granularity=tensor)": 2560 * 2048 + 4, "nf4(absmax=fp16)": (2560 + 160) * 2048}
    sizes["nf4(absmax=nested)"] = (2560 + 80) * 2048 + 4 + 4 * 80 * 2048 // 256
    sizes["mxfp4"] = (2560 + 160) * 2048
    sizes["hqq3(layout=dense)"] = (1920 + 320) * 2048
    for spec, nbytes in sizes.items():
        assert make_compressor(spec).max_nbytes((1, 2048, HIDDEN_SIZE)) == nbytes
