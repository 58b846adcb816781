"""Answers to a request other than text, as an OpenAI client expects them.

A client is a stranger: it learns what is wrong with what it sent and which rule an adapter breaks, never where files of
the server lie nor what is in them. That is said here and nowhere else; the server's log has the whole.
"""

from __future__ import annotations

import functools
import logging
import reprlib
from typing import Any

from ...pool import AdapterLoadError

logger = logging.getLogger("fastpeft.apps.serve")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100


class ApiError(Exception):
    """status: of HTTP. code, param: as in OpenAI's error objects. retry_after: seconds."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if not retry_after else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        name = "invalid_request_error" if self.status < 500 else "server_error"
        name = "rate_limit_error" if self.status == 429 else name
        return {"error": {"message": self.message, "type": name, "param": self.param, "code": self.code}}


def short(value: object) -> str:
    """A value of a request as an error may quote it, however deep or long it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, code, param)


def overloaded(requests: int, seconds: int) -> ApiError:
    return ApiError(429, f"{requests} requests are open, which is all this server takes; try again in {seconds} s",
                    "server_overloaded", retry_after=seconds)  # fmt: skip


def unknown(name: str) -> ApiError:
    why = "it is neither the base nor an adapter of this server"
    return ApiError(404, f"The model {short(name)} does not exist: {why}", "model_not_found", "model")


def unusable(error: AdapterLoadError) -> ApiError:
    """For an adapter whose files are broken, refused or gone, named relative to the server's directory of adapters."""
    _log_once(error.name, error.reason)
    why = f"adapter {error.name!r} cannot be used: {error.rule or 'the log of the server says why'}"
    return ApiError(422, why, "adapter_unusable", "model")


@functools.lru_cache(maxsize=1024)  # who asks for it again and again does not fill the log
def _log_once(name: str, reason: str) -> None:
    logger.warning("adapter %r cannot be used: %r", name, reason)


def failed(what: str, error: BaseException, code: str, param: str | None = None) -> ApiError:
    """For the server's own fault."""
    logger.error("%s", what, exc_info=error)
    return ApiError(500, f"{what}: {told(error)}", code, param)


class Told(RuntimeError):
    """An error of this server, whose text a client may read."""


def told(error: BaseException) -> str:
    """The part of an error that a client may read: its class alone where its text may say anything."""
    return str(error) if isinstance(error, Told) else type(error).__name__


def not_finite(adapter: str | None) -> ApiError:
    """For a request whose logits are NaN or infinite: its adapter's values, or the base model's, are too large."""
    why = "the model's outputs for this request are not finite (NaN or infinity)"
    if adapter is None:
        return ApiError(500, why, "not_finite")
    return ApiError(422, f"adapter {adapter!r} cannot be used for it: {why}", "not_finite", "model")


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down", retry_after=1)


def late(seconds: float, why: str = "") -> ApiError:
    return ApiError(504, f"the request was not answered within {seconds:g} s{why}", "timeout")
