from pathlib import Path

import pytest
import yaml

from pipeline.config.reading import find_config, generation_with, load_config, parse_override, with_overrides
from pipeline.config.schema import FLAG_KEYS, ConfigError, RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def load(*overrides):
    return load_config(None, [parse_override(text) for text in overrides])


def test_defaults_load_and_equal_the_dataclass():
    assert load() == RunConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path):
    assert load_config(find_config(path.name)) != RunConfig()


def test_a_file_then_overrides_in_order(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("dataset: {stride: 100, max_length: 300}\ncompressor: {name: int4}\n")
    config = load_config(path, [("dataset.stride", 200), ("dataset.stride", 250), ("model.dtype", "bf16")])
    assert (config.dataset.stride, config.dataset.max_length, config.model.dtype) == (250, 300, "bf16")
    assert config.compressor == {"name": "int4"}


def test_override_values_are_yaml():
    config = load(
        "compressor={name: outlier, channels: 8}",
        "compressor_per_link.layer:7:node0->node1=nf4",
        "partition.nodes=[{layers: [[0, 2], [6, 8]]}, {layers: [[2, 6]], device: cpu}]",
        "partition.num_nodes=2",
        "runtime.timeout_s=5",
        "wandb.run_name=null",
    )
    assert config.compressor == {"name": "outlier", "channels": 8}
    assert config.compressor_per_link == {"layer:7:node0->node1": "nf4"}
    assert config.partition.nodes[0].layers == ((0, 2), (6, 8))
    assert config.partition.nodes[1].device == "cpu"
    assert config.runtime.timeout_s == 5.0 and isinstance(config.runtime.timeout_s, float)


def test_an_option_of_a_codec_given_by_name():
    assert load("compressor=int4", "compressor.group_size=32").compressor == {"name": "int4", "group_size": 32}


@pytest.mark.parametrize(
    "key",
    [
        "batch_size",
        "dataset.first_k_tokens",
        "dataset.max_length",
        "dataset.stride",
        "evaluation.decode_chunk",
        "generation.passes",
        "model.load_in_8bit_threshold",
        "runtime.in_flight",
    ],
)
def test_what_no_record_could_hold_is_refused_before_the_run(key):
    with pytest.raises(ConfigError, match=f"{key} must be at most 1e.15, got {10**15 + 1}"):
        load(f"{key}={10**15 + 1}")


@pytest.mark.parametrize(
    "override, words",
    [
        ("dataset.strde=1", r"unknown key dataset.strde; did you mean dataset.stride\? Allowed here: name, path"),
        ("nonsense=1", "unknown key nonsense Allowed|unknown key nonsense"),
        ("dataset.stride=fast", "dataset.stride must be an integer, got 'fast'"),
        ("dataset.stride=0", "dataset.stride must be at least 1, got 0"),
        ("dataset.stride=true", "dataset.stride must be an integer, got True"),
        ("dataset.stride=4096", "dataset.stride must be at most 2048"),
        ("model.dtype=fp8", "model.dtype must be one of fp32, fp16, bf16, fp64, got 'fp8'"),
        ("model=7", "model must be a mapping"),
        ("model.load_in_8bit=1", "model.load_in_8bit must be true or false, got 1"),
        ("runtime.timeout_s=0", "runtime.timeout_s must be above 0"),
        ("runtime.timeout_s=soon", "runtime.timeout_s must be a number"),
        ("compressor=4", "compressor must be a name or a mapping, got 4"),
        ("compressor_per_link=nf4", "compressor_per_link must be a mapping"),
        ("dataset.path=x.txt", "dataset.name is pydoc, which reads no file"),
        ("dataset.name=text", "needs dataset.path"),
        ("partition.nodes=[{}]", "partition.nodes has 1 entries, partition.num_nodes is 4"),
        ("partition.nodes=[{layers: [[0, 1, 2]]}, {}, {}, {}]", r"nodes\[0\].layers\[0\] must have 2 entries"),
        ("partition.nodes=[{layers: [[0, 1]]}, {}, {}, {}]", r"nodes\[1\].layers is missing"),
        ("partition.nodes=[{layer: []}, {}, {}, {}]", r"unknown key partition.nodes\[0\].layer; did you mean"),
        ("dataset.bos=window", None),
        ("batch_size=010", "--set batch_size=010: 010 is one number to some readers .* plain decimal digits"),
        ("dataset.stride=5:30", "--set dataset.stride=5:30: 5:30 is one number"),
        ("dataset.stride=0x10", "0x10 is one number"),
        ("dataset.first_k_tokens=1_000", "1_000 is one number"),
        ("dataset.first_k_tokens=1e4", r"first_k_tokens must be an integer, got 10000.0; write 10000"),
        ("dataset.stride='256'", "dataset.stride must be an integer, got '256'"),
        ("dataset.stride=256 # half", "# half is a comment to YAML; put the whole value in quotes"),
        ("dataset.stride=", "dataset.stride must be an integer, got None"),
        ("runtime.timeout_s=.inf", r"--set runtime.timeout_s=.inf: .inf is not a finite number"),
        ("runtime.timeout_s=.nan", r".nan is not a finite number"),
        ("runtime.timeout_s=inf", "runtime.timeout_s must be a number, got 'inf'"),
        ("runtime.load_timeout_s=1e300", "runtime.load_timeout_s must be at most 1e.07, got 1e.300"),
        ("runtime.timeout_s=1e3", None),
        ("evaluation.mode=windows", "evaluation.mode must be one of window, decode, got 'windows'"),
        ("evaluation.decode_chunk=0", "evaluation.decode_chunk must be at least 1"),
        ("evaluation.decode_chunk=4", "evaluation.decode_chunk is 4, but evaluation.mode is window"),
        ("compressor_decode=4", "compressor_decode must be a name or a mapping, got 4"),
        ("generation.temperature=-0.1", "generation.temperature must be at least 0, got -0.1"),
        ("generation.temperature=null", None),
        ("generation.temperature=warm", "generation.temperature must be a number, got 'warm'"),
        ("generation.top_p=1.01", "generation.top_p must be at most 1, got 1.01"),
        ("generation.top_k=-1", "generation.top_k must be at least 0, got -1"),
        ("generation.top_k=2.5", "generation.top_k must be an integer, got 2.5"),
        ("generation.min_p=2", "generation.min_p must be at most 1, got 2"),
        ("generation.repetition_penalty=0", "generation.repetition_penalty must be above 0, got 0"),
        ("generation.seed=-1", "generation.seed must be at least 0"),
        ("generation.max_new_tokens=0", "generation.max_new_tokens is 0, which leaves nothing to tell"),
        ("generation.max_slots=256", "generation.max_slots must be at most 255"),
        ("generation.deadline_s=0", "generation.deadline_s must be above 0"),
        ("generation.stop=5", "generation.stop must be a list, got 5"),
        ("generation.stop=[a, 5]", r"generation.stop\[1\] must be a string, got 5; put it in quotes"),
        ("generation.stop=''", "generation.stop holds an empty string"),
        ("generation.max_length=128", "max_length is 128 and generation.max_new_tokens 128, which leaves no position"),
        ("generation.do_sample=true", "unknown key generation.do_sample"),
        ("runtime.threads=100000", "runtime.threads must be at most 1024"),
        ("runtime.receives_ahead=1000000000", "runtime.receives_ahead must be at most 1024"),
        ("importance.seed=99999999999999999999", "does not fit 64 bits"),
        ("wandb.enabled=yes", "wandb.enabled must be true or false, got 'yes'"),
        ("model.load_in_8bit=on", "model.load_in_8bit must be true or false, got 'on'"),
        ("model.revision=1234567", "model.revision must be a string, got 1234567; put it in quotes"),
        ("model.revision='1234567'", None),
        ("wandb.run_name=2024-01-31", None),
        ("wandb.run_name=no", None),
        ("compressor=no", None),  # a name, to be looked up
        ("dataset=null", "dataset must be a mapping of keys, got None"),
        ("model.dir=~", "--set model.dir=~: ~ alone is nothing to YAML"),
        ("exp_dir=''", "exp_dir: the path is empty"),
        ("exp_dir=~nobody-of-this-name/x", "exp_dir: .*: ~nobody-of-this-name is nobody's home folder"),
        ('exp_dir="a\\0b"', "holds a NUL character"),
        ("batch_size=&a 1", "anchors and aliases are not read"),
        ("batch_size=!!int '1'", "tags are not read"),
    ],
)
def test_bad_values_are_named(override, words):
    if words is None:
        load(override)
        return
    with pytest.raises(ConfigError, match=words):
        load(override)


def test_rules_between_keys():
    with pytest.raises(ConfigError, match="load_in_8bit and model.load_in_4bit are both true"):
        load("model.load_in_8bit=true", "model.load_in_4bit=true")
    with pytest.raises(ConfigError, match="load_in_8bit_threshold is 0, but model.load_in_8bit is false"):
        load("model.load_in_8bit_threshold=0")
    for more in ("model.dtype=bf16", "model.load_in_8bit=true", "model.load_in_4bit=true"):
        with pytest.raises(ConfigError, match="model.weights is int8, which goes with model.dtype fp32 and without"):
            load("model.weights=int8", more)
        assert load(more).model.weights == load("model.weights=auto", more).model.weights == "auto"
    with pytest.raises(ConfigError, match="model.weights must be one of auto, fp32, bf16, int8, int4"):
        load("model.weights=Q4_1")
    with pytest.raises(ConfigError, match="load_in_8bit_threshold must be at least 0, got -1"):
        load("model.load_in_8bit=true", "model.load_in_8bit_threshold=-1")
    with pytest.raises(ConfigError, match="at most 63 .*less the window BOS"):
        load("dataset.bos=window", "dataset.max_length=64", "dataset.stride=64")
    with pytest.raises(ConfigError, match="--set x: .*KEY=VALUE|KEY=VALUE"):
        parse_override("x")
    with pytest.raises(ConfigError, match="is not a YAML value"):
        parse_override("x={")


FILES = {
    "[1, 2]": "bad.yaml holds a list",
    "true": "bad.yaml holds a bool",
    "": "bad.yaml is empty; it must hold keys, such as dataset: {name: wikitext}; for the defaults, name no file",
    "# nothing\n": "bad.yaml is empty",
    "a: [": "bad.yaml cannot be read as YAML: line 1, column 5: ",
    "dataset: {name: text}\ndataset: {stride: 3}\n": "bad.yaml: line 2, column 1: key 'dataset' is given twice",
    "dataset:\n  stride: 8\n  stride: 9\n": "bad.yaml: line 3, column 3: key 'stride' is given twice, first in line 2",
    "batch_size: 010\nexp_dir: x\n": "bad.yaml: line 1, column 13: 010 is one number",
    "batch_size: two": "bad.yaml: batch_size must be an integer, got 'two'",
    "dataset.stride: 8": "unknown key dataset.stride; in a file, sections are nested, not dotted",
    "defaults: &d {stride: 8}\ndataset: {<<: *d}\n": "bad.yaml cannot be read as YAML: line 1, column 11: .*anchors",
}


@pytest.mark.parametrize("text, words", FILES.items())
def test_files_that_are_no_config(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_section_set_as_a_whole_leaves_its_other_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("dataset: {name: wikitext, max_length: 300, stride: 100}\n")
    config = load_config(path, [parse_override("dataset={stride: 50}")])
    assert (config.dataset.name, config.dataset.max_length, config.dataset.stride) == ("wikitext", 300, 50)
    with pytest.raises(ConfigError, match="unknown key dataset.strde"):
        load_config(path, [parse_override("dataset={strde: 50}")])
    assert with_overrides(config, [("importance", {"seed": 3})]).importance.seed == 3


def test_a_missing_config_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="demo.yaml.*qwen3_32b.yaml"):
        find_config("qwen4.yaml")


def test_flags_of_the_original_benchmark_reach_their_keys():
    args = load("model.dtype=bf16", "exp_dir=out", "wandb.enabled=true").original_args()
    assert set(args) == set(FLAG_KEYS)
    assert (args["dtype"], args["exp_dir"], args["wandb"], args["stride"]) == ("bf16", "out", True, 512)


def test_numerics_leave_out_paths_devices_and_timeouts():
    base = load().numerics()
    assert (
        load("runtime.timeout_s=1", "exp_dir=x", "model.dir=y", "runtime.device=cpu", "wandb.enabled=true").numerics()
        == base
    )
    for change in (
        "dataset.stride=7",
        "batch_size=3",
        "compressor=nf4",
        "model.dtype=bf16",
        "model.weights=fp32",
        "dataset.first_k_tokens=9",
    ):
        assert load(change).numerics() != base


def test_numerics_have_younger_keys_only_where_they_are_set():
    """Records and journals made before there were such keys stay recognised: no key may be added here."""
    known = {"model.dtype", "model.load_in_8bit", "model.load_in_4bit", "partition.num_nodes", "partition.wrap"}
    known |= {"partition.nodes", "dataset.bos", "dataset.max_length", "dataset.stride", "dataset.first_k_tokens"}
    known |= {"batch_size", "importance.layers", "importance.seed", "compressor", "compressor_per_link"}
    assert set(load().numerics()) == known
    for key, value in {
        "compressor_decode": "nf4",
        "evaluation.mode": "decode",
        "model.load_in_8bit_threshold": 0.0,
        "model.weights": "int4",
    }.items():
        config = load(f"{key}={value}", *(["model.load_in_8bit=true"] if "8bit" in key else []))
        assert set(config.numerics()) == known | {key} and config.numerics()[key] == value
    chunked = load("evaluation.mode=decode", "evaluation.decode_chunk=4").numerics()
    assert chunked["evaluation.decode_chunk"] == 4
    assert load("generation={seed: 3, max_length: 500, temperature: 0.5, stop: x}").numerics() == load().numerics()


def test_the_ranges_of_a_balanced_plan_stand_for_what_it_was_made_from():
    balanced = load("partition.plan=balanced", "partition.num_nodes=2", "partition.objective=decode")
    other = load("partition.plan=balanced", "partition.num_nodes=2", "partition.nodes=[{speed: 2}, {memory: 8GiB}]")
    assert balanced.numerics() != other.numerics() != load("partition.num_nodes=2").numerics()
    explicit = load("partition.num_nodes=2", "partition.nodes=[{layers: [[0, 1], [5, 6]]}, {layers: [[1, 5]]}]")
    ranges = [[(0, 1), (5, 6)], [(1, 5)]]
    assert balanced.numerics(ranges) == other.numerics(ranges) == explicit.numerics()
    assert balanced.numerics(ranges) != balanced.numerics([[(0, 2), (5, 6)], [(2, 5)]])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["partition.plan=even"], "must be one of default, balanced"),
        (["partition.objective=decode"], "objectives belong to balanced plans"),
        (["partition.nodes=[{layers: [[0, 3]]}, {layers: [[3, 6]]}]", "partition.plan=balanced"], "chooses them"),
        (["partition.nodes=[{speed: 2}, {}]"], r"nodes\[0\].speed is 2.0, but partition.plan is default"),
        (["partition.nodes=[{}, {memory: 1GiB}]"], r"nodes\[1\].memory is '1GiB', but partition.plan is default"),
        (["partition.nodes=[{}, {memory: 1x}]", "partition.plan=balanced"], r"nodes\[1\].memory: '1x' is not a size"),
        (["partition.nodes=[{}, {speed: 0}]", "partition.plan=balanced"], r"nodes\[1\].speed must be at least 0.001"),
        (["partition.nodes=[{}, {slowdown: 0.5}]"], r"nodes\[1\].slowdown must be at least 1"),
    ],
)
def test_keys_of_balanced_plans_must_go_together(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load("partition.num_nodes=2", *overrides)


def test_generation_takes_one_stop_string_or_several():
    assert load("generation.stop=END").generation.stop == ("END",)
    assert load('generation.stop=[a, "b\\nc"]').generation.stop == ("a", "b\nc")


def test_a_slot_has_the_models_positions_up_to_a_bound():
    assert [load().generation.slot_length(n) for n in (512, 40960, None)] == [512, 2048, 2048]
    asked = load("generation.max_length=4096").generation
    assert [asked.slot_length(n) for n in (8192, None)] == [4096, 4096]
    with pytest.raises(ConfigError, match="generation.max_length is 4096, the model has positions for 512 tokens"):
        asked.slot_length(512)


def test_a_section_of_generation_with_other_keys_is_checked_as_a_config_is():
    base = load("generation={seed: 3, max_length: 500}").generation
    changed = generation_with(base, {"temperature": 1, "stop": "x"})
    assert (changed.seed, changed.temperature, changed.stop) == (3, 1.0, ("x",)) and base.temperature is None
    for wrong, words in {
        "top_p": "^top_p must be a number, got 'a'",
        "topp": "^unknown key topp; did you mean top_p",
    }.items():
        with pytest.raises(ConfigError, match=words):
            generation_with(base, {wrong: "a"})
    with pytest.raises(ConfigError, match="^max_length is 500 and max_new_tokens 500"):
        generation_with(base, {"max_new_tokens": 500})


def test_which_codec_a_link_has():
    plain = load("compressor=int8", "compressor_per_link={a: nf4}")
    assert [plain.codec_of(link, decode=decode) for link in "ab" for decode in (False, True)] == [
        *("nf4", "nf4", "int8", "int8")
    ]
    own = load("compressor=int8", "compressor_per_link={a: nf4}", "compressor_decode=fp16", "compressor_decode.x=1")
    assert [own.codec_of(link) for link in "ab"] == ["nf4", "int8"]
    assert [own.codec_of(link, decode=True) for link in "ab"] == 2 * [{"name": "fp16", "x": 1}]


def test_yaml_of_a_config_reads_back_equal(tmp_path):
    config = load("partition.num_nodes=2", "partition.nodes=[{layers: [[0, 2]]}, {layers: [[2, 6]]}]")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(_lists(config.as_dict())))
    assert load_config(path) == config


def _lists(value):
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
