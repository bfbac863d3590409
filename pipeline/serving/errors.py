"""What a client is told when it gets no answer, in the API's form."""

from __future__ import annotations

from typing import Any

__all__ = ["ApiError", "busy", "failed", "refused", "shutting_down"]

_MAX_MESSAGE_LENGTH = 500


class ApiError(Exception):
    """Ends a request with an HTTP status. `param` is the field at fault, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self._fields = {"message": _shortened(message), "type": kind, "param": param, "code": code}

    def as_json(self) -> dict[str, Any]:
        return {"error": self._fields}


def refused(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def busy(message: str) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": "1"})


def failed(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error")


def shutting_down() -> ApiError:
    message = "the server is shutting down"
    return ApiError(503, message, kind="server_error", code="shutting_down", headers={"Retry-After": "10"})


def _shortened(message: str) -> str:
    """Messages tell the value got, which may be as long as a body; the cure stands at the end."""
    if len(message) <= _MAX_MESSAGE_LENGTH:
        return message
    return f"{message[: _MAX_MESSAGE_LENGTH // 2]} ... {message[-_MAX_MESSAGE_LENGTH // 2 :]}"
