"""What `pip install .` installs: all packages, their data, and the configs; found from any folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "run_pipeline.py"]
PACKAGES = ["pipeline", "compressors"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy, since building leaves files behind."""
    pytest.importorskip("setuptools", minversion="68", reason="building a wheel offline needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in [*PACKAGES, "configs", "tests", "benchmarks"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", out, sdist], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


def package_files():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    suffixes = (".py", ".json", ".css", ".js", ".jinja", ".html", ".svg", ".txt")
    return {str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes} | {"run_pipeline.py"}


CONFIGS = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.mark.slow
def test_an_sdist_has_what_a_wheel_is_built_of_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO"}
    assert names - made == {*SOURCES, *CONFIGS, *package_files()}


@pytest.mark.slow
def test_a_wheel_has_every_file_its_licence_and_a_command(wheel):
    archive = zipfile.ZipFile(wheel)
    told = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    expected = package_files() | {f"pipeline/{name}" for name in CONFIGS}
    assert set(archive.namelist()) - set(told.values()) == expected
    metadata = archive.read(told["METADATA"]).decode()
    assert re.search(r"^License(-Expression)?: MIT$", metadata, re.MULTILINE)
    (licence,) = [name for name in told.values() if name.endswith("/LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "thinwire = run_pipeline:command" in archive.read(told["entry_points.txt"]).decode()


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
