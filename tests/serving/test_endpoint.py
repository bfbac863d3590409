"""The endpoint, asked by OpenAI's own client: one process that plays all nodes of a tiny model in float64."""

import concurrent.futures
import itertools
import json
import shutil

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.records.store import read_any
from tests.helpers.serving import chat_model, serving

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = ("generation.max_slots=3", "generation.prefill_chunk=16")
    with serving(tmp_path_factory.mktemp("served"), *settings) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def complete(client, prompt="The canal", **options):
    own = {"model": "tiny-chat", "max_tokens": 12, "temperature": 1, "seed": 7}
    return client.completions.create(prompt=prompt, **own | options)


def chat(client, messages=HELLO, **options):
    own = {"model": "tiny-chat", "max_tokens": 12, "temperature": 1, "seed": 7}
    return client.chat.completions.create(messages=messages, **own | options)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other', only 'tiny-chat'"):
        client.models.retrieve("other")


def test_a_completion(client):
    told = complete(client)
    (choice,) = told.choices
    assert (choice.index, choice.finish_reason, told.object) == (0, "length", "text_completion")
    assert (told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.total_tokens) == (10, 12, 22)
    assert complete(client).choices[0].text == choice.text
    assert complete(client, seed=8).choices[0].text != choice.text


def test_as_many_tokens_as_the_api_says(client):
    own = {"model": "tiny-chat", "temperature": 0}
    assert client.completions.create(prompt="a", **own).usage.completion_tokens == 16
    usage = client.chat.completions.create(messages=HELLO, **own).usage
    assert usage.total_tokens == 96, "a chat's answer may fill its slot"


def test_prompts_as_texts_and_ids(client):
    ids = AutoTokenizer.from_pretrained(chat_model())("The canal")["input_ids"]
    text = complete(client).choices[0].text
    for prompt, num_choices in ((["The canal", "a"], 2), (ids, 1), ([ids, [1, 2, 3]], 2)):
        told = complete(client, prompt)
        assert [choice.index for choice in told.choices] == [*range(num_choices)]
        assert told.choices[0].text == text
    assert told.usage.prompt_tokens == len(ids) + 3


def test_choices_have_seeds_in_a_row(client):
    apart = [complete(client, prompt, seed=seed).choices[0].text for prompt in ("The canal", "a") for seed in (7, 8, 9)]
    told = complete(client, ["The canal", "a"], n=3)
    assert [choice.text for choice in told.choices] == apart
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (10 + 2, 6 * 12)
    chats = [chat(client, seed=seed).choices[0].message.content for seed in (7, 8)]
    assert [choice.message.content for choice in chat(client, n=2).choices] == chats


def test_without_a_seed_each_answer_is_another(client):
    assert len({complete(client, seed=openai.NOT_GIVEN).choices[0].text for _ in range(3)}) == 3


def test_stop_strings(client):
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[5:8]
    told = complete(client, max_tokens=40, stop=stop).choices[0]
    assert (told.text, told.finish_reason) == (whole[: whole.index(stop)], "stop")
    told = complete(client, max_tokens=40, stop=["never in it", stop], logprobs=0, echo=True).choices[0]
    assert told.text == "The canal" + whole[: whole.index(stop)]
    assert all(offset < len(told.text) for offset in told.logprobs.text_offset[1:])
    streamed = list(complete(client, max_tokens=40, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_of_a_completion(client):
    plain, told = complete(client).choices[0], complete(client, logprobs=3).choices[0]
    assert told.text == plain.text and plain.logprobs is None
    logprobs = told.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob < 0 and 3 <= len(top) <= 4
    for (token, offset), (_, after) in itertools.pairwise(zip(logprobs.tokens, logprobs.text_offset, strict=True)):
        assert token.startswith("bytes:") or told.text[offset:after].endswith(token)


def test_an_echoed_prompt_is_scored(client):
    """As it would be as an answer, at every place."""
    answer = complete(client, logprobs=2)
    ids = AutoTokenizer.from_pretrained(chat_model())("The canal")["input_ids"]
    told = complete(client, echo=True, logprobs=2).choices[0]
    assert told.text == "The canal" + answer.choices[0].text
    expected = answer.choices[0].logprobs.token_logprobs
    assert told.logprobs.token_logprobs[len(ids) :] == pytest.approx(expected, rel=1e-9)
    assert told.logprobs.token_logprobs[0] is told.logprobs.top_logprobs[0] is None
    assert told.logprobs.tokens[: len(ids)] == ["<bos>", *"The canal"]
    assert told.logprobs.text_offset[: len(ids) + 1] == [0, *range(len(ids))]
    alone = complete(client, ids, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert (alone.text, alone.finish_reason) == ("The canal", "length")
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(told.logprobs.token_logprobs[1 : len(ids)], rel=1e-9)
    for place in (3, 7):
        (top,) = complete(client, ids[:place], logprobs=2, max_tokens=1, temperature=0).choices[0].logprobs.top_logprobs
        likeliest = sorted(top.values())
        assert sorted(alone.logprobs.top_logprobs[place].values())[-2:] == pytest.approx(likeliest, rel=1e-9)


def test_log_probabilities_of_a_chat(client):
    told = chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert len(told.logprobs.content) == 12
    for token in told.logprobs.content:
        assert token.logprob < 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    raw = bytes(itertools.chain.from_iterable(token.bytes for token in told.logprobs.content))
    assert raw.decode(errors="replace") == told.message.content
    assert chat(client).choices[0].logprobs is None


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"logprobs": 2}, {"logprobs": 1, "echo": True, "n": 2}], ids=str)
def test_a_streamed_completion_is_the_whole_one(client, options):
    whole = complete(client, max_tokens=24, **options)
    chunks = list(complete(client, max_tokens=24, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert len(own) > 5 and "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + ["length"]
        if choice.logprobs is not None:
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                parts = [getattr(part.logprobs, key) for part in own]
                assert [*itertools.chain(*parts)] == getattr(choice.logprobs, key), key


@pytest.mark.parametrize("options", [{}, {"n": 2, "logprobs": True, "top_logprobs": 1}], ids=str)
def test_a_streamed_chat_is_the_whole_one(client, options):
    whole = chat(client, max_tokens=24, **options)
    chunks = list(chat(client, max_tokens=24, stream=True, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == "length"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        if choice.logprobs is not None:
            told = [token for part in own if part.logprobs for token in part.logprobs.content]
            assert told == choice.logprobs.content


def test_messages_as_parts_of_text(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    told = chat(client, [{"role": "user", "content": parts}])
    assert told.choices[0].message == chat(client).choices[0].message
    other = chat(client, [{"role": "developer", "content": "Be brief"}, *HELLO])
    assert other.choices == chat(client, [{"role": "system", "content": "Be brief"}, *HELLO]).choices


def test_lengths_of_a_chat(client):
    own = {"max_tokens": openai.NOT_GIVEN}
    assert chat(client, max_completion_tokens=3, **own).usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="max_tokens and max_completion_tokens differ"):
        chat(client, max_tokens=4, max_completion_tokens=3)
    with pytest.raises(openai.BadRequestError, match="max_tokens 1000, which leaves no position for a prompt"):
        chat(client, max_tokens=1000)


NEUTRAL = {
    "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "user": "someone",
}  # fmt: skip
REFUSED = {
    "best_of": 2, "frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"5": 1}, "suffix": "end",
    "tools": [{"type": "function"}], "response_format": {"type": "json_object"}, "nonsense": 1,
}  # fmt: skip


def test_parameters_of_the_api_that_are_not_done(client):
    assert complete(client, extra_body=NEUTRAL).choices == complete(client).choices
    for key, value in REFUSED.items():
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, extra_body={key: value})
        assert caught.value.param == key and key in str(caught.value)
    kept = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    assert chat(client, extra_body=kept).choices == chat(client).choices


def test_options_that_are_not_the_apis(client):
    greedy = complete(client, temperature=0).choices[0].text
    assert complete(client, temperature=1, extra_body={"top_k": 1}).choices[0].text == greedy
    assert complete(client, temperature=0, top_p=1).choices[0].text == greedy
    assert complete(client, temperature=openai.NOT_GIVEN, top_p=1).choices[0].text == greedy, "the config's default"


def test_answers_that_share_the_ring_are_those_alone(client):
    """40 at once, of 3 slots, seeded and greedy, whole and streamed, chats and completions."""

    def ask(number, *, stream):
        options = {"seed": number, "temperature": number % 3 / 2, "max_tokens": 5 + number % 20, "stream": stream}
        if number % 2:
            told = chat(client, [{"role": "user", "content": f"Say {number % 5}"}], **options)
            texts = (c.choices[0].delta.content for c in told) if stream else [told.choices[0].message.content]
        else:
            told = complete(client, f"The canal {'was ' * (number % 7)}", **options)
            texts = (c.choices[0].text for c in told) if stream else [told.choices[0].text]
        return "".join(text or "" for text in texts)

    alone = [ask(number, stream=False) for number in range(40)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        together = [*pool.map(lambda number: ask(number, stream=number % 4 < 2), range(40))]
    assert together == alone and len(set(alone)) > 30


def test_who_leaves_frees_the_slot(server, client):
    """In the middle of a stream, waiting for a slot, and without a stream."""
    cancelled = server.metric('thinwire_requests_total{endpoint="completions",outcome="cancelled"}')
    streams = [complete(client, str(number), max_tokens=80, stream=True) for number in range(5)]
    next(iter(streams[0]))
    for stream in streams:
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(client, max_tokens=86, n=8, timeout=0.05)
    server.wait_for("thinwire_slots_in_use", 0)
    server.wait_for("thinwire_answers_waiting", 0)
    assert complete(client).usage.completion_tokens == 12
    server.wait_for('thinwire_requests_total{endpoint="completions",outcome="cancelled"}', cancelled + 6)


def test_a_request_that_fails_inside_fails_alone(server, client):
    """A temperature that leaves no finite scores, which shows where tokens are chosen."""
    other = complete(client, max_tokens=40, stream=True)
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="leaves no finite scores") as caught:
            list(complete(client, temperature=1e-310, stream=stream))
        assert stream or caught.value.status_code == 500
    assert "".join(chunk.choices[0].text for chunk in other) == complete(client, max_tokens=40).choices[0].text
    server.wait_for("thinwire_slots_in_use", 0)


def test_metrics_count(server, client):
    names = ("thinwire_prompt_tokens_total", "thinwire_generated_tokens_total", "thinwire_link_payload_bytes_total")
    names += ("thinwire_time_to_first_token_seconds_count", "thinwire_time_per_output_token_seconds_count")
    before = [server.metric(name) for name in names]
    complete(client, n=2)
    changes = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert changes[:2] == [2 * 10, 2 * 12] and changes[2] > 0 and changes[3:] == [2, 2 * 11]
    assert server.metric("thinwire_slots") == 3


def test_half_a_surrogate_pair(server):
    body = {"model": "tiny-chat", "prompt": "\ud800"}
    told = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=JSON)
    assert told.status_code == 400 and "surrogate" in told.json()["error"]["message"]


JSON = {"Content-Type": "application/json"}


def test_the_record(tmp_path):
    with serving(tmp_path, "generation.draft=[ngram]") as server:
        complete(server.client(), "ab ab ab ab ab", n=2, max_tokens=30)
        judged = server.metric("thinwire_drafts_judged_total")
        server.signal()
        (finished,) = server.ranks.wait(30)
    assert finished.returncode == 130 and "tokens/s" in finished.stdout
    (path,) = tmp_path.glob("*.json")
    record = read_any(path)
    assert (record.results.num_requests, record.results.generated_tokens, len(record.requests)) == (2, 60, 2)
    assert record.drafts.num_judged == judged


@pytest.fixture(scope="module")
def ending_model(tmp_path_factory):
    """Whose likeliest token behind "The canal" ends an answer."""
    folder = tmp_path_factory.mktemp("ending") / "tiny-ending"
    shutil.copytree(chat_model(), folder)
    ids = AutoTokenizer.from_pretrained(folder)("The canal")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    token_id = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    config = GenerationConfig.from_pretrained(folder)
    config.eos_token_id = token_id
    config.save_pretrained(folder)
    return folder


def test_the_token_that_ends_an_answer_is_told_and_so_is_all_of_the_prompt(ending_model, tmp_path):
    """Harnesses count on one log-probability for each token of prompt and answer."""
    with serving(tmp_path, "generation.ignore_eos=false", model=ending_model) as server:
        ids = AutoTokenizer.from_pretrained(ending_model)("The canal")["input_ids"]
        told = server.client().completions.create(
            model=server.model, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
    (choice,) = told.choices
    assert (choice.finish_reason, told.usage.completion_tokens) == ("stop", 1)
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1


def test_a_special_token_may_be_a_stop_string(client):
    own = {"temperature": 1, "seed": 3, "max_tokens": 80, "logprobs": 0}
    specials = AutoTokenizer.from_pretrained(chat_model()).all_special_tokens
    for seed in range(40):
        tokens = complete(client, **own | {"seed": seed}).choices[0].logprobs.tokens
        met = [token for token in specials if token in tokens]
        if met:
            break
    told = complete(client, stop=[met[0]], **own | {"seed": seed}).choices[0]
    assert told.finish_reason == "stop"
    assert len(told.logprobs.tokens) <= tokens.index(met[0]) + 1


def test_another_host_is_refused_where_there_is_no_key(server):
    """A web page's own name may have been given this address."""
    for host, status in (("evil.example:80", 403), ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:8000", 200)):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status


def test_messages_as_the_client_dumps_them(client):
    answer = chat(client).choices[0].message.model_dump()
    assert chat(client, [*HELLO, answer, {"role": "user", "content": "Go on"}]).choices[0].message.content
