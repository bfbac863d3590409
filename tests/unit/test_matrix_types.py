"""Which matrices are held as blocks, and what is reckoned with them: bytes, kinds of layers, costs, `--plan`."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.config.reading import find_config, load_config
from pipeline.config.schema import ModelConfig
from pipeline.generation.generate import session_digest
from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.modules import BlockModule
from pipeline.models.blocks.storage import block_types
from pipeline.models.checkpoint import ModelError, read_checkpoint
from pipeline.models.families import FAMILIES
from pipeline.models.gguf import convert_gguf_once
from pipeline.models.gguf_header import header_types
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.matrix_types import choose_matrix_types, stored_types, types_label
from pipeline.models.model_config import load_model_config
from pipeline.models.sizes import embedding_bytes, layer_kinds, stage_weights
from pipeline.partition.plan import default_plan
from pipeline.records.node_costs import NodeCosts, write_node_costs
from pipeline.runtime import measured_nodes
from pipeline.runtime.balance import planner_problem
from pipeline.runtime.codecs import run_digest
from pipeline.runtime.deployment import DeployedModel
from pipeline.runtime.measured_nodes import kept_nodes
from pipeline.runtime.plan_report import plan_run, plan_text
from tests.helpers.gguf_files import tiny_config, write_gguf
from tests.helpers.marks import slow_but
from tests.helpers.tiny_models import skip_dropped_caps, tiny_model

CPU = torch.device("cpu")
PLAIN = WeightFormat(dtype=torch.float32)
WITH_EXPERTS = ("mixtral", "qwen3_moe")
# Of both ends of a tiny model's six layers of H = 64, and of some layers; others stay float32.
MIXED = {
    "layers": [{"self_attn.q_proj.weight": "Q8_0", "mlp.down_proj.weight": "Q4_1"}, {}, {"mlp.up_proj.weight": "BF16"}]
    + [{"self_attn.q_proj.weight": "Q8_0", "mlp.down_proj.weight": "Q4_1"}, {}, {}],
    "embedding": "Q4_1",
    "head": "Q8_0",
}
TIED = {**MIXED, "head": "Q4_1"}
LARGE = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32768,
    "tie_word_embeddings": True,
}


def never():
    raise AssertionError("the checkpoint's own blocks do not count here")


def chosen(weights, config, *, on_cpu=True, stored=never, **model):
    return choose_matrix_types(ModelConfig(name="m", weights=weights, **model), config, stored, on_cpu=on_cpu)


def config_of(model_type="llama", *, types=None, tied=False):
    config = load_model_config(tiny_model(model_type, tied=tied), {})
    config.matrix_types = types
    return config


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("fp32", {}),
        ("auto", {"dtype": "bf16"}),
        ("auto", {"load_in_8bit": True}),
        ("auto", {"load_in_4bit": True}),
        ("auto", {"on_cpu": False}),
    ],
)
def test_nothing_is_blocks_where_they_are_not_for(weights, options):
    assert chosen(weights, config_of(), **options) is None


def test_the_checkpoints_own_blocks_are_taken_but_of_experts():
    assert chosen("auto", config_of(), stored=lambda: MIXED) is MIXED
    assert chosen("auto", config_of(), stored=lambda: None) is None
    for model_type in WITH_EXPERTS:
        assert chosen("auto", config_of(model_type)) is None


@pytest.mark.parametrize(("weights", "type_name"), [("bf16", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_1")])
def test_blocks_are_made_of_all_matrices_of_whole_blocks(weights, type_name):
    types = chosen(weights, config_of())
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert types["layers"] == [{f"{name}.weight": type_name for name in names}] * 6
    assert types["embedding"] == types["head"] == type_name
    narrow = load_model_config(tiny_model("llama", intermediate_size=112), {})  # half a block of 32 is left over
    assert ("mlp.down_proj.weight" in chosen(weights, narrow)["layers"][0]) is (type_name == "BF16")


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_blocks_that_cannot_be_had_are_refused(weights):
    told = f"model.weights is {weights}, "
    with pytest.raises(ModelError, match=f"{told}which is for CPUs, and a node computes on a GPU"):
        chosen(weights, config_of(), on_cpu=False)
    for model_type in WITH_EXPERTS:
        with pytest.raises(ModelError, match=f"{told}but models of type '{model_type}' have experts"):
            chosen(weights, config_of(model_type))
    thin = load_model_config(None, {**LARGE, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2})
    with pytest.raises(ModelError, match=f"{told}but no matrix of this model has rows of whole blocks of (16|32) weig"):
        chosen(weights, thin)


def planned(*overrides, architecture=LARGE):
    given = [("model.name", "some/model"), ("model.architecture", architecture), ("partition.num_nodes", 2)]
    return plan_run(load_config(None, [*given, ("dataset.max_length", 64), ("dataset.stride", 64), *overrides]))


def test_one_node_on_a_gpu_is_enough_to_refuse_blocks(monkeypatch):
    int8 = ("model.weights", "int8")
    assert types_label(planned(int8, ("partition.nodes", [{"device": "cpu"}, {}])).model_config) == "Q8_0"
    with pytest.raises(ModelError, match="a node computes on a GPU"):
        planned(int8, ("partition.nodes", [{"device": "cpu"}, {"device": "cuda:0"}]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="a node computes on a GPU"):
        planned(int8)
    assert types_label(planned(int8, ("runtime.device", "cpu")).model_config) == "Q8_0"
    assert types_label(planned().model_config) is None


def held_nbytes(*stages):
    """Of all matrices and parameters of stages in one process, what they share once."""
    modules = [module for stage in stages for module in stage.decoder.modules()]
    weights = {}
    for stage in stages:
        projection = stage.head.projection if stage.head else None
        if isinstance(projection, torch.nn.Module):
            modules += projection.modules()
        elif projection is not None:
            weights[projection.keywords["weight"].data_ptr()] = projection.keywords["weight"].nbytes
    for module in modules:
        if isinstance(module, BlockModule):
            weights[module.matrix.data.data_ptr()] = module.matrix.nbytes
        weights |= {p.data_ptr(): p.nbytes for p in module.parameters(recurse=False)}
    return sum(weights.values())


FAMILIES_OF_BLOCKS = [model_type for model_type in FAMILIES if model_type not in WITH_EXPERTS]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("model_type", slow_but(("llama", "gemma3_text", "gpt_neox"), FAMILIES_OF_BLOCKS))
def test_sizes_are_what_a_stage_then_holds(model_type, weights, tied):
    skip_dropped_caps(model_type)
    config = config_of(model_type, tied=tied)
    config.matrix_types = chosen(weights, config)
    check_sizes(model_type, config, tied)
    whole = stage_weights(config, default_plan(6, 1).stages[0], PLAIN).nbytes
    config.matrix_types = None
    assert whole < 0.6 * stage_weights(config, default_plan(6, 1).stages[0], PLAIN).nbytes


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_of_layers_of_several_types(tied):
    check_sizes("llama", config_of(types=TIED if tied else MIXED, tied=tied), tied)


def check_sizes(model_type, config, tied):
    folder = tiny_model(model_type, tied=tied)
    (whole,) = default_plan(6, 1).stages
    held = held_nbytes(load_stage(folder, config, whole, PLAIN, device=CPU))
    assert stage_weights(config, whole, PLAIN).nbytes == held
    plan, loaded = default_plan(6, 2), []
    for stage in plan.stages:  # the first and the last are of one process
        loaded.append(load_stage(folder, config, stage, PLAIN, device=CPU))
        assert stage_weights(config, stage, PLAIN).nbytes == held_nbytes(loaded[-1])
    embedding = loaded[0].embedding
    last = load_stage(folder, config, plan.stages[-1], PLAIN, device=CPU, embedding=embedding)
    shared = embedding_bytes(config, torch.float32) if tied else 0
    assert held_nbytes(loaded[0], last) == held_nbytes(loaded[0]) + held_nbytes(loaded[-1]) - shared


def test_layers_of_other_types_are_other_kinds():
    assert layer_kinds(config_of(types=MIXED)) == [0, 1, 2, 0, 1, 1]
    assert layer_kinds(config_of()) == [0] * 6


def row_nbytes(type_name, num_weights):
    return num_weights // LAYOUTS[type_name].num_weights * LAYOUTS[type_name].nbytes


@pytest.mark.parametrize(("weights", "type_name"), [("bf16", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_1")])
def test_a_token_costs_the_bytes_of_its_blocks(weights, type_name):
    balanced = [("partition.plan", "balanced"), ("partition.objective", "decode")]
    run = planned(*balanced, ("partition.nodes", [{"speed": 1}] * 2), ("model.weights", weights))
    costs = planner_problem(run.config, run.model_config).costs
    layer = 4 * 2048 * row_nbytes(type_name, 2048)
    layer += 2 * 8192 * row_nbytes(type_name, 2048) + 2048 * row_nbytes(type_name, 8192)
    ends = 32768 * row_nbytes(type_name, 2048)
    norm = 4 * 2048
    assert costs.layer_s == (pytest.approx((layer + 2 * norm) / 2e10),) * 4
    assert costs.head_s == pytest.approx((ends + norm) / 2e10) and costs.embedding_s == 0
    assert costs.embedding_bytes == costs.tied_bytes == ends == costs.head_bytes - norm
    cache = 8 * 2048 * 2 * 2048 * 4  # slots, positions, keys and values
    assert costs.layer_bytes == (layer + 2 * norm + cache,) * 4
    prefill = planned(("model.weights", weights))
    assert planner_problem(prefill.config, prefill.model_config).costs.layer_s == (
        pytest.approx(2 * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048) / 1e11),
    ) * 4


def test_costs_of_nodes_are_kept_by_types(tmp_path, monkeypatch):
    """Node costs that one way to hold the weights has left are not taken for another."""
    own = [("partition.plan", "balanced"), ("exp_dir", str(tmp_path)), ("partition.num_nodes", 1)]
    balanced = load_config(find_config("demo.yaml"), own)
    swapped = MIXED | {"layers": [MIXED["layers"][i] for i in (2, 1, 0, 2, 1, 1)]}
    configs = [config_of(types=types) for types in (None, MIXED, swapped, {**MIXED, "head": "Q4_1"})]
    configs += [config_of(types=chosen(weights, config_of())) for weights in ("bf16", "int8", "int4")]
    paths = set()
    for config in configs:
        assert kept_nodes(balanced, config) is None
        layers = [0.1] * len(set(layer_kinds(config)))
        node = {"host": "a", "layer_s": layers, "head_s": 0.1, "one_token_layer_s": layers, "one_token_head_s": 0.1}
        costs = {"measured_at": "2026-01-02T03:04:05+00:00", "microbatch_tokens": 1024, "nodes": [node]}
        with monkeypatch.context() as patched:  # to learn where they are looked for
            patched.setattr(measured_nodes, "read_node_costs", lambda path, **_: path)
            path = kept_nodes(balanced, config)
        write_node_costs(path, NodeCosts.from_plain(costs))
        assert kept_nodes(balanced, config) == NodeCosts.from_plain(costs)
        paths.add(path)
    assert len(paths) == len(configs)


@pytest.mark.parametrize(
    ("weights", "held", "type_name"),
    [
        ("auto", "fp32", None),
        ("bf16", "fp32, BF16 blocks made at load", "BF16"),
        ("int8", "fp32, Q8_0 blocks made at load", "Q8_0"),
        ("int4", "fp32, Q4_1 blocks made at load", "Q4_1"),
    ],
)
def test_the_plan_says_how_weights_are_held_and_what_they_take(weights, held, type_name):
    text = plan_text(planned(("model.weights", weights)))
    assert text.splitlines()[0] == f"some/model: 4 layers, hidden size 2048, {held}"
    nbytes = 4 if type_name is None else LAYOUTS[type_name].nbytes / LAYOUTS[type_name].num_weights
    layer, ends = nbytes * (4 * 2048**2 + 3 * 2048 * 8192), nbytes * 32768 * 2048
    rank_0, rank_1 = text[text.index("rank  ") :].splitlines()[1:3]
    assert rank_0.split()[1] == f"{(2 * layer + ends) / 2**30:.2f}" and rank_1.split()[1] == f"{2 * layer / 2**30:.2f}"
    assert "note:" not in text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "types",
    [
        {"token_embd.weight": "Q8_0", "blk.1.ffn_down.weight": "Q5_0", "blk.0.attn_q.weight": "F32"},
        {"": "F16", "output.weight": "Q8_0", "blk.0.attn_k.weight": "BF16"},
        {"": "F32"},
        {"": "Q8_0", "token_embd.weight": "F16"},
    ],
    ids=["Q4_1", "F16", "F32", "Q8_0"],
)
def test_a_files_header_tells_what_its_conversion_comes_to(types, tied, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "a.gguf"
    write_gguf(path, LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)), types=types)
    folder = convert_gguf_once(path, str(tmp_path / "cache"))
    config = load_model_config(folder, {})
    found = header_types(path, config)
    assert found == stored_types(read_checkpoint(folder, config, block_types(folder)))
    assert (found is None) is (types == {"": "F32"})
    overrides = [("model.name", str(path)), ("dataset.max_length", 64), ("dataset.stride", 64)]
    architecture = {key: value for key, value in config.to_dict().items() if key != "dtype"}
    before = plan_run(load_config(None, [*overrides, ("model.architecture", architecture)]))
    after = plan_run(load_config(None, [*overrides, ("model.name", str(folder))]))
    assert before.model_config.matrix_types == after.model_config.matrix_types == found and before.notes == ()
    told = [plan_text(run).partition(": ")[2] for run in (before, after)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 1}, "more layers than model.architecture.num_hidden_layers, 1"),
        ({"intermediate_size": 160}, r"blk.0.ffn_gate.weight has shape .* by model.architecture it has \[160, "),
        ({"vocab_size": 320}, "token_embd.weight has shape"),
    ],
)
def test_a_header_of_another_architecture_is_refused(change, words, tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, LlamaForCausalLM(tiny_config()))
    architecture = tiny_config(**change).to_dict() | {"model_type": "llama"}
    own = [("model.name", str(path)), ("model.architecture", {k: v for k, v in architecture.items() if k != "dtype"})]
    with pytest.raises(ValueError, match=words):
        plan_run(load_config(None, [*own, ("dataset.max_length", 64), ("dataset.stride", 64)]))


def test_a_file_of_blocks_that_is_not_there_is_noted_where_they_count(tmp_path):
    words = "model.gguf is not on this machine, so nothing is known of its blocks: sizes are those of float32"
    for name in ("model.gguf", "package:no_such_package/model.gguf"):
        assert [note.endswith(words.partition(" ")[2]) for note in planned(("model.name", name)).notes] == [True]
        for own in ("fp32", "int8"):
            assert planned(("model.name", name), ("model.weights", own)).notes == ()
        assert planned(("model.name", name), ("runtime.device", "cuda:0")).notes == ()
    assert f"note: {words}" in plan_text(planned(("model.name", "model.gguf")))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="model.gguf cannot be read as GGUF"):
        planned(("model.name", str(tmp_path / "model.gguf")))


def deployed(types, blocks_digest=None):
    model = config_of(types=types)
    return DeployedModel(
        directory=tiny_model("llama"),
        config=model,
        checkpoint_digest="ab",
        block_types=types_label(model),
        blocks_digest=blocks_digest,
        notes=(),
    )


def test_weights_that_are_held_differently_are_no_session_to_resume():
    """Of one checkpoint: its blocks, float32 as on a GPU, and what is made at load, which may be of the same types."""
    config = load_config(find_config("demo.yaml"))
    int4 = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="int4"))
    made = chosen("int4", config_of())
    cases = [(config, None, None), (config, MIXED, "12"), (config, MIXED, "34"), (config, made, "12")]
    cases.append((int4, made, None))
    plan = default_plan(6, 4)
    digests: tuple[set, set] = (set(), set())
    for own, types, blocks_digest in cases:
        model = deployed(types, blocks_digest)
        ring = SimpleNamespace(config=own, deployment=SimpleNamespace(plan=plan, model=model))
        digests[0].add(session_digest(ring, None))
        codecs, parts = SimpleNamespace(facts=()), SimpleNamespace(importance={})
        checkpoint = model.weights_digest
        digests[1].add(run_digest(own, plan, codecs, parts, checkpoint=checkpoint, ids_sha256="cd", bos_id=None))
    assert [len(one) for one in digests] == [5, 5]
    assert deployed(None).weights_digest == "ab"  # as in journals that are older than blocks
