"""`--plan` with figures of links: plans beside each other, codecs from records, and a config that can be run."""

import pytest

import run_pipeline
from pipeline.advice import Line, advise, advise_with_records
from pipeline.config.reading import load_config
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.writing import config_yaml
from pipeline.runtime.balance import balanced_plan, planner_problem
from pipeline.runtime.placement import make_plan
from pipeline.runtime.plan_report import plan_run, plan_text
from tests.helpers.records import losses, write_point

# The model of tests.helpers.records: 8 layers, hidden size 64.
ARCHITECTURE = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def make_config(*overrides):
    return load_config(
        None,
        [
            *(("model.name", "some/model"), ("model.architecture", ARCHITECTURE), ("dataset.max_length", 100)),
            *(("dataset.stride", 50), *overrides),
        ],
    )


def stage_times(encode_s, decode_s, compute_s=(0.4, 0.8, 0.8, 0.8, 1.2)):
    """Of the default plan of 8 layers on 4 nodes; the head takes 0.8 s more than the last stage's one layer."""
    rest = {"device": "cpu", "wait_s": 0.0, "importance_s": 0.0, "measure_s": 0.0, "head_s": 0.0}
    return {
        str(i): rest | {"compute_s": s, "compress_s": encode_s * (i < 4), "decompress_s": decode_s * (i > 0)}
        for i, s in enumerate(compute_s)
    }


@pytest.fixture
def folder(tmp_path):
    """800 tokens: none takes 256 bytes, int8 a quarter and 1% of perplexity, int4 an eighth and 5%."""
    for codec, nbytes, change, work_s in [("none", 256, 0.0, 0.0), ("int8", 64, 0.009, 0.1), ("int4", 32, 0.05, 0.2)]:
        write_point(
            tmp_path, codec, loss=losses(change), nbytes=nbytes, stages=stage_times(work_s, work_s), model=MODEL
        )
    return tmp_path


MODEL = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 8}


def advice(config, folder, rate, *, delay_s=0.0, budget=0.02):
    return advise_with_records(plan_run(config), Line(bits_per_s=rate, delay_s=delay_s), folder, budget)


def test_both_plans_stand_side_by_side_with_what_binds():
    run = plan_run(make_config())
    text = plan_text(run)
    head, *rows = text[text.index("where the layers go") :].splitlines()[1:6]
    assert "default" in head and "balanced" in head
    assert rows[0].startswith("0") and rows[3].startswith("3")
    assert "default: " in text and "node 0 binds" in text and "links were taken as free" in text
    slow = plan_text(run, run.link_figures(1e4, 0.0))
    assert "link 3" in slow and "balanced: " in slow and "link 3 binds" in slow


def test_figures_of_links_are_payload_and_header_over_the_rate():
    run = plan_run(make_config(("compressor", "int8")))
    figures = run.link_figures(1e6, 0.25)
    frame = run.codecs[0].max_nbytes((1, 100, 64)) + run.header_nbytes(0)
    assert figures[0].s_per_token == pytest.approx(8 * frame / 100 / 1e6) and figures[0].delay_s == 0.25


@pytest.mark.parametrize("objective", ["prefill", "decode"])
def test_the_printed_config_gives_the_balanced_plan(objective, tmp_path):
    nodes = [{"speed": 2, "device": "cpu"}, {"memory": "1MiB"}, {"slowdown": 3}, {}]
    balanced = make_config(
        ("partition.plan", "balanced"), ("partition.objective", objective), ("partition.nodes", nodes)
    )
    run = plan_run(balanced)
    advice = advise(run, Line(bits_per_s=1e7, delay_s=0.02))
    best = balanced_plan(planner_problem(balanced, run.model_config, links=run.link_figures(1e7, 0.02)))
    path = tmp_path / "advice.yaml"
    path.write_text(config_yaml(advice.config))
    loaded = load_config(path)
    assert loaded == advice.config and "# the config" in advice.text
    assert make_plan(loaded, run.model_config) == best
    assert loaded.partition.nodes[0].device == "cpu" and loaded.partition.nodes[2].slowdown == 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [("compressor", {"name": "hadamard", "inner": "int4"}), ("compressor_per_link", {"a:node0->node1": "nf4"})],
        [("generation.stop", ["no", "1e3"]), ("wandb.run_name", "null"), ("generation.temperature", 1e-5)],
        [("importance.layers", [1, 2]), ("model.load_in_8bit", True), ("runtime.timeout_s", 5)],
        [("dataset.name", "text"), ("dataset.path", "/tmp/a b: c#d")],
    ],
)
def test_a_config_comes_back_from_its_yaml(overrides, tmp_path):
    config = load_config(None, [("partition.num_nodes", 3), *overrides])
    path = tmp_path / "a.yaml"
    path.write_text(config_yaml(config))
    assert load_config(path) == config


def test_slow_links_get_the_smallest_codec_within_the_budget(folder):
    slow = advice(make_config(), folder, 1e5)
    assert slow.config.compressor == "int8" and slow.config.compressor_per_link == {}
    assert "fastest on all links: int8, perplexity +0.90%" in slow.text and "link 0 binds" in slow.text
    assert advice(make_config(), folder, 1e5, budget=0.1).config.compressor == "int4"


def test_fast_links_get_none(folder):
    assert advice(make_config(), folder, 1e12).config.compressor == "none"


def test_layers_move_to_where_the_head_and_codecs_leave_time(folder):
    fast = advice(make_config(), folder, 1e12)
    # 0.4 s a layer, 0.8 s for the head, 4 s in all: 1 s would be each node's share
    nodes = [sum(end - start for start, end in node.layers) for node in fast.config.partition.nodes]
    assert max(0.4 * nodes[0] + 0.8, *(0.4 * n for n in nodes[1:])) == pytest.approx(1.2)  # 1.6 by default
    assert "tokens/s" in fast.text and f"{800 / 1.2:,.4g} tokens/s" in fast.text


def test_a_milder_codec_comes_where_it_costs_nothing_and_is_called_unmeasured(tmp_path):
    """Encoding none costs time here, so int8 is faster everywhere; a node that waits may do it all the same."""
    write_point(tmp_path, "none", loss=losses(), nbytes=256, stages=stage_times(0.4, 0.4), model=MODEL)
    write_point(tmp_path, "int8", loss=losses(0.009), nbytes=64, stages=stage_times(0.0, 0.0), model=MODEL)
    found = advice(make_config(), tmp_path, 1e12)
    (link,) = found.config.compressor_per_link
    assert (found.config.compressor, found.config.compressor_per_link[link]) == ("int8", "none")
    told = [line for line in found.lines if line.startswith(("layer:", "embed:"))]
    assert len(told) == 4 and f"{link:<25}  none, milder: no token takes longer" in told
    assert "This mixture was not measured, nor was its perplexity" in found.text
    plan = make_plan(found.config, plan_run(make_config()).model_config)
    assert link in [one.name for one in plan.links]
    without = advice(make_config(), tmp_path, 1e12, budget=0.001)  # int8 is beyond it
    assert without.config.compressor == "none" and "mixture" not in without.text


def test_records_of_another_model_are_refused(folder, tmp_path):
    other = make_config(("model.architecture", ARCHITECTURE | {"hidden_size": 128}))
    with pytest.raises(ConfigError, match="no records of this model .llama, 8 layers, hidden size 128"):
        advice(other, folder, 1e6)
    with pytest.raises(ConfigError, match="no records of this model"):
        advice(make_config(("model.dtype", "bf16")), folder, 1e6)


def test_a_budget_that_nothing_keeps_is_an_error(folder):
    with pytest.raises(ConfigError, match="no codec of .* was measured within"):
        advice(make_config(), folder, 1e6, budget=-0.5)


def test_several_settings_are_told_apart(folder):
    write_point(folder, "none", num_tokens=401, stages=stage_times(0, 0), model=MODEL)
    with pytest.raises(ConfigError, match="records of several settings, name a folder of one"):
        advice(make_config(), folder, 1e6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link_rate", "10mbit"], "--link_rate belongs to --plan"),
        (["--plan", "--link_delay", "1ms"], "--link_delay needs --link_rate"),
        (["--plan", "--records", "x"], "--records needs --link_rate"),
        (["--plan", "--link_rate", "1mbit", "--max_ppl_increase", "0.1"], "--max_ppl_increase needs --records"),
        (["--plan", "--link_rate", "fast"], "'fast' is not a rate"),
        (["--plan", "--link_rate", "1mbit", "--link_delay", "20"], "'20' is not a time"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    assert run_pipeline.main(["--config", "demo.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_screen_ends_with_a_config_that_loads(capsys, tmp_path):
    words = ["--config", "demo.yaml", "--plan", "--link_rate", "10mbit", "--link_delay", "20ms"]
    assert run_pipeline.main(words) == 0
    screen = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(screen[screen.index("# the config") :])
    loaded = load_config(path)
    assert loaded != RunConfig() and all(node.layers for node in loaded.partition.nodes)
