"""The way out of the sandboxes to the models: a small HTTP app on one Unix socket per sandbox, and the only place with the keys.

Which socket a request comes in on says which session asks. Only the Messages endpoints exist here; whatever key the caller
sends is dropped and ours is put in. It never logs a body or a key, and never answers from a sandbox that has no session.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from types import TracebackType
from typing import Any, NamedTuple

from aiohttp import web

from ash import offline, sse
from ash.config import Config, Secret
from ash.errors import ConfigError, Forbidden, ModelRefused, SandboxFailed, StreamBroken
from ash.models import Json
from ash.policy import Policy
from ash.providers import COUNT_TOKENS, MESSAGES, Call, Provider, Reply, Timing, reach, retry
from ash.providers.cloud import BEDROCK, VERTEX, Cloud
from ash.providers.direct import DEFAULT_BASE_URL, Direct, open_session, shown_base_url
from ash.providers.doorway import Doorway, raise_descriptor_limit
from ash.providers.intake import Intake, Lease
from ash.providers.local import Local
from ash.providers.meter import Meter

log = logging.getLogger(__name__)

DEFAULT_MODEL = "claude-sonnet-5-5"
NOTICE = (
    "No model provider is configured: answers come from the built-in offline demo model. "
    "Set ANTHROPIC_API_KEY and start the server again to use a real one."
)
CHOSEN_NOTICE = (
    "The offline demo model is chosen: answers come from the built-in model, not from a real one. "
    "Set ANTHROPIC_API_KEY and start the server without `--model offline` to use a real one."
)
MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_CALLS_PER_SANDBOX = 32
_MAX_SOCKET_PATH_BYTES = 107
_PASSED_REQUEST_HEADERS = ("anthropic-version", "anthropic-beta", "accept")
_ALIASES = {"sonnet": "claude-sonnet-5-5", "opus": "claude-opus-5-5", "haiku": "claude-haiku-5-5"}

OnUsage = Callable[[str, dict[str, Any]], Awaitable[None]]


class ModelAccess(NamedTuple):
    """For whom a sandbox asks, and the session's own credential if it has one."""

    session_id: str
    tenant_id: str
    model: str
    api_key: Secret | None = None
    auth_token: Secret | None = None
    base_url: str | None = None
    is_revoked: Callable[[], bool] = lambda: False
    """Whether that credential was deleted meanwhile."""


class Gateway:
    """An async context manager. `open` before a sandbox starts, `bind` when it gets a session, `close` when it is gone."""

    def __init__(
        self, config: Config, *, on_usage: OnUsage, policy: Callable[[], Policy] = Policy, timing: Timing | None = None
    ) -> None:  # fmt: skip
        self._config, self._on_usage, self._timing = config, on_usage, timing or Timing()
        self._policy = policy
        self._exits = AsyncExitStack()
        self._listeners: dict[str, tuple[str, asyncio.Server]] = {}
        self._doorways: dict[str, Doorway] = {}
        self._sandboxes: dict[str, str] = {}
        """Socket path to sandbox id."""
        self._access: dict[str, ModelAccess] = {}
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}
        self._reports: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Gateway:
        try:
            await self._start()
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def _start(self) -> None:
        raise_descriptor_limit()
        replies = offline.load(self._config.offline_script) if self._config.offline_script else None
        threads = ThreadPoolExecutor(2, "gateway")
        self._exits.callback(threads.shutdown, wait=False, cancel_futures=True)
        self._intake = Intake(threads)
        self._offline = Local(replies)
        self._exits.push_async_callback(self._offline.close)
        self._session = open_session(self._timing)
        self._exits.push_async_callback(self._session.close)
        self._default = self._choose_default()
        self._exits.push_async_callback(self._default.close)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        # A caller that leaves must end the call to the provider at once: nothing here outlives its request but the usage report.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        self._exits.push_async_callback(self._finish_reports)
        self._exits.push_async_callback(self._runner.cleanup)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sandbox_id in list(self._listeners):
            await self.close(sandbox_id)
        await self._exits.aclose()

    # What the server is set to

    @property
    def _provider_name(self) -> str:
        config = self._config
        if config.model == offline.MODEL:
            return "offline"
        if config.use_bedrock:
            return BEDROCK
        if config.use_vertex:
            return VERTEX
        has_address = config.anthropic_base_url.rstrip("/") != DEFAULT_BASE_URL
        return "anthropic" if config.anthropic_api_key or config.anthropic_auth_token or has_address else "offline"

    def _choose_default(self) -> Provider:
        name, config = self._provider_name, self._config
        if name == "offline":
            return self._offline
        if name == "anthropic":
            return Direct(self._session, config.anthropic_base_url, config.anthropic_api_key, config.anthropic_auth_token)
        return Cloud(name, self._timing)

    def default_model(self, *, has_key: bool = False) -> str:
        """The model of agents that name none; `has_key` says that the session has a key of its own."""
        return self._config.model or (offline.MODEL if self._provider_name == "offline" and not has_key else DEFAULT_MODEL)

    def _named(self, model: str) -> str:
        """The model that is meant: `default` and short names stand for one."""
        return self.default_model() if model == "default" else _ALIASES.get(model, model)

    def require_allowed(self, model: str | None) -> None:
        """Raise Forbidden for a model, None being the default one, that the policy does not allow."""
        name = self._named(model or "default")
        if not self._policy().allows_model(name):
            raise Forbidden(_not_allowed(name, self._policy().models))

    def require_allowed_content(self, content: Any) -> None:
        """Raise Forbidden for blocks that the model's provider would have to fetch, where the policy does not allow that."""
        for feature in reach.find_features({"messages": [{"role": "user", "content": content}]}):
            if not self._policy().allows_feature(feature):
                raise Forbidden(_not_named(feature))

    def describe(self) -> dict[str, Any]:
        """Which models answer, without any secret; `notice` when it is not a real one."""
        name = self._provider_name
        shown: dict[str, Any] = {"provider": name, "model": self.default_model()}
        if name == "anthropic" and self._config.anthropic_base_url.rstrip("/") != DEFAULT_BASE_URL:
            shown["baseUrl"] = shown_base_url(self._config.anthropic_base_url)
        if name == "offline":
            shown["notice"] = CHOSEN_NOTICE if self._config.model == offline.MODEL else NOTICE
        return shown

    # One socket per sandbox

    async def open(self, sandbox_id: str, socket_path: str) -> None:
        """Listen at `socket_path`. Until `bind`, every request on it is refused."""
        size = len(os.fsencode(socket_path))
        if size > _MAX_SOCKET_PATH_BYTES:
            limit = _MAX_SOCKET_PATH_BYTES
            raise SandboxFailed(f"the gateway's socket path has {size} bytes, at most {limit} work: use a data folder with a shorter path")
        self._stop_listening(sandbox_id)
        try:
            listener = await self._listen(sandbox_id, socket_path)
        except OSError as error:
            raise SandboxFailed(f"the gateway cannot listen for this sandbox: {error.strerror or error}") from error
        self._listeners[sandbox_id], self._sandboxes[socket_path] = (socket_path, listener), sandbox_id

    async def _listen(self, sandbox_id: str, socket_path: str) -> asyncio.Server:
        assert self._runner.server is not None  # since the gateway's start
        doorway = self._doorways.setdefault(sandbox_id, Doorway(self._runner.server))
        listener = await asyncio.get_running_loop().create_unix_server(doorway, socket_path)
        try:
            os.chmod(socket_path, 0o666)  # the folder around it is what keeps others out
        except OSError:
            listener.close()
            raise
        return listener

    def bind(self, sandbox_id: str, access: ModelAccess) -> None:
        """From now on the sandbox's socket speaks for this session."""
        self._access[sandbox_id] = access

    async def close(self, sandbox_id: str) -> None:
        """Stop listening and end the calls that are under way. Does nothing for a sandbox that is not open."""
        self._access.pop(sandbox_id, None)
        self._stop_listening(sandbox_id)
        for task in self._calls.pop(sandbox_id, set()):
            task.cancel()
        self._intake.forget(sandbox_id)
        doorway = self._doorways.pop(sandbox_id, None)
        if doorway is not None:
            doorway.close()

    def _stop_listening(self, sandbox_id: str) -> None:
        path, listener = self._listeners.pop(sandbox_id, ("", None))
        self._sandboxes.pop(path, None)
        if listener is not None:
            listener.close()

    # One call

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            sandbox_id = self._sandbox_of(request)
            return await self._tracked(sandbox_id, self._answer(sandbox_id, request))
        except ModelRefused as refusal:
            return _error(refusal)
        except (ConnectionError, asyncio.IncompleteReadError):
            return web.Response()  # the bridge has left; nobody reads this
        except Exception:  # the edge of a request: the bridge gets an error it can show, the log the reason
            log.exception("a model call failed inside the gateway")
            return _error(ModelRefused("The gateway failed; the server's log says why.", status=500))

    def _sandbox_of(self, request: web.Request) -> str:
        path = request.transport.get_extra_info("sockname") if request.transport is not None else None
        sandbox_id = self._sandboxes.get(path) if isinstance(path, str) else None
        if sandbox_id is None or sandbox_id not in self._access:
            raise ModelRefused("This sandbox belongs to no session.", status=403, kind="permission_error")
        return sandbox_id

    async def _tracked(self, sandbox_id: str, answer: Any) -> web.StreamResponse:
        calls = self._calls.setdefault(sandbox_id, set())
        task = asyncio.current_task()
        if len(calls) >= _MAX_CALLS_PER_SANDBOX or task is None:
            answer.close()
            raise ModelRefused(f"More than {_MAX_CALLS_PER_SANDBOX} model calls at once.", status=429, kind="rate_limit_error")
        calls.add(task)
        try:
            response: web.StreamResponse = await answer
            return response
        finally:
            calls.discard(task)

    async def _answer(self, sandbox_id: str, request: web.Request) -> web.StreamResponse:
        access = self._access[sandbox_id]
        async with AsyncExitStack() as stack:
            lease = stack.enter_context(self._intake.lease(sandbox_id))
            call = await self._read_call(sandbox_id, request, lease)
            provider = self._provider(access, call.request["model"])
            reply = await self._send(provider, call, stack, access.session_id)
            return await self._pass_on(request, call, reply, access.session_id)

    async def _read_call(self, sandbox_id: str, request: web.Request, lease: Lease) -> Call:
        if request.method != "POST" or request.path not in (MESSAGES, COUNT_TOKENS):
            raise ModelRefused(f"{request.method} {request.path} does not exist here.", status=404, kind="not_found_error")
        body = await self._intake.read(request, lease, MAX_BODY_BYTES)
        try:
            parsed = await self._intake.parse(sandbox_id, body, lease)
        except (ValueError, RecursionError) as error:
            raise ModelRefused("The request body is not valid JSON.", status=400, kind="invalid_request_error") from error
        if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), str) or not parsed["model"]:
            raise ModelRefused("model: Input should be a valid string", status=400, kind="invalid_request_error")
        headers = {name: request.headers[name] for name in _PASSED_REQUEST_HEADERS if name in request.headers}
        call = Call(request.path, request.query.get("beta") == "true", headers, body, parsed)
        call = self._with_model(call, self._named(parsed["model"]))
        await self._intake.examine(len(body), self._check, call.request)
        return call

    def _check(self, request: Json) -> None:
        """Raise ModelRefused for what the policy does not allow."""
        policy = self._policy()
        for name in reach.find_models(request):
            if not policy.allows_model(name):
                raise ModelRefused(_not_allowed(name, policy.models), status=403, kind="permission_error")
        for feature in reach.find_features(request):
            if not policy.allows_feature(feature):
                raise ModelRefused(_not_named(feature), status=403, kind="permission_error")

    def _with_model(self, call: Call, model: str) -> Call:
        if model == call.request["model"]:
            return call
        request: Json = {**call.request, "model": model}
        return call._replace(request=request, body=json.dumps(request).encode())

    def _provider(self, access: ModelAccess, model: str) -> Provider:
        if model == offline.MODEL:
            return self._offline
        if access.is_revoked():
            raise ModelRefused("The credential of this session was deleted.", status=401, kind="authentication_error")
        if access.api_key or access.auth_token:
            base_url = access.base_url or self._config.anthropic_base_url
            try:
                return Direct(self._session, base_url, access.api_key, access.auth_token, hint="Check the credential of this session.")
            except ConfigError as error:
                text = f"This session's credential cannot be used: {error}"
                raise ModelRefused(text, status=400, kind="invalid_request_error") from error
        return self._default

    async def _send(self, provider: Provider, call: Call, stack: AsyncExitStack, session_id: str) -> Reply:
        """The first reply that is not a refusal, or the last refusal."""
        started = time.monotonic()
        for attempt in range(self._timing.retries + 1):
            try:
                return await stack.enter_async_context(provider.send(call))
            except ModelRefused as refusal:
                delay = retry.find_delay(refusal, attempt, time.monotonic() - started, self._timing)
                if delay is None:
                    raise
                log.warning("session %s: the model provider answered %d; next try in %.1f s", session_id, refusal.status, delay)
                await asyncio.sleep(delay)
        raise AssertionError("find_delay ends the last attempt")

    async def _pass_on(self, request: web.Request, call: Call, reply: Reply, session_id: str) -> web.StreamResponse:
        """The reply's bytes as they come. A stream that breaks ends with an `error` event, if that can still be read as one."""
        response = web.StreamResponse(headers=reply.headers)
        meter = Meter(call.request["model"], streams=call.streams)
        try:
            await response.prepare(request)
            await self._copy(reply, response, meter, is_stream=call.streams and call.path == MESSAGES)
        except Exception:
            if request.transport is not None:
                request.transport.abort()  # half an answer is out: an error page must not follow it
            raise
        finally:
            meter.finish()
            if meter.has_usage and call.path == MESSAGES:
                await self._report(session_id, meter.usage)
        return response

    async def _copy(self, reply: Reply, response: web.StreamResponse, meter: Meter, *, is_stream: bool) -> None:
        problem = ""
        try:
            async with aclosing(reply.chunks) as chunks:
                async for chunk in chunks:
                    meter.feed(chunk)
                    await response.write(chunk)
            if is_stream and not meter.is_complete:
                problem = "The model provider's answer broke off."
        except StreamBroken as error:
            problem = error.message
        if problem and is_stream and meter.is_between_events:
            await response.write(sse.encode("error", {"type": "error", "error": {"type": "api_error", "message": problem}}))
        await response.write_eof()

    async def _report(self, session_id: str, usage: dict[str, Any]) -> None:
        """Also when the call is being cancelled: tokens that were used are counted."""
        task = asyncio.create_task(self._reported(session_id, usage), name="usage report")
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)
        await asyncio.shield(task)

    async def _reported(self, session_id: str, usage: dict[str, Any]) -> None:
        try:
            await self._on_usage(session_id, usage)
        except Exception:  # the edge of a request: the answer has been given, the count alone is lost
            log.exception("session %s: usage was not recorded", session_id)

    async def _finish_reports(self) -> None:
        if self._reports:
            await asyncio.wait(set(self._reports), timeout=5.0)


def _not_allowed(model: str, patterns: tuple[str, ...]) -> str:
    return f"The model {model!r:.100} is not allowed here; `allow` under [models] in the operator's policy has {', '.join(patterns)[:500]}."


def _not_named(feature: str) -> str:
    return (
        f"The request uses {feature!r:.80}, by which the provider does more than answer; that is refused unless `provider_features` "
        "under [models] in the operator's policy names it."
    )


def _error(refusal: ModelRefused) -> web.Response:
    """In the API's own shape. `x-should-retry: false` says that what could be tried again has been."""
    headers = {**refusal.headers, "x-should-retry": "false"}
    return web.json_response(offline.error_body(refusal), status=refusal.status, headers=headers)
