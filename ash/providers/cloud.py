"""Amazon Bedrock and Google Vertex AI, through the `anthropic` package: the only file that loads it, on the first call, in a thread.

The package signs the requests and finds the credentials by the usual variables and files; what it streams is encoded again as the
Messages API's events. Nothing but the provider ever sees those credentials.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from ash import sse
from ash.errors import ModelRefused, StreamBroken
from ash.models import Json
from ash.providers import ANTHROPIC_VERSION, COUNT_TOKENS, MESSAGES, Call, Reply, Timing, redact, refused, unreachable

BEDROCK, VERTEX = "bedrock", "vertex"


class _Platform(NamedTuple):
    title: str
    client: str
    needs: str
    packages: tuple[str, ...]
    version: str
    """What the platform calls the version of the API that it has always had."""


_PLATFORMS = {
    BEDROCK: _Platform(
        "Amazon Bedrock",
        "AsyncAnthropicBedrock",
        "Set AWS_REGION and AWS credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_BEARER_TOKEN_BEDROCK)",
        ("boto3", "botocore.auth", "botocore.eventstream", "botocore.parsers", "botocore.exceptions"),
        "bedrock-2023-05-31",
    ),
    VERTEX: _Platform(
        "Vertex AI",
        "AsyncAnthropicVertex",
        "Set CLOUD_ML_REGION, ANTHROPIC_VERTEX_PROJECT_ID and Google credentials (GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth)",
        ("google.auth", "google.auth.exceptions", "google.auth.transport.requests"),
        "vertex-2023-10-16",
    ),
}
_DATED = {"claude-sonnet-4-5": "20250929", "claude-haiku-4-5": "20251001", "claude-opus-4-5": "20251101"}
_NOISY_LOGGERS = ("anthropic", "httpx2", "botocore", "boto3", "google.auth", "urllib3")


def bedrock_model(name: str) -> str:
    """Bedrock's id of a model: the global inference profile. What already is an id or an ARN stays as it is."""
    if "." in name or ":" in name:
        return name
    name = f"{name}-{_DATED[name]}" if name in _DATED else name
    suffix = "-v1:0" if re.search(r"-20\d{6}$", name) else "-v1" if name == "claude-opus-4-6" else ""
    return f"global.anthropic.{name}{suffix}"


def vertex_model(name: str) -> str:
    """Vertex' id of a model: a date is set off by `@`."""
    name = f"{name}-{_DATED[name]}" if name in _DATED else name
    return re.sub(r"-(20\d{6})$", r"@\1", name)


class _Loaded(NamedTuple):
    client: Any
    stream_class: Any
    response_class: Any
    anthropic: Any
    transport_error: type[Exception]
    errors: tuple[type[Exception], ...]
    """What the package and its credential libraries raise when a request cannot even be sent."""


class Cloud:
    """`kind` is BEDROCK or VERTEX."""

    def __init__(self, kind: str, timing: Timing) -> None:
        self._kind, self._timing = kind, timing
        self._platform = _PLATFORMS[kind]
        self._loading = asyncio.Lock()
        self._loaded: _Loaded | None = None

    @asynccontextmanager
    async def send(self, call: Call) -> AsyncIterator[Reply]:
        if call.path == COUNT_TOKENS and self._kind == BEDROCK:
            raise ModelRefused("Amazon Bedrock cannot count tokens.", status=404, kind="not_found_error")
        loaded = await self._load()
        if call.streams and call.path == MESSAGES:
            stream = await self._post(loaded, call, cast_to=object, stream=True, stream_cls=loaded.stream_class)
            try:
                yield Reply(
                    {"content-type": "text/event-stream; charset=utf-8", **_request_id(stream.response)}, self._frames(loaded, stream)
                )
            finally:
                await stream.close()
        else:
            response = await self._post(loaded, call, cast_to=loaded.response_class)
            yield Reply({"content-type": "application/json", **_request_id(response)}, _one(response.content))

    async def close(self) -> None:
        if self._loaded is not None:
            await self._loaded.client.close()

    async def _post(self, loaded: _Loaded, call: Call, **how: Any) -> Any:
        try:
            return await loaded.client.post(call.path, body=self._body(call), options=self._options(call), **how)
        except loaded.anthropic.APIStatusError as error:
            raise self._refused(error) from error
        except loaded.anthropic.APITimeoutError as error:
            raise unreachable(self._platform.title, "timeout", timed_out=True) from error
        except loaded.anthropic.APIConnectionError as error:
            raise unreachable(self._platform.title, redact(str(error.__cause__ or error)).rstrip(".")) from error
        except loaded.errors as error:
            raise self._unusable(error) from error

    def _options(self, call: Call) -> Json:
        kept = {name: value for name, value in call.headers.items() if name == "anthropic-beta"}
        return {"headers": kept, "params": {"beta": "true"} if call.is_beta and self._kind == VERTEX else {}}

    def _body(self, call: Call) -> Json:
        to_id = bedrock_model if self._kind == BEDROCK else vertex_model
        spoken = call.headers.get("anthropic-version", ANTHROPIC_VERSION)
        version = self._platform.version if spoken == ANTHROPIC_VERSION else spoken
        return {**call.request, "model": to_id(call.request["model"]), "anthropic_version": version}

    async def _frames(self, loaded: _Loaded, stream: Any) -> AsyncGenerator[bytes, None]:
        try:
            async for event in stream:
                if isinstance(event, dict):
                    yield sse.encode(str(event.get("type")), event)
        except loaded.anthropic.APIStatusError as error:
            yield sse.encode("error", _stream_error(error))
        except (loaded.transport_error, OSError) as error:
            raise StreamBroken("The model provider's answer broke off: the connection was lost.") from error

    def _refused(self, error: Any) -> ModelRefused:
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        hint = f"{self._platform.needs}, and start the server again."
        # A signature error quotes the whole signed request, session token included, from its second sentence on.
        body = error.response.content.split(b"The Canonical String")[0] if error.status_code == 403 else error.response.content
        return refused(error.status_code, body if body == error.response.content else _first_sentence(body), headers, hint=hint)

    def _unusable(self, error: Exception) -> ModelRefused:
        reason = redact(str(error)).strip().split("\n")[0].rstrip(".")
        text = f"{self._platform.title} cannot be used: {reason}. {self._platform.needs}, and start the server again."
        return ModelRefused(text, status=401, kind="authentication_error", headers={"x-should-retry": "false"})

    async def _load(self) -> _Loaded:
        async with self._loading:
            if self._loaded is None:
                self._loaded = await asyncio.to_thread(self._import)
            return self._loaded

    def _import(self) -> _Loaded:
        """Takes more than a second of CPU, therefore in a thread. Raises ModelRefused when a package or a setting is missing."""
        platform = self._platform
        try:
            anthropic = importlib.import_module("anthropic")
            transport = importlib.import_module("httpx2")
            modules = {name: importlib.import_module(name) for name in platform.packages}
        except ImportError as error:
            text = f"{platform.title} needs the Python package {error.name}: pip install 'anthropic[{self._kind}]'"
            raise ModelRefused(f"{text}, then start the server again.", status=500, headers={"x-should-retry": "false"}) from error
        for name in _NOISY_LOGGERS:  # at level debug they log bodies and what is signed
            logging.getLogger(name).setLevel(logging.WARNING)
        is_bedrock = self._kind == BEDROCK
        foreign = modules["botocore.exceptions"].BotoCoreError if is_bedrock else modules["google.auth.exceptions"].GoogleAuthError
        try:
            client = getattr(anthropic, platform.client)(max_retries=0, timeout=self._timeout(transport), open_telemetry=False)
        except (anthropic.AnthropicError, foreign, ValueError, RuntimeError) as error:
            raise self._unusable(error) from error
        if is_bedrock:
            _warm_decoder()
        errors = (anthropic.AnthropicError, foreign, ValueError, RuntimeError, OSError)
        return _Loaded(client, anthropic.AsyncStream[object], transport.Response, anthropic, transport.HTTPError, errors)

    def _timeout(self, transport: Any) -> Any:
        return transport.Timeout(self._timing.idle, connect=self._timing.connect)


def _warm_decoder() -> None:
    """Reads Bedrock's event shapes (tens of milliseconds) here rather than in the loop at the first event."""
    try:
        importlib.import_module("anthropic.lib.bedrock._stream_decoder").get_response_stream_shape()
    except (ImportError, AttributeError):
        return  # another version of the package; it reads them when it needs them


def _first_sentence(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    found = re.search(r'"(?:message|Message)"\s*:\s*"([^"\\]*)', text)
    return (found.group(1) if found else text[:200]).strip().encode()


def _stream_error(error: Any) -> Json:
    inner = error.body.get("error") if isinstance(error.body, dict) else None
    told = inner if isinstance(inner, dict) else {}
    message = redact(str(told.get("message") or "The model provider failed."))
    return {"type": "error", "error": {"type": told.get("type") or "api_error", "message": message}}


def _request_id(response: Any) -> dict[str, str]:
    for name in ("request-id", "x-amzn-requestid"):
        if name in response.headers:
            return {"request-id": response.headers[name]}
    return {}


async def _one(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content
