"""The ways to reach a model: what a call and a reply are, and how a provider's refusal is put in words.

A provider sends one call once. It raises ModelRefused before the first byte and StreamBroken after it; whether a call is
tried again is decided in `retry`. No provider logs a body or a key, and no error text contains one.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from ash.errors import ModelRefused
from ash.models import Json

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
ANTHROPIC_VERSION = "2023-06-01"
"""What a caller speaks that does not say."""


class Call(NamedTuple):
    """One request of a sandbox. `headers` are the few that a caller may choose; `body` is what it sent, `request` the same parsed."""

    path: str
    is_beta: bool
    headers: dict[str, str]
    body: bytes
    request: Json

    @property
    def streams(self) -> bool:
        return self.request.get("stream") is True


class Reply(NamedTuple):
    headers: dict[str, str]
    chunks: AsyncGenerator[bytes, None]


class Provider(Protocol):
    def send(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """The reply once its headers are there; leaving the context gives the connection up."""

    async def close(self) -> None: ...


class Timing(NamedTuple):
    """Seconds, and how often a call is tried again. An idle provider must give up before the bridge counts as hung."""

    connect: float = 10.0
    idle: float = 300.0
    retries: int = 2
    retry_budget: float = 120.0


_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
_WORDS = {
    400: "The model provider rejected the request",
    401: "The model provider refused the key",
    402: "The model provider asks for payment",
    403: "The model provider refused access",
    404: "The model provider does not know this model or address",
    413: "The request is too large for the model provider",
    429: "The model provider's rate limit is reached",
    504: "The model provider took too long",
    529: "The model provider is overloaded",
}
_PASSED_HEADERS = ("request-id", "retry-after", "retry-after-ms", "x-should-retry")
_KEY_LIKE = re.compile(r"sk-ant-[\w-]+|(?:AKIA|ASIA)[A-Z0-9]{12,}|[A-Za-z0-9+/_=-]{60,}")
_MAX_MESSAGE_CHARS = 2000


def refused(status: int, body: bytes, headers: Mapping[str, str], *, secrets: tuple[str, ...] = (), hint: str = "") -> ModelRefused:
    """The error for a provider's answer of `status`, in words, with the provider's own error type and headers."""
    kind, message = _read_error(status, body)
    words = _WORDS.get(status, f"The model provider {'failed with' if status >= 500 else 'answered'} HTTP {status}")
    text = f"{words}: {redact(message, secrets)[:_MAX_MESSAGE_CHARS]}" if message else words
    advice = [hint] if hint and status in (401, 403) else []
    if "retry-after" in headers and status in (429, 503, 529):
        advice.append(f"It asks to wait (Retry-After: {headers['retry-after'][:40]}).")
    return ModelRefused(" ".join([text.rstrip(".") + ".", *advice]), status=status, kind=kind, headers=passed_headers(headers))


def passed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an answer that the caller of the API may need."""
    lowered = {name.lower(): value for name, value in headers.items()}
    return {name: value for name, value in lowered.items() if name in _PASSED_HEADERS or name.startswith("anthropic-ratelimit-")}


def _read_error(status: int, body: bytes) -> tuple[str, str]:
    """The error's type and message from a body in Anthropic's shape or another common one."""
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    error = data.get("error", data) if isinstance(data, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    message = error.get("message") or error.get("Message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        is_page = body.lstrip()[:1] == b"<"
        message = "" if is_page else body[:300].decode("utf-8", "replace").strip()
    return kind if isinstance(kind, str) and kind != "error" else _KINDS.get(status, "api_error"), message


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text without `secrets` and without anything that looks like a key."""
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    return _KEY_LIKE.sub("***", text)


def unreachable(where: str, reason: str, *, may_retry: bool = True, timed_out: bool = False) -> ModelRefused:
    """The error when no answer came at all."""
    headers = {} if may_retry else {"x-should-retry": "false"}
    if timed_out:
        text = f"The model provider at {where} did not answer in time ({reason})."
        return ModelRefused(text, status=504, kind="timeout_error", headers=headers)
    return ModelRefused(f"The model provider at {where} could not be reached: {reason}.", status=502, kind="api_error", headers=headers)
