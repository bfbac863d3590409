"""lm-evaluation-harness through the ring: the numbers and texts of its own `hf` model, where nothing is compressed."""

import functools
import json
import shutil
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from pipeline.config.schema import ConfigError
from pipeline.serving.harness import check_tasks
from pipeline.serving.harness_model import ThinwireLM
from pipeline.serving.harness_options import HarnessOptions
from pipeline.serving.lm_eval import config_of
from tests.helpers.harness_ring import answers_to, ask_ring, run_lm_eval
from tests.helpers.launch import call_on_ranks, run_alone, run_ranks
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_tasks import write_tasks

SLOT_LENGTH = 96
WINDOW = SLOT_LENGTH - 1
PAIRS = [
    ("The canal was", " built"),
    ("The canal was", " closed in"),
    ("The canal was", " dug"),
    ("The canal is", "a"),
    ("The canal is", "b"),
    ("", "no context"),
    ("", "n"),
    ("<bos>", "told"),
    ("<bos>The canal", " was"),
    ("a trailing space ", "moves"),
    ("long " * 40, "context"),
    ("long " * 40, "contest, and more"),
    ("a", "b" * (WINDOW - 1)),
    ("a", "c" * WINDOW),
]
TEXTS = ["short", "", "x", "a stage sends packed bytes to the next one and the last returns a loss. " * 4]
ASKED = [
    ("The canal", {"until": ["e"], "max_gen_toks": 24}),
    ("The canal", {"until": ["<bos>", "\n\n"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.7}),
    ("Once upon a time", {"max_gen_toks": 3, "repetition_penalty": 1.4}),
    ("<bos>Once", {"until": "\x10P", "max_new_tokens": 16, "temperature": 0.0, "top_p": 0.9}),
    ("long " * 40, {"until": ["zz"], "max_gen_toks": 20}),
]


def without_bos(folder):
    """A copy of a tiny model, whose tokenizer has no BOS and adds none."""
    shutil.copytree(tiny_model(), folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["bos_token"]
    path.write_text(json.dumps(config))
    return folder


def answers(model, greedy):
    return answers_to(model, requests(greedy))


def requests(greedy):
    """By kind of request; `greedy` are pairs whose continuation is the likeliest."""
    return {
        "loglikelihood": [*PAIRS, *greedy],
        "loglikelihood_rolling": [(text,) for text in TEXTS],
        "generate_until": ASKED,
    }


def greedy_pairs(reference):
    """Contexts with the one character that comes next, where it is one that a text can have."""
    found = []
    for number in range(60):
        context = f"lock {number}"
        with torch.inference_mode():
            token = reference.model(torch.tensor([reference.tok_encode(context)])).logits[0, -1].argmax()
        text = reference.tok_decode([token.item()])
        if text.isascii() and text.isprintable() and text.strip():
            found.append((context, text))
    return found


RINGS = {
    "1 process": (1, {}),
    "4 ranks, chunks of 7": (4, {"generation.prefill_chunk": 7}),
    "4 ranks, head away": (4, {"partition.wrap": False, "generation.max_slots": 8}),
}


@pytest.mark.parametrize("tokenizer", ["adds BOS", "without BOS"])
def test_numbers_and_texts_are_those_of_the_harness_own_model(tokenizer, tmp_path):
    """Whose window is ours; both in float64."""
    model_dir = tiny_model() if tokenizer == "adds BOS" else without_bos(tmp_path / "model")
    model = HFLM(pretrained=str(model_dir), device="cpu", dtype="float64", max_length=WINDOW)
    greedy = greedy_pairs(model)
    expected = answers(model, greedy)
    flags = [is_greedy for _, is_greedy in expected["loglikelihood"]]
    assert sum(flags) >= len(greedy) > 3 and not all(flags)
    for name, (num_ranks, settings) in RINGS.items():
        keys = {"model.name": str(model_dir), "generation.max_length": SLOT_LENGTH, "exp_dir": str(tmp_path / name)}
        asked = requests(greedy)
        ranks = call_on_ranks(num_ranks, ask_ring, keys | settings, asked, distributed=num_ranks > 1)
        for rank in ranks:
            rank.check()
        got, told = json.loads((tmp_path / name / "answers.json").read_text())
        numbers = [logprob for logprob, _ in got["loglikelihood"]]
        assert numbers == pytest.approx([logprob for logprob, _ in expected["loglikelihood"]], abs=1e-4), name
        assert [is_greedy for _, is_greedy in got["loglikelihood"]] == flags, name
        assert got["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=1e-4), name
        assert got["generate_until"] == expected["generate_until"], name
        assert got["generate_until"][3] == "PPPP", "it ends at its stop string"
        assert told["num_requests"] >= sum(map(len, asked.values()))


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks", (TEXTS[0], TEXTS[3]))


def command(tasks_dir, exp_dir, *more, tasks="tiny_choice,tiny_rolling,tiny_answer"):
    settings = ("model.dtype=fp64", "runtime.threads=1", f"generation.max_length={SLOT_LENGTH}")
    settings += ("generation.max_new_tokens=8",)
    words = [word for setting in settings for word in ("--set", setting)]
    return ["--model_name", str(tiny_model()), "--exp_dir", str(exp_dir), *words, "--lm_eval", tasks,
            "--lm_eval_tasks", str(tasks_dir), *more]  # fmt: skip


def test_tasks_end_to_end(tasks_dir, tmp_path):
    """Four ranks, by the command: the harness' results of its own model, a record with every sample, a table."""
    words = command(tasks_dir, tmp_path, "--limit", "5", "--log_samples")
    shown = run_ranks([words] * 4)[0].check()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    model = HFLM(pretrained=str(tiny_model()), device="cpu", dtype="float64", max_length=WINDOW)
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    names = ["tiny_choice", "tiny_rolling", "tiny_answer"]
    expected = lm_eval.simple_evaluate(model=model, tasks=names, limit=5, task_manager=manager)["results"]
    found = {task["name"]: task for task in record["tasks"]}
    assert sorted(found) == sorted(names)
    for name, metric in (("tiny_choice", "acc"), ("tiny_rolling", "bits_per_byte"), ("tiny_answer", "exact_match")):
        (told,) = (m for m in found[name]["metrics"] if m["name"] == metric)
        assert told["value"] == pytest.approx(expected[name][f"{metric},none"], abs=1e-6)
        assert f"{name} {metric}" in shown.stdout
    (choice,) = found["tiny_choice"]["metrics"]
    assert len(choice["samples"]) == 5 and choice["stderr"] == pytest.approx(expected["tiny_choice"]["acc_stderr,none"])
    (rolling,) = found["tiny_rolling"]["metrics"]
    assert rolling["samples"] is None  # bits of all texts over bytes of all texts: no mean of the texts'
    own = json.loads((tmp_path / record["harness"]["results_file"]).read_text())
    assert own["results"]["tiny_choice"]["acc,none"] == choice["value"]
    assert len(list((tmp_path / "lm_eval").glob("*-samples_tiny_*.jsonl"))) == 3
    for link in record["traffic_per_link"].values():
        assert link["bits_per_value"] == 64 and link["tokens"] > 0


def test_the_harness_own_command_line(tasks_dir, tmp_path):
    model_args = f"model_name={tiny_model()},dtype=fp64,compressor=hadamard(int4),exp_dir={tmp_path / 'records'}"
    model_args += ",partition.num_nodes=2"
    words = ["run", "--model", "thinwire", "--model_args", model_args, "--tasks", "tiny_choice", "--limit", "3"]
    words += ["--include_path", str(tasks_dir), "--output_path", str(tmp_path / "out")]
    ranks = call_on_ranks(2, run_lm_eval, words)
    for rank in ranks:
        rank.check()
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "thinwire" and results["n-samples"]["tiny_choice"]["effective"] == 3
    assert "tiny_choice" in ranks[0].stdout and "tiny_choice" not in ranks[1].stdout


def test_a_sweep_pairs_samples(tasks_dir, tmp_path):
    """Points share the deployment; a codec that cannot generate fails alone; changes stand in the table."""
    sweep = tmp_path / "some.yaml"
    sweep.write_text("points: [{compressor: none}, {compressor: int2}, {compressor: token_mixed(fraction=0.5)}]\n")
    words = command(tasks_dir, tmp_path / "out", "--sweep", str(sweep), tasks="tiny_choice")
    ranks = run_ranks([words] * 4)
    assert [rank.returncode for rank in ranks] == [3, 0, 0, 0], ranks[0].stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*-tasks-*.json")]
    assert len(records) == 2 and len(list((tmp_path / "out").glob("failed-*.json"))) == 1
    lines = [line for line in ranks[0].stdout.splitlines() if line.startswith(("none", "int2"))]
    assert len(lines) == 2 and "(" in lines[1] and "(" not in lines[0]


def test_a_failed_request_ends_the_evaluation(tasks_dir, tmp_path):
    codec = "tests.helpers.bad_codecs:RaisingForShape(tokens=5)"
    words = command(tasks_dir, tmp_path, "--compressor", codec, "--set", "generation.prefill_chunk=5",
                    tasks="tiny_choice")  # fmt: skip
    finished = run_alone(*words, "--set", "partition.num_nodes=2")
    assert finished.returncode != 0
    assert "loglikelihood request" in finished.stderr and "no bits for" in finished.stderr
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "options, told",
    [
        (["--limit", "3"], "--limit belongs to --lm_eval"),
        (["--lm_eval", "a", "--limit", "1.5"], "--limit is 1.5"),
        (["--lm_eval", "a", "--generate", "b"], "--lm_eval and --generate"),
    ],
)
def test_what_cannot_be_asked_for(options, told, tmp_path):
    finished = run_alone("--model_name", str(tiny_model()), "--exp_dir", str(tmp_path), *options)
    assert finished.returncode != 0 and told in finished.stderr


def test_a_name_that_is_no_tasks(tasks_dir, monkeypatch):
    """The index of the harness' own tasks, which takes many seconds, is left out."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    with pytest.raises(ConfigError, match="'no_such_task' is no task"):
        check_tasks(HarnessOptions(tasks=("tiny_choice", "no_such_task"), include_path=tasks_dir))
    check_tasks(HarnessOptions(tasks=("tiny_*",), include_path=tasks_dir))


def test_model_args_are_a_config():
    config = config_of({"config": "demo.yaml", "compressor": "nf4", "generation.max_slots": 3, "dtype": "fp64"})
    assert (config.compressor, config.generation.max_slots, config.model.dtype) == ("nf4", 3, "fp64")
    with pytest.raises(ConfigError, match="no_such_key"):
        config_of({"no_such_key": 1})


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM, USER, BEGUN = ({"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    ("history", "adds_prompt", "expected"),
    [
        ([USER], True, "<user>user says<assistant>"),
        ([SYSTEM, USER], True, "<user>user says<assistant>"),
        ([USER, BEGUN], False, "<user>user says<assistant>assistant says"),
    ],
)
def test_chat_templates(history, adds_prompt, expected):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.chat_template = TEMPLATE
    model = ThinwireLM(None, SimpleNamespace(tokenizer=tokenizer, slot_length=SLOT_LENGTH), {})
    reference = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    assert HFLM.apply_chat_template(reference, history, adds_prompt) == expected
    assert model.apply_chat_template(history, adds_prompt) == expected
    assert model.chat_template(True) == TEMPLATE
    assert "/" not in model.tokenizer_name
