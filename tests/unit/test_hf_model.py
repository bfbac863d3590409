"""Stages of every verified model type against the whole model, in one process."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.loading import ModelError, WeightFormat, load_stage
from pipeline.models.model_config import VERIFIED_MODEL_TYPES, load_model_config
from pipeline.partition.plan import default_plan
from tests.helpers.marks import slow_but
from tests.helpers.tiny_models import CAPS_ARE_DROPPED, MODEL_TYPES, VOCAB_SIZE, save_tiny_model, skip_dropped_caps

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OWN_SIZES = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("model_type", sorted(set(VERIFIED_MODEL_TYPES) - set(MODEL_TYPES)))
@pytest.mark.parametrize("num_nodes", slow_but([4], [1, 4]))
def test_logits_are_bit_equal(model_type, num_nodes, tmp_path):
    skip_dropped_caps(model_type)
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **SIZES | OWN_SIZES.get(model_type, {}))
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(tmp_path)
    ids = torch.randint(0, VOCAB_SIZE, (2, 24))
    config = load_model_config(tmp_path, {})
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(input_ids=ids).logits
        embedding, states = None, None
        for stage in default_plan(5, num_nodes).stages:
            part = load_stage(
                tmp_path,
                config,
                stage,
                WeightFormat(dtype=torch.float32),
                device=torch.device("cpu"),
                embedding=embedding if stage.node == 0 else None,
            )
            embedding = part.embedding if part.embedding is not None else embedding
            inputs = {"input_ids": ids} if stage.is_first else {"inputs_embeds": states}
            states = part.decoder(**inputs, use_cache=False).last_hidden_state
        assert torch.equal(part.head(states), expected)


@pytest.mark.parametrize("model_type", ["granite", "cohere", "gpt2", "mamba"])
def test_other_types_are_refused_not_run_wrongly(model_type):
    with pytest.raises(ModelError, match=f"'{model_type}' is not .*(tested|plain decoder)"):
        load_model_config(None, {"model_type": model_type})


def test_quantised_checkpoints_are_refused():
    with pytest.raises(ModelError, match="quantised already"):
        load_model_config(None, {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})


@pytest.mark.parametrize(
    "architecture, words",
    [
        ({}, "has no model_type"),
        ({"hidden_size": 4}, "has no model_type"),
        ({"model_type": "no_such_model"}, "is not a transformers config"),
    ],
)
def test_an_architecture_that_says_too_little(architecture, words):
    with pytest.raises(ModelError, match=words):
        load_model_config(None, architecture)


def test_the_architecture_must_agree_with_the_checkpoint(tmp_path):
    save_tiny_model(tmp_path, "llama", num_layers=2)
    with pytest.raises(ModelError, match="architecture.hidden_size is 65, the checkpoint's config.json has 64"):
        load_model_config(tmp_path, {"model_type": "llama", "hidden_size": 65})


# A field of an older config.json, or one that is left to its default, and one that says otherwise.
@pytest.mark.parametrize(
    ("model_type", "fields", "equal", "unequal"),
    [
        ("llama", {}, {"rope_theta": 10000.0}, {"rope_theta": 500000.0}),
        ("llama", {}, {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {}, {"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ("llama", {}, {"dtype": "float32"}, {"dtype": "float16"}),
        ("llama", {}, {"num_attention_heads": 4}, {"num_attention_heads": 8}),
        ("llama", {}, {"head_dim": None}, {"head_dim": 32}),
        ("llama", {}, {"transformers_version": "4.40.0", "temperature": 0.6}, {"num_hidden_layers": 3}),
        ("llama", {}, {"rope_parameters": {"rope_theta": 10000}}, {"rope_parameters": {"rope_theta": 10}}),
        ("llama", {"rope_theta": 50.0}, {"rope_theta": 50}, {"rope_theta": 10000.0}),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 50.0},
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 50.0},
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {}, {"rope_scaling": None}),
        ("gpt_neox", {}, {"rotary_pct": 0.25, "rotary_emb_base": 10000}, {"rotary_pct": 0.5}),
        ("gpt_neox", {}, {}, {"rotary_emb_base": 500}),
        ("gemma3_text", {}, {"rope_local_base_freq": 10000.0, "rope_theta": 1e6}, {"rope_local_base_freq": 5.0}),
        ("gemma3_text", {}, {}, {"rope_theta": 10000.0}),
        ("qwen2", {}, {"use_sliding_window": False, "sliding_window": 4096}, {"use_sliding_window": True}),
        ("qwen2", {}, {"num_key_value_heads": 2}, {"num_key_value_heads": None}),
        ("llama", {}, {}, {"hiden_size": 64}),
        ("llama", {}, {"model_type": "llama"}, {"model_type": "qwen2"}),
    ],
)
def test_architecture_in_the_words_of_an_older_config(tmp_path, model_type, fields, equal, unequal):
    save_tiny_model(tmp_path, model_type, num_layers=2, **fields)
    load_model_config(tmp_path, equal)
    (key,) = unequal
    with pytest.raises(ModelError, match=rf"architecture\.{key} is .*, the checkpoint's config\.json has "):
        load_model_config(tmp_path, equal | unequal)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a valid JSON file"),
        ("", "not a valid JSON file"),
        ("[]", "cannot be used"),  # transformers' own words about a list differ from version to version
        ("null", "NoneType"),
        ({"model_type": ...}, "model_type"),
        ({"model_type": "no_such"}, "no_such"),
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"num_hidden_layers": 2.5}, "'num_hidden_layers'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "no_such"}, "no_such"),
        ({"rope_parameters": {"rope_type": "no_such"}}, "no_such"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' expected bool"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"pad_token_id": 10**6}, "Padding_idx"),
        ({"dtype": "no_such"}, "no_such"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content, words):
    save_tiny_model(tmp_path, "llama", num_layers=2)
    path = tmp_path / "config.json"
    if isinstance(content, dict):
        fields = json.loads(path.read_text()) | content
        content = json.dumps({key: value for key, value in fields.items() if value is not ...})
    path.write_text(content)
    with pytest.raises(ModelError) as info:
        load_model_config(tmp_path, {})
    assert str(path) in str(info.value) and words in str(info.value)


def test_a_kernel_that_drops_the_cap_of_attention_logits_is_refused(monkeypatch):
    """transformers before 5.21 runs Gemma 2 on sdpa, which has no cap."""
    fields = {"model_type": "gemma2", "attn_logit_softcapping": 50.0}
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 258}
    architecture = fields | sizes | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not CAPS_ARE_DROPPED:
        load_model_config(None, architecture)

    def on_sdpa(config, make=AutoModelForCausalLM.from_config, **options):
        model = make(config, **options)
        model.config._attn_implementation = "sdpa"
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", on_sdpa)
    with pytest.raises(ModelError, match="leaves out attn_logit_softcapping.*5.21"):
        load_model_config(None, architecture)
    load_model_config(None, architecture | {"attn_logit_softcapping": None})
