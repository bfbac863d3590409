"""The HTTP server: uvicorn on a thread of its own, with its connections bounded.

Its socket is bound before weights are loaded, so that an address that cannot be had is told at once, and listens when
the ring is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.config.schema import ConfigError, ServingConfig
from pipeline.config.units import parse_address
from pipeline.serving.errors import ApiError

__all__ = ["HttpServer", "bind", "read_key", "warn_of_exposure"]

logger = logging.getLogger(__name__)

READ_S = 60.0  # for a client to read some of what is ready for it
HEAD_S = 10.0  # for a request's head to come, from the connection on
MIN_KEY_LENGTH, MAX_KEY_FILE_NBYTES = 16, 4096
_MORE_CONNECTIONS = 64  # than answers: for what is refused at once, and for metrics
_CLOSE_S = 5  # for responses that are written at the end


def bind(config: ServingConfig) -> socket.socket:
    """The socket, bound and not listening yet. Raises ConfigError."""
    host, port = parse_address(config.address)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as e:
        raise ConfigError(f"serving.address: {config.address} cannot be had: {e.strerror or e}") from e
    return bound


def read_key(config: ServingConfig) -> bytes | None:
    """The key that requests must bring; None where none is asked for. Raises ConfigError."""
    if config.api_key_file is None:
        return None
    where = f"serving.api_key_file: {config.api_key_file}"
    try:
        with open(config.api_key_file, "rb") as file:
            key, mode = file.read(MAX_KEY_FILE_NBYTES + 1).strip(), os.fstat(file.fileno()).st_mode
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {e.strerror or e}") from e
    is_word = key.isascii() and key.decode("ascii", "replace").isprintable() and b" " not in key
    if not MIN_KEY_LENGTH <= len(key) <= MAX_KEY_FILE_NBYTES or not is_word:
        raise ConfigError(
            f"{where} must hold one word of at least {MIN_KEY_LENGTH} ASCII characters, such as openssl rand -hex 32 "
            "makes"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s can be read by others than its owner: chmod 600", where)
    return key


def warn_of_exposure(bound: socket.socket, *, has_key: bool) -> None:
    """Where others than this machine can ask."""
    host = bound.getsockname()[0]
    if _is_loopback(bound):
        return
    if has_key:
        logger.warning("%s is no loopback address: requests, answers and the key cross the network in the clear", host)
    else:
        logger.warning(
            "%s is no loopback address and there is no key: whoever reaches it can use the model, and read what others "
            "send; give --api_key_file, and see docs/security.md",
            host,
        )


def _is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


class HttpServer:
    """uvicorn on a thread with the loop `loop`, from `start` to `stop`.

    `problem` is what ended it before that.
    """

    def __init__(self, bound: socket.socket) -> None:
        self.loop = asyncio.new_event_loop()
        self.problem: BaseException | None = None
        self._socket = bound
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._on_end: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def is_local(self) -> bool:
        return _is_loopback(self._socket)

    @property
    def url(self) -> str:
        host = self._socket.getsockname()[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self, app: Starlette, *, max_answers: int, on_end: Callable[[], None]) -> None:
        """`on_end` is called on the thread when it ends, for whatever reason."""
        config = uvicorn.Config(
            app,
            http=_protocol(max_answers + _MORE_CONNECTIONS),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        self._server, self._on_end = uvicorn.Server(config), on_end
        self._thread.start()

    def call(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a coroutine on the loop, from any thread or signal handler."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._begin, work)

    def stop(self) -> None:
        """On the loop: finish the responses under way, and end."""
        if self._server is not None:
            self._server.should_exit = True

    def join(self) -> None:
        """Wait for the thread's end; a response that nobody reads does not hold it up."""
        self._thread.join(_CLOSE_S + 2)

    def _begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self.loop.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        assert self._server is not None
        try:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(self._server.serve([self._socket]))
        except BaseException as e:  # uvicorn exits by SystemExit; told on the main thread
            self.problem = e
        finally:
            self._on_end()
            self.loop.close()


def _protocol(max_connections: int) -> type[H11Protocol]:
    """HTTP/1.1 with so many connections at most, which bring a request's head in time."""

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(_response(503, "Service Unavailable", "too many connections", "server_error"))
                transport.close()
            else:
                self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(READ_S, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_timer()
            self.resume_writing()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_response(400, "Bad Request", msg, "invalid_request_error"))
            self.transport.close()

        def _watch_head(self) -> None:
            # Of a request that was answered before its body was read.
            is_unread = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
            if self.conn.their_state is not h11.IDLE and not is_unread:
                self._forget_timer()
            elif self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(HEAD_S, self.transport.close)

        def _forget_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol


def _response(status: int, phrase: str, message: str, kind: str) -> bytes:
    body = json.dumps(ApiError(status, message, kind=kind).as_json()).encode()
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}retry-after: 1\r\nconnection: close\r\n\r\n".encode() + body
