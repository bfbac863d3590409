"""AttnLRP's rules: against lxt's numbers, by conservation, on cut models, and that they leave no trace."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.analysis.relevance import RELEVANCE_MODEL_TYPES, attnlrp
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.partition.plan import StagePlan
from tests.helpers.make_relevance_goldens import fill_weights
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_model

GOLDENS = Path(__file__).parent / "goldens"


def golden(model_type):
    return json.loads((GOLDENS / f"relevance_{model_type}.json").read_text(encoding="ascii"))


def golden_model(stored, **fields):
    """The golden's model, with the attention function that stages run with, and its token ids."""
    config = AutoConfig.for_model(**stored["config"] | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    fill_weights(model, stored["seed"])
    return model, torch.tensor(stored["ids"])


def target_logits(head, hidden_states, ids):
    """The true next tokens' logits [B, T - 1]."""
    return head(hidden_states[:, :-1]).gather(-1, ids[:, 1:, None]).squeeze(-1)


def embed(model, ids):
    return model.get_input_embeddings()(ids).detach().requires_grad_()


def run(model, ids):
    """Relevance of the whole model as one stage, and the logits that it starts from."""
    with attnlrp(model.base_model) as relevance:
        hidden_states = model.base_model(inputs_embeds=embed(model, ids), use_cache=False).last_hidden_state
        logits = target_logits(model.get_output_embeddings(), hidden_states, ids)
        logits.sum().backward()
    return relevance, logits.detach()


def watch_layers(layers):
    """A list that a backward pass fills with the relevance [B, T] of each layer's output, the last layer first."""
    found = []

    def watch(_, args, output):
        values = output.detach()
        output.register_hook(lambda gradient: found.append((values * gradient).sum(-1)))

    for layer in layers:
        layer.register_forward_hook(watch)
    return found


def watch_attention(monkeypatch):
    """A list of (q, k, v, scaling, output, gradient of output) per layer; gradients come in the backward pass."""
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, attention_mask, scaling, **options):
        output, _ = sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)
        inputs = [tensor.detach().double() for tensor in (query, key, value)]
        call = [*inputs, scaling, output.detach().double().transpose(1, 2)]
        output.register_hook(lambda gradient: call.append(gradient.double().transpose(1, 2)))
        calls.append(call)
        return output, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
    return calls


def softmax_absorbs(query, key, value, scaling, output, gradient):
    """What a causal softmax absorbs, by propositions 3.3 and 3.1 as the paper writes them, on relevances."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    visible = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    scores = query @ key.transpose(2, 3) * scaling
    attention = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    assert (attention @ value - output).abs().max() < 1e-4
    of_output = output * gradient
    of_attention = attention * (of_output / (2 * output) @ value.transpose(2, 3))
    of_scores = scores * (of_attention - attention * of_attention.sum(-1, keepdim=True))
    return (of_attention - of_scores).sum()


@pytest.mark.parametrize("model_type", RELEVANCE_MODEL_TYPES)
def test_relevances_are_those_of_lxt(model_type):
    stored = golden(model_type)
    model, ids = golden_model(stored)
    found = watch_layers(model.base_model.layers)
    relevance, logits = run(model, ids)
    torch.testing.assert_close(logits, torch.tensor(stored["target_logits"]), rtol=1e-5, atol=1e-5)
    hidden = torch.stack([relevance.tokens, *reversed(found)])
    torch.testing.assert_close(hidden, torch.tensor(stored["hidden"]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(relevance.heads.float(), torch.tensor(stored["heads"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [*((model_type, {}) for model_type in RELEVANCE_MODEL_TYPES), ("gpt_neox", {"use_parallel_residual": False})],
)
def test_every_layer_conserves_relevance(model_type, fields, biased, monkeypatch):
    """What a layer gives on is what it got, less what its softmax (by the paper's formula) and biases absorb."""
    calls = watch_attention(monkeypatch)
    model, ids = golden_model(golden(model_type), **fields)
    if not biased:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    found = watch_layers(model.base_model.layers)
    relevance, logits = run(model, ids)
    boundaries = [relevance.input, *(tensor.double().sum() for tensor in reversed(found))]
    scale = logits.abs().sum()
    for index, call in enumerate(calls):
        absorbed = softmax_absorbs(*call)
        assert (relevance.softmax[index] - absorbed).abs() < 1e-5 * scale
        lost = boundaries[index + 1] - boundaries[index]
        assert (lost - absorbed - relevance.biases[index]).abs() < 1e-5 * scale
    assert (relevance.output - boundaries[-1] - relevance.biases[-1]).abs() < 1e-5 * scale
    assert (relevance.output - logits.sum()).abs() < 1e-5 * scale
    has_biases = biased and model_type in ("qwen2", "gpt_neox")
    assert (relevance.bias_share != 0) == has_biases
    kept = 1 - relevance.bias_share - relevance.softmax_share
    assert abs(kept * relevance.output - relevance.input) < 1e-5 * scale


@pytest.mark.parametrize("model_type", RELEVANCE_MODEL_TYPES)
def test_stages_find_what_the_whole_model_does(model_type):
    """Stages of 2, 0 and 4 layers, twice; hidden states go on and gradients come back as plain numbers."""
    folder = tiny_model(model_type)
    ids = torch.randint(0, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    expected, _ = run(whole, ids)
    config = load_model_config(folder, {})
    weights = WeightFormat(dtype=torch.float32)
    bounds = ((0, 2), (2, 2), (2, 6))
    stages = [
        StagePlan(stage_index=i, node=i, start=start, end=end, is_first=i == 0, is_last=i == 2)
        for i, (start, end) in enumerate(bounds)
    ]
    parts = [load_stage(folder, config, stage, weights, device=torch.device("cpu")) for stage in stages]
    with ExitStack() as blocks:
        relevances = [blocks.enter_context(attnlrp(part.decoder)) for part in parts]
        for _ in range(2):
            inputs, outputs = [], []
            states = parts[0].embedding(ids)
            for part in parts:
                inputs.append(states.detach().requires_grad_())
                states = part.decoder(inputs_embeds=inputs[-1], use_cache=False).last_hidden_state
                outputs.append(states)
            target_logits(parts[-1].head, states, ids).sum().backward()
            for index in (1, 0):
                outputs[index].backward(inputs[index + 1].grad)
    heads = torch.cat([relevance.heads for relevance in relevances])
    torch.testing.assert_close(heads, 2 * expected.heads, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(relevances[0].tokens, expected.tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(relevances[2].tokens, (inputs[2] * inputs[2].grad).sum(-1).detach())
    torch.testing.assert_close(relevances[1].input, relevances[1].output)
    torch.testing.assert_close(relevances[2].input, relevances[1].output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("model_type", RELEVANCE_MODEL_TYPES)
def test_outputs_stay_bit_equal_and_causal(model_type, recorded):
    model, ids = golden_model(golden(model_type))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    with torch.set_grad_enabled(recorded):
        expected = model(input_ids=ids, use_cache=False).logits
        with attnlrp(model.base_model) as relevance:
            logits = model(inputs_embeds=embed(model, ids), use_cache=False).logits
            later = model(inputs_embeds=embed(model, changed), use_cache=False).logits
    assert torch.equal(logits, expected)
    assert torch.equal(later[:, :7], logits[:, :7])
    assert not torch.equal(later[:, 7:], logits[:, 7:])
    assert logits.requires_grad == recorded
    assert not relevance.heads.any()


def test_no_relevance_reaches_later_tokens():
    model, ids = golden_model(golden("llama"))
    with attnlrp(model.base_model) as relevance:
        hidden_states = model.base_model(inputs_embeds=embed(model, ids), use_cache=False).last_hidden_state
        hidden_states[:, 5].sum().backward()
    assert relevance.tokens[:, :6].all()
    assert not relevance.tokens[:, 6:].any()


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox"])
def test_rules_are_gone_after_an_error(model_type):
    model, ids = golden_model(golden(model_type))
    embeddings = embed(model, ids)

    def gradient():
        return torch.autograd.grad(model(inputs_embeds=embeddings, use_cache=False).logits.sum(), embeddings)[0]

    plain = gradient()
    with pytest.raises(RuntimeError, match="stop"):
        with attnlrp(model.base_model):
            assert not torch.allclose(gradient(), plain)
            raise RuntimeError("stop")
    assert torch.equal(gradient(), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_other_types_are_refused():
    config = AutoConfig.for_model(**golden("llama")["config"] | {"model_type": "gemma"})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="'gemma', only for llama, qwen2, qwen3, gpt_neox"):
        with attnlrp(model.base_model):
            pass


def test_an_input_without_gradient_is_refused():
    model, ids = golden_model(golden("llama"))
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embed(model, ids).detach()}):
        with attnlrp(model.base_model), pytest.raises(ValueError, match="must be .* that require a gradient"):
            model.base_model(**inputs)
