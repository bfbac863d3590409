"""`--plan` with figures of links: plans beside each other, codecs from records, and a config that can be run."""

import json

import pytest

import run_pipeline
from pipeline.advice import advise, advise_with_records
from pipeline.comm.emulation import Conditions
from pipeline.comm.wire import header_nbytes
from pipeline.config.reading import load_config
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.writing import config_yaml
from pipeline.runtime.balance import balanced_plan, planner_problem
from pipeline.runtime.placement import make_plan
from pipeline.runtime.plan_report import plan_run, plan_text
from tests.helpers.records import PLAN, losses, write_point

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


def alike(rate, delay_s=0.0):
    """Four links."""
    return (Conditions(bits_per_s=rate, delay_s=delay_s),) * 4


def advice(config, folder, rate, *, delay_s=0.0, budget=0.02):
    return advise_with_records(plan_run(config), alike(rate, delay_s), folder, budget)


def test_both_plans_stand_side_by_side_with_what_binds():
    run = plan_run(make_config())
    text = plan_text(run)
    head, *rows = text[text.index("where the layers go") :].splitlines()[1:6]
    assert "default" in head and "balanced" in head
    assert rows[0].startswith("0") and rows[3].startswith("3")
    assert "default: " in text and "node 0 binds" in text and "links were taken as free" in text
    slow = plan_text(run, run.link_figures(alike(1e4)))
    assert "link 3" in slow and "balanced: " in slow and "link 3 binds" in slow


def test_figures_of_links_are_payload_and_header_over_the_rate():
    run = plan_run(make_config(("compressor", "int8")))
    figures = run.link_figures(alike(1e6, 0.25))
    frame = run.codecs[0].max_nbytes((1, 100, 64)) + run.header_nbytes(0)
    assert figures[0].s_per_token == pytest.approx(8 * frame / 100 / 1e6) and figures[0].delay_s == 0.25


def test_a_sampled_token_has_a_frame_and_a_codec_of_its_own():
    given = [("partition.plan", "balanced"), ("partition.objective", "decode"), ("partition.nodes", [{"speed": 1}] * 4)]
    run = plan_run(make_config(*given, ("model.dtype", "fp32"), ("compressor", "int8"), ("compressor_decode", "none")))
    for index, link in enumerate(run.link_figures(alike(1e6))):
        frame = 4 * 64 + header_nbytes(num_rows=1, trail=[4 * 64] * index)
        assert link.s_per_token == pytest.approx(8 * frame / 1e6)


@pytest.mark.parametrize("objective", ["prefill", "decode"])
def test_the_printed_config_gives_the_balanced_plan(objective, tmp_path):
    nodes = [{"speed": 2, "device": "cpu"}, {"memory": "1MiB"}, {"slowdown": 3}, {}]
    balanced = make_config(
        ("partition.plan", "balanced"), ("partition.objective", objective), ("partition.nodes", nodes)
    )
    run = plan_run(balanced)
    network = alike(1e7, 0.02)
    advice = advise(run, network)
    best = balanced_plan(planner_problem(balanced, run.model_config, links=run.link_figures(network)))
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


def test_codecs_are_named_without_the_network_that_they_were_measured_on(folder):
    links = {name: {"bits_per_s": 1e6, "delay_s": 0.02, "jitter_s": 0.0} for name in PLAN.chain_names}
    emulation = {"links": links, "slowdown": []}
    write_point(
        folder, "int3", loss=losses(0.001), nbytes=24, stages=stage_times(0, 0), model=MODEL, emulation=emulation
    )
    found = advice(make_config(), folder, 1e5)
    text = "\n".join(found.lines)
    assert "fastest on all links: int3, perplexity" in text and "Mbit/s" not in text


def test_links_that_move_to_other_layers_are_said_to_be_unmeasured(folder, tmp_path):
    moved = "Perplexities were measured with links behind other layers: run it before you rely on them."
    assert moved in advice(make_config(), folder, 1e12).lines
    (tmp_path / "even").mkdir()
    even = stage_times(0.0, 0.0, compute_s=(0.4, 0.8, 0.8, 0.8, 0.4))  # a free head: the default plan is best
    write_point(tmp_path / "even", "none", loss=losses(), nbytes=256, stages=even, model=MODEL)
    assert moved not in advice(make_config(), tmp_path / "even", 1e12).lines


def test_a_codec_is_advised_with_the_importance_that_it_was_measured_with(folder):
    metrics = dict.fromkeys((link.name for link in PLAN.links), {"name": "random"})
    args = {"config": {"importance": {"seed": 7}}}
    figures = {"loss": losses(0.001), "nbytes": 24, "stages": stage_times(0, 0), "model": MODEL}
    write_point(folder, "int3", **figures, importance=metrics, args=args)
    assert advice(make_config(), folder, 1e5).config.compressor == "int8"
    seeded = advice(make_config(("importance.seed", 7)), folder, 1e5).config
    assert (seeded.compressor, seeded.importance.seed) == ("int3", 7)


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


NAMES = ["layer:0:node0->node1", "layer:2:node1->node2", "layer:4:node2->node3", "layer:6:node3->node0"]  # by default


def uneven(*overrides):
    """Links of 1 Tbit/s but for link 1, which binds with every codec."""
    links = [("links.rate", "1000gbit"), ("links_per_link", {NAMES[1]: {"rate": "100kbit"}})]
    return make_config(*links, *overrides)


def printed(advice, tmp_path):
    """The config on the screen, read again, and the plan that it makes."""
    path = tmp_path / "printed.yaml"
    path.write_text(advice.text[advice.text.index("# the config") :])
    config = load_config(path)
    return config, make_plan(config, plan_run(make_config()).model_config)


def test_the_one_thin_link_gets_the_strong_codec_and_the_others_the_mildest(folder, tmp_path):
    run = plan_run(uneven())
    found = advise_with_records(run, run.network, folder, 0.02)
    config, plan = printed(found, tmp_path)
    names = plan.chain_names
    assert names[1] != NAMES[1] and [name[-12:] for name in names] == [name[-12:] for name in NAMES]
    assert config.links_per_link == {names[1]: {"rate": "100kbit"}} and config.links.rate == "1000gbit"
    assert [config.codec_of(name) for name in names] == ["none", "int8", "none", "none"]
    rate = 1e5 / (8 * (64 + 60 / 100))  # payload, and the header of a window of 100 tokens
    assert f"int8, perplexity +0.90%: {rate:,.4g} tokens/s, link 1 binds" in found.text
    assert f"so mixed: {rate:,.4g} tokens/s, link 1 binds" in found.text
    assert plan_run(config).network == run.network


def test_for_one_token_a_milder_codec_costs_at_most_a_hundredth_of_it(folder, tmp_path):
    """None takes 1536 bits more than int8: 15 ms on the thinnest, 0.3 ms and 0.08 ms elsewhere, of about 21 ms."""
    decode = [("partition.plan", "balanced"), ("partition.objective", "decode")]
    names = plan_run(make_config(*decode)).plan.chain_names
    rates = dict(zip(names, ["5mbit", "20mbit", "100kbit", None], strict=True))
    run = plan_run(make_config(*decode, ("links_per_link", {name: {"rate": rate} for name, rate in rates.items()})))
    found = advise_with_records(run, run.network, folder, 0.02)
    config, plan = printed(found, tmp_path)
    assert [config.codec_of(name) for name in plan.chain_names] == ["int8", "none", "int8", "none"]
    assert [config.link_of(name).rate for name in plan.chain_names] == list(rates.values())
    assert "none, milder: costs at most 1% of a token" in found.text and "no token takes longer" not in found.text


def test_without_a_rate_a_link_is_free_but_for_its_delay():
    config = make_config(("links.rate", "1mbit"), ("links_per_link", {NAMES[1]: {"rate": None, "delay": "20ms"}}))
    run = plan_run(config)
    figures = run.link_figures(run.network)
    assert (figures[1].s_per_token, figures[1].delay_s) == (0.0, 0.02)
    assert figures[0] == run.link_figures(alike(1e6))[0]


def test_codecs_of_links_move_with_their_places(tmp_path):
    run = plan_run(uneven(("compressor_per_link", {NAMES[2]: "int4", NAMES[0]: "nf4"})))
    config, plan = printed(advise(run, run.network), tmp_path)
    assert plan.chain_names != tuple(NAMES)
    assert [config.codec_of(name) for name in plan.chain_names] == ["nf4", "none", "int4", "none"]


def test_losses_return_over_a_link_of_their_own():
    names = plan_run(make_config(("partition.wrap", False))).plan.chain_names
    links = [("links.rate", "1mbit"), ("links_per_link", {names[3]: {"delay": "30ms"}})]
    run = plan_run(make_config(("partition.wrap", False), *links))
    problem = planner_problem(run.config, run.model_config, links=run.link_figures(run.network))
    assert len(problem.links) == 3 and problem.delays_s == problem.return_delay_s == 0.03
    advised = advise(run, run.network).config
    assert advised.links_per_link == {"result:node3->node0": {"delay": "30ms"}}


def test_a_token_waits_for_the_way_of_results_too(folder):
    decode = [("partition.wrap", False), ("partition.plan", "balanced"), ("partition.objective", "decode")]
    run = plan_run(make_config(*decode, ("links_per_link", {"result:node3->node0": {"delay": "30s"}})))
    found = advise_with_records(run, run.network, folder, 0.02)
    assert "3.001e+04 ms a token, most of it delays" in found.text


def test_seconds_of_slowed_nodes_are_not_taken_for_their_own(tmp_path):
    emulation = {"links": {}, "slowdown": [1, 1, 3, 1]}
    for codec in ("none", "int8"):
        write_point(tmp_path, codec, stages=stage_times(0, 0), model=MODEL, emulation=emulation)
    with pytest.raises(ConfigError, match="no codec of .* on all links alike, without slowdown"):
        advice(make_config(), tmp_path, 1e6)


def test_links_change_no_plan_of_nodes_that_are_alike():
    for objective, in_flight in [("prefill", 0), ("prefill", 1), ("decode", 0)]:
        balanced = [("partition.plan", "balanced"), ("partition.objective", objective)]
        run = plan_run(make_config(*balanced, ("runtime.in_flight", in_flight)))
        network = [Conditions(bits_per_s=rate, delay_s=0.02) for rate in (1e12, 1e5, 1e4, 1e12)]
        links = (None, run.link_figures(network))
        problems = [planner_problem(run.config, run.model_config, links=figures) for figures in links]
        free, thin = [balanced_plan(problem) for problem in problems]
        assert free == thin and problems[0] != problems[1]


def test_another_order_of_nodes_is_not_reckoned_with():
    nodes = [{"layers": [[0, 1], [7, 8]]}, {"layers": [[3, 5]]}, {"layers": [[1, 3]]}, {"layers": [[5, 7]]}]
    run = plan_run(make_config(("partition.nodes", nodes), ("links.rate", "1mbit")))
    with pytest.raises(ConfigError, match=r"pass nodes \[0, 2, 1, 3, 0\], links are reckoned with for \[0, 1, 2, 3, 0"):
        run.link_figures(run.network)
    with pytest.raises(ConfigError, match="links are reckoned with"):
        advise_with_records(run, run.network, ".", 0.02)


def test_records_of_another_model_are_refused(folder, tmp_path):
    other = make_config(("model.architecture", ARCHITECTURE | {"hidden_size": 128}))
    with pytest.raises(ConfigError, match="no records of this model .llama, 8 layers, hidden size 128"):
        advice(other, folder, 1e6)
    with pytest.raises(ConfigError, match="no records of this model"):
        advice(make_config(("model.dtype", "bf16")), folder, 1e6)


def test_records_of_weights_that_were_held_differently_are_refused(folder, tmp_path):
    int8 = make_config(("model.weights", "int8"))
    with pytest.raises(ConfigError, match="hidden size 64, fp32, Q8_0 blocks made at load.; run a sweep"):
        advice(int8, folder, 1e6)
    for made_at_load in (True, False):
        model = MODEL | {"blocks": {"types": ["Q8_0"], "made_at_load": made_at_load}}
        own = tmp_path / str(made_at_load)
        own.mkdir()
        write_point(own, "none", nbytes=256, stages=stage_times(0, 0), model=model)
    assert "fp32, Q8_0 blocks made at load, 400 tokens" in "".join(advice(int8, tmp_path / "True", 1e6).lines)
    with pytest.raises(ConfigError, match="no records of this model"):
        advice(int8, tmp_path / "False", 1e6)


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


THIN = {"links": {"rate": "10mbit"}, "links_per_link": {"layer:10:node1->node2": {"rate": "1mbit"}}}


def screen_of(capsys, *words, links=THIN):
    sets = [f"{key}={json.dumps(value)}" for key, value in links.items()]
    assert run_pipeline.main(["--config", "demo.yaml", "--plan", *(w for s in sets for w in ("--set", s)), *words]) == 0
    return capsys.readouterr().out


def test_plan_takes_the_links_of_the_config(capsys, tmp_path):
    screen = screen_of(capsys)
    assert "link 1 binds" in screen and "note: " not in screen
    path = tmp_path / "printed.yaml"
    path.write_text(screen[screen.index("# the config") :])
    assert load_config(path).links_per_link == {"layer:9:node1->node2": {"rate": "1mbit"}}


def test_link_rate_goes_over_the_links_of_the_config(capsys):
    screen = screen_of(capsys, "--link_rate", "100kbit")
    rows = [line.split() for line in screen.splitlines() if line.startswith("link ")]
    assert len({row[2] for row in rows[1:]}) == 1  # the first row is the head of a table
    assert "note: reckoned with --link_rate; the config below still has links of its own" in screen
    assert "layer:9:node1->node2: {rate: 1mbit}" in screen


def test_a_config_whose_links_allow_no_advice_is_still_shown(capsys):
    nodes = json.dumps([{"layers": [[0, 10]]}, {"layers": [[10, 20]]}, {"layers": [[20, 25]]}, {"layers": [[25, 30]]}])
    links = {"links": {"rate": "10mbit"}}
    screen = screen_of(capsys, "--set", f"partition.nodes={nodes}", links=links)
    assert "rank  weights" in screen and "# the config" not in screen
    assert "note: no config for these links: the layers of partition.nodes pass nodes [0, 1, 2, 3]" in screen
