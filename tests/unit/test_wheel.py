"""What `pip install .` installs: all packages, their data, and the configs; found from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "run_pipeline.py"]
PACKAGES = ["pipeline", "compressors"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since building leaves files behind."""
    pytest.importorskip("setuptools", minversion="68", reason="building a wheel offline needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in [*PACKAGES, "configs"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", out, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_a_wheel_has_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    suffixes = (".py", ".json", ".css", ".js", ".jinja", ".html", ".svg", ".txt")
    expected = {str(p.relative_to(ROOT)) for p in files if p.suffix in suffixes}
    expected |= {f"pipeline/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")} | {"run_pipeline.py"}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_an_installed_package_finds_its_configs_from_anywhere(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    code = (
        "import sys, run_pipeline, pipeline.report.html_page\n"
        "from pipeline.data.mixture import load_kinds\n"
        "assert 'chinese' in load_kinds()\n"
        "from pipeline.config.sweep_file import find_sweep, load_sweep\n"
        "from pipeline.report.published import read_published\n"
        "read_published()\n"
        "print(run_pipeline.__file__, find_sweep('quick.yaml'), load_sweep(find_sweep('quick.yaml')).name)\n"
        "sys.exit(run_pipeline.main(['--config', 'demo.yaml', '--plan']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{site}/run_pipeline.py {site}/pipeline/configs/sweeps/quick.yaml quick\n")
    assert "30 layers, hidden size 576" in run.stdout
