from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from codec_cases import SPECS

from compressors import Compressor, LinkInfo, Payload, builtin_names, make_compressor


class Constant(Compressor):
    """A plug-in for the tests: sends nothing, decodes to `value`."""

    name = "constant"

    def __init__(self, *, value: float = 0.0, shape: list[int] | None = None, inner=None, link=None):
        super().__init__(link=link)
        self.value, self.shape = value, shape
        self.inner = None if inner is None else make_compressor(inner, link)

    def compress(self, x, **side):
        return Payload(torch.empty(0, dtype=torch.uint8), tuple(x.shape))

    def decompress(self, payload, device, dtype):
        return torch.full(payload.shape, self.value, device=device, dtype=dtype)


@pytest.fixture(autouse=True)
def plugin_module(monkeypatch):
    module = types.ModuleType("plugin_for_tests")
    module.Constant = Constant
    module.number = 3
    module.Unfinished = type("Unfinished", (Compressor,), {"name": "unfinished", "compress": Constant.compress})
    module.Nameless = type("Nameless", (Constant,), {"name": None})
    module.NoLink = type("NoLink", (Constant,), {"__init__": lambda self: None})
    monkeypatch.setitem(sys.modules, "plugin_for_tests", module)


def test_names_options_and_link_reach_the_codec():
    link = LinkInfo(name="l", hidden_size=64, max_tokens=4)
    codec = make_compressor("int4(granularity=tensor)", link)
    assert codec.config() == {"name": "int4", "nbits": 4, "granularity": "tensor"}
    assert codec.link is link
    assert make_compressor(codec) is codec
    assert make_compressor({"name": "int4", "granularity": "tensor"}).codec_id() == codec.codec_id()
    assert make_compressor("int4").codec_id() != codec.codec_id()


@pytest.mark.parametrize("spec", SPECS)
def test_config_makes_the_same_codec_again(spec):
    codec = make_compressor(spec)
    assert make_compressor(codec.config()).codec_id() == codec.codec_id()


def test_codec_ids_differ():
    assert len({make_compressor(spec).codec_id() for spec in SPECS}) == len(SPECS)


def test_short_form_of_plugins_and_nested_codecs():
    codec = make_compressor(" plugin_for_tests:Constant( value = 2.5 , shape=[1, 2],inner=int4(granularity=tensor)) ")
    assert codec.config() == {
        "name": "constant",
        "value": 2.5,
        "shape": [1, 2],
        "inner": {"name": "int4", "nbits": 4, "granularity": "tensor"},
    }
    assert make_compressor("plugin_for_tests:Constant(nf4)").inner.name == "nf4"
    assert make_compressor("plugin_for_tests:Constant()").inner is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int44", r"unknown compressor 'int44', did you mean 'int4'.*built-in: none, fp16"),
        ({"name": "nf5"}, "did you mean 'nf4'"),
        ({"granularity": "token"}, "expected a mapping with `name: <codec>`"),
        (17, "compressor is 17, expected a name"),
        ("", "is not of the form"),
        ("int4(granularity=row)", "'int4': granularity is 'row', allowed: token, tensor"),
        (
            "int4(granulariti=token)",
            r"'int4' has no option 'granulariti' \(got 'token'\), did you mean 'granularity'",
        ),
        ("mxfp4(block=3)", "'mxfp4' has no option 'block'.*allowed: none"),
        ("int4(nbits=5)", "nbits is 5, but the name fixes 4"),
        ("int4(fp16)", "'int4' has no option 'inner'"),
        ("int4(granularity=token, granularity=token)", "granularity is given twice"),
        ("int4(granularity=token", "is not of the form|brackets"),
        ("int4(granularity=token))", "brackets do not match"),
        ("int4(granularity=[)", "brackets do not match"),
        ("int4(,)", "an argument is empty"),
        ("plugin_for_tests:Constant(value={a)", "is not a YAML value"),
        ("topk(density=064)", r"density=064: 064 is one number to some readers"),
        ("topk(density=.inf)", r"density=.inf: .inf is not a finite number"),
        ("topk(density=0.1 # ten percent)", "# ten percent is a comment to YAML"),
        ("klt(calibration=~, step=1)", "~ alone is nothing to YAML and the home folder to a shell"),
        ("outlier(channels=[1, 02], inner=int4)", "02 is one number"),
        ("outlier(channels=8, inner=no)", "unknown compressor 'no'"),
        ("outlier(channels=1e1, inner=int4)", "channels is 10.0, allowed"),
        ("hadamard(" * 40 + "int4" + ")" * 40, "nested deeper than 32 levels"),
        ("outlier(channels=" + "[" * 5000 + "]" * 5000 + ")", "nested deeper than 32 levels"),
        ("no_such_module:X", "cannot import module 'no_such_module'"),
        ("plugin_for_tests:Missing", "module 'plugin_for_tests' has no 'Missing'"),
        ("plugin_for_tests:number", "number is not a subclass of compressors.Compressor"),
        ("plugin_for_tests:Unfinished", "Unfinished does not define decompress"),
        ("plugin_for_tests:Nameless", "has no class attribute `name`"),
        ("plugin_for_tests:NoLink", "must take link=None"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        make_compressor(spec)


def test_a_float_in_the_form_of_people():
    assert make_compressor("topk(density=1e-1)").codec_id() == make_compressor("topk(density=0.1)").codec_id()


def test_a_calibration_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "channels.json").write_text('{"channels": {"a": [2, 0]}}', encoding="utf-8-sig")
    link = LinkInfo(name="a", hidden_size=8, max_tokens=4, dtype=torch.float32)
    codec = make_compressor("outlier(channels=1, calibration=~/channels.json, inner=int4)", link)
    assert codec.format_config()["channels"] == [2]
    for spec in ("klt(calibration=~/calib, step=1)", "klt_fixed(calibration=~/calib, nbits=3)"):
        with pytest.raises(
            ValueError, match=f"calibration is '{tmp_path}/calib', allowed: a folder with a.safetensors"
        ):
            make_compressor(spec, link)
    for spec in ("klt(calibration=~nobody-of-this-name/c, step=1)", "klt(calibration=7, step=1)"):
        with pytest.raises(ValueError, match="compressor 'klt': calibration is .*, allowed: a folder"):
            make_compressor(spec, link)


@pytest.mark.slow
def test_listing_and_making_codecs_loads_no_numba():
    code = (
        "import sys, compressors\n"
        "for name in compressors.builtin_names():\n"
        "    try: compressors.make_compressor(name)\n"
        "    except ValueError as e: assert 'needs option' in str(e), e\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "nf4" in builtin_names()


def test_a_plugin_with_a_builtins_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "impostor.py").write_text(PLUGIN.replace("NAME", "none"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'none', which is a built-in codec's"):
        make_compressor("impostor:Plugin")


def test_a_plugins_code_is_part_of_its_id(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for module, text in (("first_plugin", PLUGIN), ("second_plugin", PLUGIN + "# changed\n")):
        (tmp_path / f"{module}.py").write_text(text.replace("NAME", "plugin"))
    first, second = (make_compressor(f"{module}:Plugin") for module in ("first_plugin", "second_plugin"))
    assert first.codec_id() != second.codec_id()
    assert first.codec_id() == make_compressor("first_plugin:Plugin").codec_id()


PLUGIN = """
from compressors import Compressor


class Plugin(Compressor):
    name = "NAME"

    def compress(self, x, **side):
        raise NotImplementedError

    def decompress(self, payload, device, dtype):
        raise NotImplementedError
"""
