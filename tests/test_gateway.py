"""The gateway over its real Unix sockets, against a loopback server that stands in for the provider."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import resource
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ash import sse
from ash.config import Secret, load_config
from ash.errors import ConfigError, ModelRefused, SandboxFailed
from ash.gateway import DEFAULT_MODEL, Gateway, ModelAccess
from ash.providers import Timing, redact, refused, retry
from ash.providers.doorway import MAX_CONNECTIONS
from ash.providers.intake import parse_fairly
from ash.providers.meter import Meter

KEY = "sk-ant-test-0123456789"
QUICK = Timing(connect=2.0, idle=2.0, retries=2, retry_budget=3.0)
ACCESS = ModelAccess("session-1", "default", "claude-x")
ASK = {"model": "claude-x", "max_tokens": 50, "stream": True, "messages": [{"role": "user", "content": "hi"}]}

START = {
    "type": "message_start",
    "message": {"id": "m", "type": "message", "role": "assistant", "model": "claude-real", "content": [],
                "usage": {"input_tokens": 11, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "output_tokens": 1}},
}  # fmt: skip
TEXT = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "héllo \u2028"}}
END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}}
STOP = {"type": "message_stop"}


def frames(*events: dict[str, Any]) -> bytes:
    return b"".join(sse.encode(event["type"], event) for event in events)


WHOLE = frames(START, TEXT, END, STOP)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Upstream:
    """Stands in for the provider: answers each request with the next handler, the last one for ever."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers = list(handlers)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.url = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.path_qs, headers, await request.read()))
        handler = self.handlers.pop(0) if len(self.handlers) > 1 else self.handlers[0]
        self.started.set()
        try:
            return await handler(request)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@asynccontextmanager
async def listening(upstream: Upstream) -> AsyncIterator[Upstream]:
    app = web.Application(client_max_size=100 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", upstream.serve)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield upstream
    finally:
        await runner.cleanup()


def stream(*parts: bytes, then: str = "end") -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "request-id": "req_1"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        if then == "hang":
            await asyncio.sleep(60)
        if then == "abort":
            assert request.transport is not None
            request.transport.abort()
        return response

    return handler


def error(status: int, message: str = "no", kind: str = "some_error", **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        body = {"type": "error", "error": {"type": kind, "message": message}}
        return web.json_response(body, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return handler


def whole(value: dict[str, Any]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(value)

    return handler


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def error(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert value["type"] == "error"
        found: dict[str, Any] = value["error"]
        return found

    @property
    def events(self) -> list[Any]:
        return [frame.data for frame in sse.Decoder().feed(self.body)]


class Rig:
    """A gateway with one sandbox's socket, and a client on the sandbox's side."""

    def __init__(self, gateway: Gateway, folder: str, usage: list[tuple[str, dict[str, Any]]]) -> None:
        self.gateway, self.folder, self.usage = gateway, folder, usage

    def path(self, sandbox_id: str = "sb") -> str:
        return os.path.join(self.folder, f"{sandbox_id}.sock")

    async def open(self, sandbox_id: str = "sb", access: ModelAccess | None = ACCESS) -> None:
        await self.gateway.open(sandbox_id, self.path(sandbox_id))
        if access is not None:
            self.gateway.bind(sandbox_id, access)

    @asynccontextmanager
    async def client(self, sandbox_id: str = "sb") -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(self.path(sandbox_id))
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=5)) as session:
            yield session

    async def ask(
        self, body: Any = ASK, path: str = "/v1/messages", *, sandbox_id: str = "sb", method: str = "POST", **headers: str
    ) -> Answer:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        sent = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        async with (
            self.client(sandbox_id) as session,
            session.request(method, f"http://gateway{path}", data=data, headers=sent) as response,
        ):
            return Answer(response.status, {name.lower(): value for name, value in response.headers.items()}, await response.read())


@asynccontextmanager
async def rigged(environ: dict[str, str] | None = None, timing: Timing = QUICK, **flags: Any) -> AsyncIterator[Rig]:
    usage: list[tuple[str, dict[str, Any]]] = []

    async def on_usage(session_id: str, seen: dict[str, Any]) -> None:
        usage.append((session_id, seen))

    config = load_config(flags, environ or {})
    with tempfile.TemporaryDirectory() as folder:
        async with Gateway(config, on_usage=on_usage, timing=timing) as gateway:
            yield Rig(gateway, folder, usage)


@asynccontextmanager
async def connected(*handlers: Handler, timing: Timing = QUICK, **environ: str) -> AsyncIterator[tuple[Rig, Upstream]]:
    """A rig whose provider is an Upstream with these handlers."""
    async with listening(Upstream(*handlers)) as upstream:
        given = {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": upstream.url, **environ}
        async with rigged(given, timing) as rig:
            await rig.open()
            yield rig, upstream


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


# What goes through


async def test_a_stream_arrives_byte_for_byte_and_its_usage_is_reported_once() -> None:
    async with connected(stream(WHOLE[:50], WHOLE[50:51], WHOLE[51:])) as (rig, _):
        answer = await rig.ask()
    assert (answer.status, answer.body) == (200, WHOLE)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["request-id"] == "req_1"
    assert rig.usage == [
        (
            "session-1",
            {
                "model": "claude-real",
                "input_tokens": 11,
                "output_tokens": 7,
                "cache_creation_input_tokens": 2,
                "cache_read_input_tokens": 3,
            },
        )
    ]


async def test_the_request_body_arrives_byte_for_byte() -> None:
    body = b'{ "model":"claude-x",  "max_tokens": 5, "messages":[], "system": "\\u00e9 \xc3\xa9" }'
    async with connected(stream(WHOLE)) as (rig, upstream):
        await rig.ask(body)
    assert upstream.requests[0][2] == body


async def test_our_key_is_put_in_and_the_callers_headers_are_dropped() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        await rig.ask(x_api_key="evil", authorization="Bearer evil", cookie="a=b", anthropic_beta="b1", anthropic_version="2026-10-21",
                      x_forwarded_for="1.2.3.4", accept="text/event-stream", proxy_authorization="evil")  # fmt: skip
    headers = upstream.requests[0][1]
    assert headers["x-api-key"] == KEY
    assert (headers["anthropic-beta"], headers["anthropic-version"], headers["accept"]) == ("b1", "2026-10-21", "text/event-stream")
    assert headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie", "x-forwarded-for", "proxy-authorization"} & set(headers)
    assert "evil" not in json.dumps(headers)


async def test_a_bearer_token_is_sent_as_one() -> None:
    async with connected(stream(WHOLE), ANTHROPIC_API_KEY="", ANTHROPIC_AUTH_TOKEN="tok-1") as (rig, upstream):
        await rig.ask()
    headers = upstream.requests[0][1]
    assert headers["authorization"] == "Bearer tok-1"
    assert "x-api-key" not in headers


async def test_the_path_of_the_base_url_and_only_the_beta_query_are_kept() -> None:
    async with listening(Upstream(stream(WHOLE))) as upstream, rigged({"ANTHROPIC_BASE_URL": f"{upstream.url}/proxy/"}) as rig:
        await rig.open()
        await rig.ask(path="/v1/messages?beta=true&x=1")
        await rig.ask(path="/v1/messages?x=1")
    assert [path for path, _, _ in upstream.requests] == ["/proxy/v1/messages?beta=true", "/proxy/v1/messages"]


async def test_a_reply_that_does_not_stream_is_passed_on_and_counted() -> None:
    message = {"type": "message", "model": "claude-real", "usage": {"input_tokens": 4, "output_tokens": 2}}
    async with connected(whole(message)) as (rig, _):
        answer = await rig.ask({**ASK, "stream": False})
    assert json.loads(answer.body) == message
    assert rig.usage == [("session-1", {"model": "claude-real", "input_tokens": 4, "output_tokens": 2})]


async def test_counting_tokens_is_passed_on_and_not_counted_as_usage() -> None:
    async with connected(whole({"input_tokens": 9})) as (rig, upstream):
        answer = await rig.ask({"model": "m", "messages": []}, "/v1/messages/count_tokens")
    assert json.loads(answer.body) == {"input_tokens": 9}
    assert upstream.requests[0][0] == "/v1/messages/count_tokens"
    assert rig.usage == []


async def test_a_short_model_name_is_written_out_for_the_provider() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        await rig.ask({**ASK, "model": "sonnet"})
        await rig.ask({**ASK, "model": "default"})
    assert [json.loads(body)["model"] for _, _, body in upstream.requests] == [DEFAULT_MODEL, DEFAULT_MODEL]


async def test_events_are_passed_on_as_they_come() -> None:
    async with (
        connected(stream(frames(START), then="hang")) as (rig, _),
        rig.client() as session,
        session.post("http://gateway/v1/messages", json=ASK) as response,
    ):
        assert await response.content.readany() == frames(START)


# Who may ask for what


async def test_a_sandbox_without_a_session_is_refused() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        await rig.open("warm", None)
        answer = await rig.ask(sandbox_id="warm")
    assert (answer.status, answer.error["type"]) == (403, "permission_error")
    assert upstream.requests == []


async def test_each_socket_speaks_for_its_own_session() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        await rig.open("other", ModelAccess("session-2", "default", "m", api_key=Secret("own-key")))
        await asyncio.gather(rig.ask(), rig.ask(sandbox_id="other"))
    assert sorted(session for session, _ in rig.usage) == ["session-1", "session-2"]
    assert sorted(headers["x-api-key"] for _, headers, _ in upstream.requests) == ["own-key", KEY]


async def test_a_session_credential_wins_over_the_server_and_its_own_address_is_used() -> None:
    async with listening(Upstream(stream(WHOLE))) as own, connected(stream(WHOLE)) as (rig, upstream):
        await rig.open("sb", ACCESS._replace(auth_token=Secret("tok"), base_url=own.url))
        await rig.ask()
    assert upstream.requests == []
    assert own.requests[0][1]["authorization"] == "Bearer tok"
    assert "x-api-key" not in own.requests[0][1]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/messages"), ("POST", "/v1/models"), ("POST", "/v1/messages/batches"), ("GET", "/"), ("POST", "/v1/files"),
     ("DELETE", "/v1/messages"), ("POST", "/v1/messages/../complete"), ("POST", "/v1//messages"), ("POST", "/v1/messages%2F..")],
)  # fmt: skip
async def test_nothing_but_the_two_endpoints_exists(method: str, path: str) -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask(path=path, method=method)
    assert (answer.status, answer.error["type"]) == (404, "not_found_error")
    assert upstream.requests == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 1}', b'{"model": ""}', b"{}", b"[" * 100_000, b"\xff\xfe"])
async def test_a_body_without_a_model_is_refused_without_a_call(body: bytes) -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask(body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert upstream.requests == []


async def test_a_body_beyond_the_limit_is_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.gateway.MAX_BODY_BYTES", 1000)
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask(b"x" * 2000)
    assert (answer.status, answer.error["type"]) == (413, "request_too_large")
    assert "1000 bytes" in answer.error["message"]
    assert upstream.requests == []


async def test_more_calls_at_once_than_allowed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.gateway._MAX_CALLS_PER_SANDBOX", 1)
    async with (
        connected(stream(frames(START), then="hang")) as (rig, upstream),
        rig.client() as session,
        session.post("http://gateway/v1/messages", json=ASK),
    ):
        assert (await rig.ask()).status == 429
    assert len(upstream.requests) == 1


# What a sandbox may take up


def padded(size: int, filler: str = "x") -> bytes:
    return json.dumps({**ASK, "metadata": {"filler": filler * size}}).encode()


@asynccontextmanager
async def connections(rig: Rig, count: int) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    opened = [await asyncio.open_unix_connection(rig.path()) for _ in range(count)]
    try:
        yield opened
    finally:
        for _, writer in opened:
            writer.close()


async def count_closed(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]], expected: int) -> None:
    async def is_closed(reader: asyncio.StreamReader) -> bool:
        try:
            return await asyncio.wait_for(reader.read(1), 0.01) == b""
        except (TimeoutError, ConnectionError) as error:
            return isinstance(error, ConnectionError)

    async with asyncio.timeout(5):
        while sum([await is_closed(reader) for reader, _ in opened]) != expected:
            pass


async def test_connections_beyond_the_limit_are_closed_at_once_and_another_sandbox_is_still_served() -> None:
    async with connected(stream(WHOLE)) as (rig, _), connections(rig, MAX_CONNECTIONS + 30) as opened:
        await count_closed(opened, 30)
        await rig.open("other")
        assert (await rig.ask(sandbox_id="other")).status == 200


async def test_places_that_get_free_can_be_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.providers.doorway.MAX_CONNECTIONS", 2)
    async with connected(stream(WHOLE)) as (rig, _):
        statuses = [(await rig.ask()).status for _ in range(6)]
    assert statuses == [200] * 6


@pytest.mark.parametrize("sent", [b"", b"POST /v1/messages HTTP/1.1\r\nHost: g\r\n"])
async def test_a_connection_without_a_whole_head_is_closed_after_a_while(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.providers.doorway.IDLE_SECONDS", 0.05)
    async with connected(stream(WHOLE)) as (rig, _), connections(rig, 1) as [(reader, writer)]:
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.providers.intake.BODY_SECONDS", 0.05)
    async with connected(stream(WHOLE)) as (rig, upstream), connections(rig, 1) as [(reader, writer)]:
        writer.write(b"POST /v1/messages HTTP/1.1\r\nHost: g\r\nContent-Length: 100\r\n\r\n{")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 408 ")
    assert upstream.requests == []


async def test_a_closed_sandboxs_idle_connections_end() -> None:
    async with connected(stream(WHOLE)) as (rig, _), connections(rig, 3) as opened:
        await rig.ask()
        await rig.gateway.close("sb")
        await count_closed(opened, 3)


async def test_the_soft_limit_of_descriptors_is_raised_at_the_start() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        async with rigged():
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_large_body_arrives_byte_for_byte_too() -> None:
    body = padded(3_000_000)
    async with connected(stream(WHOLE)) as (rig, upstream):
        assert (await rig.ask(body)).status == 200
    assert upstream.requests[0][2] == body


@pytest.mark.parametrize("part", ["[],", '{"a":1},'])
async def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(part: str) -> None:
    body = b'{"model": "claude-x", "messages": [' + part.encode() * 600_000 + b"1]}"
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask(body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert "brackets, braces and commas" in answer.error["message"]
    assert upstream.requests == []


async def test_a_large_body_that_is_not_json_is_refused() -> None:
    async with connected(stream(WHOLE)) as (rig, _):
        statuses = [(await rig.ask(body)).status for body in (padded(300_000)[:-1], b"[" * 300_000, b"\xff" * 300_000)]
    assert statuses == [400, 400, 400]


async def test_a_sandbox_whose_calls_hold_too_much_is_refused_until_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.providers.intake.MAX_SANDBOX_BYTES", 10_000)
    async with connected(stream(frames(START), then="hang"), stream(WHOLE)) as (rig, _):
        await rig.open("other")
        async with rig.client() as session, session.post("http://gateway/v1/messages", data=padded(8000)) as response:
            await response.content.readany()
            refused_answer, other = await rig.ask(padded(8000)), await rig.ask(padded(8000), sandbox_id="other")
        await until(lambda: not rig.gateway._intake.held)
        assert (await rig.ask(padded(8000))).status == 200
    assert (refused_answer.status, refused_answer.error["type"], other.status) == (429, "rate_limit_error", 200)


async def test_all_sandboxes_together_hold_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.providers.intake.MAX_TOTAL_BYTES", 10_000)
    async with connected(stream(frames(START), then="hang"), stream(WHOLE)) as (rig, _):
        await rig.open("other")
        async with rig.client() as session, session.post("http://gateway/v1/messages", data=padded(8000)) as response:
            await response.content.readany()
            assert (await rig.ask(padded(8000), sandbox_id="other")).status == 429


@pytest.mark.parametrize("text", ['{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude00"], "b": {}}', '\ufeff{"a": 1}', "[NaN]"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_fair_parser_reads_what_the_usual_one_reads(text: str, encoding: str) -> None:
    body = text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding)
    assert repr(parse_fairly(body)) == repr(json.loads(body))


@pytest.mark.parametrize("body", [b"", b"{", b"[1,]", b'{"a" 1}', b'{"a": 1} x', b"\xff"])
def test_the_fair_parser_refuses_what_the_usual_one_refuses(body: bytes) -> None:
    for parse in (json.loads, parse_fairly):
        with pytest.raises(ValueError):  # noqa: PT011 - the decoder's and the codec's errors have no other base
            parse(body)


async def test_a_huge_conversation_with_the_offline_model_leaves_the_loop_free() -> None:
    messages = [{"role": "user", "content": "hi"}] * 60_000
    async with rigged() as rig:
        await rig.open()
        task = asyncio.create_task(rig.ask({**ASK, "messages": messages}))
        await rig.open("other")
        assert (await rig.ask(sandbox_id="other")).status == 200
        assert not task.done()
        assert (await task).events[-1] == STOP


# Errors, retries, breaks


@pytest.mark.parametrize(
    ("status", "words"),
    [(400, "rejected the request"), (401, "refused the key"), (402, "payment"), (403, "refused access"), (404, "does not know this model"),
     (413, "too large"), (429, "rate limit"), (500, "failed with HTTP 500"), (503, "failed with HTTP 503"), (529, "overloaded")],
)  # fmt: skip
async def test_a_refusal_is_put_in_words_and_keeps_the_providers_status_and_type(status: int, words: str) -> None:
    async with connected(error(status, f"told you {KEY}", x_should_retry="false", request_id="req_9")) as (rig, upstream):
        answer = await rig.ask()
    assert (answer.status, answer.error["type"]) == (status, "some_error")
    assert words in answer.error["message"]
    assert "told you ***" in answer.error["message"]
    assert KEY not in answer.body.decode()
    assert answer.headers["request-id"] == "req_9"
    assert len(upstream.requests) == 1
    assert rig.usage == []


async def test_a_refused_key_says_where_it_is_set() -> None:
    async with connected(error(401, "invalid x-api-key", "authentication_error")) as (rig, _):
        answer = await rig.ask()
    assert answer.error["message"] == (
        "The model provider refused the key: invalid x-api-key. "
        "Check ANTHROPIC_API_KEY, or ANTHROPIC_AUTH_TOKEN, and start the server again."
    )


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 529])
async def test_a_passing_failure_is_tried_again(status: int) -> None:
    failing = error(status, retry_after_ms="10")
    async with connected(failing, failing, stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask()
    assert answer.body == WHOLE
    assert len(upstream.requests) == 3


async def test_after_two_retries_the_last_refusal_is_the_answer() -> None:
    async with connected(error(529, "busy", "overloaded_error", retry_after_ms="1")) as (rig, upstream):
        answer = await rig.ask()
    assert (answer.status, answer.error["type"]) == (529, "overloaded_error")
    assert answer.headers["x-should-retry"] == "false"
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_lasting_failure_is_not_tried_again(status: int) -> None:
    async with connected(error(status)) as (rig, upstream):
        assert (await rig.ask()).status == status
    assert len(upstream.requests) == 1


async def test_a_wait_longer_than_the_budget_is_left_to_the_user() -> None:
    async with connected(error(429, retry_after="3600")) as (rig, upstream):
        answer = await rig.ask()
    assert answer.status == 429
    assert answer.headers["retry-after"] == "3600"
    assert "Retry-After: 3600" in answer.error["message"]
    assert len(upstream.requests) == 1


async def test_a_provider_that_is_not_there_is_named() -> None:
    async with rigged({"ANTHROPIC_BASE_URL": "http://user:pw@127.0.0.1:9"}, Timing(retries=0)) as rig:
        await rig.open()
        answer = await rig.ask()
    assert answer.status == 502
    assert answer.error["message"] == "The model provider at 127.0.0.1:9 could not be reached: Connection refused."
    assert "pw" not in answer.body.decode()


async def test_a_connection_that_is_lost_before_the_first_byte_is_tried_again() -> None:
    async def drop(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with connected(drop, stream(WHOLE), timing=QUICK) as (rig, upstream):
        assert (await rig.ask()).body == WHOLE
    assert len(upstream.requests) == 2


async def test_a_provider_that_never_answers_is_given_up() -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async with connected(silent, timing=Timing(idle=0.05, retries=1, retry_budget=0.04)) as (rig, _):
        answer = await rig.ask()
    assert (answer.status, answer.error["type"]) == (504, "timeout_error")
    assert "did not answer in time" in answer.error["message"]


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("http://elsewhere.invalid/")

    async with connected(elsewhere) as (rig, upstream):
        answer = await rig.ask()
    assert answer.status == 502
    assert "points to http://elsewhere.invalid/" in answer.error["message"]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("then", ["abort", "end"])
async def test_a_broken_stream_ends_with_an_error_event_and_no_message_stop(then: str) -> None:
    async with connected(stream(frames(START, TEXT), then=then)) as (rig, upstream):
        answer = await rig.ask()
    assert answer.status == 200
    assert answer.events[:2] == [START, TEXT]
    assert answer.events[2]["type"] == "error"
    assert "broke off" in answer.events[2]["error"]["message"]
    assert len(answer.events) == 3
    assert len(upstream.requests) == 1
    assert rig.usage[0][1]["input_tokens"] == 11


async def test_a_stream_that_breaks_inside_an_event_just_ends() -> None:
    part = frames(START) + b'event: content_block_delta\ndata: {"ty'
    async with connected(stream(part, then="abort")) as (rig, _):
        answer = await rig.ask()
    assert answer.body == part
    assert len(rig.usage) == 1


async def test_a_stream_that_goes_silent_ends() -> None:
    async with connected(stream(frames(START), then="hang"), timing=Timing(idle=0.05)) as (rig, _):
        answer = await rig.ask()
    assert "sent nothing for too long" in answer.events[1]["error"]["message"]


async def test_a_caller_that_leaves_ends_the_providers_call_and_the_usage_so_far_is_reported() -> None:
    async with connected(stream(frames(START), then="hang")) as (rig, upstream):
        async with rig.client() as session, session.post("http://gateway/v1/messages", json=ASK) as response:
            await response.content.readany()
        await asyncio.wait_for(upstream.cancelled.wait(), 5)
        await until(lambda: bool(rig.usage))
    assert rig.usage[0][1]["output_tokens"] == 1


async def test_a_caller_that_leaves_before_the_first_byte_ends_the_providers_call() -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async with connected(silent) as (rig, upstream):
        task = asyncio.create_task(rig.ask())
        await asyncio.wait_for(upstream.started.wait(), 5)
        task.cancel()
        await asyncio.wait_for(upstream.cancelled.wait(), 5)
    assert rig.usage == []


async def test_usage_that_cannot_be_recorded_does_not_spoil_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(stream(WHOLE)) as (rig, _):

        async def fail(session_id: str, usage: dict[str, Any]) -> None:
            raise RuntimeError("disk full")

        rig.gateway._on_usage = fail
        assert (await rig.ask()).body == WHOLE
    assert "usage was not recorded" in caplog.text


async def test_nothing_secret_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with connected(error(500, f"key {KEY}", retry_after_ms="1"), stream(WHOLE)) as (rig, _):
        await rig.ask({**ASK, "system": "very private"})
    assert KEY not in caplog.text
    assert "very private" not in caplog.text


# Sockets


async def test_the_socket_can_be_opened_by_every_user_of_its_folder() -> None:
    async with rigged() as rig:
        await rig.open()
        assert stat.S_IMODE(os.stat(rig.path()).st_mode) == 0o666


async def test_a_closed_sandbox_is_not_listened_to_and_its_calls_end() -> None:
    async with connected(stream(frames(START), then="hang")) as (rig, upstream), rig.client() as session:
        async with session.post("http://gateway/v1/messages", json=ASK) as response:
            await response.content.readany()
            await rig.gateway.close("sb")
            await asyncio.wait_for(upstream.cancelled.wait(), 5)
        with pytest.raises(aiohttp.ClientConnectionError):
            await rig.ask()
        await rig.gateway.close("sb")


async def test_a_socket_left_by_a_dead_server_is_replaced() -> None:
    async with connected(stream(WHOLE)) as (rig, _):
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(rig.path("again"))
        await rig.open("again")
        assert (await rig.ask(sandbox_id="again")).status == 200


async def test_a_socket_path_that_is_too_long_says_so() -> None:
    async with rigged() as rig:
        with pytest.raises(SandboxFailed, match="shorter path"):
            await rig.gateway.open("sb", "/tmp/" + "x" * 120)


async def test_a_folder_that_is_not_there_says_so() -> None:
    async with rigged() as rig:
        with pytest.raises(SandboxFailed, match="cannot listen"):
            await rig.gateway.open("sb", os.path.join(rig.folder, "missing", "s.sock"))


# Which provider


@pytest.mark.parametrize(
    ("environ", "provider", "model"),
    [
        ({}, "offline", "offline"),
        ({"ANTHROPIC_API_KEY": KEY}, "anthropic", DEFAULT_MODEL),
        ({"ANTHROPIC_AUTH_TOKEN": "t", "ASH_MODEL": "claude-haiku-5-5"}, "anthropic", "claude-haiku-5-5"),
        ({"ANTHROPIC_API_KEY": KEY, "ASH_MODEL": "offline"}, "offline", "offline"),
        ({"ANTHROPIC_BASE_URL": "http://localhost:8080"}, "anthropic", DEFAULT_MODEL),
        ({"CLAUDE_CODE_USE_BEDROCK": "1"}, "bedrock", DEFAULT_MODEL),
        ({"CLAUDE_CODE_USE_VERTEX": "1", "ANTHROPIC_API_KEY": KEY}, "vertex", DEFAULT_MODEL),
    ],
)
async def test_the_settings_decide_the_provider(environ: dict[str, str], provider: str, model: str) -> None:
    async with rigged(environ) as rig:
        shown = rig.gateway.describe()
    assert (shown["provider"], shown["model"]) == (provider, model)
    assert ("notice" in shown) == (provider == "offline")
    assert KEY not in json.dumps(shown)


async def test_without_a_provider_the_offline_model_answers_and_the_notice_says_how_to_change_that() -> None:
    async with rigged() as rig:
        await rig.open()
        answer = await rig.ask()
        assert "Set ANTHROPIC_API_KEY" in rig.gateway.describe()["notice"]
    assert answer.events[0]["message"]["model"] == "offline"
    assert answer.events[-1] == STOP
    assert rig.usage[0][1]["model"] == "offline"
    assert rig.usage[0][1]["output_tokens"] > 5


async def test_the_model_offline_is_never_sent_to_a_provider() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask({**ASK, "model": "offline"})
        counted = await rig.ask({"model": "offline", "messages": ASK["messages"]}, "/v1/messages/count_tokens")
    assert answer.events[-1] == STOP
    assert json.loads(counted.body)["input_tokens"] > 0
    assert upstream.requests == []


async def test_the_offline_model_refuses_what_the_real_api_refuses() -> None:
    async with rigged() as rig:
        await rig.open()
        answer = await rig.ask({"model": "offline", "messages": ASK["messages"]})
    assert (answer.status, answer.error) == (400, {"type": "invalid_request_error", "message": "max_tokens: Field required"})


async def test_a_scripted_error_passes_and_a_scripted_break_is_seen(tmp_path: Any) -> None:
    script = tmp_path / "script.json"
    script.write_text(
        json.dumps(
            {"replies": [{"text": "half of it", "error": {"status": 529, "times": 2, "headers": {"retry-after-ms": "1"}}, "cut": 4}]}
        )
    )
    async with rigged(offline_script=str(script)) as rig:
        await rig.open()
        answer = await rig.ask()
    assert [event["type"] for event in answer.events] == ["message_start", "content_block_start", "ping", "content_block_delta", "error"]


async def test_the_base_url_is_shown_without_its_password() -> None:
    async with rigged({"ANTHROPIC_BASE_URL": "http://user:secret@proxy.test:8080/x/"}) as rig:
        assert rig.gateway.describe()["baseUrl"] == "http://proxy.test:8080/x"


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "http://", "/path"])
async def test_a_base_url_that_is_none_stops_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match="ANTHROPIC_BASE_URL"):
        async with rigged({"ANTHROPIC_BASE_URL": url}):
            pass


async def test_a_script_that_is_not_there_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        async with rigged(offline_script="/nowhere/script.json"):
            pass


# Pure parts


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [(429, {}, True), (408, {}, True), (409, {}, True), (500, {}, True), (529, {}, True), (400, {}, False), (401, {}, False),
     (500, {"x-should-retry": "false"}, False), (400, {"x-should-retry": "true"}, True)],
)  # fmt: skip
def test_retries_follow_the_official_clients_rules(status: int, headers: dict[str, str], expected: bool) -> None:
    assert retry.should_retry(ModelRefused("x", status=status, headers=headers)) is expected


def test_waits_double_with_jitter_up_to_a_limit() -> None:
    waits = [retry.backoff(attempt) for attempt in range(8)]
    assert all(0.75 * min(0.5 * 2**attempt, 8) <= wait <= min(0.5 * 2**attempt, 8) for attempt, wait in enumerate(waits))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "2"}, 2.0), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5), ({}, None),
     ({"retry-after": "soon"}, None)],
)  # fmt: skip
def test_the_asked_wait_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry.parse_retry_after(headers) == seconds


def test_a_wait_until_a_date_is_read() -> None:
    seconds = retry.parse_retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"})
    assert seconds is not None
    assert seconds > 1_000_000


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"<html>Bad gateway</html>", "The model provider failed with HTTP 502."), (b"", "The model provider failed with HTTP 502."),
     (b"upstream down", "The model provider failed with HTTP 502: upstream down."),
     (b'{"error": "no such tenant"}', "The model provider failed with HTTP 502: no such tenant."),
     (b'{"message": "nope."}', "The model provider failed with HTTP 502: nope.")],
)  # fmt: skip
def test_other_error_shapes_are_understood(body: bytes, message: str) -> None:
    assert refused(502, body, {}).message == message


def test_what_looks_like_a_key_is_never_shown() -> None:
    shown = redact("a sk-ant-api03-AbC_d- b AKIAIOSFODNN7EXAMPLE c " + "x" * 80 + " d tiny", ("tiny",))
    assert shown == "a *** b *** c *** d ***"


def test_a_meter_gives_up_on_an_endless_event(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter("m", streams=True)
    monkeypatch.setattr(meter, "_decoder", sse.Decoder(max_bytes=100))
    meter.feed(frames(START)[:50])
    meter.feed(b"x" * 200)
    meter.feed(b"more")
    meter.finish()
    assert meter.is_complete
    assert not meter.has_usage
