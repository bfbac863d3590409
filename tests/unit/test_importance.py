"""Metrics against their formulas, and files that belong to another run."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from compressors import make_compressor
from compressors.wrappers.token_mixed import CAUSAL_METRICS
from pipeline.config.schema import ConfigError
from pipeline.data.windows import make_microbatches, make_windows
from pipeline.importance.files import (
    ImportanceFileError,
    TokenOwner,
    file_digest,
    read_head_relevance,
    read_token_importance,
    write_head_relevance,
    write_token_importance,
)
from pipeline.importance.metrics import METRICS, AttentionMetric, MetricSetting
from pipeline.importance.selection import make_metrics
from pipeline.models import attention
from pipeline.models.attention import Attention, AttentionError
from pipeline.partition.plan import default_plan

BATCH, HEADS, NUM_TOKENS = 2, 4, 23
RELEVANCE = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [4, 0, 3, 1], [1, 0, 0, 0]])
MICROBATCHES = make_microbatches(make_windows(100, 23, 20), 2)
OWNER = TokenOwner(checkpoint_fingerprint="abc", ids_sha256="def", max_length=23, stride=20, bos="text")


def make_attention(seed):
    torch.manual_seed(seed)
    return Attention(torch.randn(BATCH, HEADS, NUM_TOKENS, 8), torch.randn(BATCH, 2, NUM_TOKENS, 8), None, 0.5)


def dense(read):
    """softmax(QK^T * scaling + mask), the definition."""
    scores = read.query @ read.key.repeat_interleave(HEADS // 2, 1).mT * read.scaling
    return scores.masked_fill(torch.ones(NUM_TOKENS, NUM_TOKENS).triu(1).bool(), -torch.inf).softmax(-1)


def by_definition(name, weights, layer):
    """[B, T] of one layer's A [B, heads, T, T], in loops as the formulas have it."""
    w = RELEVANCE[layer] / RELEVANCE[layer].sum() if "head_weighted" in name else torch.full((HEADS,), 1 / HEADS)
    a = (weights * w[:, None, None]).sum(1)
    columns = []
    for j in range(NUM_TOKENS):
        if name == "last_row":
            columns.append(a[:, -1, j])
        elif name.endswith("causal"):
            columns.append(sum(a[:, i, j] for i in range(j, NUM_TOKENS)) / (NUM_TOKENS - j))
        else:
            columns.append(sum(a[:, i, j] for i in range(NUM_TOKENS)) / NUM_TOKENS)
    return torch.stack(columns, 1)


ATTENTION_METRICS = [name for name, cls in METRICS.items() if issubclass(cls, AttentionMetric)]


@pytest.mark.parametrize("layers", [[3], [2, 3]])
@pytest.mark.parametrize("name", ATTENTION_METRICS)
def test_attention_metrics_follow_their_formulas(name, layers, monkeypatch):
    monkeypatch.setattr(attention, "MAX_CHUNK_NBYTES", 4 * BATCH * HEADS * NUM_TOKENS * 5)
    metric = METRICS[name](MetricSetting(layers=layers, first_layer=1, head_relevance=RELEVANCE))
    read = {layer: make_attention(layer) for layer in (1, 2, 3)}
    for layer, one in read.items():
        metric.read(layer - 1, one)
    expected = torch.stack([by_definition(name, dense(read[layer]), layer) for layer in layers]).mean(0)
    got = metric.importance(torch.zeros(BATCH, NUM_TOKENS, 8), 0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("additive", [False, True])
def test_a_sliding_window_leaves_fewer_rows_that_see_a_token(additive):
    plain = make_attention(0)
    seen = torch.ones(NUM_TOKENS, NUM_TOKENS).tril().bool() & torch.ones(NUM_TOKENS, NUM_TOKENS).triu(-4).bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen
    slid = Attention(plain.query, plain.key, mask.expand(BATCH, 1, -1, -1), plain.scaling)
    scores = plain.query @ plain.key.repeat_interleave(HEADS // 2, 1).mT * plain.scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)
    expected = torch.stack([weights[:, seen[:, j], j].mean(1) for j in range(NUM_TOKENS)], 1)
    metric = METRICS["column_causal"](MetricSetting(layers=[0]))
    metric.read(0, slid)
    torch.testing.assert_close(metric.importance(torch.zeros(BATCH, NUM_TOKENS, 8), 0), expected)


def test_an_attention_metric_notices_a_layer_that_it_was_not_shown():
    metric = METRICS["column"](MetricSetting(layers=[1, 2]))
    metric.read(1, make_attention(0))
    with pytest.raises(AttentionError, match=r"was shown the attention of the stage's layers \[1\], it reads \[1, 2\]"):
        metric.importance(torch.zeros(BATCH, NUM_TOKENS, 8), 0)


@pytest.mark.parametrize("name", ATTENTION_METRICS)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(name, num_tokens):
    metric = METRICS[name](MetricSetting(layers=[0], head_relevance=RELEVANCE))
    metric.read(0, Attention(torch.randn(2, 4, num_tokens, 8), torch.randn(2, 4, num_tokens, 8), None, 0.5))
    assert torch.equal(metric.importance(torch.zeros(2, num_tokens, 8), 0), torch.ones(2, num_tokens))


def test_norm():
    x = torch.randn(2, 5, 64).to(torch.bfloat16)
    expected = x.double().pow(2).sum(-1).sqrt().float()
    torch.testing.assert_close(METRICS["norm"](MetricSetting()).importance(x, 0), expected)


@pytest.mark.parametrize("name", CAUSAL_METRICS)
def test_metrics_of_places_see_neither_content_nor_other_windows(name):
    metric = METRICS[name](MetricSetting(microbatches=MICROBATCHES))
    alone = METRICS[name](MetricSetting(microbatches=make_microbatches(make_windows(100, 23, 20), 1)))
    result = metric.importance(torch.randn(2, 23, 8), 1)
    assert torch.equal(result, metric.importance(torch.zeros(2, 23, 8), 1))
    assert torch.equal(result[0], alone.importance(torch.zeros(1, 23, 8), 2)[0])


def test_the_codec_knows_which_metrics_are_causal():
    assert {name for name, cls in METRICS.items() if cls.causal} == set(CAUSAL_METRICS)


def test_random_depends_on_seed_window_and_position_and_is_flat():
    long = make_microbatches(make_windows(20_000, 10_000, 10_000), 2)
    values = METRICS["random"](MetricSetting(microbatches=long, seed=3)).importance(torch.zeros(2, 10_000, 1), 0)
    again = METRICS["random"](MetricSetting(microbatches=long, seed=4)).importance(torch.zeros(2, 10_000, 1), 0)
    assert not torch.equal(values, again) and not torch.equal(values[0], values[1])
    counts = torch.histc(values, 10, 0, 1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert abs(float(torch.corrcoef(values)[0, 1])) < 0.05


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_uniform_spreads_the_choice_evenly(fraction):
    long = make_microbatches(make_windows(1000, 1000, 1000), 1)
    values = METRICS["uniform"](MetricSetting(microbatches=long)).importance(torch.zeros(1, 1000, 1), 0)[0]
    chosen = torch.zeros(1000).index_fill_(0, values.topk(round(fraction * 1000)).indices, 1)
    shares = chosen.view(10, 100).mean(1)
    assert (shares - fraction).abs().max() <= 0.03
    assert values.unique().numel() == 1000


def test_oracle_gives_each_micro_batch_its_part():
    lengths = [m.num_tokens for m in MICROBATCHES]
    values = torch.arange(float(sum(lengths)))
    metric = METRICS["oracle"](MetricSetting(microbatches=MICROBATCHES, token_importance=values))
    for m, microbatch in enumerate(MICROBATCHES):
        start = sum(lengths[:m])
        expected = values[start : start + lengths[m]].view(microbatch.shape)
        assert torch.equal(metric.importance(torch.zeros(*microbatch.shape, 1), m), expected)
    with pytest.raises(
        ValueError, match=f"has 7 values for a link, the windows of this run have {sum(lengths)} tokens"
    ):
        METRICS["oracle"](MetricSetting(microbatches=MICROBATCHES, token_importance=values[:7]))


def test_a_metric_says_what_determines_it():
    """Records and digests have it: of files the content, not the path."""
    setting = MetricSetting(
        layers=[2, 3],
        seed=5,
        microbatches=MICROBATCHES,
        head_relevance=RELEVANCE,
        token_importance=torch.zeros(sum(m.num_tokens for m in MICROBATCHES)),
        file_digest="sha",
    )
    said = {name: cls(setting).describe() for name, cls in METRICS.items()}
    assert said["column"] == {"metric": "column", "layers": [2, 3]}
    for name in ("head_weighted", "head_weighted_causal"):
        assert said[name] == {"metric": name, "layers": [2, 3], "head_weights": "sha"}
    assert said["oracle"] == {"metric": "oracle", "oracle": "sha"}
    assert said["random"] == {"metric": "random", "seed": 5}
    assert said["norm"] == {"metric": "norm"} and said["uniform"] == {"metric": "uniform"}


def test_files_come_back(tmp_path):
    path = tmp_path / "importance.safetensors"
    by_link = {"layer:1:node0->node1": torch.rand(9), "layer:2:node1->node0": torch.rand(9)}
    write_token_importance(path, by_link, OWNER, notes={"objective": "nll"})
    for link, values in by_link.items():
        assert torch.equal(read_token_importance(path, link, OWNER), values)
    heads = tmp_path / "heads.safetensors"
    write_head_relevance(heads, RELEVANCE, checkpoint_fingerprint="abc")
    got = read_head_relevance(heads, checkpoint_fingerprint="abc", num_layers=4, num_heads=4)
    assert torch.equal(got, RELEVANCE)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["heads.safetensors", "importance.safetensors"]
    moved = heads.rename(tmp_path / "moved")
    assert len(file_digest(moved)) == 64 and file_digest(moved) != file_digest(path)


@pytest.mark.parametrize(
    "key, value",
    [("checkpoint_fingerprint", "x"), ("ids_sha256", "x"), ("max_length", 24), ("stride", 1), ("bos", "window")],
)
def test_token_importance_of_another_run_is_refused(key, value, tmp_path):
    path = tmp_path / "importance.safetensors"
    write_token_importance(path, {"link": torch.rand(9)}, OWNER)
    with pytest.raises(ImportanceFileError, match=f"was made for {key} {getattr(OWNER, key)}, this run has {value}"):
        read_token_importance(path, "link", dataclasses.replace(OWNER, **{key: value}))


@pytest.mark.parametrize("values", [torch.tensor([1.0, torch.nan]), torch.ones(2, 2)])
def test_token_importance_that_is_no_row_of_numbers_is_refused(values, tmp_path):
    path = tmp_path / "importance.safetensors"
    write_token_importance(path, {"link": torch.rand(9)}, OWNER)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"link": values}, path, metadata)
    with pytest.raises(ImportanceFileError, match="link must be a row of numbers"):
        read_token_importance(path, "link", OWNER)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 4], "importance.layers has 4, the model's layers are 0 to 3"),
        ([3], r"stage 0 holds layers 0 to 1, and importance.layers is \[3\]"),
    ],
)
def test_layers_that_a_stage_does_not_hold_are_named(layers, message):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    section = SimpleNamespace(layers=layers, seed=0)
    config = SimpleNamespace(importance=section)
    encoders = {0: make_compressor("token_mixed(metric=column, fraction=0.5)")}
    plan, model_config = default_plan(4, 2, wrap=False), LlamaConfig(**sizes)
    with pytest.raises(ConfigError, match=message):
        make_metrics(config, plan, encoders, MICROBATCHES, model_config=model_config, owner=OWNER)


def test_unusable_files_are_refused(tmp_path):
    path = tmp_path / "file"
    heads = {"checkpoint_fingerprint": "abc", "num_layers": 4, "num_heads": 4}
    with pytest.raises(ImportanceFileError, match="cannot be read"):
        read_token_importance(path, "link", OWNER)
    with pytest.raises(ImportanceFileError, match="cannot be read"):
        file_digest(path)
    path.write_bytes(b"not a tensor")
    with pytest.raises(ImportanceFileError, match="cannot be read"):
        read_token_importance(path, "link", OWNER)
    save_file({"link": torch.rand(9)}, path)
    with pytest.raises(ImportanceFileError, match="a 'thinwire token importance' file of version 1 is needed"):
        read_token_importance(path, "link", OWNER)
    write_token_importance(path, {"link": torch.rand(9)}, OWNER)
    with pytest.raises(ImportanceFileError, match="has nothing for other, only for: link"):
        read_token_importance(path, "other", OWNER)
    with pytest.raises(ImportanceFileError, match="a 'thinwire head relevance' file"):
        read_head_relevance(path, **heads)
    write_head_relevance(path, RELEVANCE[:, :2], checkpoint_fingerprint="abc")
    with pytest.raises(ImportanceFileError, match=r"has shape \(4, 2\), the model has \(4, 4\)"):
        read_head_relevance(path, **heads)
    with pytest.raises(ImportanceFileError, match="was made for checkpoint_fingerprint abc, this run has xyz"):
        read_head_relevance(path, **{**heads, "checkpoint_fingerprint": "xyz"})


@pytest.mark.parametrize(
    "relevance, words",
    [
        (torch.tensor([[1.0, -1]]), "not negative"),
        (torch.tensor([[1.0, torch.nan]]), "must be finite"),
        (torch.tensor([[1.0, 1], [0, 0]]), "is 0 for all heads of layer 1"),
        (torch.ones(3), r"must be float32 \[layers, heads\]"),
        (torch.ones(3, 2).double(), r"must be float32 \[layers, heads\]"),
    ],
)
def test_relevance_that_is_no_weight_is_not_written(relevance, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        write_head_relevance(tmp_path / "file", relevance, checkpoint_fingerprint="abc")


@pytest.mark.parametrize(
    "by_link", [{"a": torch.rand(3, 2)}, {"a": torch.tensor([torch.nan])}, {"a": torch.rand(3), "b": torch.rand(2)}]
)
def test_importance_that_is_no_row_per_link_is_not_written(by_link, tmp_path):
    with pytest.raises(ValueError, match="importance"):
        write_token_importance(tmp_path / "file", by_link, OWNER)
