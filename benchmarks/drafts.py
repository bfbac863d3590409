"""What drafts do to tokens a second over far links: measured on emulated links, beside the same answers without them.

    export OMP_WAIT_POLICY=PASSIVE
    torchrun --nproc_per_node=4 -m benchmarks.drafts --config demo.yaml --set dataset.name=wikitext
    torchrun --nproc_per_node=4 -m benchmarks.drafts --config demo.yaml --part codecs --calibration results/calibration
    python -m benchmarks.drafts --config demo.yaml --part acceptance

`ladder`: kinds of text x one-way delays x ways of drafting. `codecs`: codecs on all links, at one delay, all kinds of
text. Each round takes all cells one after the other, each on a ring of its own that knows nothing yet of its drafts and
answers the prompts of a kind one by one, greedily. Tokens a second are of whole answers, medians of rounds; ms/token
are between tokens, and so are the predicted tokens a second; acceptance and passes are of all rounds together. `equal`
is the share of tokens before the first that differs from the answer without drafts (same codec, first delay): in
float32 a near-tie may fall otherwise where passes have several tokens. `repeated`: the share of the answers' 8-grams
that stand there a second time, which is what looking up what came before can find.

`acceptance`: drafters on text that people wrote, forced token by token: at each position, how often the drafts are what
comes next, by depth. No ring, so for drafters that need ids alone.

Drafters are those of `generation.draft`, without it `ngram`. `--kinds`, `--delays`, `--modes` and `--codecs` take a
part of the cells. A table and a JSON are written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.draft_texts import CHAT, KINDS, prompts_of
from benchmarks.thin_links import make_link_codecs
from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.planner.pass_costs import PassCosts, predicted_rate
from pipeline.records.drafts import Drafts
from pipeline.runtime.launch import on_deployment

# What `generation.draft_passes` is; None: no drafts.
MODES = {"no drafts": None, "one pass": 1, "passes in flight": 0}
CODECS = {
    **{name: name for name in ("none", "int8", "nf4")},
    "klt 0.42": "klt(calibration={calibration}, step=0.42)",  # about 2.2 bits a value with this model
    "klt 0.85": "klt(calibration={calibration}, step=0.85)",  # about 1.4
}
GRAM = 8
MIN_JUDGED = 20
FORCED_TOKENS = 2048


class Cell(NamedTuple):
    codec: str
    kind: str
    delay: str
    mode: str


@dataclass
class Measured:
    """Of a cell, by round: tokens a second of whole answers, seconds between tokens; the answers' token ids."""

    tokens_per_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    drafts: list[Drafts] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


class Bench:
    """One deployment per codec, all with the same loaded stages. Rank 0 alone has answers and times."""

    def __init__(self, config: RunConfig, deployment: Any, codecs: Mapping[str, str], arguments: argparse.Namespace):
        self.draft, self.is_first = config.generation.draft, deployment.control.world.rank == 0
        self.configs = {name: with_overrides(config, [("compressor", spec)]) for name, spec in codecs.items()}
        self.deployments = {
            name: dataclasses.replace(deployment, codecs=make_link_codecs(own, deployment))
            for name, own in self.configs.items()
        }
        self.prompts = {kind: prompts_of(kind, config.dataset, arguments.prompts) for kind in arguments.kinds}
        self.cells: defaultdict[Cell, Measured] = defaultdict(Measured)

    def measure(self, cell: Cell) -> None:
        from pipeline.generation.ring import GenerationRing

        passes = MODES[cell.mode]
        own: list[tuple[str, Any]] = [("links.delay", cell.delay), ("generation.draft_passes", passes or 0)]
        own += [("generation.draft", [])] if passes is None else []
        ring = GenerationRing(with_overrides(self.configs[cell.codec], own), self.deployments[cell.codec])
        scheduler, answers = self._submit(ring, cell.kind) if self.is_first else (None, [])
        ring.run(scheduler)
        ring.close()
        if self.is_first:
            self._take(self.cells[cell], answers, ring)

    def _submit(self, ring: Any, kind: str) -> tuple[Any, list[Any]]:
        from pipeline.generation.answer import Answer
        from pipeline.generation.generate import make_request_maker, make_scheduler

        maker, scheduler = make_request_maker(ring), make_scheduler(ring)
        links = [link.name for link in ring.deployment.plan.links]
        answers = [Answer(maker.make(prompt), maker.tokenizer, link_names=links) for prompt in self.prompts[kind]]
        for answer in answers:
            scheduler.submit(answer)
        scheduler.close()
        return scheduler, answers

    def _take(self, measured: Measured, answers: Sequence[Any], ring: Any) -> None:
        from pipeline.generation.record import recorded_drafts

        if errors := [answer.error for answer in answers if answer.error is not None]:
            raise SystemExit(errors[0])
        gaps = [gap for answer in answers for gap in answer.token_gaps_s]
        spent_s = sum(answer.ttft_s for answer in answers) + sum(gaps)
        measured.tokens_per_s.append(sum(len(answer.token_ids) for answer in answers) / spent_s)
        measured.tpot_s.append(statistics.mean(gaps))
        measured.answers = [answer.token_ids for answer in answers]
        if ring.drafting is not None:
            measured.drafts.append(recorded_drafts(ring.drafting, self.draft))


def run(config: RunConfig, deployment: Any, codecs: Mapping[str, str], arguments: argparse.Namespace) -> None:
    bench = Bench(config, deployment, codecs, arguments)
    cells = [Cell(*cell) for cell in itertools.product(codecs, arguments.kinds, arguments.delays, arguments.modes)]
    bench.measure(cells[0]._replace(delay="0"))  # warms up, and is forgotten
    bench.cells.clear()
    for number in range(1, arguments.rounds + 1):
        for cell in cells:
            bench.measure(cell)
        if bench.is_first:
            print(f"round {number} of {arguments.rounds} done", file=sys.stderr, flush=True)
            rows = [row_of(cell, bench.cells) for cell in cells]
            write(arguments, config, deployment.environment, codecs, rows)
    if bench.is_first:
        print(table(rows))
        print(arguments.out)


def row_of(cell: Cell, cells: Mapping[Cell, Measured]) -> dict[str, Any]:
    """What the JSON has of a cell; null where there were no drafts, or nothing to compare with."""
    measured = cells[cell]
    alone = [own for own in cells if own[:2] == cell[:2] and MODES[own.mode] is None]
    first = [drafter.by_depth[0] for drafts in measured.drafts for drafter in drafts.drafters if drafter.by_depth]
    num_passes = sum(drafts.passes for drafts in measured.drafts)
    num_judged = sum(drafts.num_judged for drafts in measured.drafts)
    return {
        **cell._asdict(),
        "tokens_per_s": statistics.median(measured.tokens_per_s),
        "tpot_s": statistics.median(measured.tpot_s),
        "predicted_tokens_per_s": predicted(cell, cells),
        "tokens_per_pass": share(sum(drafts.tokens for drafts in measured.drafts), num_passes),
        "first_right": share(sum(counts.right for counts in first), sum(counts.judged for counts in first)),
        "drafts_right": share(sum(drafts.num_right for drafts in measured.drafts), num_judged),
        "void_share": share(sum(drafts.void for drafts in measured.drafts), num_passes),
        "equal_share": equal_share(cells[alone[0]].answers, measured.answers) if alone else None,
        "repeated_share": repeated_share(measured.answers),
    }


def predicted(cell: Cell, cells: Mapping[Cell, Measured]) -> float | None:
    """Tokens a second between tokens, as `predicted_rate` has them: the most that any number of drafts gives.

    From costs, links and acceptance as the rings of this cell knew them; without drafts, as those of another cell of
    this codec and delay did. Where a drafter has none, that counts as a draft that is wrong.
    """
    alike = [own for own in cells if (own.codec, own.delay) == (cell.codec, cell.delay) and cells[own].drafts]
    of_rounds = cells[cell].drafts or [drafts for own in alike for drafts in cells[own].drafts]
    if not of_rounds:
        return None
    shares = acceptance(of_rounds)
    return statistics.median(
        max(
            predicted_rate(
                shares,
                depth=depth,
                passes=passes,
                costs=PassCosts(**drafts.costs.model_dump()),
                away_s=drafts.away_s,
                draft_s=draft_s(drafts),
            )
            for depth in range(1 + (drafts.limits.depth if cells[cell].drafts else 0))
            for passes in {1, drafts.limits.passes if cells[cell].drafts else 1}
        )
        for drafts in of_rounds
    )


def draft_s(drafts: Drafts) -> float:
    """Of a draft that went, whichever drafter's."""
    judged = [sum(counts.judged for counts in drafter.by_depth) for drafter in drafts.drafters]
    spent = sum(drafter.draft_s * n for drafter, n in zip(drafts.drafters, judged, strict=True))
    return share(spent, sum(judged)) or 0.0


def acceptance(of_rounds: Sequence[Drafts]) -> list[float]:
    """By depth, how often a draft was right where those before it were, of all drafters together; the deepest ones, of
    which too few were judged to tell, as one, and one more of them wrong than was seen: none is right for ever.
    """
    right: Counter[int] = Counter()
    judged: Counter[int] = Counter()
    for drafter in itertools.chain.from_iterable(drafts.drafters for drafts in of_rounds):
        for place, counts in enumerate(drafter.by_depth):
            right[place] += counts.right
            judged[place] += counts.judged
    for place in range(max(judged, default=0), 0, -1):
        if judged[place] < MIN_JUDGED:
            right[place - 1] += right.pop(place, 0)
            judged[place - 1] += judged.pop(place, 0)
    shares = [share(right[place], judged[place]) or 0.0 for place in sorted(judged)]
    if shares:
        shares[-1] = right[len(shares) - 1] / (judged[len(shares) - 1] + 1)
    num_asked = sum(sum(drafts.rows_by_in_flight[:1]) for drafts in of_rounds)
    if shares and num_asked:
        shares[0] *= max(0.0, 1 - sum(drafts.undrafted.none for drafts in of_rounds) / num_asked)
    return shares


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def equal_share(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> float:
    """Of all tokens, those before the first of an answer that differs."""
    equal = total = 0
    for one, other in zip(expected, got, strict=True):
        equal += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))
        total += len(one)
    return equal / total


def repeated_share(answers: Iterable[Sequence[int]]) -> float | None:
    """Of the 8-grams of all answers, those that stood in the same answer before; None where answers are shorter."""
    repeated = total = 0
    for ids in answers:
        grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return share(repeated, total)


def write(
    arguments: argparse.Namespace,
    config: RunConfig,
    environment: Mapping[str, str],
    codecs: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    from pipeline.records.environment import software_versions
    from pipeline.records.files import write_json

    conditions = {
        "model": config.model.name,
        "draft": list(config.generation.draft),
        "draft_depth": config.generation.draft_depth,
        "text": config.dataset.name,
        "versions": software_versions(),
    }
    if codecs:
        conditions |= {
            "dtype": config.model.dtype,
            "rounds": arguments.rounds,
            "prompts_of_a_kind": arguments.prompts,
            "generated_tokens": arguments.tokens,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "specs": dict(codecs),
            "environment": dict(environment),
        }
    write_json(arguments.out, {"kind": "thinwire drafts", "conditions": conditions, arguments.part: rows})


HEADINGS = {
    "tokens/s": ("tokens_per_s", ".2f", 1),
    "ms/token": ("tpot_s", ".0f", 1e3),
    "predicted tokens/s": ("predicted_tokens_per_s", ".2f", 1),
    "tokens/pass": ("tokens_per_pass", ".2f", 1),
    "first draft right": ("first_right", ".0%", 1),
    "drafts right": ("drafts_right", ".0%", 1),
    "void": ("void_share", ".0%", 1),
    "equal": ("equal_share", ".0%", 1),
    "repeated": ("repeated_share", ".0%", 1),
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As docs/drafts.md has it; codecs are named where there are several."""
    several = len({row["codec"] for row in rows}) > 1
    lines = [f"| {' | '.join(['text, delay, drafts', *HEADINGS])} |", "|---" * (1 + len(HEADINGS)) + "|"]
    for row in rows:
        label = ", ".join([*([f"`{row['codec']}`"] if several else []), row["kind"], row["delay"], row["mode"]])
        cells = [
            "" if row[key] is None else format(factor * row[key], form) for key, form, factor in HEADINGS.values()
        ]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


def forced_acceptance(drafter: Any, ids: Sequence[int], *, start: int, depth: int) -> list[tuple[int, int]]:
    """(judged, right) by depth of a `Drafter`'s drafts at each position of a text, from `start` on."""
    counts = [[0, 0] for _ in range(depth)]
    for position in range(start, len(ids)):
        drafts = itertools.islice(drafter.draft(0, ids[:position]), min(depth, len(ids) - position))
        for place, draft in enumerate(drafts):
            is_right = draft.token_id == ids[position + place]
            counts[place][0] += 1
            counts[place][1] += is_right
            if not is_right:
                break
    return [(judged, right) for judged, right in counts]


def run_acceptance(config: RunConfig, arguments: argparse.Namespace) -> None:
    from pipeline.data.text import encode, load_tokenizer
    from pipeline.drafting.drafter import DrafterContext
    from pipeline.drafting.registry import make_drafters
    from pipeline.models.source import resolve_model
    from pipeline.partition.plan import default_plan

    directory = resolve_model(config.model.name, cache_dir=config.model.dir, stage_to=None, show_progress=False)
    tokenizer = load_tokenizer(directory, trust_remote_code=config.model.trust_remote_code)
    rows = []
    for kind, text in forced_texts(config.dataset).items():
        ids = encode(tokenizer, text, f"{kind} cannot be tokenised", add_special_tokens=False)[:FORCED_TOKENS]
        for spec in config.generation.draft:
            context = DrafterContext(
                plan=default_plan(1, 1), stages={}, model_config=None, checkpoint_digest="", eos_ids=()
            )
            (drafter,) = make_drafters([spec], context)
            counts = forced_acceptance(drafter, ids, start=1, depth=config.generation.draft_depth)
            by_depth = [{"judged": judged, "right": right} for judged, right in counts]
            rows.append({"text": kind, "num_tokens": len(ids), "drafter": spec, "by_depth": by_depth})
    write(arguments, config, {}, {}, rows)
    print(acceptance_table(rows))
    print(arguments.out)


def forced_texts(dataset: Any) -> dict[str, str]:
    """The config's text, the source of a module of Python's library, a conversation."""
    import argparse as module

    from pipeline.data.text import load_text

    text = load_text(name=dataset.name, path=dataset.path, split=dataset.split).text[:40_000]
    return {"text": text, "Python": Path(module.__file__).read_text(encoding="utf-8")[:40_000], "chat": CHAT}


def acceptance_table(rows: Sequence[Mapping[str, Any]]) -> str:
    depths = range(1, 1 + max(len(row["by_depth"]) for row in rows))
    lines = [f"| {' | '.join(['text, drafter', 'drafted', *(f'depth {d}' for d in depths)])} |"]
    lines.append("|---" * (2 + len(depths)) + "|")
    for row in rows:
        shares = [share(at["right"], at["judged"]) for at in row["by_depth"]]
        drafted = row["by_depth"][0]["judged"] / (row["num_tokens"] - 1)
        cells = [f"{row['text']}, `{row['drafter']}`", f"{drafted:.0%}"]
        lines.append(f"| {' | '.join([*cells, *('' if s is None else f'{s:.0%}' for s in shares)])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    parser.add_argument("--part", choices=("ladder", "codecs", "acceptance"), default="ladder")
    parser.add_argument("--kinds", type=_list, default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--delays", type=_list, help="of each link, one way: 20ms,50ms; of codecs 20ms")
    parser.add_argument("--modes", type=_list, help=f"{', '.join(MODES)}; of codecs without the second")
    parser.add_argument("--codecs", type=_list, help="names of those to take, of codecs")
    parser.add_argument("--calibration", type=path_option, help="of klt, for this model and plan")
    parser.add_argument("--prompts", type=int, default=3, help="of each kind, at most 3")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=path_option, default=Path("build/drafts.json"))
    arguments = parser.parse_args(argv)
    is_ladder = arguments.part == "ladder"
    arguments.delays = arguments.delays or (["20ms", "50ms"] if is_ladder else ["20ms"])
    arguments.modes = arguments.modes or [mode for mode in MODES if is_ladder or MODES[mode] != 1]
    for key, allowed in (("kinds", KINDS), ("modes", MODES)):
        if strange := [value for value in getattr(arguments, key) if value not in allowed]:
            parser.error(f"--{key}: {strange[0]!r} is none of {', '.join(allowed)}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        config = with_overrides(read_config(arguments), [("runtime.threads", 1), *_own(arguments.tokens)])
        if not config.generation.draft:
            config = with_overrides(config, [("generation.draft", "ngram")])
        if arguments.part == "acceptance":
            run_acceptance(config, arguments)
            return 0
        codecs = {str(config.compressor): config.compressor} if is_ladder else _codecs(parser, arguments)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    work = lambda deployment: run(config, deployment, codecs, arguments)
    on_deployment(config, Path(config.exp_dir), work, with_text=False)
    return 0


def _own(num_tokens: int) -> list[tuple[str, Any]]:
    """One sequence at a time, greedy, of so many tokens."""
    generation = {"max_slots": 1, "max_length": 512, "max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return [(f"generation.{key}", value) for key, value in generation.items()]


def _codecs(parser: OptionParser, arguments: argparse.Namespace) -> dict[str, str]:
    names = arguments.codecs or [name for name in CODECS if arguments.calibration or "calibration" not in CODECS[name]]
    for name in names:
        if name not in CODECS:
            parser.error(f"--codecs: {name!r} is none of {', '.join(CODECS)}")
        if arguments.calibration is None and "calibration" in CODECS[name]:
            parser.error(f"--codecs: {name} needs --calibration")
    return {name: CODECS[name].format(calibration=arguments.calibration) for name in names}


def _list(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    run_command(main)
