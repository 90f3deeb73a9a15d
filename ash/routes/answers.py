"""What every answer has in common: the one shape of errors, the security headers, and CORS where the operator opened it.

An error tells its caller what to do differently and nothing about this machine: no path, no traceback.
"""

from __future__ import annotations

import logging
import math
import uuid
from typing import Any

from aiohttp import web

from ash.auth import Handler
from ash.errors import AshError, Overloaded

log = logging.getLogger(__name__)

_SECURITY_HEADERS = {
    "Server": "ash",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
_PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, PUT, PATCH, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "600",
}


def error_answer(status: int, code: str, message: str, hint: str = "") -> web.Response:
    body: dict[str, Any] = {"error": message, "statusCode": status, "code": code, "message": message}
    answer = web.json_response({**body, "hint": hint} if hint else body, status=status)
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def log_failure(what: str) -> str:
    """Log the exception that is being handled, with its traceback. Returns what may be said about it."""
    id = uuid.uuid4().hex[:12]
    log.exception("%s failed, id %s", what, id)
    return f"Internal error {id}; the server's log says more under this id"


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except AshError as error:
        if error.status >= 500:
            log.warning("%s %s: %s", request.method, request.path, error.message)
        answer = error_answer(error.status, error.code, error.message, error.hint)
        if isinstance(error, Overloaded):
            answer.headers["Retry-After"] = str(math.ceil(error.retry_after))
        return answer
    except web.HTTPException as error:
        return _http_answer(request, error)
    except Exception:  # noqa: BLE001 - the request's edge: whatever it was, its caller gets an answer and the log the details
        return error_answer(500, "internal_error", log_failure(f"{request.method} {request.path}"))


def _http_answer(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if isinstance(error, web.HTTPNotFound):
        return error_answer(404, "route_not_found", f"Route {request.method}:{request.path} not found")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        answer = error_answer(405, "method_not_allowed", f"{request.method} is not possible on {request.path}; possible: {allowed}")
        answer.headers["Allow"] = allowed
        return answer
    return error_answer(error.status, "http_error", error.reason)


class Origins:
    """The browser origins that may read answers. They still need a key: being allowed to ask is not being somebody."""

    def __init__(self, allowed: str) -> None:
        self._allowed = {origin.strip().rstrip("/").lower() for origin in allowed.split(",") if origin.strip()}

    def _granted(self, request: web.BaseRequest) -> str | None:
        origin = request.headers.get("Origin")
        if origin is None or not self._allowed:
            return None
        return origin if "*" in self._allowed or origin.lower() in self._allowed else None

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For every answer, streams included, as it is about to be sent."""
        headers = response.headers
        headers.update(_SECURITY_HEADERS)
        headers.setdefault("Cache-Control", "no-store")
        if self._allowed:
            headers.add("Vary", "Origin")
        if (origin := self._granted(request)) is not None:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After, WWW-Authenticate"

    def middleware(self) -> Any:
        @web.middleware
        async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
            """A preflight never carries a key, so it is answered before anyone asks for one."""
            is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
            if is_preflight and self._granted(request) is not None:
                return web.Response(status=204, headers=_PREFLIGHT_HEADERS)
            return await handler(request)

        return answer_preflight
