"""Calibrations of made-up hidden states, for the tests of calibrated codecs."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from compressors import LinkInfo, make_compressor
from compressors.check import Subject, hidden_states
from compressors.klt.calibration_file import Origin, write_calibration, write_token_table
from compressors.klt.fit import LinkStatistics, fit, token_importance
from compressors.klt.models import SampleRow
from compressors.klt.token_table import NarrowTable, TokenTable, make_token_table, narrow_token_table

LINK = "check"  # the link's name in compressors.check
VOCABULARY = 64
NUM_ROWS, ROW_LENGTH = 6, 80


@functools.cache
def calibrate(hidden_size, use_token_ids):
    """Calibration and token table for `check.hidden_states`, some of which follow from ids, and random gradients."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(VOCABULARY, hidden_size, generator=generator)
    rows = [torch.randint(0, VOCABULARY, (ROW_LENGTH,), generator=generator) for _ in range(NUM_ROWS)]
    tokens = TokenTable.empty()
    if use_token_ids:
        counts = torch.bincount(torch.cat(rows), minlength=VOCABULARY)
        tokens = make_token_table(lambda: [embedding], counts)
    statistics = LinkStatistics(hidden_size, tokens.num_features, torch.device("cpu"))
    sample = []
    for seed, ids in enumerate(rows):
        x = hidden_states((1, ROW_LENGTH, hidden_size), seed=seed + 10) + embedding[ids]
        x = x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        gradients = torch.randn(x.shape, generator=generator) * torch.linspace(0.1, 2, hidden_size)
        features = tokens.features(ids) if use_token_ids else torch.zeros(ROW_LENGTH, 0)
        statistics.add(x, features.unsqueeze(0))
        statistics.add_gradients(x, gradients)
        sample.append(SampleRow(x[0], ids.int()))
    narrow = NarrowTable.empty()
    if use_token_ids:
        narrow = narrow_token_table(tokens, counts, token_importance(statistics))
    return fit(statistics, sample, narrow), narrow.table


@functools.cache
def folder(hidden_size, use_token_ids=True, checkpoint="some model"):
    """A folder with the files of link `check`. They stay for the session."""
    path = Path(tempfile.mkdtemp(prefix="thinwire-calibration-"))
    calibration, tokens = calibrate(hidden_size, use_token_ids)
    origin = Origin(checkpoint=checkpoint, text_sha256="0")
    write_calibration(path, calibration, origin, link_name=LINK, num_tokens=1)
    if use_token_ids:
        write_token_table(path, tokens, origin)
    return str(path)


class Calibrated(Subject):
    """A codec under test whose calibration follows the input's hidden size."""

    def __init__(self, options, use_token_ids=True):
        super().__init__(f"calibrated {options}")
        self._options, self._use_token_ids = options, use_token_ids

    def make(self, x):
        width = x.shape[-1]
        link = LinkInfo(name=LINK, hidden_size=width, max_tokens=max(x[..., 0].numel(), 1), dtype=x.dtype)
        return make_compressor({"calibration": folder(width, self._use_token_ids), **self._options}, link)
