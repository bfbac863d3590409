"""Documents against what they speak of: records, files, links, commands, codecs, config keys.

A table whose figures come from records has a comment above it, `<!-- from docs/results/NAME.json -->` (or several, with
commas). Each row's first cell names what the figures belong to, each heading which of its figures a cell shows.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import math
import re
import shlex
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from benchmarks import drafts
from compressors.registry import builtin_names, make_compressor
from pipeline.config.key_table import key_table
from pipeline.config.options import OptionParser, read_config
from pipeline.config.reading import find_config
from pipeline.config.sweep_file import find_sweep, load_sweep
from pipeline.importance.metrics import AttentionMetric, MetricSetting
from pipeline.models import families
from pipeline.models.attention import Attention

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAX_README_LINES = 125

# By what a row's first cell says, then by heading; a string where a cell is words.
Figures = dict[str, dict[str, list[float] | str]]


def pages(with_what: re.Pattern[str]) -> list[Path]:
    return [page for page in PAGES if with_what.search(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class TestFigures:
    MARKER = re.compile(r"<!-- from (?P<paths>[^>]*) -->\n(?P<table>(?:\|.*\n)+)")
    # +0.92% (a change), 16% (a share), x 11.5 (a ratio), 0.34, -0.33, 3.58e+08
    FIGURE = re.compile(r"(?P<number>[+-]?\d+(?:\.(?P<decimals>\d+))?(?:e(?P<exponent>[+-]\d+))?)(?P<percent>%)?")

    @pytest.mark.parametrize("page", pages(MARKER), ids=name)
    def test_tables_show_what_the_records_say(self, page):
        for found in self.MARKER.finditer(page.read_text()):
            known = figures(found["paths"].split(", "))
            headings, _, *rows = [cells(line) for line in found["table"].splitlines()]
            for label, *shown in rows:
                assert label in known, f"{name(page)}: {found['paths']} has nothing on {label!r}"
                assert len(shown) == len(headings) - 1, label
                for heading, cell in zip(headings[1:], shown, strict=True):
                    problem = self.problem(cell, known[label].get(heading, []))
                    assert problem is None, f"{name(page)}, {label}, {heading}: {problem}"

    def problem(self, cell: str, expected: list[float] | str) -> str | None:
        """Why the figures of a cell are not those expected, at the precision that it shows. An empty cell is none."""
        if isinstance(expected, str):
            return None if cell == expected else f"says {cell!r}, not {expected!r}"
        shown = list(self.FIGURE.finditer(cell))
        if cell and (not shown or len(shown) != len(expected)):
            return f"shows {cell!r}, the records have {expected}"
        for one, value in zip(shown, expected, strict=False):
            number, unit = float(one["number"]), 10.0 ** (int(one["exponent"] or 0) - len(one["decimals"] or ""))
            if one["percent"]:
                number, unit = number / 100 + (one["number"][0] in "+-"), unit / 100
            if not abs(number - value) <= unit * 0.5 * (1 + 1e-6):
                return f"shows {one[0]!r} in {cell!r}, the records have {value:.6g}"
        return None

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [
            ("+0.92% (+0.52% to +1.23%)", [1.0092, 1.0052, 1.0122]),
            ("+0.92%", [1.0092, 1.0052, 1.0122]),
            ("0.9%", [0.0198]),
            ("x 11.5", [12.5]),
            ("3.58e+08", [3.57e8]),
            ("-0.33", [0.33]),
            ("0.33", []),
            ("none", [0.33]),
            ("one sequence", "two sequences"),
        ],
    )
    def test_a_wrong_cell_is_found(self, cell, expected):
        assert self.problem(cell, expected) is not None

    def test_every_record_is_shown(self):
        markers = [found["paths"] for page in PAGES for found in self.MARKER.finditer(page.read_text())]
        shown = {Path(path).stem for paths in markers for path in paths.split(", ")}
        records = {path.stem for path in (ROOT / "docs/results").glob("*.json") if not path.stem.startswith("gpu_")}
        assert len(records) >= 7 and shown >= records

    def test_every_codec_has_a_row(self):
        (table,) = re.findall(r"\| name \| what it sends.*\n((?:\|.*\n)+)", (ROOT / "docs/codecs.md").read_text())
        names = [codec for line in table.splitlines() for codec in re.findall(r"`([\w]+)`", line.split("|")[1])]
        assert sorted(names) == sorted(builtin_names())

    def test_the_table_of_keys_is_current(self):
        assert f".key_table -->\n{key_table()}\n" in (ROOT / "docs/configuration.md").read_text(), (
            "print it anew: python -m pipeline.config.key_table"
        )


def cells(line: str) -> list[str]:
    """Of a table's row, without emphasis and without the mark of codecs that are not causal."""
    return [re.sub(r"[`*]", "", cell).strip() for cell in line.strip().strip("|").split("|")]


def figures(paths: list[str]) -> Figures:
    """What records say, in the words of the tables."""
    known: Figures = defaultdict(dict)
    for path in paths:
        record = json.loads((ROOT / path).read_text())
        kinds = {"ladder": of_drafts, "codecs": of_drafts, "acceptance": of_acceptance, "conditions": of_thin_links}
        kinds |= {"columns": of_publication, "points": of_importance, "T=1024": of_costs}
        kinds |= {"by_text": of_texts, "task_scores": of_tasks, "weight_formats": of_weight_formats}
        kinds |= {"new_tokens": of_generated_text, "runs": of_generation_speed, "rows": of_codecs}
        read = next(kind for key, kind in kinds.items() if key in record)
        for label, by_heading in read(record).items():
            known[label] |= by_heading
    return known


def of_codecs(record: dict) -> Figures:
    uncompressed = record.get("ppl_uncompressed") or record["rows"][0]["avg_ppl"]
    known: Figures = {}
    for row in record["rows"]:
        ratio = row["avg_ppl"] / uncompressed
        known[row["codec"]] = {
            "bits/value": [row["bits_per_value"]],
            "perplexity": [row["avg_ppl"]],
            "change (95% interval)": [ratio] if row["codec"] == "none" else [ratio, *row["ppl_interval_95"]],
        }
        if "bits_per_value_by_link" in row:
            known[row["codec"]] |= {
                "bits by link": [*row["bits_per_value_by_link"].values()],
                "cost": [row["share_of_compute"]],
            }
        else:
            known[row["codec"]] |= {
                "payload bytes/token/link": [row["bytes_per_token"]],
                "encode + decode, share of compute": [(row["compress_s"] + row["decompress_s"]) / row["compute_s"]],
            }
    return known


def of_publication(record: dict) -> Figures:
    """Our codecs' names for the original benchmark's methods; perplexity over that of its bf16 run."""
    ppl = {row[0]: row[3] for row in record["rows"] if row[2] == 10000}
    names = {
        **{f"int{n}": f"TorchAO_IntXAffine_{n}bit" for n in range(2, 9)},
        **{f"hqq{n}": f"hqq_{n}bit" for n in range(1, 5)},
        **{"bf16": "none_bf16", "fp8_e4m3": "torchao_float8_per_token", "nf4": "bnb_nf4", "fp4": "bnb_fp4"},
    }
    for method in ppl:
        if tile := re.fullmatch(r"BlockRowColMean_Tb(\d+)Fb(\d+)", method):
            names[f"block_rowcol_mean(block_tokens={tile[1]}, block_channels={tile[2]})"] = method
    heading = "Qwen3-32B, published"
    return {codec: {heading: [ppl[method] / ppl["none_bf16"]]} for codec, method in names.items()}


def of_importance(record: dict) -> Figures:
    known: Figures = {}
    for point in record["points"]:
        label = f"{point['high']} / {point['low']}, {point['fraction']:.0%}"
        row = known.setdefault(label, {"bits": [point["bits_per_value"]]})
        row.setdefault(point["metric"], []).append(point["ppl"])
        row["uniform bits"] = [point["ppl"] / point["ppl_over_uniform_bits"]]
    for row in known.values():
        assert len(row["random"]) == 3
        row["random"] = [statistics.geometric_mean(row["random"])]
    for metric, summary in record["layers"]["summary"].items():
        by_position = record["layers"]["spearman_with_position"][metric]
        known[metric] = {
            "first third against last third of the layers": [summary["spearman"]["early_against_late_third"]],
            "first against last layer": [summary["spearman"]["first_against_last"]],
            "neighbouring layers": [summary["spearman"]["neighbours"]],
            "with the position alone, mean over layers": [statistics.fmean(by_position)],
        }
    return known


def of_costs(record: dict) -> Figures:
    return {
        contender: {"time": [cost["time_ratio"]], "peak memory of the pass": [cost["memory_ratio"]]}
        for contender, cost in record["T=1024"].items()
    }


def of_generated_text(record: dict) -> Figures:
    uncompressed = next(row for row in record["rows"] if row["codec"] == "none")
    return {
        row["codec"]: {
            "tokens equal": [row["equal_share"]],
            "text's perplexity": [row["text_ppl"]],
            "decode-mode perplexity": [row["decode_ppl"]],
            "bytes/token/link": [row["bytes_per_token"]],
            "header bytes/token/link": [row["header_bytes_per_token"]],
            "time/token": [row["tpot_s"] / uncompressed["tpot_s"]],
        }
        for row in record["rows"]
    }


def of_thin_links(record: dict) -> Figures:
    """By codec and link, and by codec alone for links of 20 ms."""
    known: Figures = defaultdict(dict)
    for row in record["rows"]:
        link = f"{row['rate']}, {row['delay']}" if row["rate"] else "loopback"
        known[f"{link}, {row['codec']}"] = {
            "bytes/token/link": [row["bytes_per_token_per_link"]],
            "first token of 512, s": [row["ttft_s"]],
            "ms/token": [1e3 * row["tpot_s"]],
            "predicted": [1e3 * row["predicted_tpot_s"]],
            "tokens/s of four": [row["tokens_per_s_of_four"]],
            "prompt tokens/s": [] if row["prompt_tokens_per_s"] is None else [row["prompt_tokens_per_s"]],
        }
        if row["delay"] == "20ms":
            own = known[row["codec"]]
            own["bytes/token/link"] = [row["bytes_per_token_per_link"]]
            own[f"first token over {row['rate']}, s"] = [row["ttft_s"]]
            own[f"ms/token over {row['rate']}"] = [1e3 * row["tpot_s"]]
    return known


def of_texts(record: dict) -> Figures:
    """By kind of text: what each codec takes and costs there."""
    known: Figures = defaultdict(dict)
    for row in record["by_text"]:
        known[row["text"]][row["codec"]] = [row["bits_per_value"], 1 + row["ppl_change"]]
    return known


def of_weight_formats(record: dict) -> Figures:
    """By what weights are held as: perplexities, and speeds as shares of llama.cpp's single stream on all cores."""
    llama = record["llama.cpp"][str(record["cores"])]
    known: Figures = {}
    for row in record["weight_formats"]:
        places = {place: value for place, value in row.items() if isinstance(value, dict)}
        known[row["weights"]] = {
            **{place: [value["tokens_per_s"] / llama] for place, value in places.items()},
            **{f"{place}, MiB": [value["peak_rss_bytes"] / 2**20] for place, value in places.items()},
            **{heading: [row[heading]] for heading in ("windows", "one by one") if heading in row},
        }
    return known


def of_tasks(record: dict) -> Figures:
    """Score and its standard error; where there is something to compare with, the change and its own."""
    known: Figures = defaultdict(dict)
    for row in record["task_scores"]:
        figures = [row[key] for key in ("score", "stderr", "change", "change_stderr")]
        known[row["codec"]]["bits/value"] = [row["bits_per_value"]]
        known[row["codec"]][row["task"]] = [figure for figure in figures if figure is not None]
    return known


def of_drafts(record: dict) -> Figures:
    """By kind of text, delay and way of drafting; where there are several codecs, by codec before these."""
    rows = record.get("ladder") or record["codecs"]
    parts = ("codec", "kind", "delay", "mode") if len({row["codec"] for row in rows}) > 1 else ("kind", "delay", "mode")
    return {
        ", ".join(row[part] for part in parts): {
            heading: [] if row[key] is None else [factor * row[key]]
            for heading, (key, _, factor) in drafts.HEADINGS.items()
        }
        for row in rows
    }


def of_acceptance(record: dict) -> Figures:
    """By text and drafter."""
    known: Figures = {}
    for row in record["acceptance"]:
        depths = enumerate(row["by_depth"], 1)
        known[f"{row['text']}, {row['drafter']}"] = {
            "drafted": [row["by_depth"][0]["judged"] / (row["num_tokens"] - 1)],
            **{f"depth {depth}": [at["right"] / at["judged"]] for depth, at in depths if at["judged"]},
        }
    return known


def of_generation_speed(record: dict) -> Figures:
    headings = {
        ("fp32", "PASSIVE"): "float32",
        ("fp32", "not set"): "float32, threads that spin",
        ("bf16", "PASSIVE"): "bfloat16, one round",
    }
    known: Figures = defaultdict(dict)
    for run in record["runs"]:
        speeds = run["tokens_per_s"]
        for case, speed in speeds.items():
            against = "generate, batch of eight" if "eight" in case else "generate, one sequence"
            known[case]["against"] = against
            known[case][headings[run["dtype"], run["omp_wait_policy"]]] = [speed / speeds[against]]
    return known


class TestLinks:
    # Of a link or image its target, without those to other sites.
    LINK = re.compile(r"\]\((?!\w+:)([^()\s]*)\)")

    @pytest.mark.parametrize("page", pages(LINK), ids=name)
    def test_files_and_headings_are_there(self, page):
        for link in self.LINK.findall(without_code(page)):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), f"{name(page)}: {link}"
            assert not anchor or anchor in anchors(target), f"{name(page)}: {link}; there are {anchors(target)}"

    def test_every_page_can_be_reached_from_the_readme(self):
        reached, to_do = set(), [ROOT / "README.md"]
        while to_do:
            page = to_do.pop()
            if page.suffix == ".md" and page not in reached:
                reached.add(page)
                links = self.LINK.findall(without_code(page))
                to_do += [(page.parent / link.partition("#")[0]).resolve() for link in links if link[0] != "#"]
        assert set(PAGES) == reached

    def test_figures_are_shown(self):
        shown = {link for page in PAGES for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text())}
        assert {path.name for path in (ROOT / "docs").glob("*.png")} == {Path(link).name for link in shown}

    def test_the_readme_is_short(self):
        assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*?) *$", text, flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    seen: Counter[str] = Counter()
    for index, slug in enumerate(slugs):
        slugs[index] = f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1
    return slugs


class Parsed(Exception):
    """Raised where a program has read its command line, with what it has read."""


def commands(page: Path) -> Iterator[str]:
    """Lines of code, and code within text, that begin as a command does."""
    text = re.sub(r"[ \t]*\\\n\s*", " ", page.read_text())
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(\S.*)", rest, flags=re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    for line in lines:
        if re.match(r"(\w+=\S* +)*(python|torchrun|thinwire(?= --)|make|sh) ", line):
            yield line


def all_commands() -> list[tuple[str, str]]:
    return sorted({(name(page), command) for page in PAGES for command in commands(page)})


class TestCommands:
    def test_commands_are_found(self):
        programs = Counter(command.split()[0] for _, command in all_commands())
        assert programs["torchrun"] > 15 and programs["python"] > 15 and programs["make"] >= 5 and programs["sh"] >= 3

    @pytest.mark.parametrize(("page", "command"), all_commands())
    def test_a_command_names_what_is_there(self, page, command, monkeypatch, capsys):
        words = shlex.split(command, comments=True)
        while "=" in words[0]:
            variable, _, value = words.pop(0).partition("=")
            if variable == "CONFIG":
                find_config(value)
        check = {
            "python": check_python,
            "torchrun": check_torchrun,
            "thinwire": check_installed,
            "make": check_make,
            "sh": check_script,
        }
        try:
            check[words[0]]([word for word in words[1:] if word != "..."], monkeypatch)
        except SystemExit:
            pytest.fail(f"{page}: {command}\n{capsys.readouterr().err}")

    @pytest.mark.parametrize(
        "command",
        [
            "python -m benchmarks.no_such",
            "python run_pipeline.py --config demo.yaml --no_such",
            "python run_pipeline.py --config no_such.yaml",
            "python run_pipeline.py --set runtime.no_such=1",
            "python run_pipeline.py --compressor no_such",
            "python run_pipeline.py --sweep no_such.yaml",
            "torchrun --no_such=4 run_pipeline.py",
            "thinwire --config demo.yaml --no_such",
            "torchrun --nproc_per_node=4 -m pipeline.calibrate --config demo.yaml --out calib --no_such",
            "python -m pipeline.config.key_table --no_such",
            "python -m pipeline.report results --no_such",
            "make no_such",
            "make demo NO_SUCH=1",
            "sh torchrun_scripts/no_such.sh",
            "sh torchrun_scripts/four_gpus.sh --no_such",
            "sh torchrun_scripts/token_importance.sh no_such.yaml",
        ],
    )
    def test_a_wrong_command_is_found(self, command, monkeypatch, capsys):
        with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, ImportError)):
            self.test_a_command_names_what_is_there("page", command, monkeypatch, capsys)


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = get_args_parser().parse_args(words)
    check_program(options.training_script, options.training_script_args, options.module, monkeypatch)


def check_installed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_program("run_pipeline", words, True, monkeypatch)


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    else:
        is_module = words[0] == "-m"
        check_program(words[is_module], words[1 + is_module :], is_module, monkeypatch)


def check_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, is_assignment, _ = word.partition("=")
        pattern = rf"\$\({variable}\)|\$\(if \$\({variable}\)" if is_assignment else rf"^{word}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile knows no {word}"


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script, *rest = words
    assert (ROOT / script).is_file(), script
    if rest and rest[0].endswith(".yaml"):
        find_config(rest[0])
    else:
        check_program("run_pipeline.py", rest, False, monkeypatch)


def check_program(program: str, arguments: list[str], is_module: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program's own parser read `arguments`, without the work, and read what config and codecs they ask for."""
    assert is_module or (ROOT / program).is_file(), program
    module = importlib.import_module(program if is_module else program.removesuffix(".py").replace("/", "."))
    assert Path(module.__file__).is_relative_to(ROOT)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{program}.__main__")
    if not arguments:
        return
    assert hasattr(module, "main"), f"{program} takes no options"
    for parser in (argparse.ArgumentParser, OptionParser):
        monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed) as info:
        module.main()
    (parsed,) = info.value.args
    if getattr(parsed, "sweep", None):
        load_sweep(find_sweep(parsed.sweep))
    if hasattr(parsed, "overrides"):
        config = read_config(parsed)
        for spec in (config.compressor, config.compressor_decode, *config.compressor_per_link.values()):
            check_codec(spec)


def stopping(parse_args):
    def parse(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace))

    return parse


def check_codec(spec) -> None:
    """Refuse a codec that cannot be made, but for want of its calibration or of the reader's own module."""
    try:
        make_compressor("none" if spec is None else spec)
    except (ValueError, OSError) as e:
        if "calibration" not in str(e) and "my_codecs" not in str(e):
            raise


@functools.cache
def all_files() -> list[str]:
    """Of the repository, but for environments, builds and the like beside it."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "build"]
    files = [path for folder in (*folders, ROOT / ".ci") for path in folder.rglob("*") if path.is_file()]
    return [f"/{path.relative_to(ROOT)}" for path in (*files, *ROOT.glob("*"))]


class TestNames:
    """What stands in the text as code and looks like a file or an object of this repository."""

    FILE = re.compile(r"`((?:[\w.{}-]+/)*[\w.-]+\.(?:py|sh|yaml|md|ipynb|toml|cfg))`")
    OBJECT = re.compile(r"`((?:compressors|pipeline|benchmarks)(?:\.\w+)+)(?:\(\))?`")

    @pytest.mark.slow
    @pytest.mark.parametrize("page", pages(FILE), ids=name)
    def test_files(self, page):
        for named in {*self.FILE.findall(page.read_text())} - {"my_codecs.py", "my_drafters.py"}:
            assert any(path.endswith(f"/{named}") for path in all_files()), named

    @pytest.mark.parametrize("page", pages(OBJECT), ids=name)
    def test_objects(self, page):
        for named in self.OBJECT.findall(page.read_text()):
            path, *parts = named.split(".")
            found = importlib.import_module(path)
            for part in parts:
                path = f"{path}.{part}"
                try:
                    found = importlib.import_module(path)
                except ModuleNotFoundError:
                    assert hasattr(found, part), named
                    found = getattr(found, part)


def example(page: str, first_line: str) -> str:
    (code,) = re.findall(rf"^```python\n({first_line}.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return code


def test_the_families_that_are_shown_are_those_of_the_table():
    names = dict(vars(families))
    exec(example("docs/adding_a_model_family.md", "FAMILIES"), names)  # noqa: S102
    assert len(names["FAMILIES"]) == 2
    for model_type, family in names["FAMILIES"].items():
        assert families.FAMILIES[model_type] == family


def test_the_metrics_that_are_shown_work():
    torch.manual_seed(0)
    names = dict(vars(sys.modules[AttentionMetric.__module__]))
    for first_line in ("class Peak", "class Strongest"):
        exec(example("docs/adding_a_metric.md", first_line), names)  # noqa: S102
    x = torch.randn(2, 7, 5)
    peak = names["Peak"](MetricSetting()).importance(x, 0)
    assert torch.equal(peak, x.abs().max(-1).values)

    read = Attention(torch.randn(2, 4, 23, 8), torch.randn(2, 2, 23, 8), None, 0.5)
    scores = read.query @ read.key.repeat_interleave(2, 1).mT * read.scaling
    weights = scores.masked_fill(torch.ones(23, 23).triu(1).bool(), -math.inf).softmax(-1)
    strongest = names["Strongest"](MetricSetting(layers=[0]))
    strongest.read(0, read)
    torch.testing.assert_close(strongest.importance(x, 0), weights.amax((1, 2)))
