"""What a codec does to generated text: the same prompts, greedy, through the ring with each codec.

    python -m benchmarks.generated_quality --calibration results/cpu_demo/calibration --out build/generated

Per codec: the share of generated tokens that equal the uncompressed run's before the first difference; the perplexity
of the uncompressed model on the text that was generated; the perplexity of a known text in evaluation.mode=decode;
bytes a token and link, headers apart; the median time between tokens. Each codec runs on four ranks by the commands
that a user types; a table and a JSON with all of it are written.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.console import run_command
from pipeline.config.options import OptionParser, path_option
from pipeline.config.schema import DEMO_MODEL
from pipeline.data.text import load_text
from pipeline.models.source import resolve_model
from pipeline.records.environment import software_versions
from pipeline.records.files import write_json
from pipeline.records.generation_record import GenerationRecord
from pipeline.records.store import read_generation, read_record

NUM_RANKS = 4
CODECS = (
    *("none", "int8", "nf4", "hadamard(int4)"),
    *(f"klt(calibration={{calibration}}, step={step})" for step in (0.2, 0.4, 0.7)),
)
HEADINGS = (
    *("codec", "tokens equal", "text's perplexity", "decode-mode perplexity", "bytes/token/link"),
    *("header bytes/token/link", "ms/token"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calibration", type=path_option, required=True, help="of klt, for the demo's model")
    parser.add_argument("--out", type=path_option, required=True, help="a folder")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--scored_tokens", type=int, default=1024, help="of the known text")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = arguments.out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in make_prompts(arguments.prompts)))
    rows: list[dict[str, Any]] = []
    for number, codec in enumerate(CODECS):
        spec, folder = codec.format(calibration=arguments.calibration), arguments.out / f"{number}"
        answers, record = generate(spec, prompts, folder, arguments.new_tokens)
        links = record.traffic_per_link.values()
        crossings = sum(link.tokens for link in links)
        rows.append(
            {
                "codec": codec.replace("calibration={calibration}, ", ""),
                "answers": [answers[line] for line in sorted(answers)],
                "decode_ppl": decode_perplexity(spec, folder, arguments.scored_tokens),
                "bytes_per_token": sum(link.payload_bytes for link in links) / crossings,
                "header_bytes_per_token": sum(link.header_bytes for link in links) / crossings,
                "tpot_s": record.results.tpot_s.median,
            }
        )
        print(f"{rows[-1]['codec']} done", file=sys.stderr, flush=True)
    score_texts(rows)
    for row in rows:
        row["equal_share"] = equal_share(rows[0]["answers"], row["answers"])
    conditions = {key: getattr(arguments, key) for key in ("prompts", "new_tokens", "scored_tokens")}
    write_json(
        arguments.out / "generated_quality.json",
        {
            "kind": "thinwire generated quality",
            "model": DEMO_MODEL,
            "num_ranks": NUM_RANKS,
            **conditions,
            "versions": software_versions(),
            "rows": rows,
        },
    )
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    for row in rows:
        cells = (
            f"`{row['codec']}`",
            f"{row['equal_share']:.1%}",
            f"{row['text_ppl']:.2f}",
            f"{row['decode_ppl']:.3f}",
            f"{row['bytes_per_token']:.1f}",
            f"{row['header_bytes_per_token']:.1f}",
            f"{1e3 * row['tpot_s']:.0f}",
        )
        print("| " + " | ".join(cells) + " |")
    return 0


def make_prompts(num: int) -> list[str]:
    """Beginnings of paragraphs of the demo's text, 12 words each."""
    paragraphs = [p.split() for p in load_text(name="pydoc", path=None, split="test").text.split("\n\n")]
    long_enough = [" ".join(words[:12]) for words in paragraphs if len(words) >= 40]
    step = len(long_enough) // num
    return long_enough[::step][:num]


def generate(codec: str, prompts: Path, folder: Path, new_tokens: int) -> tuple[dict[int, Any], GenerationRecord]:
    settings = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": "true", "max_length": 256}
    words = [word for key, value in settings.items() for word in ("--set", f"generation.{key}={value}")]
    run(codec, folder, *words, "--generate", str(prompts))
    (path,) = folder.glob("answers-*.jsonl")
    (record,) = folder.glob("*-generation-*.json")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["line"]: line for line in lines}, read_generation(record)


def decode_perplexity(codec: str, folder: Path, num_tokens: int) -> float:
    settings = ("evaluation.mode=decode", "evaluation.decode_chunk=1")
    words = [word for setting in settings for word in ("--set", setting)]
    windows = ("--first_k_tokens", str(num_tokens), "--max_length", "512", "--stride", "256")
    run(codec, folder / "decode", *words, *windows)
    (record,) = (folder / "decode").glob("*.json")
    return read_record(record).results.avg_ppl


def run(codec: str, folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
    command += ["run_pipeline.py", "--config", "demo.yaml", "--compressor", codec, "--exp_dir", str(folder), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{codec}: {done.stderr[-2000:]}")


@torch.inference_mode()
def score_texts(rows: Sequence[dict[str, Any]]) -> None:
    """Add each row's perplexity of the uncompressed model on what was generated, given the prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = resolve_model(DEMO_MODEL, cache_dir=None, stage_to=None, show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for row in rows:
        nll, count = 0.0, 0
        for answer in row["answers"]:
            prompt, generated = tokenizer(answer["prompt"])["input_ids"], answer["token_ids"]
            logits = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
            nll += torch.nn.functional.cross_entropy(logits, torch.tensor(generated), reduction="sum").item()
            count += len(generated)
        row["text_ppl"] = math.exp(nll / count)


def equal_share(expected: Sequence[Mapping[str, Any]], got: Sequence[Mapping[str, Any]]) -> float:
    """Of all generated tokens, those before the first that differs."""
    equal = total = 0
    for one, other in zip(expected, got, strict=True):
        pairs = list(zip(one["token_ids"], other["token_ids"], strict=True))
        equal += next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    return equal / total


if __name__ == "__main__":
    run_command(main)
