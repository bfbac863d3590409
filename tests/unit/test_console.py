"""Commands whose standard output is closed or full, or whose reader has gone: no traceback, and nothing goes astray."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compressors.console import EXIT_READER_GONE
from tests.helpers.records import write_point
from tests.helpers.tiny_models import tiny_arguments, tiny_model

ROOT = Path(__file__).parents[2]
PLAN = ["run_pipeline.py", "--config", "demo.yaml", "--plan"]
HELP = ["-m", "pipeline.report", "--help"]
BENCHMARK = ["-m", "benchmarks.memory", "--help"]
CODEC = ["-m", "compressors.check", "nf4"]
REFUSED_CODEC = ["-m", "compressors.check", "no_such_codec"]
COMMANDS = {"plan": PLAN, "help": HELP, "benchmark": BENCHMARK, "check": CODEC, "refused": REFUSED_CODEC}


def run(*words, stdout, stdin=None, closed=(), unbuffered=""):
    """A command of this repository; `closed` are descriptors that it starts without."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered},
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        preexec_fn=(lambda: [os.close(descriptor) for descriptor in closed]) if closed else None,
    )


@pytest.fixture
def readerless():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def generate_arguments(exp_dir, *more):
    return ["run_pipeline.py", *tiny_arguments(exp_dir), "--set", "generation.max_new_tokens=4", *more]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_has_gone_ends_a_command_quietly(words, readerless):
    ended = run(*words, stdout=readerless)
    assert (ended.returncode, ended.stderr) == (EXIT_READER_GONE, "")


@pytest.mark.slow
def test_a_reader_that_has_gone_while_there_is_more_to_say(readerless):
    ended = run(*PLAN, stdout=readerless, unbuffered="1")
    assert (ended.returncode, ended.stderr) == (EXIT_READER_GONE, "")


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_a_report_quietly(tmp_path, readerless):
    write_point(tmp_path, "nf4")
    for words in (["-m", "pipeline.report", tmp_path], ["-m", "pipeline.report", tmp_path, "-o", tmp_path / "a.html"]):
        ended = run(*words, stdout=readerless)
        assert (ended.returncode, ended.stderr) == (EXIT_READER_GONE, "")


@pytest.mark.slow
def test_output_that_cannot_be_written_is_told():
    with open("/dev/full", "w") as full:
        ended = run(*PLAN, stdout=full)
    assert (ended.returncode, ended.stderr) == (
        1,
        "error: standard output cannot be written: No space left on device\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--generate", "ab"], ["--chat"]], ids=["text", "chat"])
def test_an_answer_that_nobody_reads_ends_with_a_message(more, tmp_path, readerless):
    arguments = generate_arguments(tmp_path, *more)
    if more == ["--chat"]:
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        arguments += ["--model_name", str(_with_template(tmp_path / "model", template))]
    ended = run(*arguments, stdout=readerless, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1
    assert "error: standard output cannot be written: Broken pipe" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_standard_streams_that_are_closed_lose_nothing(tmp_path):
    """Descriptor 2 would be the answers file, and the warning would stand in it."""
    arguments = generate_arguments(tmp_path, "--generate", "ab")
    for _ in range(2):  # the second warns that answers are set aside
        assert run(*arguments, stdout=None, closed=(0, 1, 2)).returncode == 0
    files = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir() if path.suffix in (".jsonl", ".old"))
    assert files == ["answers", "answers"]
    for path in tmp_path.glob("answers-*"):
        assert path.read_text().count("\n") == 1 and path.read_text().startswith('{"line": 1,')


def _with_template(folder, template):
    shutil.copytree(tiny_model(), folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder
