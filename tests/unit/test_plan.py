import pytest

from pipeline.partition.plan import PlanError, default_plan, explicit_plan


def layers(plan):
    return [(s.node, s.start, s.end) for s in plan.stages]


def test_qwen3_32b_has_the_published_links():
    plan = default_plan(64, 4)
    assert layers(plan) == [(0, 0, 8), (1, 8, 24), (2, 24, 40), (3, 40, 56), (0, 56, 64)]
    assert [link.name for link in plan.links] == [
        "layer:7:node0->node1",
        "layer:23:node1->node2",
        "layer:39:node2->node3",
        "layer:55:node3->node0",
    ]


@pytest.mark.parametrize(
    "num_layers, num_nodes, wrap, expected",
    [
        (30, 4, True, [(0, 0, 3), (1, 3, 11), (2, 11, 19), (3, 19, 26), (0, 26, 30)]),
        (30, 1, True, [(0, 0, 30)]),
        (30, 2, True, [(0, 0, 7), (1, 7, 22), (0, 22, 30)]),
        (24, 2, False, [(0, 0, 12), (1, 12, 24)]),
        (5, 3, False, [(0, 0, 1), (1, 1, 3), (2, 3, 5)]),
        (2, 4, True, [(0, 0, 0), (1, 0, 1), (2, 1, 2), (3, 2, 2), (0, 2, 2)]),
    ],
)
def test_default_plan(num_layers, num_nodes, wrap, expected):
    assert layers(default_plan(num_layers, num_nodes, wrap=wrap)) == expected


@pytest.mark.parametrize("num_nodes", range(1, 9))
@pytest.mark.parametrize("num_layers", [1, 7, 30, 64])
@pytest.mark.parametrize("wrap", [True, False])
def test_every_layer_is_held_once_and_link_names_are_unique(num_layers, num_nodes, wrap):
    plan = default_plan(num_layers, num_nodes, wrap=wrap)
    assert [i for s in plan.stages for i in range(s.start, s.end)] == list(range(num_layers))
    assert {s.node for s in plan.stages} == set(range(num_nodes))
    assert [s.is_first for s in plan.stages].count(True) == [s.is_last for s in plan.stages].count(True) == 1
    names = [link.name for link in plan.links]
    assert len(names) == len(set(names)) == len(plan.stages) - 1
    assert all(link.src_node != link.dst_node for link in plan.links)
    assert plan.last_node == (0 if wrap else num_nodes - 1)


def test_a_stage_without_layers_names_its_link_after_the_embedding():
    assert default_plan(2, 4).links[0].name == "embed:node0->node1"


def test_explicit_ranges_in_any_order_and_merged_on_one_node():
    plan = explicit_plan(10, [[(7, 10), (0, 2), (2, 3)], [(3, 7)]])
    assert layers(plan) == [(0, 0, 3), (1, 3, 7), (0, 7, 10)]


def test_node_0_keeps_the_head_where_the_nodes_before_it_have_no_layers():
    plan = explicit_plan(4, [[(0, 4), (4, 4)], [(4, 4)], [(4, 4)]])
    assert layers(plan) == [(0, 0, 4), (1, 4, 4), (2, 4, 4), (0, 4, 4)]


@pytest.mark.parametrize(
    "ranges, words",
    [
        ([[(0, 4)], [(5, 8)]], "layer 4 is held nowhere"),
        ([[(0, 4)], [(3, 8)]], "layer 3 is held twice"),
        ([[(0, 4)], [(4, 7)]], r"\[0, 7\), the model has 8"),
        ([[(0, 4)], [(4, 9)]], r"\[0, 9\), the model has 8"),
        ([[(4, 8)], [(0, 4)]], "first layers are on node 1"),
        ([[(0, 8)], []], r"nodes\[1\].layers is empty"),
        ([[(0, 4)], [(6, 4), (4, 8)]], "ends before it starts|held"),
    ],
)
def test_bad_ranges_are_named(ranges, words):
    with pytest.raises(PlanError, match=words):
        explicit_plan(8, ranges)
