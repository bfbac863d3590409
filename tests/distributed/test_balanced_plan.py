"""Runs with a balanced plan: measured once, the same on all ranks, for resumed runs, sweeps and other processes."""

import json
import re
import shutil

import pytest

from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import run_alone, run_ranks
from tests.helpers.tiny_models import tiny_arguments, tiny_model

BALANCED = ("--set", "partition.plan=balanced", "--set", "partition.num_nodes=3")


def run(exp_dir, *more, num_ranks=3):
    return [one.check() for one in run_ranks([tiny_arguments(exp_dir, *more)] * num_ranks)]


def only_record(folder):
    (path,) = folder.glob("*.json")
    return read_record(path), read_per_token(path)["loss"]


def layers_of(record):
    return [(stage.node, *stage.layers) for stage in record.plan]


def test_measured_plans_are_kept_and_computed_alike(tmp_path):
    first = run(tmp_path / "a", *BALANCED)
    assert "node costs were measured and are kept in" in first[0].stderr
    assert not any("measured" in one.stderr for one in first[1:])
    record, losses = only_record(tmp_path / "a")
    assert record.args.config.model_dump()["partition"]["plan"] == "balanced"
    (costs,) = (tmp_path / "a").glob("*.costs")
    assert len(json.loads(costs.read_text())["nodes"]) == 3

    # Another run with these costs has this plan, whoever runs it; its ranges in a config are the same run.
    value = json.loads(costs.read_text())
    value["nodes"][0] |= {"layer_s": [1e-3], "head_s": 5e-3}
    for node in value["nodes"][1:]:
        node["layer_s"] = [1e-3]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / costs.name).write_text(json.dumps(value))
    second = run_alone(*tiny_arguments(tmp_path / "b", *BALANCED)).check()
    assert f"node costs from {tmp_path / 'b' / costs.name}, measured at" in second.stderr
    kept, kept_losses = only_record(tmp_path / "b")
    assert layers_of(kept) == [(0, 0, 0), (1, 0, 3), (2, 3, 6), (0, 6, 6)]
    planned = run_alone(*tiny_arguments(tmp_path / "b", *BALANCED, "--plan")).check().stdout
    assert "node costs as measured at" in planned and re.search(r"^1 +1 +0-2 ", planned, re.MULTILINE)
    explicit = "partition.nodes=[{layers: [[0, 0], [6, 6]]}, {layers: [[0, 3]]}, {layers: [[3, 6]]}]"
    run(tmp_path / "c", "--set", "partition.num_nodes=3", "--set", explicit)
    same, same_losses = only_record(tmp_path / "c")
    assert same.digest == kept.digest and (same_losses == kept_losses).all()
    assert (record.digest == kept.digest) == (layers_of(record) == layers_of(kept))
    assert losses == pytest.approx(kept_losses, abs=1e-4)


def test_all_points_of_a_sweep_and_a_second_start_have_one_plan(tmp_path):
    sweep = tmp_path / "s.yaml"
    sweep.write_text(json.dumps({"name": "s", "points": [{"compressor": "none"}, {"compressor": "int8"}]}))
    first = run(tmp_path / "runs", *BALANCED, "--sweep", str(sweep))
    records = [read_record(path) for path in (tmp_path / "runs").glob("*.json")]
    assert len(records) == 2 and len({tuple(layers_of(record)) for record in records}) == 1
    again = run(tmp_path / "runs", *BALANCED, "--sweep", str(sweep))
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2 and again[0].stderr.count("done before") == 2
    told = [re.search(r"layers by node (.*)", one[0].stderr)[1] for one in (first, again)]
    assert told[0] == told[1]


def test_speeds_of_the_config_are_taken_without_measuring(tmp_path):
    nodes = "partition.nodes=[{speed: 1}, {speed: 4}, {speed: 1}]"
    (one, *_) = run(tmp_path, *BALANCED, "--set", nodes)
    assert "measured" not in one.stderr and not list(tmp_path.glob("*.costs"))
    shares = {}
    for node, start, end in layers_of(only_record(tmp_path)[0]):
        shares[node] = shares.get(node, 0) + end - start
    assert shares[1] >= 3 > max(shares[0], shares[2])


def test_prompts_are_answered_on_a_balanced_plan_without_layers_on_a_node(tmp_path):
    nodes = "partition.nodes=[{speed: 1}, {speed: 0.001}, {speed: 1}]"
    more = (*BALANCED, "--set", nodes, "--set", "generation.temperature=0", "--generate", "abc")
    (one, *_) = run(tmp_path / "a", *more, "--set", "generation.max_new_tokens=6")
    assert re.search(r"layers by node .*\], \[\((\d), \1\)\], \[", one.stderr)  # node 1 has none
    plain = ("--set", "partition.num_nodes=3", "--set", "generation.temperature=0", "--generate", "abc")
    run(tmp_path / "b", *plain, "--set", "generation.max_new_tokens=6")
    texts = [
        json.loads(next((tmp_path / name).glob("answers-*.jsonl")).read_text().splitlines()[-1])["text"]
        for name in ("a", "b")
    ]
    assert texts[0] == texts[1]


def test_a_damaged_file_of_costs_ends_all_ranks_with_its_name(tmp_path):
    run(tmp_path, *BALANCED)
    (costs,) = tmp_path.glob("*.costs")
    costs.write_text("{}")
    for one in run_ranks([tiny_arguments(tmp_path, *BALANCED)] * 3):
        assert one.returncode == 1
    assert f"{costs} is no file of node costs" in run_alone(*tiny_arguments(tmp_path, *BALANCED)).stderr


def test_memory_that_cannot_hold_the_model_ends_the_run_before_weights_load(tmp_path):
    nodes = "partition.nodes=[{speed: 1, memory: 200kB}, {memory: 1kB}, {memory: 300kB}]"
    found = run_ranks([tiny_arguments(tmp_path, *BALANCED, "--set", nodes)] * 3)
    assert all(one.returncode for one in found)
    assert "bytes of memory: 4 of 6 layers find no room" in found[0].stderr


def test_ends_that_differ_take_memory_twice_whatever_the_model_s_config_says(tmp_path):
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    one_end = 4 * 258 * 64
    nodes = f"partition.nodes=[{{speed: 1, memory: {one_end * 3 // 2}B}}, {{}}, {{}}]"
    words = tiny_arguments(tmp_path / "out", *BALANCED, "--set", nodes, "--model_name", str(model))
    for found in (run_alone(*words), run_alone(*words, "--plan")):
        assert found.returncode and "node 0 lacks" in found.stderr
