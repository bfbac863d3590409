"""What a calibration of `klt` takes as hidden states grow wider, by its parts, and what follows for Qwen3-32B.

    python -m benchmarks.calibration_cost

Of a random model of the shape of SmolLM2-135M (H = 576), Qwen2-0.5B (896) and Qwen3-1.7B (2048), two decoder layers of
each: seconds for a token and layer to compute, and to compute with gradients; of one link, seconds for a token to be
added to the statistics and for its gradient, seconds to fit, apart from and with the sample that is held out, and for
an id to narrow the token table; bytes of statistics in memory and of files. One thread, float32, CPU time; hidden
states are random, with outlier channels. Beside each measured figure stands what the part's formula makes of the size
before, so that the last lines, the same formulas from the widest size on, can be judged.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from compressors.check import hidden_states
from compressors.console import run_command
from compressors.klt.calibration_file import write_calibration, write_token_table
from compressors.klt.fit import LinkStatistics, fit, token_importance
from compressors.klt.models import SampleRow
from compressors.klt.token_table import MAX_FEATURES, make_token_table, narrow_token_table

NUM_LAYERS = 2
NUM_IDS = 4096


@dataclass(frozen=True)
class Shape:
    """Of a decoder, and what the whole model has."""

    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_size: int

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden_size * self.head_size * 2 * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_features(self) -> int:
        return min(MAX_FEATURES, self.hidden_size)


SHAPES = (Shape(576, 1536, 9, 3, 64), Shape(896, 4864, 14, 2, 64), Shape(2048, 6144, 16, 8, 128))
QWEN3_32B = Shape(5120, 25600, 64, 8, 128)
QWEN3_32B_LAYERS, QWEN3_32B_IDS, LINKS, TOKENS = 64, 151_936, 4, 49_152

# What each part grows with.
GROWTH: dict[str, Callable[[Shape], float]] = {
    "forward, us a token and layer": lambda s: s.layer_parameters,
    "forward and gradients, us a token and layer": lambda s: s.layer_parameters,
    "statistics, us a token and link": lambda s: (s.hidden_size + 2 + s.num_features) ** 2,
    "their gradients, us a token and link": lambda s: s.hidden_size**2,
    "fit without a sample, s a link": lambda s: s.hidden_size**3,
    "sample, us a token and link": lambda s: s.hidden_size,
    "narrow table, us an id": lambda s: s.num_features**2,
    "statistics in memory, MB a link": lambda s: (s.hidden_size + 2 + s.num_features) ** 2 + 2 * s.hidden_size**2,
    "file, MB a link": lambda s: s.hidden_size**2,
    "token table, bytes an id": lambda s: s.num_features,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before: tuple[Shape, dict[str, float]] | None = None
    for shape in SHAPES:
        measured = measure(shape, arguments.tokens, arguments.rounds)
        print(f"H = {shape.hidden_size}{'':40}{'measured':>12}{'by formula':>14}")
        for part, value in measured.items():
            grown = "" if before is None else f"{before[1][part] * GROWTH[part](shape) / GROWTH[part](before[0]):14.4g}"
            print(f"  {part:50}{value:12.4g}{grown}")
        before = (shape, measured)
    assert before is not None
    print_total(*before)
    return 0


def measure(shape: Shape, num_tokens: int, rounds: int) -> dict[str, float]:
    """Each part of GROWTH; times are the least of the rounds."""
    x = hidden_states((1, num_tokens, shape.hidden_size))
    ids = torch.randint(0, NUM_IDS, (num_tokens,), generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(NUM_IDS, shape.hidden_size, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(ids, minlength=NUM_IDS)
    wide = make_token_table(lambda: [embedding], counts)
    features, gradients = wide.features(ids)[None], torch.randn_like(x)
    statistics = LinkStatistics(shape.hidden_size, wide.num_features, torch.device("cpu"))
    per_token = 1e6 / num_tokens

    def least(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
        return min(seconds)

    forward, backward = _model_seconds(shape, x, least)
    add = least(lambda: statistics.add(x, features))
    add_gradients = least(lambda: statistics.add_gradients(x, gradients))
    narrow_s = time.process_time()
    narrow = narrow_token_table(wide, counts, token_importance(statistics))
    narrow_s = time.process_time() - narrow_s
    sample = SampleRow(x[0], ids.int())
    fit(statistics, [sample], narrow)  # compiles
    start = time.process_time()
    calibration = fit(statistics, [SampleRow(x[0, :1], ids[:1].int())], narrow)
    bare_s = time.process_time() - start
    start = time.process_time()
    fit(statistics, [sample], narrow)
    sample_s = time.process_time() - start - bare_s
    origin = {"checkpoint": "none", "text_sha256": "none"}
    with tempfile.TemporaryDirectory() as folder:
        link_file = write_calibration(Path(folder), calibration, link_name="link", num_tokens=num_tokens, **origin)
        table_file = write_token_table(Path(folder), narrow.table, **origin)
        sizes = [path.stat().st_size for path in (link_file, table_file)]
    kept = (statistics.products, statistics.sensitivity, statistics.sensitive_products)
    values = (
        *(forward * per_token / NUM_LAYERS, backward * per_token / NUM_LAYERS, add * per_token),
        *(add_gradients * per_token, bare_s, sample_s * per_token, 1e6 * narrow_s / NUM_IDS),
        *(sum(t.nbytes for t in kept) / 1e6, sizes[0] / 1e6, sizes[1] / NUM_IDS),
    )
    return dict(zip(GROWTH, values, strict=True))


def _model_seconds(
    shape: Shape, x: torch.Tensor, least: Callable[[Callable[[], object]], float]
) -> tuple[float, float]:
    """Of a forward through NUM_LAYERS layers, and of one with gradients of their input."""
    config = Qwen3Config(
        vocab_size=2,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
    )
    model = Qwen3Model(config).requires_grad_(False)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    def with_gradients() -> torch.Tensor:
        inputs = x.clone().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum(), inputs)[0]

    forward()
    return least(forward), least(with_gradients)


def print_total(widest: Shape, measured: dict[str, float]) -> None:
    """Of a calibration of Qwen3-32B on one such thread, every part by its formula."""
    grown = {part: value * GROWTH[part](QWEN3_32B) / GROWTH[part](widest) for part, value in measured.items()}
    model, graded, add, add_gradients, bare, sample, narrow, memory, file, table = grown.values()
    hours = {
        "model, states alone": TOKENS * QWEN3_32B_LAYERS * model / 3.6e9,
        "model, with gradients of all tokens": TOKENS * QWEN3_32B_LAYERS * graded / 3.6e9,
        "statistics": TOKENS * LINKS * (add + add_gradients) / 3.6e9,
        "fits": LINKS * (bare / 3600 + 8192 * sample / 3.6e9) + QWEN3_32B_IDS * narrow / 3.6e9,
    }
    print(f"Qwen3-32B, {TOKENS} tokens, {LINKS} links, by the formulas from H = {widest.hidden_size}")
    for part, value in hours.items():
        print(f"  {part:50}{value:12.3g} h of one such thread")
    print(f"  {'statistics in memory':50}{memory / 1e3:12.3g} GB a link")
    print(f"  {'files':50}{LINKS * file + QWEN3_32B_IDS * table / 1e6:12.4g} MB")


if __name__ == "__main__":
    run_command(main)
