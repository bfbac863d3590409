"""Sweep files: what they expand to, what is refused."""

from pathlib import Path

import pytest

from pipeline.config.reading import load_config, with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.sweep_file import find_sweep, load_sweep

LINKS = ["layer:0:node0->node1", "layer:3:node1->node0"]


def sweep(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return load_sweep(path)


def overrides(tmp_path, points):
    return [dict(p.overrides) for p in sweep(tmp_path, f"points: {points}").points(LINKS)]


def test_points_as_they_stand(tmp_path):
    found = sweep(
        tmp_path, "base: {dataset.stride: 4}\npoints: [{compressor: none}, {compressor: {name: nf4, absmax: fp16}}]"
    )
    assert found.name == "s" and found.base == (("dataset.stride", 4),)
    assert [p.overrides for p in found.points([])] == [
        (("compressor", "none"),),
        (("compressor", {"name": "nf4", "absmax": "fp16"}),),
    ]


def test_every_combination(tmp_path):
    points = "[{for: {n: [8, 4], b: [1, 2]}, compressor: 'int{n}', batch_size: '{b}'}]"
    assert overrides(tmp_path, points) == [
        {"compressor": "int8", "batch_size": 1},
        {"compressor": "int8", "batch_size": 2},
        {"compressor": "int4", "batch_size": 1},
        {"compressor": "int4", "batch_size": 2},
    ]


def test_placeholders_inside_lists_and_mappings(tmp_path):
    points = "[{for: {p: [0.1]}, compressor: {name: topk, density: '{p}', also: ['x{p}', 7]}}]"
    assert overrides(tmp_path, points) == [{"compressor": {"name": "topk", "density": 0.1, "also": ["x0.1", 7]}}]


def test_a_point_per_link(tmp_path):
    points = "[{for: {link: links}, compressor_per_link: {'{link}': nf4}}]"
    assert overrides(tmp_path, points) == [{"compressor_per_link": {link: "nf4"}} for link in LINKS]


def test_equal_points_are_one(tmp_path):
    assert overrides(tmp_path, "[{compressor: nf4}, {for: {c: [nf4, fp4]}, compressor: '{c}'}]") == [
        {"compressor": "nf4"},
        {"compressor": "fp4"},
    ]


def test_a_plan_without_links_may_leave_no_points(tmp_path):
    found = sweep(tmp_path, "points: [{for: {link: links}, compressor_per_link: {'{link}': nf4}}]")
    with pytest.raises(ConfigError, match="sweep s has no points: the plan has 0 links"):
        found.points([])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "cannot be read as YAML"),
        ("compressor: none", "must be a mapping with `points`"),
        ("", "s.yaml is empty; it must hold keys, with points"),
        ("- compressor: none", "s.yaml holds a list, not a mapping"),
        ("points: [{compressor: none}]\npoints: [{compressor: nf4}]", "line 2, column 1: key 'points' is given twice"),
        ("points: [{compressor: none, compressor: nf4}]", "key 'compressor' is given twice"),
        ("points: [{for: {n: [010]}, compressor: 'int{n}'}]", "010 is one number to some readers"),
        ("name: ../x\npoints: [{compressor: none}]", r"name becomes a file's: letters.* got '\.\./x'"),
        ("base: false\npoints: [{compressor: none}]", "base must be a mapping of dotted keys, got False"),
        ("points: []", "must be a mapping with `points`"),
        ("points: [{compressor: none}]\nmodel: x", "unknown key model; a sweep has name, base and points"),
        ("name: 3\npoints: [{compressor: none}]", "name must be a string, got 3"),
        ("points: [nf4]", "point 1 must be a mapping of keys, got 'nf4'"),
        ("points: [{compressor: none}, {}]", "point 2 sets no key"),
        ("points: [{model.dtype: fp16}]", "point 1: model.dtype cannot vary within a sweep"),
        ("points: [{runtime.threads: 2}]", "runtime.threads cannot vary within a sweep"),
        ("points: [{dataset: {stride: 3}}]", "point 1: dataset cannot vary .* allowed: batch_size, .*dataset.stride"),
        ("base: {partition.num_nodes: 2}\npoints: [{compressor: none}]", "base: partition.num_nodes cannot vary"),
        ("base: 3\npoints: [{compressor: none}]", "base must be a mapping of dotted keys, got 3"),
        ("points: [{for: [1], compressor: none}]", "for must be a mapping of names to lists"),
        ("points: [{for: {n: 4}, compressor: 'int{n}'}]", "for.n must be a list of values or the word links, got 4"),
        ("points: [{for: {n: []}, compressor: 'int{n}'}]", r"for.n must be a list of values .* got \[\]"),
        ("points: [{for: {n: [4]}, compressor: 'int{m}'}]", r"\{m\} is filled by nothing; for has: n"),
        ("points: [{for: {n: [4]}, compressor: none}]", r"for.n fills nothing; write \{n\} where it belongs"),
    ],
)
def test_what_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        sweep(tmp_path, text)


def test_keys_that_become_equal_are_refused(tmp_path):
    found = sweep(
        tmp_path, "points: [{for: {link: links}, compressor_per_link: {'{link}': nf4, 'layer:0:node0->node1': int8}}]"
    )
    with pytest.raises(ConfigError, match="keys {link}, layer:0:node0->node1 become equal"):
        found.points(LINKS)


def test_the_number_of_points_has_a_bound(tmp_path):
    many = list(range(1000))
    found = sweep(
        tmp_path, f"points: [{{for: {{a: {many}, b: {many}}}, batch_size: '{{a}}', dataset.stride: '{{b}}'}}]"
    )
    with pytest.raises(ConfigError, match="sweep s has more than 10000 points; make several sweeps"):
        found.points(LINKS)


def test_shipped_sweeps_are_found_and_their_points_are_valid_configs():
    folder = Path(__file__).parents[2] / "configs" / "sweeps"
    sizes = {}
    for path in folder.glob("*.yaml"):
        found = load_sweep(find_sweep(path.name))
        assert found.name == path.stem
        points = found.points(LINKS)
        sizes[found.name] = len(points)
        config = load_config(None, found.base)
        for point in points:
            with_overrides(config, point.overrides)
    assert sizes["published_table"] == 30 and sizes["quick"] == 8 and sizes["each_link"] == 1 + 2 * len(LINKS)


def test_an_unknown_sweep_names_the_known():
    with pytest.raises(ConfigError, match="sweep.yaml' is neither a file nor in .*quick.yaml"):
        find_sweep("sweep.yaml")


def test_the_deployment_holds_the_whole_text_and_no_codec(tmp_path):
    config = with_overrides(RunConfig(), [("compressor", "nf4"), ("dataset.first_k_tokens", 500)])
    deployed = sweep(tmp_path, "points: [{compressor: none}]").deployed(config)
    assert (deployed.compressor, deployed.dataset.first_k_tokens) == ("none", 0)
