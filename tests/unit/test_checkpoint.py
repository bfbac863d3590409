"""Every stored tensor and every field that depends on the layer: used as transformers uses it, or refused."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.checkpoint import read_checkpoint
from pipeline.models.families import FAMILIES
from pipeline.models.loading import ModelError, WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.sizes import stage_parameter_bytes
from pipeline.models.weight_files import checkpoint_fingerprint
from pipeline.partition.plan import default_plan
from tests.helpers.marks import slow_but, slowly
from tests.helpers.tiny_models import VOCAB_SIZE, skip_dropped_caps
from tests.unit.test_hf_model import OWN_SIZES, SIZES

PLANS = [(1, True), (4, True), (4, False)]
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_model(folder, model_type="llama", **fields):
    """A random model whose one-dimensional parameters are no constants, which hide mistakes."""
    config = AutoConfig.for_model(model_type, **SIZES | OWN_SIZES.get(model_type, {}) | fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def change_config(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder, change):
    """Store what `change` makes of the stored tensors, in place or as a new dict."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


@torch.inference_mode()
def logits_of_transformers(folder, ids, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(input_ids=ids).logits


@torch.inference_mode()
def logits_of_stages(folder, ids, num_nodes, wrap, dtype=torch.float32):
    config = load_model_config(folder, {})
    embedding, states = None, None
    for stage in default_plan(config.num_hidden_layers, num_nodes, wrap=wrap).stages:
        part = load_stage(
            folder,
            config,
            stage,
            WeightFormat(dtype=dtype),
            device=torch.device("cpu"),
            embedding=embedding if stage.node == 0 else None,
        )
        embedding = part.embedding if part.embedding is not None else embedding
        inputs = {"input_ids": ids} if stage.is_first else {"inputs_embeds": states}
        states = part.decoder(**inputs, use_cache=False).last_hidden_state
    return part.head(states)


def check_equal(folder, **options):
    """Logits of every plan are those of the unsplit model, bit for bit; returns the checkpoint's notes."""
    ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = logits_of_transformers(folder, ids, **options)
    for num_nodes, wrap in PLANS:
        assert torch.equal(logits_of_stages(folder, ids, num_nodes, wrap, **options), expected), (num_nodes, wrap)
    return read_checkpoint(folder, load_model_config(folder, {})).notes


def check_refused(folder, *words):
    """Four nodes end in a ModelError with all of `words`, the directory's name among them."""
    with pytest.raises(ModelError) as info:
        logits_of_stages(folder, torch.zeros(1, 4, dtype=torch.int64), 4, True)
    for word in (folder.name, *words):
        assert word in str(info.value), (word, str(info.value))


def without(stored, name):
    return {other: tensor for other, tensor in stored.items() if other != name}


def random_like(tensor, seed=7):
    return 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


class TestTying:
    """`tie_word_embeddings` against what is stored."""

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_head_of_its_own_is_the_head(self, tmp_path, dtype):
        save_model(tmp_path, tie_word_embeddings=True)
        change_tensors(tmp_path, lambda stored: stored | {HEAD: random_like(stored[EMBEDDING])})
        (note,) = check_equal(tmp_path, dtype=dtype)
        assert "tie_word_embeddings true, but lm_head.weight is stored and differs" in note

    def test_a_head_that_differs_in_its_last_value(self, tmp_path):
        def differ(stored):
            stored[HEAD] = stored[EMBEDDING].clone()
            stored[HEAD][-1, -1] += 1

        save_model(tmp_path, tie_word_embeddings=True)
        change_tensors(tmp_path, differ)
        assert len(check_equal(tmp_path)) == 1

    def test_a_head_that_is_the_embedding_stays_one_tensor(self, tmp_path):
        save_model(tmp_path, tie_word_embeddings=True)
        change_tensors(tmp_path, lambda stored: stored | {HEAD: stored[EMBEDDING]})
        assert check_equal(tmp_path) == ()
        assert read_checkpoint(tmp_path, load_model_config(tmp_path, {})).is_tied

    @pytest.mark.parametrize("tied", slow_but([True], [True, False]))
    def test_an_untied_model_says_tied_or_not(self, tmp_path, tied):
        save_model(tmp_path, tie_word_embeddings=False)
        change_config(tmp_path, tie_word_embeddings=tied)
        assert len(check_equal(tmp_path)) == tied

    @pytest.mark.parametrize("model_type", slow_but(["gpt_neox"], ["llama", "gpt_neox", "gemma"]))
    def test_the_only_matrix_has_the_heads_name(self, tmp_path, model_type):
        def rename(stored):
            (name,) = [name for name in stored if "embed" in name]
            stored["embed_out.weight" if model_type == "gpt_neox" else HEAD] = stored.pop(name)

        save_model(tmp_path, model_type, tie_word_embeddings=True)
        change_tensors(tmp_path, rename)
        assert check_equal(tmp_path) == ()

    def test_untied_without_a_head(self, tmp_path):
        save_model(tmp_path, tie_word_embeddings=True)
        change_config(tmp_path, tie_word_embeddings=False)
        check_refused(tmp_path, "lacks lm_head.weight", "tie_word_embeddings false")

    def test_untied_without_an_embedding(self, tmp_path):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: without(stored, EMBEDDING))
        check_refused(tmp_path, f"lacks {EMBEDDING}")

    def test_neither_is_stored(self, tmp_path):
        save_model(tmp_path, tie_word_embeddings=True)
        change_tensors(tmp_path, lambda stored: without(stored, EMBEDDING))
        check_refused(tmp_path, f"lacks {EMBEDDING}")

    @pytest.mark.parametrize("model_type", slow_but(["llama"], sorted(FAMILIES)))
    def test_every_family_ties_by_default_or_not(self, tmp_path, model_type):
        skip_dropped_caps(model_type)
        save_model(tmp_path, model_type)
        change_config(tmp_path, tie_word_embeddings=...)
        assert check_equal(tmp_path) == ()


class TestNames:
    @pytest.mark.parametrize("model_type", slow_but(["llama"], ["llama", "gpt_neox", "mixtral", "qwen3_moe"]))
    @pytest.mark.parametrize("tied", slow_but([True], [True, False]))
    def test_without_the_decoders_prefix(self, tmp_path, model_type, tied):
        prefix = f"{FAMILIES[model_type].decoder}."
        save_model(tmp_path, model_type, tie_word_embeddings=tied)
        change_tensors(tmp_path, lambda stored: {name.removeprefix(prefix): t for name, t in stored.items()})
        assert check_equal(tmp_path) == ()

    @pytest.mark.slow
    def test_some_with_the_prefix_and_some_without(self, tmp_path):
        def rename(stored):
            return {n.removeprefix("model.") if "layers.2" in n else n: t for n, t in stored.items()}

        save_model(tmp_path)
        change_tensors(tmp_path, rename)
        assert check_equal(tmp_path) == ()

    def test_one_tensor_under_two_names(self, tmp_path):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: stored | {"norm.weight": stored["model.norm.weight"] + 1})
        check_refused(tmp_path, "twice", "'norm.weight'", "'model.norm.weight'")

    @pytest.mark.slow
    def test_the_heads_old_name(self, tmp_path):
        save_model(tmp_path, "gpt_neox")
        change_tensors(tmp_path, lambda stored: {n.replace("lm_head", "embed_out"): t for n, t in stored.items()})
        assert check_equal(tmp_path) == ()

    def test_another_familys_name_for_the_head(self, tmp_path):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: {n.replace("lm_head", "embed_out"): t for n, t in stored.items()})
        check_refused(tmp_path, "'embed_out.weight'", "has no use")


class TestTensors:
    @pytest.mark.parametrize(
        ("model_type", "name", "tensor"),
        [
            ("gpt_neox", "gpt_neox.layers.{}.attention.bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8)),
            slowly("gpt_neox", "gpt_neox.layers.{}.attention.masked_bias", torch.tensor(-1e9)),
            slowly("gpt_neox", "layers.{}.attention.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)),
            ("llama", "model.layers.{}.self_attn.rotary_emb.cos_cached", torch.zeros(1, 1, 8, 16)),
        ],
    )
    def test_buffers_that_the_model_makes_itself(self, tmp_path, model_type, name, tensor):
        save_model(tmp_path, model_type)
        change_tensors(tmp_path, lambda stored: stored | {name.format(layer): tensor for layer in range(5)})
        assert check_equal(tmp_path) == ()

    @pytest.mark.parametrize("model_type", slow_but(["gpt_neox"], ["llama", "gpt_neox"]))
    @pytest.mark.parametrize("factor", slow_but([4], [1, 4]))
    def test_stored_frequencies_follow_the_config_or_are_noted(self, tmp_path, model_type, factor):
        save_model(tmp_path, model_type)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).base_model.rotary_emb.inv_freq.half() / factor
        part = "attention" if model_type == "gpt_neox" else "self_attn"
        name = f"{FAMILIES[model_type].decoder}.layers.3.{part}.rotary_emb.inv_freq"
        change_tensors(tmp_path, lambda stored: stored | {name: expected})
        notes = check_equal(tmp_path)
        assert len(notes) == (factor != 1) and all(name in note for note in notes)

    @pytest.mark.parametrize(
        "name",
        [
            "score.weight",
            "lm_head.bias",
            "model.layers.5.input_layernorm.weight",
            "model.layers.3.self_attn.q_proj.bias",
            "model.layers.3.self_attn.q_norm.weight",
            "model.layers.3.self_attn.q_proj.lora_A.weight",
            "model.layers.x.input_layernorm.weight",
            "model.layers.weight",
            "model.layers.3.attention.bias",
            "model.embed_positions.weight",
            "model.embed_tokens.bias",
            "norm.bias",
            "layers",
        ],
    )
    def test_of_no_use(self, tmp_path, name):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: stored | {name: torch.ones(64)})
        check_refused(tmp_path, repr(name)[:-1] if "layers.3" not in name else name.partition("layers.3.")[2])

    @pytest.mark.parametrize(
        "suffix",
        [
            *("weight_scale", "weight_scale_inv", "input_scale", "qweight", "scales", "qzeros", "g_idx", "SCB"),
            *("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "weight_packed"),
        ],
    )
    def test_scales_beside_weights(self, tmp_path, suffix):
        name = f"model.layers.3.self_attn.q_proj.{suffix}"
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: stored | {name: torch.ones(64)})
        check_refused(tmp_path, repr(name), "quantised", "take the unquantised checkpoint")

    def test_float8_weights_with_scales(self, tmp_path):
        def quantise(stored):
            for name in [name for name in stored if "proj" in name]:
                scale = stored[name].abs().max() / 448
                stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
                stored[f"{name}_scale"] = scale
            return stored

        save_model(tmp_path)
        change_tensors(tmp_path, quantise)
        check_refused(tmp_path, "weight_scale'", "quantised")

    @pytest.mark.parametrize("dtype", slow_but([torch.float8_e4m3fn], [torch.float8_e4m3fn, torch.float8_e5m2]))
    def test_float8_weights_alone_are_noted(self, tmp_path, dtype):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: {n: t.to(dtype) if "proj" in n else t for n, t in stored.items()})
        (note,) = check_equal(tmp_path)
        assert "35 weights" in note and "8-bit floating point" in note

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e8m0fnu])
    def test_weights_of_integers(self, tmp_path, dtype):
        name = "model.layers.3.self_attn.q_proj.weight"
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: stored | {name: stored[name].to(torch.float32).to(dtype)})
        check_refused(tmp_path, repr(name), "unquantised")

    @pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float64, torch.float16, torch.bfloat16]))
    def test_other_floats_are_cast(self, tmp_path, dtype):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: {name: tensor.to(dtype) for name, tensor in stored.items()})
        assert check_equal(tmp_path) == ()

    def test_a_lacking_tensor(self, tmp_path):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: without(stored, "model.layers.3.mlp.up_proj.weight"))
        check_refused(tmp_path, "mlp.up_proj.weight")

    def test_a_lacking_layer(self, tmp_path):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: {n: t for n, t in stored.items() if "layers.3." not in n})
        check_refused(tmp_path, "nothing of layer 3")

    @pytest.mark.parametrize("name", [EMBEDDING, HEAD, "model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
    def test_another_shape(self, tmp_path, name):
        save_model(tmp_path)
        change_tensors(tmp_path, lambda stored: stored | {name: stored[name][:-1]})
        check_refused(tmp_path, name, "has shape", "config.json")


class TestFiles:
    """What cannot be read is named, with what there is against it."""

    @pytest.mark.parametrize(
        "damage",
        [lambda data: b"", lambda data: b"\xff" * 8 + data[8:], lambda data: data[:30] + b"\xff" + data[31:],
         lambda data: data[:-1000]],
    )  # fmt: skip
    def test_damaged(self, tmp_path, damage):
        path = save_model(tmp_path) / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=r"model\.safetensors: its header cannot be read .*model\.stage_to"):
            read_checkpoint(tmp_path, load_model_config(tmp_path, {}))

    def test_gone_since_the_headers_were_read(self, tmp_path):
        save_model(tmp_path)
        tensor = read_checkpoint(tmp_path, load_model_config(tmp_path, {})).embedding
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=rf"model\.safetensors: {EMBEDDING} cannot be read .*model\.stage_to"):
            tensor[...]

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_without_the_right_to_read(self, tmp_path, name, monkeypatch):
        def refuse(path, *arguments, **options):
            if path == tmp_path / name:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *arguments, **options)

        save_model(tmp_path)
        opened = io.open
        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr("io.open", refuse)  # of Path.read_bytes
        with pytest.raises(ValueError, match=rf"{name}: it cannot be read .*access rights.*model\.stage_to"):
            checkpoint_fingerprint(tmp_path)


class TestLayerFields:
    """Whatever tells layers apart is cut with them."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "fields",
        [
            {"mlp_only_layers": [1]},
            {"mlp_only_layers": [0, 3, 4]},
            {"decoder_sparse_step": 2},
            {"decoder_sparse_step": 3},
            {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
            {"decoder_sparse_step": 7},
            {"num_experts": 0},
            {"sliding_window": 8, "use_sliding_window": True},
        ],
    )
    def test_experts(self, tmp_path, fields):
        save_model(tmp_path, "qwen3_moe", **fields)
        assert check_equal(tmp_path) == ()
        self.check_bytes(tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("model_type", "fields"),
        [
            ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
            ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
            ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}),
            ("qwen3", {"layer_types": WINDOWS, "use_sliding_window": True, "sliding_window": 8}),
            ("gemma2", {"layer_types": WINDOWS}),
            ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 8}),
            ("gemma3_text", {"sliding_window_pattern": 5, "sliding_window": 8, "final_logit_softcapping": 3.0}),
            ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
            ("mistral", {"sliding_window": None}),
            ("mixtral", {"sliding_window": 8}),
            ("phi3", {"sliding_window": 8}),
            ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}}),
            ("phi3", {"partial_rotary_factor": 0.5}),
            ("starcoder2", {"sliding_window": 8, "use_bias": False}),
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("llama", {"head_dim": 32}),
            ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}),
            ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}),
            ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
            ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
            ("gpt_neox", {"attention_bias": False}),
            ("olmo2", {"attention_bias": True}),
        ],
    )
    def test_windows_positions_and_biases(self, tmp_path, model_type, fields):
        if fields.get("attn_logit_softcapping", ...) is not None:
            skip_dropped_caps(model_type)
        save_model(tmp_path, model_type, **fields)
        assert check_equal(tmp_path) == ()
        self.check_bytes(tmp_path)

    def check_bytes(self, folder):
        """All plans hold the same weights, but for a tied head on another node."""
        config = load_model_config(folder, {})
        sums = set()
        for num_nodes, wrap in [(1, True), (2, True), (3, True), (4, True), (5, False)]:
            stages = default_plan(config.num_hidden_layers, num_nodes, wrap=wrap).stages
            total = sum(stage_parameter_bytes(config, stage, WeightFormat(dtype=torch.float32)) for stage in stages)
            tied = config.tie_word_embeddings and num_nodes > 1
            sums.add(total - tied * 4 * config.vocab_size * config.hidden_size)
        assert len(sums) == 1

    @pytest.mark.parametrize(
        ("model_type", "fields"),
        [
            ("llama", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 8}),
            slowly("mixtral", {"layer_types": WINDOWS, "sliding_window": 8}),
            slowly("llama", {"embedding_multiplier": 12.0}),
            slowly("llama", {"no_rope_layers": [0, 1, 1, 1, 0]}),
            slowly("llama", {"final_logit_softcapping": 3.0}),
            slowly("gemma", {"final_logit_softcapping": 3.0}),
            slowly("gemma3_text", {"attn_logit_softcapping": 3.0}),
            slowly("mixtral", {"mlp_only_layers": [1]}),
            slowly("olmo2", {"clip_qkv": 8.0}),
        ],
    )
    def test_what_transformers_does_not_read_is_noted(self, tmp_path, model_type, fields):
        save_model(tmp_path, model_type)
        change_config(tmp_path, **fields)
        (note,) = check_equal(tmp_path)
        assert f"has {next(iter(fields))}, which" in note

    @pytest.mark.parametrize(
        ("model_type", "fields", "word"),
        [
            ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
            ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
            ("llama", {"per_layer_config": {"1": {"intermediate_size": 32}}}, "per_layer_config"),
            ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised already"),
            ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "quantised already"),
            ("mistral", {"layer_types": WINDOWS}, "'ministral'"),
            ("llama", {"num_hidden_layers": 4}, "num_hidden_layers 4"),
            ("llama", {"num_hidden_layers": 6}, "nothing of layer 5"),
        ],
    )
    def test_what_cannot_be_cut(self, tmp_path, model_type, fields, word):
        save_model(tmp_path, model_type)
        change_config(tmp_path, **fields)
        check_refused(tmp_path, word)
