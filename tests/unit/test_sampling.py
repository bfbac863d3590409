"""Sampling: what config and checkpoint come to, transformers' distributions, and draws that depend on nothing else."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.config.schema import ConfigError, GenerationConfig
from pipeline.models.checkpoint import ModelError
from pipeline.models.sampling import (
    DEFAULTS,
    GenerationDefaults,
    Sampler,
    SamplingOptions,
    read_generation_defaults,
    sampling_options,
    uniform,
)
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_model

MODEL_CONFIG = LlamaConfig(eos_token_id=7)
NO_IDS = torch.zeros(0, dtype=torch.int64)


def logits_of(seed, size=VOCAB_SIZE, scale=3.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"))


GRID = list(itertools.product((0.5, 1.0, 1.7), (1.0, 0.9, 0.3), (0, 1, 20, 5000), (0.0, 0.1), (1.0, 1.3)))


class TestDistribution:
    @pytest.mark.parametrize("temperature, top_p, top_k, min_p, penalty", GRID)
    def test_is_transformers(self, model, temperature, top_p, top_k, min_p, penalty):
        names = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        names["repetition_penalty"] = penalty
        config = transformers.GenerationConfig(do_sample=True, **names)
        ids = torch.arange(0, 60, 2)
        processors = model._get_logits_processor(generation_config=config, input_ids_seq_length=len(ids), device="cpu")
        for seed in range(3):
            logits = logits_of(seed)
            expected = torch.softmax(processors(ids[None], logits[None].clone())[0], -1).double()
            kept, probabilities = Sampler(SamplingOptions(**names)).distribution(logits, ids)
            ours = torch.zeros(VOCAB_SIZE, dtype=torch.float64).index_put((kept,), probabilities)
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
            assert ((ours > 0) == (expected > 0)).all()

    def test_equals_at_the_edge_of_top_k_all_stay(self):
        kept, _ = Sampler(SamplingOptions(temperature=1.0, top_k=2)).distribution(
            torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), NO_IDS
        )
        assert kept.tolist() == [1, 2, 3]

    def test_logits_are_left_as_they_are(self):
        logits = logits_of(0)
        before = logits.clone()
        Sampler(SamplingOptions(temperature=0.7, top_k=5, repetition_penalty=1.5))(logits, torch.arange(9), 9)
        assert torch.equal(logits, before)


class TestGreedy:
    def test_takes_the_first_of_equals(self):
        logits = torch.zeros(50_000)
        logits[[40_000, 123, 49_999]] = 1.0
        assert Sampler(SamplingOptions())(logits, NO_IDS, 0).token_id == 123

    def test_heeds_the_repetition_penalty_and_nothing_else(self):
        logits = torch.tensor([0.0, 2.0, 1.5])
        assert Sampler(SamplingOptions(repetition_penalty=2.0))(logits, torch.tensor([1]), 1).token_id == 2
        assert Sampler(SamplingOptions(top_k=1, seed=5))(logits, torch.tensor([1]), 1).token_id == 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_of_any_float(self, dtype):
        logits = logits_of(3).to(dtype)
        sampled = Sampler(SamplingOptions())(logits, NO_IDS, 0)
        assert sampled.token_id == logits.argmax()
        assert sampled.logprob == pytest.approx(torch.log_softmax(logits.double(), -1).max().item(), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [SamplingOptions(num_top=3), SamplingOptions(temperature=0.4, top_k=2, repetition_penalty=1.9, num_top=3)],
    ids=["greedy", "sampling"],
)
def test_log_probabilities_are_the_models_own(options):
    logits = logits_of(4)
    sampled = Sampler(options)(logits, torch.arange(VOCAB_SIZE), 11)
    expected = torch.log_softmax(logits.double(), -1)
    assert sampled.logprob == pytest.approx(expected[sampled.token_id].item(), abs=1e-5)
    likeliest = expected.topk(3)
    assert [index for index, _ in sampled.top] == likeliest.indices.tolist()
    assert [logprob for _, logprob in sampled.top] == pytest.approx(likeliest.values.tolist(), abs=1e-5)


def test_the_likeliest_are_at_most_the_vocabulary_equals_by_id():
    sampled = Sampler(SamplingOptions(num_top=9))(torch.tensor([1.0, 2.0, 1.0]), NO_IDS, 0)
    assert [index for index, _ in sampled.top] == [1, 0, 2]


def test_what_is_impossible_is_not_among_the_likeliest():
    """Its log-probability would be no number that JSON has."""
    sampled = Sampler(SamplingOptions(num_top=3))(torch.tensor([1.0, -math.inf, 2.0]), NO_IDS, 0)
    assert [index for index, _ in sampled.top] == [2, 0]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_ids_are_read_for_a_penalty_alone(penalty):
    options = SamplingOptions(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=penalty)
    sampler = Sampler(options)
    assert sampler.reads_ids is (penalty != 1)
    likeliest = logits_of(6).argmax()[None]
    found = [sampler.distribution(logits_of(6), ids)[1] for ids in (NO_IDS, likeliest)]
    assert torch.equal(*found) is not sampler.reads_ids


# Of numpy's Philox, whose stream numpy promises to keep; another number here changes seeded answers.
UNIFORM = {(0, 0): 0.011546754286331562, (0, 1): 0.8133540609793564, (1, 0): 0.3035680343067586}
UNIFORM[2**63 - 1, 2**40] = 0.8413283553663722


class TestDraws:
    @pytest.mark.slow
    def test_follow_the_distribution(self):
        options = SamplingOptions(temperature=1.3, seed=20)
        sampler, logits, num_draws = Sampler(options), logits_of(5, scale=1.5), 4000
        kept, probabilities = sampler.distribution(logits, NO_IDS)
        counts = np.zeros(VOCAB_SIZE)
        for position in range(num_draws):
            counts[sampler(logits, NO_IDS, position).token_id] += 1
        expected, found = num_draws * probabilities.numpy(), counts[kept.numpy()]
        assert found.sum() == num_draws
        rare = expected < 5
        bins = [np.append(values[~rare], values[rare].sum()) for values in (found, expected)]
        assert bins[1].min() >= 5 and len(bins[1]) > 20
        assert chisquare(*bins).pvalue > 0.01

    def test_depend_on_seed_and_position_alone(self):
        logits = [logits_of(seed) for seed in range(20)]
        options = [SamplingOptions(temperature=1.0, seed=seed) for seed in (1, 2)]
        samplers = [Sampler(o) for o in options]
        one_by_one = [[s(logits[p], NO_IDS, p).token_id for p in range(20)] for s in samplers]
        mixed = {(i, p): samplers[i](logits[p], NO_IDS, p).token_id for p in reversed(range(20)) for i in (1, 0)}
        assert [[mixed[i, p] for p in range(20)] for i in (0, 1)] == one_by_one
        assert one_by_one[0] != one_by_one[1]
        assert len({Sampler(options[0])(logits[0], NO_IDS, p).token_id for p in range(20)}) >= 5

    def test_numbers_are_the_same_everywhere(self):
        assert {key: uniform(*key) for key in UNIFORM} == UNIFORM

    @pytest.mark.parametrize("drawn, token_id", [(0.0, 1), (0.25, 1), (0.5, 3), (1 - 2**-53, 3)])
    def test_never_take_a_token_without_probability(self, drawn, token_id, monkeypatch):
        monkeypatch.setattr("pipeline.models.sampling.uniform", lambda seed, position: drawn)
        logits = torch.tensor([-math.inf, 2.0, -math.inf, 2.0, -math.inf])
        assert Sampler(SamplingOptions(temperature=1.0))(logits, NO_IDS, 0).token_id == token_id


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1.0)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("values", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers(options, values):
    with pytest.raises(ValueError, match="the logits for position 8 hold NaN or infinity"):
        Sampler(options)(torch.tensor(values), NO_IDS, 8)


def test_a_temperature_too_small_for_float32():
    with pytest.raises(ValueError, match="a temperature of 1e-40 leaves no finite scores for position 8; raise it"):
        Sampler(SamplingOptions(temperature=1e-40))(torch.tensor([1.0, 2.0]), NO_IDS, 8)


class TestOptionsInAFrame:
    def test_round_trip(self):
        options = SamplingOptions(
            temperature=0.1, top_k=3, top_p=0.3, min_p=1e-3, repetition_penalty=1.1, seed=2**63 - 1, num_top=4
        )
        assert SamplingOptions.from_json(json.loads(json.dumps(options.as_json()))) == options

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"top_p": 2}, "top_p must be at most 1, got 2"),
            ({"top_p": None}, "top_p must be a number, got None"),
            ({"seed": "x"}, "seed must be an integer, got 'x'"),
            ({"num_top": True}, "num_top must be an integer of at least 0, got True"),
            ({"more": 1}, "sampling options have the keys temperature, .* got .*more"),
        ],
    )
    def test_is_strict(self, change, words):
        with pytest.raises(ValueError, match=words):
            SamplingOptions.from_json(SamplingOptions().as_json() | change)


def defaults_of(tmp_path, content=None, **fields):
    if content is None:
        content = json.dumps(fields)
    (tmp_path / "generation_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_generation_defaults(tmp_path, MODEL_CONFIG)


class TestCheckpoint:
    def test_defaults_are_transformers(self):
        known = transformers.GenerationConfig._get_default_generation_params()
        assert {name: known.get(name) for name in DEFAULTS} == DEFAULTS | {"min_p": None}

    def test_without_the_file_the_config_tells(self, tmp_path):
        defaults = read_generation_defaults(tmp_path, MODEL_CONFIG)
        assert defaults == GenerationDefaults(**DEFAULTS, eos_ids=(7,), notes=())

    @pytest.mark.parametrize("eos, expected", [(2, (2,)), ([128009, 3, 3], (3, 128009)), (None, ()), ([], ())])
    def test_eos_is_an_id_or_several(self, tmp_path, eos, expected):
        assert defaults_of(tmp_path, eos_token_id=eos).eos_ids == expected

    def test_values(self, tmp_path):
        defaults = defaults_of(tmp_path, do_sample=True, temperature=1, top_p=0.8, top_k=20, repetition_penalty=1.05)
        said = {"do_sample": True, "temperature": 1.0, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
        assert defaults == GenerationDefaults(**DEFAULTS | said, eos_ids=(), notes=())

    def test_nulls_are_defaults(self, tmp_path):
        defaults = defaults_of(tmp_path, do_sample=None, temperature=None, top_k=None)
        assert (defaults.do_sample, defaults.temperature, defaults.top_k) == (False, 1.0, 50)

    def test_what_has_no_effect_is_told(self, tmp_path):
        fields = {"no_repeat_ngram_size": 3, "suppress_tokens": [5], "num_beams": 1, "typical_p": 1.0, "max_length": 40}
        assert defaults_of(tmp_path, **fields, bad_words_ids=None, begin_suppress_tokens=[]).notes == (
            "generation_config.json has suppress_tokens [5], which has no effect here",
            "generation_config.json has no_repeat_ngram_size 3, which has no effect here",
        )

    @pytest.mark.parametrize(
        "content, words",
        [
            ('{"temperature": 0.6', "is damaged"),
            ("[1]", "it holds a list, not an object"),
            ("", "is damaged"),
            (b'{"a": "\xff"}', "is damaged"),
            ('{"max_new_tokens": 0}', "is damaged .*max_new_tokens"),
            ('{"early_stopping": []}', "is damaged"),
            ('{"temperature": -1}', "temperature must be at least 0, got -1"),
            ('{"temperature": NaN}', "temperature must be a finite number"),
            ('{"top_p": "0.9"}', "top_p must be a number, got '0.9'"),
            ('{"top_k": 50.0}', "top_k must be an integer, got 50.0; write 50"),
            ('{"do_sample": "yes"}', "do_sample must be true or false, got 'yes'"),
            ('{"eos_token_id": "</s>"}', "eos_token_id must be a token id or a list of them, got '</s>'"),
            ('{"eos_token_id": [2, true]}', r"eos_token_id must be a token id or a list of them, got \[2, True\]"),
            ('{"eos_token_id": -1}', "eos_token_id must be a token id"),
        ],
    )
    def test_a_file_at_fault_is_named(self, tmp_path, content, words):
        with pytest.raises(ModelError, match=rf"generation_config\.json.*{words}.*(; correct it, or copy it again)"):
            defaults_of(tmp_path, content)


GREEDY = GenerationDefaults(**DEFAULTS, eos_ids=(), notes=())
SAMPLING = dataclasses.replace(GREEDY, do_sample=True, temperature=0.6, top_p=0.9, min_p=0.05, repetition_penalty=1.1)


class TestOptions:
    def test_the_checkpoint_decides_where_nothing_is_given(self):
        assert sampling_options(GenerationConfig(seed=4), GREEDY) == SamplingOptions(seed=4)
        assert sampling_options(GenerationConfig(), SAMPLING) == SamplingOptions(
            temperature=0.6, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1
        )

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    def test_log_probabilities_are_asked_for_by_number(self, temperature):
        for asked, num_top in ((None, 0), (0, 0), (5, 5)):
            config = GenerationConfig(temperature=temperature, logprobs=asked)
            assert sampling_options(config, GREEDY).num_top == num_top

    def test_what_is_given_wins(self):
        given = GenerationConfig(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=9)
        assert sampling_options(given, SAMPLING) == SamplingOptions(temperature=2.0, seed=9)
        assert sampling_options(GenerationConfig(top_k=7), SAMPLING).top_k == 7

    def test_a_temperature_decides_between_greedy_and_sampling(self):
        greedy = sampling_options(GenerationConfig(temperature=0.0, top_k=7), SAMPLING)
        assert greedy == SamplingOptions(repetition_penalty=1.1) and greedy.greedy
        sampling = sampling_options(GenerationConfig(temperature=0.7), GREEDY)
        assert sampling == SamplingOptions(temperature=0.7, top_k=50) and not sampling.greedy
        cold = dataclasses.replace(SAMPLING, temperature=0.0)
        assert sampling_options(GenerationConfig(), cold) == SamplingOptions(repetition_penalty=1.1)

    @pytest.mark.parametrize("name, value", [("top_p", 0.9), ("top_k", 7), ("min_p", 0.1)])
    def test_cuts_without_sampling_are_refused(self, name, value):
        with pytest.raises(ConfigError, match=f"{name} is {value}, but no temperature is given and .* greedy; give"):
            sampling_options(GenerationConfig(**{name: value}), GREEDY)

    def test_a_penalty_alone_is_for_greedy_answers_too(self):
        assert sampling_options(GenerationConfig(repetition_penalty=1.2), GREEDY).repetition_penalty == 1.2
