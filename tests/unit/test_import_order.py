"""Data flows one way: the rows of docs/design.md, as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = [
    "allocator", "world", "watchdog", "config", "points", "plan", "schedule", "windows", "metrics", "record", "record_schema", "journal", "tracking",
    "progress", "layer_analysis", "layer_plots", "quality", "prediction",
    "results", "importance_curves", "columns", "outlook", "charts", "published", "html_parts", "html_costs", "html_prediction", "html_report", "text_report", "plots", "report",
]  # fmt: skip
TORCH = [
    "staging",
    "gguf_conversion",
    "model_source",
    "dataset",
    "attention",
    "hf_model",
    "stage",
    "probes",
    "importance",
    "importance_files",
    "relevance",
    "wire",
]
PROCESS_GROUP = [
    "mailbox", "link", "distributed", "compose", "plan_report", "runner", "deployment", "start", "gradients", "model_analysis", "analyse", "calibration", "calibrate", "task", "head", "evaluation", "sweep",
]  # fmt: skip
ORDER = PLAIN + TORCH + PROCESS_GROUP


def imports(path):
    """Modules named in import statements anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_row():
    assert {p.stem for p in (ROOT / "pipeline").glob("*.py")} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("*.py")), ids=lambda p: p.stem)
def test_a_module_imports_only_rows_above_it(path):
    if path.stem == "__init__":
        return
    own = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
    assert [name for name in own if name in ORDER and ORDER.index(name) >= ORDER.index(path.stem)] == []
    if path.stem not in PROCESS_GROUP:
        assert not any(name.startswith("torch.distributed") for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "compressors").rglob("*.py")), ids=lambda p: p.stem)
def test_codecs_know_nothing_of_the_pipeline(path):
    names = list(imports(path))
    assert not any(name.split(".")[0] == "pipeline" or name.startswith("torch.distributed") for name in names)


def test_plain_modules_do_not_load_torch():
    code = "import sys\n" + "".join(f"import pipeline.{name}\n" for name in PLAIN)
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("folder", ["pipeline", "compressors"])
def test_no_pickle_no_eval(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {"pickle", "dill", "marshal", "shelve"} & {name.split(".")[0] for name in imports(path)}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id in ("eval", "exec") for f in calls), path
        assert "torch.load(" not in path.read_text() and "_object(" not in path.read_text(), path
