"""Data flows one way: the rooms of docs/design.md, as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Rooms, the lowest last: a room imports from those below it only.
ROOMS = [
    "evaluation", "analysis", "report", "runtime", "importance", "comm", "models", "records", "config", "partition",
    "data",
]  # fmt: skip
SIDE_BY_SIDE = {"evaluation", "analysis"}
ENTRY_POINTS = {"analyse", "calibrate"}
# Importing these does not load torch.
PLAIN_ROOMS = ["report", "records", "config", "partition"]
PLAIN_MODULES = [
    "comm.world", "comm.watchdog", "comm.network", "data.windows", "runtime.launch", "runtime.memory",
    "evaluation.progress", "evaluation.tracking", "analysis.layer_statistics", "analysis.plots",
]  # fmt: skip
PROCESS_GROUP_ROOMS = {"comm", "runtime"}


def imports(path):
    """Modules named in import statements anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_room():
    assert {p.stem for p in (ROOT / "pipeline").glob("*.py")} - {"__init__"} == ENTRY_POINTS
    assert {p.parent.name for p in (ROOT / "pipeline").rglob("*.py")} - {"pipeline"} == set(ROOMS)


def test_every_room_says_what_belongs_there():
    for init in [*(ROOT / "pipeline").glob("*/__init__.py"), *(ROOT / "compressors").glob("*/__init__.py")]:
        assert ast.get_docstring(ast.parse(init.read_text())), init


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("*/*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_a_module_imports_from_its_own_room_and_those_below(path):
    room = path.parent.name
    above = set(ROOMS[: ROOMS.index(room)]) | SIDE_BY_SIDE - {room} | ENTRY_POINTS
    names = list(imports(path))
    assert [name for name in names if name.startswith("pipeline.") and name.split(".")[1] in above] == []
    if room not in PROCESS_GROUP_ROOMS:
        assert not any(name.startswith("torch.distributed") for name in names)


@pytest.mark.parametrize("path", sorted((ROOT / "compressors").rglob("*.py")), ids=lambda p: p.stem)
def test_codecs_know_nothing_of_the_pipeline(path):
    names = list(imports(path))
    assert not any(name.split(".")[0] == "pipeline" or name.startswith("torch.distributed") for name in names)


def test_plain_modules_do_not_load_torch():
    rooms = [p for room in PLAIN_ROOMS for p in (ROOT / "pipeline" / room).glob("*.py") if p.stem[0] != "_"]
    names = [*(f"{p.parent.name}.{p.stem}" for p in rooms), *PLAIN_MODULES]
    code = "import sys\n" + "".join(f"import pipeline.{name}\n" for name in names)
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("folder", ["pipeline", "compressors"])
def test_no_pickle_no_eval(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {"pickle", "dill", "marshal", "shelve"} & {name.split(".")[0] for name in imports(path)}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id in ("eval", "exec") for f in calls), path
        assert "torch.load(" not in path.read_text() and "_object(" not in path.read_text(), path
