"""The routes: who may ask, how much is read, and how answers and errors are written.

Starlette alone, since bodies are bounded before they are read and errors have the API's form.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.serving.api_types import ChatBody, CompletionBody, SharedBody, read_body
from pipeline.serving.errors import ApiError, failed, shutting_down
from pipeline.serving.service import Service, Ticket

__all__ = ["make_app"]

BODY_S = 30.0  # for a body to come
_DONE = b"data: [DONE]\n\n"
_CLIENT_GONE = 499  # nobody reads it

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    service: Service, *, api_key: bytes | None, is_local: bool, max_body_nbytes: int, is_ready: Callable[[], bool]
) -> Starlette:
    """`is_local`: only this machine can ask. `is_ready` says whether passes can go around the ring."""
    routes = _Routes(service, api_key, is_local, max_body_nbytes, is_ready)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/metrics", routes.guarded("metrics", routes.metrics)),
            Route("/v1/models", routes.guarded("models", routes.models)),
            Route("/v1/models/{model:path}", routes.guarded("models", routes.model)),
            Route("/v1/completions", routes.guarded("completions", routes.completions), methods=["POST"]),
            Route("/v1/chat/completions", routes.guarded("chat", routes.chat), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _unforeseen},
    )
    app.router.redirect_slashes = False  # to wherever the request's Host says
    return app


@dataclass(frozen=True)
class _Routes:
    service: Service
    api_key: bytes | None
    is_local: bool
    max_body_nbytes: int
    is_ready: Callable[[], bool]

    def guarded(self, endpoint: str, handler: Handler) -> Handler:
        """With the key asked for, errors in the API's form, and what came of it counted."""

        @functools.wraps(handler)
        async def handle(request: Request) -> Response:
            try:
                self._check_host(request)
                self._check_key(request)
                response = await handler(request)
            except ApiError as e:
                self._count(endpoint, _outcome(e.status))
                return _error(e)
            except ClientDisconnect:
                self._count(endpoint, "cancelled")
                return Response(status_code=_CLIENT_GONE)
            except Exception:
                self._count(endpoint, "failed")
                raise
            if not isinstance(response, StreamingResponse):
                self._count(endpoint, _outcome(response.status_code))
            return response

        return handle

    async def health(self, request: Request) -> Response:
        if self.service.is_stopping:
            return _json({"status": "shutting down"}, 503)
        return _json({"status": "ok"}) if self.is_ready() else _json({"status": "the ring is being formed"}, 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["model"])
        return _json(self._model())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, "completions", CompletionBody)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", ChatBody)

    async def _answer(self, request: Request, endpoint: str, kind: type[SharedBody]) -> Response:
        if self.service.is_stopping:
            raise shutting_down()
        content = await self._content(request)
        ticket = await self.service.take(functools.partial(read_body, content, kind))
        if ticket.streams:
            return _EventStream(ticket, functools.partial(self._stream_ended, ticket, endpoint))
        try:
            return Response(await _unless_gone(request, _whole(ticket)), media_type="application/json")
        finally:
            self.service.end(ticket)

    def _stream_ended(self, ticket: Ticket, endpoint: str, outcome: str) -> None:
        self.service.end(ticket)
        self._count(endpoint, outcome)

    async def _content(self, request: Request) -> bytes:
        """The body. Raises ApiError for one that is too long, before it is read where its length is told."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no web page may send here without being asked whether it may
            raise ApiError(415, f"the body must be JSON, with Content-Type: application/json, not {kind or 'without'}")
        too_long = ApiError(
            413, f"the body is longer than {self.max_body_nbytes} bytes", headers={"Connection": "close"}
        )
        told = request.headers.get("content-length", "0")
        if len(told) > 18 or int(told) > self.max_body_nbytes:
            raise too_long
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > self.max_body_nbytes:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, f"the body has not come within {BODY_S:g} s", headers={"Connection": "close"}) from None
        return bytes(content)

    def _check_host(self, request: Request) -> None:
        """A web page may give its own name this address (DNS rebinding); nothing else keeps it from asking."""
        if self.is_local and self.api_key is None and not _is_here(request.headers.get("host", "")):
            raise ApiError(403, "the Host header names another machine; ask localhost, or serve with a key")

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.api_key)
        if scheme.lower() != "bearer" or not is_right:
            message = "the request has no valid key; send it as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}  # its body is not read
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    def _model(self) -> dict[str, Any]:
        service = self.service
        return {"id": service.model, "object": "model", "created": service.created, "owned_by": "thinwire"}

    def _count(self, endpoint: str, outcome: str) -> None:
        self.service.metrics.requests.labels(endpoint, outcome).inc()


class _EventStream(StreamingResponse):
    """Answers as server-sent events; an error after the first is one of them, and the last.

    `on_end` is told the outcome, also where the client has gone before anything was sent.
    """

    def __init__(self, ticket: Ticket, on_end: Callable[[str], None]) -> None:
        super().__init__(self._events(ticket), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end, self._outcome = on_end, "cancelled"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end(self._outcome)

    async def _events(self, ticket: Ticket) -> AsyncIterator[bytes]:
        try:
            for chunk in ticket.reply.first_chunks(ticket.choices):
                yield _event(chunk)
            async for choice, text in ticket.events():
                yield _event(ticket.reply.chunk(choice, text))
            for chunk in ticket.reply.last_chunks(ticket.choices):
                yield _event(chunk)
            self._outcome = "completed"
            yield _DONE
        except ApiError as e:
            self._outcome = _outcome(e.status)
            yield _event(e.as_json())


async def _whole(ticket: Ticket) -> bytes:
    """Written on another thread: with log-probabilities it may be very long."""
    async for _ in ticket.events():
        pass
    return await asyncio.get_running_loop().run_in_executor(None, lambda: _encoded(ticket.reply.whole(ticket.choices)))


def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or "localhost"
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises ClientDisconnect where the client goes before."""
    gone, doing = asyncio.create_task(_gone(request)), asyncio.create_task(work)
    try:
        await asyncio.wait({gone, doing}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        gone.cancel()
        doing.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """Of routing: no such path, or not by this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return _error(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """The traceback goes to standard error."""
    return _error(failed(f"the server has failed with this request: {type(error).__name__}"))


def _outcome(status: int) -> str:
    if status < 400:
        return "completed"
    return "busy" if status == 429 else "refused" if status < 500 else "failed"


def _error(error: ApiError) -> Response:
    return _json(error.as_json(), error.status, error.headers)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encoded(value), status, headers, "application/json")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encoded(value) + b"\n\n"


def _encoded(value: dict[str, Any]) -> bytes:
    """ASCII, so that half of a surrogate pair, which a message may repeat, is no matter."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
