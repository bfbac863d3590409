"""YAML as people read it: what values become, and what is refused with which words."""

import pytest

from compressors.strict_yaml import MAX_DEPTH, MAX_NBYTES, parse_yaml, parse_yaml_value, read_yaml
from compressors.user_files import InputError

VALUES = {
    "": None,
    " ": None,
    "null": None,
    "true": True,
    "False": False,
    "0": 0,
    "-0": 0,
    "+5": 5,
    "-12": -12,
    "9223372036854775807": 2**63 - 1,
    "1e-3": 1e-3,
    "1e3": 1e3,
    "-1E+2": -100.0,
    ".5": 0.5,
    "5.": 5.0,
    "0.10": 0.1,
    "yes": "yes",
    "no": "no",
    "on": "on",
    "Off": "Off",
    "y": "y",
    "none": "none",
    "inf": "inf",
    "2024-01-31": "2024-01-31",
    "2024-01-31 10:00:00": "2024-01-31 10:00:00",
    "1.2.3": "1.2.3",
    "12e": "12e",
    "=": "=",
    "layer:2:node0->node1": "layer:2:node0->node1",
    "~/models": "~/models",
    "'010'": "010",
    '"~"': "~",
    "'a # b'": "a # b",
    "[1, [no], {a: on}]": [1, ["no"], {"a": "on"}],
    "{1: x, true: y, null: z}": {"1": "x", "true": "y", "null": "z"},
    "\ufeff7": 7,
}


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_values(text, value):
    found = parse_yaml_value(text, "here")
    assert found == value and type(found) is type(value)


OTHER_NUMBERS = "010 -010 00 007.5 0x10 0b11 0o17 1_000 1_0.5 5:30 1:00:00 190:20:30.15".split()
REFUSED = {
    **{text: "is one number to some readers.*plain decimal digits, or in quotes" for text in OTHER_NUMBERS},
    ".inf": r"\.inf is not a finite number",
    "-.Inf": r"-\.Inf is not a finite number",
    ".NaN": r"\.NaN is not a finite number",
    "1e999": "1e999 is too large for a number",
    "9223372036854775808": "does not fit 64 bits",
    "9" * 5000: r"999\.\.\. \(5000 characters\) does not fit 64 bits",
    "~": "~ alone is nothing to YAML and the home folder to a shell; write null, or ~/",
    "{a: ~}": "~ alone is nothing",
    "a # b": "# b is a comment to YAML; put the whole value in quotes",
    "# b": "is a comment to YAML",
    "{a: 1, b: 2, a: 3}": "key 'a' is given twice; put both together, or take one out",
    "{a: 1, 'a': 1}": "key 'a' is given twice",
    "{x: {a: 1, a: 1}}": "key 'a' is given twice",
    "[&x 1, *x]": "&x: anchors and aliases are not read",
    "*x": r"\*x: anchors and aliases are not read",
    "*.txt": "put the value in quotes",
    "{<<: {a: 1}}": "merge keys .* are not read",
    "!!int '5'": "tags are not read",
    "!!python/object:os.system x": "tags are not read",
    "!x y": "!x: tags are not read",
    "{[a]: b}": "a key must be a word",
    "{? {a: b} : c}": "a key must be a word",
    "[": "is not a YAML value",
    "{a": "is not a YAML value: .*expected ',' or '}'",
    "a: b: c": "put a value with ': ' in quotes",
    "@x": "put the value in quotes",
    "`x": "put the value in quotes",
    "a\tb: c": "tabs",
    "--- a\n--- b": "is not a YAML value: line 2, column 1: .*take the line --- out",
    "\x07": r"the character U\+0007 may not stand there",
    "a\0b": r"the character U\+0000 may not stand there",
    "a\ud800b": r"the character U\+D800 may not stand there",
    '"a\\0b"': "holds a NUL character",
    '"\\ud800"': "is not UTF-8",
    "[" * 100_000: f"nested deeper than {MAX_DEPTH} levels",
    "{a: " * 1000: f"nested deeper than {MAX_DEPTH} levels",
    "a" * (MAX_NBYTES + 1): f"has {MAX_NBYTES + 1} characters; YAML here has at most",
}


@pytest.mark.parametrize(("text", "words"), REFUSED.items(), ids=lambda text: ascii(text[:30]))
def test_what_is_refused(text, words):
    with pytest.raises(InputError, match=rf"(?s)^here.*{words}"):
        parse_yaml_value(text, "here")


def test_an_alias_cannot_multiply():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(InputError, match="here cannot be read as YAML: line 1, column 5: &a0: anchors"):
        parse_yaml(bomb, "here")


def test_comments_are_comments_in_files():
    assert parse_yaml("# one\na: 1 # two\n\n# three\n", "here") == {"a": 1}
    assert parse_yaml("# nothing else\n", "here") is None


FILES = {
    b"dataset:\n  name: text\nbatch_size: 2\ndataset:\n  stride: 3\n": (
        "a.yaml: line 4, column 1: key 'dataset' is given twice, first in line 1; put both together"
    ),
    b"dataset:\n\tname: text\n": "a.yaml cannot be read as YAML: line 2, column 1: .*indent with spaces, not tabs",
    b"a: 1\nb: 010\n": "a.yaml: line 2, column 4: 010 is one number",
    b"a: caf\xe9\n": r"a.yaml is not UTF-8: .*\(at byte 6, line 1\); convert it",
    "a: 1\n".encode("utf-16"): "a.yaml is UTF-16, by its byte-order mark",
    b"a: 1\nb: \0\n": "a.yaml has a NUL byte at byte 8, line 2",
    b"a: [1\n": "a.yaml cannot be read as YAML: line 2, column 1: ",
    b"x" * (MAX_NBYTES + 1): f"a.yaml has {MAX_NBYTES + 1} bytes; a YAML file here has at most {MAX_NBYTES}",
}


@pytest.mark.parametrize(("content", "words"), FILES.items(), ids=lambda content: ascii(content[:20]))
def test_files_that_are_refused(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_yaml(path)


@pytest.mark.parametrize("written", [b"a: 1\nb: [x]\n", b"\xef\xbb\xbfa: 1\r\nb: [x]\r\n", b"a: 1\rb: [x]\r"])
def test_marks_and_line_ends_of_files(tmp_path, written):
    path = tmp_path / "a.yaml"
    path.write_bytes(written)
    assert read_yaml(path) == {"a": 1, "b": ["x"]}


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="nope.yaml cannot be read: .*No such file"):
        read_yaml(tmp_path / "nope.yaml")
    with pytest.raises(InputError, match="cannot be read: .*directory"):
        read_yaml(tmp_path)
