"""The notebooks run from top to bottom, here on a tiny model."""

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.helpers.launch import ROOT
from tests.helpers.tiny_models import tiny_model, write_text

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    config = {
        "model": {"name": str(tiny_model("qwen2"))},
        "partition": {"num_nodes": 2, "wrap": False},
        "dataset": {"name": "text", "path": str(write_text(tmp_path / "text", 200)), "max_length": 64, "stride": 64},
        "runtime": {"threads": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("THINWIRE_NOTEBOOK_CONFIG", str(tmp_path / "tiny.yaml"))
    monkeypatch.setenv("THINWIRE_NOTEBOOK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[1].source.startswith("# Install")
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
