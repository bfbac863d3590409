"""What import-linter's contracts (pyproject.toml, `make lint`) do not say of the rooms of docs/design.md."""

import ast
import re
import subprocess
import sys

import pytest

from tests.helpers.sources import ROOT, nodes_of, sources

OURS = ("pipeline", "compressors")
# Importing these does not load torch.
PLAIN_ROOMS = ["report", "records", "config", "planner", "partition"]
PLAIN_MODULES = [
    "comm.world", "comm.watchdog", "comm.network", "data.windows", "runtime.launch", "runtime.memory",
    "evaluation.progress", "evaluation.tracking", "generation.text", "analysis.layer_statistics", "analysis.plots",
    "serving.harness_runs",
]  # fmt: skip
PROCESS_GROUP_ROOMS = {"comm", "runtime"}
# Private names that tests may touch, and why.
PRIVATE_NAMES_OF_OTHERS = {
    "_attn_implementation": "transformers: which attention a model runs can be read in no other way",
    "_get_logits_processor": "transformers: the distribution that sampling is compared with",
    "_get_default_generation_params": "transformers: the defaults that ours are compared with",
    "_choose_scale_float8": "torchao: the codec that ours is compared with",
    "_quantize_affine_float8": "torchao: the codec that ours is compared with",
    "_schema": "torch: of an operator, its overload",
    "_forward_hooks": "torch: that a module has none left",
    "_forward_pre_hooks": "torch: that a module has none left",
    "_exit": "os: public for all its underscore",
}
MAX_ARGUMENTS, MAX_CONSTRUCTOR_ARGUMENTS = 7, 6
# Functions that may take more arguments, and why. Kernels take the arrays that they fill one by one.
ARGUMENTS_OF_OTHERS = {"_over_slots": "transformers: calls it, and names what it passes"}
NAMING_CALLS = {"setattr", "getattr", "hasattr", "delattr", "patch", "object"}


def imports(path):
    """Modules named in import statements anywhere in a file."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_says_what_belongs_there():
    for init in [*(ROOT / "pipeline").glob("*/__init__.py"), *(ROOT / "compressors").glob("*/__init__.py")]:
        assert ast.get_docstring(ast.parse(init.read_text())), init


def test_process_groups_belong_to_two_rooms():
    for path in sources(*OURS):
        if path.parent.name not in PROCESS_GROUP_ROOMS:
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path


@pytest.mark.slow
def test_plain_modules_do_not_load_torch():
    rooms = [p for room in PLAIN_ROOMS for p in (ROOT / "pipeline" / room).glob("*.py") if p.stem[0] != "_"]
    names = [*(f"{p.parent.name}.{p.stem}" for p in rooms), *PLAIN_MODULES]
    code = "import sys\n" + "".join(f"import pipeline.{name}\n" for name in names)
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("folder", ["pipeline", "compressors"])
def test_no_pickle_no_eval(folder):
    for path in sources(folder):
        assert not {"pickle", "dill", "marshal", "shelve"} & {name.split(".")[0] for name in imports(path)}, path
        calls = [node.func for node in nodes_of(path) if isinstance(node, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id in ("eval", "exec") for f in calls), path
        pickling = r"torch\.load\(|(gather|broadcast|scatter|send|recv)_object"  # torch.distributed's are pickles
        assert not re.search(pickling, path.read_text()), path


def too_many_arguments(nodes):
    """(function, number of arguments) of those that take more than a function or constructor may."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in OWN for argument in taken)
            if count > (MAX_CONSTRUCTOR_ARGUMENTS if node.name == "__init__" else MAX_ARGUMENTS):
                yield node.name, count


def test_functions_take_few_arguments():
    """Of more, some belong together and want an object of their own."""
    found = []
    for path in sources(*OURS):
        if "kernels" not in path.parts:
            found += too_many_arguments(nodes_of(path))
    assert {name for name, _ in found} == set(ARGUMENTS_OF_OTHERS), found


def test_many_arguments_are_found():
    text = """
class A:
    def __init__(self, a, b, c, d, e, f, *more, **others): ...
    def method(self, a, b, c, d, e, /, f, *, g): ...
class B:
    def __init__(self, a, b, c, d, e, f, *, g=0): ...
async def one(a, b, c, d, e, f, *, g, h=None): ...
"""
    assert sorted(too_many_arguments(ast.walk(ast.parse(text)))) == [("__init__", 7), ("one", 8)]


def private_names(nodes):
    """(line, name) of what a file touches of others that begins with one underscore."""
    for node in nodes:
        names = []
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in NAMING_CALLS:
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [text.rpartition(".")[2] for text in strings]
        yield from ((node.lineno, name) for name in names if re.match(r"_[^_]", name))


OWN = {"self", "cls"}


def called(call):
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def test_test_files_have_names_of_their_own():
    """Where a folder of tests is no package, pytest takes a module's name alone, and of two it loads one."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_tests_touch_no_private_names():
    """They would fail where nothing that anyone can see has changed, and pass where it has."""
    found, allowed = [], set()
    for path in sources("tests"):
        for line, name in private_names(nodes_of(path)):
            if name in PRIVATE_NAMES_OF_OTHERS:
                allowed.add(name)
            else:
                found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert found == []
    assert allowed == set(PRIVATE_NAMES_OF_OTHERS), "what nobody touches is no exception"


@pytest.mark.parametrize(
    "text",
    [
        "journal._file.close()",
        "self.ring._engines",
        "from pipeline.records.files import _partial",
        "monkeypatch.setattr(TextStream, '_decode', None)",
        "mock.patch('pipeline.records.store._write')",
        "mock.patch.object(store, '_write')",
    ],
)
def test_a_private_name_is_found(text):
    assert [name for _, name in private_names(ast.walk(ast.parse(text)))]


def test_what_is_no_private_name_of_another():
    text = "self._x = cls._y = a.__name__\nmonkeypatch.setenv('_A', '')\nmonkeypatch.setattr('os.cpu_count', _own)"
    assert list(private_names(ast.walk(ast.parse(text)))) == []


def test_every_command_ends_as_commands_do():
    """With no traceback where the reader of its output has gone; what only prints a table for the docs has no main."""
    programs = [ROOT / "run_pipeline.py"]
    programs += sources(*OURS, "benchmarks")
    num_commands = 0
    for path in programs:
        text = path.read_text()
        if 'if __name__ == "__main__":' in text and "\ndef main(" in text:
            num_commands += 1
            assert text.endswith('if __name__ == "__main__":\n    run_command(main)\n'), path
    assert num_commands > 10
