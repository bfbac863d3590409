"""Reading attention changes nothing, and what is read is the kernel's attention."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models import attention
from pipeline.models.attention import Attention, AttentionError
from pipeline.models.loading import WeightFormat, check_attention_readable, load_stage
from pipeline.models.model_config import VERIFIED_MODEL_TYPES, load_model_config
from pipeline.models.stage import Stage
from pipeline.partition.plan import default_plan
from tests.helpers.marks import slow_but
from tests.helpers.tiny_models import save_tiny_model, skip_dropped_caps, tiny_model
from tests.unit.test_hf_model import OWN_SIZES, SIZES

CPU = torch.device("cpu")
NUM_TOKENS = 40
IDS = torch.randint(0, 250, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def load_stages(model_dir, num_nodes=2, dtype=torch.float32):
    config = load_model_config(model_dir, {})
    plan, weights = default_plan(config.num_hidden_layers, num_nodes, wrap=False), WeightFormat(dtype=dtype)
    return [
        Stage(stage, load_stage(model_dir, config, stage, weights, device=CPU), CPU, config.vocab_size)
        for stage in plan.stages
    ]


def dense(read: Attention, first_row=0):
    """All weights [B, heads, T, T] from the chunks, rows before `first_row` NaN."""
    weights = torch.full((*read.shape, read.shape[2]), torch.nan)
    for start, rows in read.chunks(first_row):
        weights[:, :, start : start + rows.shape[2]] = torch.nn.functional.pad(rows, (0, read.shape[2] - rows.shape[3]))
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", *slow_but((), ["qwen2", "gpt_neox"])])
def test_hidden_states_are_bit_equal_and_weights_are_those_of_eager(model_type, dtype, monkeypatch):
    monkeypatch.setattr(attention, "MAX_CHUNK_NBYTES", 4 * 2 * 4 * NUM_TOKENS * 7)  # 7 rows, which do not divide 40
    eager = AutoModelForCausalLM.from_pretrained(tiny_model(model_type), attn_implementation="eager", dtype=dtype)
    read = {}
    with torch.inference_mode():
        plain, x = IDS, IDS
        for stage in load_stages(tiny_model(model_type), dtype=dtype):
            plain = stage.forward(plain)
            x = stage.forward(x, lambda layer, one, start=stage.plan.start: read.update({start + layer: one}))
            assert torch.equal(x, plain)
        expected = eager.eval()(input_ids=IDS, output_attentions=True).attentions
        assert sorted(read) == list(range(len(expected)))
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
        for layer, weights in enumerate(expected):
            torch.testing.assert_close(dense(read[layer]), weights.float(), **tolerance)
            torch.testing.assert_close(dense(read[layer], 37)[:, :, 37:], weights[:, :, 37:].float(), **tolerance)
            assert dense(read[layer], 37)[:, :, :37].isnan().all()


@pytest.mark.parametrize("model_type", sorted(set(VERIFIED_MODEL_TYPES) - {"gemma2"}))
def test_every_model_type_shows_every_layer(model_type, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | OWN_SIZES.get(model_type, {}))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    check_attention_readable(config)
    (stage,) = load_stages(tmp_path, num_nodes=1)
    read = {}
    with torch.inference_mode():
        assert torch.equal(stage.forward(IDS, read.__setitem__), stage.forward(IDS))
    assert sorted(read) == list(range(5))
    for one in read.values():
        torch.testing.assert_close(dense(one).sum(-1), torch.ones(one.shape))


def test_a_kernel_with_soft_capping_is_refused_before_weights_are_read():
    skip_dropped_caps("gemma2")
    config = AutoConfig.for_model("gemma2", **SIZES | OWN_SIZES["gemma2"])
    with pytest.raises(AttentionError, match="Gemma2Model runs on eager; only that of sdpa can be read"):
        check_attention_readable(config)


def test_memory_is_bounded(tmp_path, monkeypatch):
    """One chunk at a time, whatever the length."""
    monkeypatch.setattr(attention, "MAX_CHUNK_NBYTES", 2**16)
    query, key = torch.randn(2, 4, 500, 8), torch.randn(2, 2, 500, 8)
    chunks = [rows.shape for _, rows in Attention(query, key, None, 0.3).chunks()]
    assert max(4 * shape.numel() for shape in chunks) <= 2**16
    assert sum(shape[2] for shape in chunks) == 500


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(num_tokens):
    read = Attention(torch.randn(2, 4, num_tokens, 8), torch.randn(2, 2, num_tokens, 8), None, 0.3)
    assert torch.equal(dense(read), torch.ones(2, 4, num_tokens, num_tokens))


def test_additive_masks():
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 4, 9, 8)
    seen = torch.rand(1, 1, 9, 9) > 0.3
    seen |= torch.eye(9, dtype=torch.bool)
    added = torch.zeros(1, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(dense(Attention(query, key, added, 0.3)), dense(Attention(query, key, seen, 0.3)))


def test_one_layer_on_the_eager_kernel_would_not_be_causal():
    """Why attention is not read by switching a layer's kernel: it gets no mask then, and later tokens leak."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model()).eval()
    changed = IDS.clone()
    changed[:, -1] = 7

    def first_tokens(ids):
        with torch.inference_mode():
            return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]

    assert torch.equal(first_tokens(IDS), first_tokens(changed))
    layer = model.base_model.layers[2].self_attn
    layer.config = type(layer.config).from_dict(layer.config.to_dict())
    layer.config._attn_implementation = "eager"
    assert not torch.equal(first_tokens(IDS), first_tokens(changed))


def test_a_cache_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, "llama", num_layers=1)).eval()
    with torch.inference_mode(), attention.attention_function(model.base_model, attention.READABLE_SDPA):
        past = model.base_model(input_ids=IDS, use_cache=True).past_key_values
        with pytest.raises(AttentionError, match="cache cannot be read"):
            model.base_model(input_ids=IDS[:, :1], past_key_values=past, attention_reader=lambda *_: None)
