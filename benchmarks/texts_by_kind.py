"""Texts of several kinds from what is on this machine, a file each, for `benchmarks.kinds_of_text`.

    python -m benchmarks.texts_by_kind --wikitext wiki.test.raw --out build/kinds

Python source and JSON of installed packages; manual pages in Chinese, Russian and Japanese, without their roff;
messages of programs in Georgian, a script that no text of the calibration's mixture has; conversations that were
written for this (`chat_test.txt`). None of it is in a calibration. What is not installed is named and left out.
"""

from __future__ import annotations

import gzip
import re
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from compressors.console import run_command
from pipeline.config.options import OptionParser, path_option
from pipeline.data.text import load_text

MAN, LOCALE = Path("/usr/share/man"), Path("/usr/share/locale")
MAX_PIECE = 12_000  # characters of one file, so that the first few thousand tokens are of several
MAX_TEXT = 60_000  # characters
PYTHON_FILES = ("jinja2/environment.py", "yaml/scanner.py", "tqdm/std.py", "filelock/_api.py", "accelerate/hooks.py")
JSON_FILES = (
    *("torch/_dynamo/graph_break_registry.json", "nbformat/v4/nbformat.v4.5.schema.json"),
    *("debugpy/_vendored/pydevd/_pydevd_bundle/_debug_adapter/debugProtocol.json",),
)
MIN_FOREIGN = 0.5  # of a line's letters; translated pages have paragraphs in English


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wikitext", type=path_option, required=True, help="WikiText's raw test file")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wikitext = load_text(name="wikitext", path=str(arguments.wikitext), split="test").text
    packages = Path(sysconfig.get_path("purelib"))
    texts = {
        "wikitext": [wikitext],
        "python": _contents(packages / name for name in PYTHON_FILES),
        "json": _contents(packages / name for name in JSON_FILES),
        "chat": _contents([Path(__file__).with_name("chat_test.txt")]),
        "chinese": _man_pages("zh_CN"),
        "russian": _man_pages("ru"),
        "japanese": _man_pages("ja"),
        "georgian": (_messages(path) for path in sorted((LOCALE / "ka").rglob("*.mo"))),
    }
    for kind, pieces in texts.items():
        text = "\n\n".join(piece if kind == "wikitext" else piece[:MAX_PIECE] for piece in pieces)[:MAX_TEXT]
        if not text.strip():
            print(f"{kind}: nothing of it is installed here", file=sys.stderr)
            continue
        path = arguments.out / f"{kind}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"--kind {kind}={path}")
    return 0


def _contents(paths: Iterable[Path]) -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in paths if path.is_file())


def _man_pages(language: str) -> Iterator[str]:
    for path in sorted((MAN / language).rglob("*.gz")):
        if not path.is_symlink():
            yield plain_page(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))


def plain_page(roff: str) -> str:
    """The translated lines of a manual page, without requests and font changes."""
    lines: list[str] = []
    for line in roff.splitlines():
        if line.startswith((".PP", ".SH", ".TP", ".IP", ".RE")):
            lines.append("")
        line = re.sub(r"^\.(SH|SS|B|I|BR|IR|RI)\s+", "", line)
        if line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f.|\\[&| ]|\\s[-+]?\d", "", line)
        line = re.sub(r"\\\*\(Aq|\\\(aq", "'", line).replace("\\-", "-").replace("\\e", "\\")
        letters = [c for c in line if c.isalpha()]
        if not letters and line.strip() or sum(not c.isascii() for c in letters) < MIN_FOREIGN * len(letters):
            continue
        lines.append(line.strip().strip('"'))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _messages(path: Path) -> str:
    """Translations of a GNU message catalogue (.mo), a line each."""
    data = path.read_bytes()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, _, table = struct.unpack_from(f"{order}3I", data, 8)
    texts = []
    for number in range(1, count):  # the first is the catalogue's own header
        length, start = struct.unpack_from(f"{order}2I", data, table + 8 * number)
        texts.append(data[start : start + length].split(b"\0")[0].decode("utf-8", "replace"))
    return "\n".join(texts)


if __name__ == "__main__":
    run_command(main)
