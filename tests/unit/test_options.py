"""One set of options in every program, and one meaning of `~` in every path."""

import ast
import dataclasses
import importlib
import os
import typing

import pytest

from pipeline.config.options import OptionParser, add_config_options, given_keys, read_config
from pipeline.config.reading import find_config, load_config, parse_override
from pipeline.config.schema import FLAG_KEYS, ConfigError, RunConfig
from tests.helpers.sources import ROOT, nodes_of, sources

PROGRAMS = {
    "run_pipeline": [],
    "pipeline.calibrate": ["--out", "x"],
    "pipeline.analyse": ["layers", "--out", "x"],
    "benchmarks.pipeline": [],
    "benchmarks.importance": [],
}


def parse(*words):
    parser = OptionParser(prog="program")
    add_config_options(parser)
    return parser.parse_args(words)


class Parsed(Exception):
    pass


def parsed_by(program, words, monkeypatch):
    """What a program's parser makes of a command line; nothing else of it runs."""

    def stop(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace))

    parse_args = OptionParser.parse_args
    monkeypatch.setattr(OptionParser, "parse_args", stop)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(program).main([*words, *PROGRAMS[program]])
    return caught.value.args[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_knows_all_flags_of_a_config(program, monkeypatch):
    words = ["--config", "demo.yaml", "--set", "batch_size=3", "--set", "dataset.stride=5"]
    for flag in FLAG_KEYS:
        words += [f"--{flag}"] if flag.startswith("load_in") or flag == "wandb" else [f"--{flag}", "fp16"]
    arguments = parsed_by(program, words, monkeypatch)
    assert arguments.config == "demo.yaml" and arguments.overrides == ["batch_size=3", "dataset.stride=5"]
    for flag in FLAG_KEYS:
        assert getattr(arguments, flag) in (True, "fp16")


@pytest.mark.parametrize("name", ["first_k_tokens", "tokens"])
def test_calibration_takes_the_number_of_tokens_by_both_names(name, monkeypatch):
    arguments = parsed_by("pipeline.calibrate", [f"--{name}", "123"], monkeypatch)
    assert read_config(arguments, own=[("dataset.first_k_tokens", 50_000)]).dataset.first_k_tokens == 123


def test_the_order_of_file_program_flags_and_set(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("batch_size: 2\ndataset: {stride: 20, max_length: 200, first_k_tokens: 50}\n")
    arguments = parse("--config", str(path), "--stride", "30", "--max_length", "300", "--set", "dataset.max_length=400")
    config = read_config(arguments, own=[("dataset.stride", 10), ("dataset.first_k_tokens", 60)])
    dataset = config.dataset
    assert (config.batch_size, dataset.stride, dataset.max_length, dataset.first_k_tokens) == (2, 30, 400, 60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "010"], "--batch_size 010: 010 is one number to some readers"),
        (["--batch_size", "1_0"], "1_0 is one number"),
        (["--batch_size", "two"], "batch_size must be an integer, got 'two'"),
        (["--stride", "-5"], "dataset.stride must be at least 1, got -5"),
        (["--config", ""], "config '': the path is empty"),
        (["--exp_dir", ""], "exp_dir: the path is empty"),
        (["--exp_dir", "a\udcff"], r"exp_dir is not UTF-8: .*; rename the file"),
    ],
)
def test_bad_values_of_flags(words, message):
    with pytest.raises(ConfigError, match=message):
        read_config(parse(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--first-k-tokens", "5"], "unrecognized arguments: --first-k-tokens 5; did you mean --first_k_tokens?"),
        (["--compresor=nf4"], "did you mean --compressor?"),
        (["--dataset.stride", "5"], "keys of the config are written --set dataset.stride=VALUE"),
        (["--batch", "5"], "unrecognized arguments: --batch"),  # no abbreviations
        (["nf4"], "unrecognized arguments: nf4"),
    ],
)
def test_unknown_options(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compressor", "nf4"], "compressor is 'nf4', but it is not used here"),
        (["--set", "compressor.group_size=4"], "compressor.group_size is 4, but it is not used here"),
        (["--set", "wandb={project: x}"], "wandb.project is 'x', but it is not used here"),
        (["--wandb"], "wandb.enabled is True, but"),
        (["--compressor", "none", "--no-wandb"], None),
    ],
)
def test_keys_that_a_program_does_not_use(words, message, tmp_path):
    unused = dict.fromkeys(("compressor", "wandb"), "it is not used here")
    (tmp_path / "a.yaml").write_text("compressor: nf4\nwandb: {enabled: true}\n")  # of a file for several programs
    arguments = parse("--config", str(tmp_path / "a.yaml"), *words)
    if message is None:
        assert read_config(arguments, own=[("compressor", "int4")], unused=unused).compressor == "int4"
        return
    with pytest.raises(ConfigError, match=message):
        read_config(arguments, unused=unused)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("pipeline.calibrate", ["--stride", "7"], "dataset.stride is 7, but calibration's windows do not overlap"),
        ("pipeline.calibrate", ["--compressor", "nf4"], "compressor is 'nf4', but calibration looks at"),
        ("pipeline.calibrate", ["--exp_dir", "y"], "exp_dir is 'y', but calibration writes to --out"),
        ("pipeline.calibrate", ["--tokens", "1"], "first_k_tokens is 1: at least 2 tokens"),
        ("pipeline.calibrate", ["--mixture", "1"], "1 is out of range; give a share from 0 to below 1"),
        ("pipeline.calibrate", ["--mixture", "nan"], "nan is out of range"),
        ("pipeline.calibrate", ["--mixture", "half"], "'half' is no number"),
        ("pipeline.calibrate", ["--mixture", "0.2", "--shortcut"], "--shortcut takes the config's text alone"),
        ("pipeline.calibrate", ["--tokens", "-5"], "first_k_tokens must be at least 0"),
        ("pipeline.analyse", ["--exp_dir", "y"], "exp_dir is 'y', but an analysis writes to --out"),
        ("pipeline.analyse", ["--config", "nope.yaml"], "config 'nope.yaml' is neither a file nor in"),
        ("benchmarks.pipeline", ["--first_k_tokens", "99"], "the text is cut to --windows full windows"),
        ("benchmarks.pipeline", ["--set", "batch_size=010"], "010 is one number"),
        ("benchmarks.importance", ["--compressor", "nf4"], "this benchmark takes a model and a partition"),
    ],
)
def test_programs_refuse_what_they_do_not_use(program, words, message, capsys):
    try:
        status = importlib.import_module(program).main([*words, *PROGRAMS[program]])
    except SystemExit as e:
        status = e.code
    assert status not in (0, None)
    assert message in capsys.readouterr().err + str(status)


# The keys of a config that name files, and no others: a new one has to be put here or into `NO_PATHS`.
PATHS = ["model.name", "model.dir", "model.stage_to", "dataset.path", "importance.head_weights", "importance.oracle"]
PATHS += ["exp_dir", "serving.api_key_file"]
NO_PATHS = ["model.revision", "model.dtype", "model.weights", "dataset.name", "dataset.split", "dataset.bos"]
NO_PATHS += ["runtime.device", "links.rate", "links.delay", "links.jitter"]
NO_PATHS += ["evaluation.mode", "runtime.backend", "runtime.interface", "wandb.project", "wandb.run_name", "wandb.mode"]
NO_PATHS += ["partition.plan", "partition.objective", "serving.address"]


def string_keys(cls=RunConfig, prefix=""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from string_keys(hint, f"{prefix}{name}.")
        elif hint in (str, str | None):
            yield prefix + name


def test_every_string_key_is_a_path_or_is_not():
    assert sorted(string_keys()) == sorted(PATHS + NO_PATHS)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("source", ["file", "set", "flag"])
def test_home_in_every_path_of_a_config(key, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, name = key.rpartition(".")
    overrides = [("dataset.name", "text")] if key == "dataset.path" else []
    flags = {config_key: flag for flag, config_key in FLAG_KEYS.items()}
    path = tmp_path / "a.yaml"
    for given, expected in (("~/a b/$HOME", f"{tmp_path}/a b/$HOME"), ("x/~", "x/~"), ("./~", "./~")):
        if source == "file":
            path.write_text(f"{section}: {{{name}: '{given}'}}\n" if section else f"{name}: '{given}'\n")
            if key == "dataset.path":
                path.write_text(f"dataset: {{name: text, path: '{given}'}}\n")
            config = load_config(path)
        elif source == "set":
            config = load_config(None, [*overrides, parse_override(f"{key}={given}")])
        elif key in flags:
            config = load_config(None, given_keys(parse(f"--{flags[key]}", given)))
        else:
            continue
        for part in key.split("."):
            config = getattr(config, part)
        assert config == expected


def test_home_in_the_names_of_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("batch_size: 2\n")
    assert find_config("~/mine.yaml") == tmp_path / "mine.yaml"
    assert find_config("~/mine.yaml", "sweeps") == tmp_path / "mine.yaml"


def test_paths_and_yaml_are_read_in_one_place():
    """Options that are paths go through `path_option`, `~` through `user_path`, YAML through `strict_yaml`."""
    for path in [ROOT / "run_pipeline.py", *sources("pipeline", "compressors", "benchmarks")]:
        for node in nodes_of(path):
            if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
                assert node.value.id != "Path", f"{path}:{node.value.lineno}: say type=path_option"
            if isinstance(node, ast.Attribute) and path.name != "user_files.py":
                assert node.attr != "expanduser", f"{path}:{node.lineno}: say user_path"
            if isinstance(node, ast.Attribute) and path.name != "strict_yaml.py":
                is_reader = isinstance(node.value, ast.Name) and node.value.id == "yaml" and "load" in node.attr
                assert not is_reader, f"{path}:{node.lineno}: say parse_yaml or read_yaml"


@pytest.mark.parametrize("program", ["pipeline.report.__main__", "pipeline.report.importance_curves"])
def test_home_in_the_folders_of_reports(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", [program, "~/nowhere"])
    try:
        status = importlib.import_module(program).main()
    except SystemExit as e:
        status = e.code
    assert status == 2 and f"{tmp_path}{os.sep}nowhere" in capsys.readouterr().err
