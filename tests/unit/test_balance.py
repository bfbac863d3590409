"""Costs of layers from a model's shape and from what nodes were measured to take."""

import json
import time

import pytest
import torch

from pipeline.config.reading import find_config, load_config
from pipeline.models.loading import WeightFormat, random_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.sizes import layer_kinds, stage_weights
from pipeline.models.stage import Stage
from pipeline.partition.plan import StagePlan, default_plan
from pipeline.planner.forecast import cuts_of, forecast
from pipeline.planner.problem import LinkFigures, PlannerError
from pipeline.records.files import RecordError
from pipeline.records.node_costs import NodeCosts, costs_path, read_node_costs, write_node_costs
from pipeline.runtime.balance import is_measured, planner_problem, scored_per_window
from pipeline.runtime.placement import balanced_layers, make_plan
from pipeline.runtime.timing import time_microbatch, time_one_token
from tests.helpers.tiny_models import tiny_model

MIDDLE = StagePlan(stage_index=1, node=1, start=0, end=1, is_first=False, is_last=False)
PLAIN = WeightFormat(dtype=torch.float32)


def demo(*overrides):
    return load_config(find_config("demo.yaml"), [("partition.plan", "balanced"), *overrides])


def model_of(config):
    return load_model_config(None, config.model.architecture)


def measured(layer_s, head_s, **other):
    """By node: seconds of a layer; the head's at each node (None: not measured)."""
    nodes = [
        {"host": "a", "layer_s": [s], "head_s": head, "one_token_layer_s": [s / 100], "one_token_head_s": head}
        for s, head in zip(layer_s, head_s, strict=True)
    ]
    whole = {"measured_at": "2026-01-02T03:04:05+00:00", "microbatch_tokens": 1024, "nodes": nodes}
    return NodeCosts.from_plain(whole | other)


def test_costs_of_the_demo_come_from_its_weights():
    config = demo()
    costs = planner_problem(config, model_of(config)).costs
    layer = 576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576
    assert costs.layer_s == (pytest.approx(2 * layer / 1e11),) * 30
    assert costs.layer_bytes == (4 * layer,) * 30
    assert costs.head_s == pytest.approx(0.5 * 2 * (49152 + 1) * 576 / 1e11)  # half of a window's tokens are scored
    assert costs.embedding_s == 0
    assert costs.embedding_bytes == costs.tied_bytes == 4 * 49152 * 576 == costs.head_bytes - 4 * 576


def test_decoding_reads_weights_and_keeps_a_cache():
    config = demo(("partition.objective", "decode"))
    costs = planner_problem(config, model_of(config)).costs
    layer = 4 * (576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576)
    assert costs.layer_s[0] == pytest.approx(layer / 2e10)
    assert costs.layer_bytes[0] == layer + 8 * 2048 * 2 * 3 * 64 * 4  # slots, positions, keys and values of 3 heads


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_token_meets_its_share_of_the_experts(model_type):
    config = load_model_config(tiny_model(model_type), {})
    weights = stage_weights(config, MIDDLE, PLAIN)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        layer = AutoModelForCausalLM.from_config(config).base_model.layers[0]
    experts = sum(p.numel() for p in layer.parameters() if p.dim() == 3)
    whole = sum(p.numel() for p in layer.parameters())
    assert 0 < experts < whole and config.num_experts_per_tok == 2
    assert weights.active == whole - experts / 2 and weights.active_bytes == 4 * weights.active  # 2 of 4 experts
    assert weights.nbytes == 4 * whole


def test_layers_with_and_without_a_window_are_two_kinds():
    assert layer_kinds(load_model_config(tiny_model("gemma3_text"), {})) == [0, 1, 0, 1, 0, 1]
    assert layer_kinds(load_model_config(tiny_model("llama"), {})) == [0] * 6


def test_a_random_stage_computes_what_a_loaded_one_would():
    config = load_model_config(tiny_model("llama"), {})
    cpu = torch.device("cpu")
    for plan in (MIDDLE, StagePlan(stage_index=2, node=0, start=6, end=6, is_first=False, is_last=True)):
        stage = Stage(plan, random_stage(config, plan, PLAIN, device=cpu), cpu, 258)
        output = stage.forward(torch.randn(1, 5, 64))
        assert output.shape == (1, 5, 64) and output.isfinite().all()
        assert not plan.is_last or stage.logits(output[0]).shape == (5, 258)
        start_s = time.perf_counter()
        assert time_microbatch(stage, (2, 16), 64, torch.float32, scored=8) > 0
        assert 0 < time_one_token(stage, 64, torch.float32) < time.perf_counter() - start_s


def test_nodes_are_measured_where_no_speed_is_given():
    assert is_measured(demo()) and not is_measured(load_config(find_config("demo.yaml")))
    given = [{"speed": 2}, {}, {"slowdown": 4}, {}]
    config = demo(("partition.nodes", given))
    assert not is_measured(config)
    assert [node.speed for node in planner_problem(config, model_of(config)).nodes] == [2, 1, 0.25, 1]


def test_measured_costs_are_per_token_and_slowdowns_multiply_them():
    config = demo(("partition.nodes", [{}, {"slowdown": 4}, {}, {}]))
    problem = planner_problem(config, model_of(config), measured([0.1, 0.1, 0.2, 0.1], [0.3, None, None, None]))
    assert problem.costs.layer_s == (pytest.approx(0.1 / 1024),) * 30
    assert problem.costs.head_s == pytest.approx(0.3 / 1024)
    assert [node.speed for node in problem.nodes] == pytest.approx([1, 0.25, 0.5, 1])
    config = demo(("partition.objective", "decode"))
    decode = planner_problem(config, model_of(config), measured([0.1] * 4, [0.3, *[None] * 3]))
    assert decode.costs.layer_s[0] == pytest.approx(0.001) and decode.costs.head_s == pytest.approx(0.3)


def test_a_head_is_measured_where_it_lies():
    config = demo(("partition.wrap", False))
    costs = measured([0.1, 0.1, 0.1, 0.2], [None, None, None, 0.5])
    problem = planner_problem(config, model_of(config), costs)
    made = forecast(problem, (0, 10, 20, 30, 30))
    assert made.node_s[3] == pytest.approx(0.5 / 1024)  # on its own node what it took there


def test_the_plan_follows_the_measurement_and_the_memory():
    config = demo()
    even = make_plan(config, model_of(config), measured([0.1] * 4, [1e-6, *[None] * 3]))
    assert even == default_plan(30, 4)
    heavy_head = make_plan(config, model_of(config), measured([0.1] * 4, [0.6, *[None] * 3]))
    assert balanced_layers(config, heavy_head)[0] == [(0, 1), (28, 30)]
    tight = demo(("partition.nodes", [{}, {"memory": "30MiB"}, {}, {}]))
    plan = make_plan(tight, model_of(tight), measured([0.1] * 4, [0.6, *[None] * 3]))
    assert sum(s.num_layers for s in plan.stages_of_node(1)) == 2  # of 13.5 MiB each
    nothing = demo(("partition.nodes", [{"memory": "10MiB"}] * 4))
    with pytest.raises(PlannerError, match="node 0 lacks .* of memory: embedding and head"):
        make_plan(nothing, model_of(nothing))


def test_link_figures_reach_the_forecast():
    config = demo()
    problem = planner_problem(config, model_of(config), links=[LinkFigures(s_per_token=1.0, delay_s=0.5)] * 4)
    made = forecast(problem, cuts_of(problem, default_plan(30, 4)))
    assert made.binds == "link 0" and made.s_per_token == 1.0


def test_a_window_scores_its_stride():
    assert scored_per_window(demo(("dataset.stride", 1024))) == 1023 and scored_per_window(demo()) == 512


def test_node_costs_come_back_from_their_file(tmp_path):
    costs, path = measured([0.1, 0.2], [0.3, None]), costs_path(tmp_path / "new", "0123456789abcdef0123")
    assert path.name == "nodes-0123456789abcdef.costs"
    assert read_node_costs(path, num_nodes=2, num_kinds=1, head_node=0) is None
    write_node_costs(path, costs)
    assert read_node_costs(path, num_nodes=2, num_kinds=1, head_node=0) == costs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "thinwire run"}, "kind"),
        ({"nodes": []}, "nodes"),
        ({"microbatch_tokens": 0}, "microbatch_tokens"),
        ({"more": 1}, "more"),
        ({"measured_at": "today"}, "measured_at"),
        (("layer_s", [0.0]), "layer_s"),
        (("layer_s", [1e9]), "layer_s"),
        (("layer_s", ["fast"]), "layer_s"),
        (("layer_s", [0.1, 0.1]), "other kinds of layers"),
        (("head_s", None), "lacks the head's costs on node 0"),
    ],
)
def test_a_damaged_file_of_node_costs_is_refused(change, words, tmp_path):
    value = measured([0.1], [0.3]).model_dump(mode="json")
    if isinstance(change, dict):
        value |= change
    else:
        value["nodes"][0][change[0]] = change[1]
    path = tmp_path / "a.costs"
    path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match=words):
        read_node_costs(path, num_nodes=1, num_kinds=1, head_node=0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_what_is_no_file_of_node_costs_is_refused(content, tmp_path):
    path = tmp_path / "a.costs"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="is no file of node costs.*delete it"):
        read_node_costs(path, num_nodes=1, num_kinds=1, head_node=0)
