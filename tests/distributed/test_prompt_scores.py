"""Log-probabilities of prompts through the ring: the reference's, in whatever chunks they come, beside whatever."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.options import read_config
from pipeline.config.reading import generation_with
from pipeline.generation.answer import Answer
from pipeline.generation.generate import make_request_maker, make_scheduler
from pipeline.generation.ring import GenerationRing
from pipeline.partition.passes import PassKind
from pipeline.runtime.launch import on_deployment
from run_pipeline import make_parser
from tests.helpers.launch import call_on_ranks
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_model

SLOT_LENGTH = 60
PLANS = {"1": (1, ()), "4": (4, ()), "4, no wrap": (4, ("partition.wrap=false",))}


def answer_all(rank, words, jobs, path):
    """Each job is keys of `generation` and requests, answered by a ring of its own; rank 0 writes what comes."""
    config = read_config(make_parser().parse_args(words))

    def work(deployment):
        told = []
        for keys, requests in jobs:
            own = dataclasses.replace(config, generation=generation_with(config.generation, keys))
            ring = GenerationRing(own, deployment)
            scheduler = answers = None
            if rank == 0:
                scheduler, maker = make_scheduler(ring), make_request_maker(ring)
                passes = noted_passes(scheduler)
                answers = [submit(request, scheduler, maker, deployment.plan) for request in requests]
                scheduler.close()
            ring.run(scheduler)
            ring.close()
            if answers is not None:
                told.append({"answers": [as_json(answer) for answer in answers], "passes": passes})
        if rank == 0:
            Path(path).write_text(json.dumps(told))

    on_deployment(config, Path(config.exp_dir), work, with_text=False)


def noted_passes(scheduler):
    passes, start = [], scheduler.next

    def noting():
        entry = start()
        if entry is not None:
            work = entry.work
            passes.append((work.kind is PassKind.PREFILL, work.echoes, len(work.rows), work.num_tokens))
        return entry

    scheduler.next = noting
    return passes


def submit(request, scheduler, maker, plan):
    scored = request.get("scored")
    made = maker.make(request["fields"]) if scored is None else maker.make_scored(*scored)
    answer = Answer(
        made,
        maker.tokenizer,
        link_names=[link.name for link in plan.links],
        on_text=lambda text: answer.cancel() if request.get("cancelled") == "in between" else None,
    )
    scheduler.submit(answer)
    if request.get("cancelled") == "before":
        answer.cancel()
    return answer


def as_json(answer):
    prompt = [(token.token_id, token.logprob, token.top) for token in answer.prompt_logprobs]
    return {**answer.as_line(), "prompt_ids": answer.prompt_ids, "scored_from": answer.scored_from, "told": prompt}


def run(num_ranks, tmp_path, jobs, *settings, codec="none"):
    base = ("runtime.threads=1", "model.dtype=fp64", f"generation.max_length={SLOT_LENGTH}")
    base += ("generation.max_new_tokens=4",)
    words = [word for setting in (*base, *settings) for word in ("--set", setting)]
    words += ["--model_name", str(tiny_model()), "--exp_dir", str(tmp_path), "--compressor", codec]
    for finished in call_on_ranks(num_ranks, answer_all, words, jobs, str(tmp_path / "told.json"), timeout_s=200):
        finished.check()
    return json.loads((tmp_path / "told.json").read_text())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float64)


def check_told(model, answer):
    """Against the model's own forward over prompt and answer."""
    prompt, own, at = answer["prompt_ids"], answer["token_ids"], answer["scored_from"]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([[*prompt, *own]])).logits[0], -1)
    assert answer["error"] is None and [token_id for token_id, *_ in answer["told"]] == prompt[at:]
    for position, (token_id, logprob, top) in enumerate(answer["told"], at):
        right = logprobs[position - 1]
        assert logprob == pytest.approx(right[token_id].item(), abs=1e-9)
        likeliest = right.topk(len(top))
        assert [index for index, _ in top] == likeliest.indices.tolist()
        assert [value for _, value in top] == pytest.approx(likeliest.values.tolist(), abs=1e-9)
    if own:
        right = logprobs[range(len(prompt) - 1, len(prompt) + len(own) - 1), own]
        assert answer["logprobs"]["token_logprobs"] == pytest.approx(right.tolist(), abs=1e-9)


def some_ids(rng, length):
    return [rng.randrange(VOCAB_SIZE - 2) for _ in range(length)]


@pytest.mark.parametrize("plan", PLANS)
def test_every_position_is_transformers(plan, model, tmp_path):
    num_ranks, settings = PLANS[plan]
    rng = random.Random(0)
    context, whole = some_ids(rng, 40), some_ids(rng, SLOT_LENGTH)
    endings = [some_ids(rng, length) for length in (1, 4, 4, 15)]
    requests = [{"scored": ([*context, *ending], 40, 2)} for ending in endings]
    requests += [{"scored": (whole, at, 3)} for at in (1, 30, SLOT_LENGTH - 1)]
    requests += [{"scored": (some_ids(rng, 2), 1)}, {"scored": (some_ids(rng, 9), 5, 20)}]
    fields = {"prompt": some_ids(rng, 12), "echo": True, "logprobs": 2}
    requests += [{"fields": {**fields, "max_new_tokens": n, "ignore_eos": True}} for n in (0, 3)]
    jobs = [
        ({"prefill_chunk": chunk, "max_slots": num_slots}, requests)
        for chunk, num_slots in ((1, 1), (2, 3), (7, 8), (0, 8))
    ]
    for told in run(num_ranks, tmp_path, jobs, *settings):
        for answer in told["answers"]:
            check_told(model, answer)
            assert answer["finish_reason"] == "length"
    plain = [rows * num_tokens for is_prompt, echoes, rows, num_tokens in told["passes"] if is_prompt and not echoes]
    contexts = 39, 29, SLOT_LENGTH - 2, 4  # each once: a context for its four continuations, a text for its three
    assert sum(plain) <= sum(contexts)
    assert any(echoes and rows > 1 for _, echoes, rows, _ in told["passes"])


@pytest.mark.parametrize(("codec", "decode"), [("nf4", ()), ("int8", ("compressor_decode=nf4",))])
def test_requests_of_all_kinds_answer_as_each_does_alone(codec, decode, tmp_path):
    rng = random.Random(1)
    contexts = [some_ids(rng, 30) for _ in range(3)]
    requests = []
    for number in range(40):
        prompt = [*rng.choice(contexts)[: rng.choice([0, 20, 30])], *some_ids(rng, rng.randint(1, 12))]
        kind = number % 5
        if kind < 2 and len(prompt) > 1:
            requests.append({"scored": (prompt, rng.randrange(1, len(prompt)), 2)})
            continue
        fields = {"prompt": prompt, "max_new_tokens": rng.randint(1, 16), "ignore_eos": True, "logprobs": 1}
        fields |= {"temperature": rng.choice([0, 1.0]), "seed": number, "echo": kind == 3}
        cancelled = {4: rng.choice(["before", "in between"])}.get(kind)
        requests.append({"fields": fields, "cancelled": cancelled})
    alone = [{key: value for key, value in request.items() if key != "cancelled"} for request in requests]
    jobs = [({"max_slots": 8, "prefill_chunk": 16}, requests), ({"max_slots": 1, "prefill_chunk": 0}, alone)]
    together, one_by_one = run(4, tmp_path, jobs, *decode, codec=codec)
    for request, answer, right in zip(requests, together["answers"], one_by_one["answers"], strict=True):
        num_tokens = len(answer["token_ids"])
        if request.get("cancelled"):
            assert answer["finish_reason"] in ("cancelled", "length") and answer["error"] is None
            assert request["cancelled"] != "before" or num_tokens == 0
        else:
            assert answer["finish_reason"] == "length" and num_tokens == len(right["token_ids"])
        assert answer["token_ids"] == right["token_ids"][:num_tokens]
        assert request.get("cancelled") or len(answer["told"]) == len(right["told"])
        for (token_id, logprob, _), (other_id, other, _) in zip(answer["told"], right["told"], strict=False):
            assert token_id == other_id and logprob == pytest.approx(other, abs=1e-9)
    assert sum(answer["finish_reason"] == "cancelled" for answer in together["answers"]) >= 4
