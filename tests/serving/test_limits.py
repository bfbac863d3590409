"""What the endpoint refuses, and how it ends: keys, bounds, signals. A server of its own for each kind."""

import concurrent.futures
import contextlib
import json
import logging
import signal
import socket
import time

import httpx
import openai
import pytest

from pipeline.config.schema import ConfigError, ServingConfig
from pipeline.serving.server import bind, read_key, warn_of_exposure
from tests.helpers.launch import run_alone
from tests.helpers.serving import serving

KEY = "a-key-of-thirty-two-characters!!"


def complete(client, **options):
    return client.completions.create(**{"model": "tiny-chat", "prompt": "a", "max_tokens": 4, "seed": 1} | options)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "key").write_text(f"{KEY}\n")
    (folder / "key").chmod(0o600)
    settings = ("generation.max_slots=2", "serving.max_waiting=2", "serving.max_body_nbytes=2000")
    with serving(folder, *settings, words=["--api_key_file", str(folder / "key")]) as server:
        yield server


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \u00e9"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics"])
def test_a_key_that_is_missing_or_wrong(guarded, header, path):
    """Also before the body is read."""
    headers = {"Authorization": header.encode()} if header else {}
    method = "POST" if "completions" in path else "GET"
    told = httpx.request(method, f"{guarded.url}{path}", headers=headers)
    assert (told.status_code, told.json()["error"]["code"]) == (401, "invalid_api_key")


def test_the_key(guarded):
    assert complete(guarded.client(KEY)).usage.completion_tokens == 4
    with pytest.raises(openai.AuthenticationError):
        complete(guarded.client("wrong"))
    assert httpx.get(f"{guarded.url}/health").json() == {"status": "ok"}
    assert guarded.metric("thinwire_slots", KEY) == 2


def test_a_full_queue(guarded):
    """Two slots and two that wait; a fifth is told to come again, and gets its answer when it does."""
    client, eager = guarded.client(KEY), guarded.client(KEY, max_retries=50)
    with pytest.raises(openai.BadRequestError, match="n times the prompts is 5, of at most 4"):
        complete(client, n=5)
    streams = [complete(client, max_tokens=90, stream=True) for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client)
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "rate_limit_exceeded"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = pool.submit(complete, eager)
        texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
        assert len(set(texts)) == 1 and late.result().usage.completion_tokens == 4
    assert guarded.metric('thinwire_requests_total{endpoint="completions",outcome="busy"}', KEY) >= 1


def told_by(server, *lines, body=b"", pause_s=0.0):
    """What a server answers to raw bytes, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in (*lines, f"Authorization: Bearer {KEY}", "")).encode())
        time.sleep(pause_s)
        connection.sendall(body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


POST = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")


def test_a_body_that_is_too_long(guarded):
    """Refused by what it says of its length, and as soon as it is longer where it says nothing."""
    told = told_by(guarded, *POST, "Content-Length: 2001")
    assert b"413" in told and b"longer than 2000 bytes" in told
    assert b"413" in told_by(guarded, *POST, "Content-Length: 999999999999999999")
    told = told_by(guarded, *POST, "Transfer-Encoding: chunked", body=b"7d1\r\n" + 2001 * b" ")
    assert b"413" in told and b"connection: close" in told.lower()


def test_what_is_no_http(guarded):
    assert b'"error"' in told_by(guarded, "nonsense")
    with contextlib.suppress(ConnectionError):  # it may close while more is on its way
        assert told_by(guarded, "GET /health HTTP/1.1", "Host: x", "X: " + 2_000_000 * "x")[:10] == b"HTTP/1.1 4"
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_a_body_that_is_not_said_to_be_json(guarded):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    told = httpx.post(f"{guarded.url}/v1/completions", content="{}", headers=headers)
    assert told.status_code == 415 and "application/json" in told.json()["error"]["message"]


def test_more_connections_than_there_is_room_for(guarded):
    """4 answers and 64 more: those beyond are told so at once, and room comes back."""
    host, port = guarded.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port)), timeout=60) for _ in range(4 + 64 + 8)]
    refused = 0
    for connection in held:
        connection.settimeout(0.5)
        try:
            refused += connection.recv(65536).startswith(b"HTTP/1.1 503")
        except TimeoutError:
            pass
        connection.close()
    assert refused >= 8
    assert httpx.get(f"{guarded.url}/health", timeout=60).status_code == 200


def interrupted_in(server, *, number=signal.SIGINT, rank=0, max_tokens=80):
    """A server that is interrupted in the middle of a stream: the stream, begun, and when."""
    stream = complete(server.client(), max_tokens=max_tokens, stream=True)
    first = next(stream)
    server.signal(number, rank)
    return stream, first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_answers_under_way_come_to_their_end(number, tmp_path):
    with serving(tmp_path) as server:
        alone = complete(server.client(), max_tokens=80).choices[0].text
        stream, first = interrupted_in(server, number=number)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            for _ in range(100):
                complete(server.client(), max_tokens=1)
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream) == alone
        (finished,) = server.ranks.wait(60)
    assert finished.returncode == 130 and "dropped" not in finished.stderr
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_bytes())["results"]["num_failed"] == 0


def test_what_takes_too_long_is_named_and_dropped(tmp_path):
    with serving(tmp_path, "serving.shutdown_s=0") as server:
        stream, first = interrupted_in(server)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        (finished,) = server.ranks.wait(60)
    assert finished.returncode == 130
    assert f"dropped: {first.id}, choice 0, after " in finished.stderr and " of at most 80 tokens" in finished.stderr
    (path,) = tmp_path.glob("*.json")
    (request,) = json.loads(path.read_bytes())["requests"]
    assert request["finish_reason"] == "cancelled" and 0 < request["num_tokens"] < 80


def test_a_second_signal_ends_it_at_once(tmp_path):
    with serving(tmp_path) as server:
        stream, _ = interrupted_in(server)
        while httpx.get(f"{server.url}/health").status_code == 200:
            time.sleep(0.02)
        server.signal()
        (finished,) = server.ranks.wait(60)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
    assert finished.returncode == 130 and "interrupted" in finished.stderr and not list(tmp_path.glob("*.json"))


def test_an_address_that_another_has(tmp_path, guarded):
    """Told before weights load."""
    address = guarded.url.removeprefix("http://")
    finished = run_alone("--config", "demo.yaml", "--exp_dir", str(tmp_path), "--serve", address)
    assert finished.returncode == 1 and f"serving.address: {address} cannot be had" in finished.stderr


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words of enough length", b"\xff" * 20, b"x" * 5000], ids=range(5)
)
def test_a_file_that_holds_no_key(content, tmp_path):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="must hold one word of at least 16 ASCII characters"):
        read_key(ServingConfig(api_key_file=str(tmp_path / "key")))


def test_a_key_that_others_can_read(tmp_path, caplog):
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o644)
    assert read_key(ServingConfig(api_key_file=str(path))) == KEY.encode()
    assert "can be read by others" in caplog.text
    path.chmod(0o600)
    caplog.clear()
    assert read_key(ServingConfig(api_key_file=str(path))) and caplog.text == ""
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(ServingConfig(api_key_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("address", "has_key", "told"),
    [("127.0.0.1:0", False, ""), ("0.0.0.0:0", False, "there is no key"), ("0.0.0.0:0", True, "in the clear")],
)
def test_warnings_beyond_loopback(address, has_key, told, caplog):
    with bind(ServingConfig(address=address)) as bound, caplog.at_level(logging.WARNING):
        warn_of_exposure(bound, has_key=has_key)
    assert (told in caplog.text) and bool(told) == bool(caplog.text)
