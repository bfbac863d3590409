"""What import-linter's contracts (pyproject.toml, `make lint`) do not say of the rooms of docs/design.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Importing these does not load torch.
PLAIN_ROOMS = ["report", "records", "config", "planner", "partition"]
PLAIN_MODULES = [
    "comm.world", "comm.watchdog", "comm.network", "data.windows", "runtime.launch", "runtime.memory",
    "evaluation.progress", "evaluation.tracking", "generation.text", "analysis.layer_statistics", "analysis.plots",
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


def test_every_room_says_what_belongs_there():
    for init in [*(ROOT / "pipeline").glob("*/__init__.py"), *(ROOT / "compressors").glob("*/__init__.py")]:
        assert ast.get_docstring(ast.parse(init.read_text())), init


def test_process_groups_belong_to_two_rooms():
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "compressors").rglob("*.py")]:
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
    for path in (ROOT / folder).rglob("*.py"):
        assert not {"pickle", "dill", "marshal", "shelve"} & {name.split(".")[0] for name in imports(path)}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id in ("eval", "exec") for f in calls), path
        assert "torch.load(" not in path.read_text() and "_object(" not in path.read_text(), path
