"""Requests that nobody should send: each is answered with a 4xx in the API's form, and the ring lives on."""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.serving.api_types import ChatBody, CompletionBody, read_body
from pipeline.serving.errors import ApiError
from tests.helpers.malformed import CHAT, CHAT_FIELDS, COMPLETION, TEXT_FIELDS, malformed
from tests.helpers.serving import serving

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("malformed"), "generation.max_slots=2") as server:
        yield server


def test_malformed_requests(server):
    found = list(malformed())
    assert len(found) > 400
    with httpx.Client(base_url=f"{server.url}/v1/", headers={"Content-Type": "application/json"}, timeout=60) as client:
        for path, body in found:
            told = client.post(path, content=body)
            error = told.json().get("error", {}) if told.status_code != 200 else {}
            assert 400 <= told.status_code < 500 and error["message"] and len(error["message"]) < 1000, body[:200]
        told = client.post("completions", content=json.dumps(COMPLETION))
        assert told.json()["usage"]["completion_tokens"] == 1
    assert "Traceback" not in server.ranks.rank_stderr(0)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_another_method(server, method):
    told = httpx.request(method, f"{server.url}/v1/completions")
    assert told.status_code == 405 and (method == "HEAD" or told.json()["error"]["type"] == "invalid_request_error")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/models/..%2f..%2fetc/passwd", "/%00", "//"])
def test_another_path(server, path):
    told = httpx.get(f"{server.url}{path}")
    assert told.status_code == 404 and told.json()["error"]["message"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted({*TEXT_FIELDS, *CHAT_FIELDS}))


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from([CompletionBody, ChatBody]), fields=st.dictionaries(NAMES, ANYTHING, max_size=5))
def test_any_json_is_a_body_or_refused(kind, fields):
    base = COMPLETION if kind is CompletionBody else CHAT
    try:
        body = read_body(json.dumps(base | fields).encode(), kind)
    except ApiError as e:
        assert e.status == 400 and json.dumps(e.as_json())
    else:
        assert body.num_choices >= 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(content):
    with pytest.raises(ApiError, match="body|model"):
        read_body(content, CompletionBody)
