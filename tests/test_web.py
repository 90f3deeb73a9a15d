"""The server as a whole: errors in one shape, headers, CORS, request bodies, and the life of a server process."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ash.config import Config
from ash.errors import ConfigError
from ash.web import bind, create_app
from tests.harness import Server, serving

Start = Callable[..., Awaitable[Server]]
SOME_ID = "00000000-0000-4000-8000-000000000000"
API_PAGE = Path(__file__).parent.parent / "docs" / "api.md"


def all_routes(server: Server) -> list[tuple[str, str]]:
    found = {(route.method, route.resource.canonical) for route in server.app.router.routes() if route.resource is not None}
    return sorted((method, path) for method, path in found if method != "HEAD")


def filled(path: str) -> str:
    return path.replace("{id}", SOME_ID).replace("{name}", "nobody")


def assert_shape(body: Any, status: int) -> None:
    assert {"error", "statusCode", "code", "message"} <= body.keys() <= {"error", "statusCode", "code", "message", "hint"}
    assert body["statusCode"] == status
    assert body["error"] == body["message"]
    assert body["error"]


# Errors


async def test_every_route_but_health_asks_strangers_for_a_key(server: Server) -> None:
    for method, path in all_routes(server):
        async with server.http.request(method, server.url + filled(path), headers={"Host": "evil.example"}) as answer:
            assert answer.status == (200 if path == "/health" else 401), (method, path)
            if answer.status == 401:
                assert_shape(await answer.json(), 401)


async def test_every_route_of_a_session_answers_404_in_one_shape_when_there_is_none(server: Server) -> None:
    bodies = {"exec": {"command": "true"}, "messages": {"content": "hi"}}
    for method, path in all_routes(server):
        if "{id}" in path and "/sessions/" in path:
            body = bodies.get(path.rpartition("/")[2]) if method == "POST" else None
            assert_shape(await server.call(method, filled(path), body, expect=404), 404)


async def test_every_route_of_a_session_refuses_an_id_that_is_no_uuid(server: Server) -> None:
    for method, path in all_routes(server):
        if "{id}" in path and "/sessions/" in path:
            answer = await server.call(method, path.replace("{id}", "not-a-uuid"), expect=400)
            assert 'params/id must match format "uuid"' in answer["error"]


async def test_every_route_is_documented(server: Server) -> None:
    page = API_PAGE.read_text()
    assert [f"{method} {path}" for method, path in all_routes(server) if f"`{method} {path}`" not in page] == []


async def test_an_unknown_route_and_a_wrong_method_answer_in_the_one_shape(server: Server) -> None:
    unknown = await server.call("GET", "/api/nothing", expect=404)
    assert_shape(unknown, 404)
    assert unknown["error"] == "Route GET:/api/nothing not found"
    async with server.http.put(server.url + "/api/agents") as answer:
        assert_shape(await answer.json(), 405)
        assert answer.headers["Allow"] == "GET, HEAD, POST"


async def test_an_unexpected_error_shows_its_id_and_nothing_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(server.parts.sessions, "list", broken)
    answer = await server.call("GET", "/api/sessions", expect=500)
    assert_shape(answer, 500)
    assert "secret" not in str(answer)
    id = answer["error"].split()[2].rstrip(";")
    assert id in caplog.text
    assert "/secret/place" in caplog.text


# Headers and origins


async def test_every_answer_carries_the_security_headers(server: Server) -> None:
    for path in ("/health", "/api/sessions", "/no/such/route"):
        async with server.http.get(server.url + path) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Server"] == "ash"
            assert "Access-Control-Allow-Origin" not in answer.headers


async def preflight(server: Server, origin: str) -> tuple[int, str | None]:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with server.http.options(server.url + "/api/sessions", headers=headers) as answer:
        return answer.status, answer.headers.get("Access-Control-Allow-Origin")


async def test_no_other_origin_may_ask_by_default(server: Server) -> None:
    assert await preflight(server, "https://app.example") == (401, None)


async def test_an_allowed_origin_may_ask_and_still_needs_a_key(start_server: Start) -> None:
    server = await start_server(allowed_origins="https://app.example/, https://two.example")
    assert await preflight(server, "https://app.example") == (204, "https://app.example")
    assert await preflight(server, "https://evil.example") == (401, None)
    _, key = await server.parts.keys.create("default", "test")
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {key}"}, 200)):
        async with server.http.get(server.url + "/api/sessions", headers={"Origin": "https://two.example", **headers}) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "https://two.example")
            assert answer.headers["Vary"] == "Origin"


async def test_a_stream_can_be_read_by_an_allowed_origin(start_server: Start) -> None:
    server = await start_server(allowed_origins="*")
    id, (_, key) = await server.session(), await server.parts.keys.create("default", "test")
    headers = {"Origin": "https://app.example", "Authorization": f"Bearer {key}"}
    async with server.http.post(f"{server.url}/api/sessions/{id}/messages", json={"content": "hi"}, headers=headers) as answer:
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example")
        await answer.read()


# Bodies


async def post(server: Server, data: Any, path: str = "/api/agents", **headers: str) -> tuple[int, Any]:
    async with server.http.post(server.url + path, data=data, headers=headers) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize(("data", "complaint"), [
    (b'{"name": "a",', "line 1 column 14"),
    (b"[1]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b'{"name": "a", "config": {"x": NaN}}', "NaN is not a JSON value"),
    (b'{"name": "a", "config": {"x": 1e999}}', "too large a number"),
    (b'{"name": "\xff"}', "not UTF-8"),
    (b'{"name": "a", "systemPrompt": "\\ud83d"}', "half of a surrogate pair, \\ud83d"),
    (b"[" * 100_000, "nested too deeply"),
    (b"", "name is required"),
    (b"  ", "name is required"),
])  # fmt: skip
async def test_an_unusable_body_is_refused_with_what_is_wrong(server: Server, data: bytes, complaint: str) -> None:
    status, answer = await post(server, data)
    assert status == 400
    assert_shape(answer, 400)
    assert complaint in answer["error"]


async def test_a_whole_surrogate_pair_in_escapes_is_fine(server: Server) -> None:
    status, _ = await post(server, b'{"name": "a", "systemPrompt": "\\ud83d\\ude00"}')
    assert status == 201


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream", ""])
async def test_a_json_body_is_accepted_whatever_it_is_called(server: Server, content_type: str) -> None:
    status, _ = await post(server, b'{"name": "a", "systemPrompt": "x"}', **{"Content-Type": content_type})
    assert status == 201


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}])
async def test_changes_of_a_session_take_no_body_with_and_without_a_content_type(server: Server, headers: dict[str, str]) -> None:
    id = await server.session()
    for verb in ("pause", "resume", "stop", "fork", "interrupt"):
        status, answer = await post(server, None, f"/api/sessions/{id}/{verb}", **headers)
        assert status in (200, 201), answer


async def test_a_body_that_is_too_large_is_refused_with_the_limit(start_server: Start) -> None:
    server = await start_server(max_body_mb=1)
    status, answer = await post(server, io.BytesIO(b" " * (1024 * 1024 + 1)))
    assert status == 413
    assert_shape(answer, 413)
    assert "the limit here is 1 MiB" in answer["error"]


async def test_a_large_body_without_a_length_is_cut_off_at_the_limit(start_server: Start) -> None:
    server = await start_server(max_body_mb=1)

    async def endless() -> Any:
        for _ in range(64):
            yield b" " * 65536

    async with server.http.post(server.url + "/api/agents", data=endless()) as answer:
        assert answer.status == 413


async def test_a_compressed_bomb_is_cut_off_at_the_limit(start_server: Start) -> None:
    import zlib

    server = await start_server(max_body_mb=1)
    bomb = zlib.compress(b" " * (64 * 1024 * 1024))
    status, _ = await post(server, bomb, **{"Content-Encoding": "deflate"})
    assert status == 413


async def test_a_body_that_is_not_encoded_as_it_says_is_refused(server: Server) -> None:
    status, answer = await post(server, b"not gzip at all", **{"Content-Encoding": "gzip"})
    assert (status, answer["code"]) == (400, "invalid_request")


# The life of a server


async def test_a_second_server_on_the_same_data_folder_is_refused(server: Server, make_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="uses the data folder"):
        async with serving(make_config()):
            pytest.fail("it started")


async def test_a_server_whose_start_fails_leaves_nothing_open(
    start_server: Start, make_config: Callable[..., Config], data_dir: str
) -> None:
    Path(data_dir, "ash.db").mkdir()
    runner = web.AppRunner(create_app(make_config()))
    with pytest.raises(Exception, match=r"ash\.db|database"):
        await runner.setup()
    await runner.cleanup()
    Path(data_dir, "ash.db").rmdir()
    assert await (await start_server()).call("GET", "/health", expect=200)


def test_the_same_port_is_taken_on_every_address_of_localhost() -> None:
    sockets = bind("localhost", 0)
    try:
        assert len({listener.getsockname()[1] for listener in sockets}) == 1
        assert "127.0.0.1" in {listener.getsockname()[0] for listener in sockets}
    finally:
        for listener in sockets:
            listener.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_is_refused_in_words(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}"):
        bind(host, 0)


def test_a_taken_port_is_said_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken.*--port"):
            bind("127.0.0.1", port)


PROGRAM = """
import sys, ash.web
from ash.config import load_config
from tests import fakes
ash.web.Sandboxes = fakes.FakeSandboxes
ash.web.run(load_config(dict(argument.split("=") for argument in sys.argv[1:]), environ={}))
"""


@contextmanager
def running(data_dir: str, *settings: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server process and what it printed while starting. It is killed if the test has not stopped it."""
    arguments = [f"data_dir={data_dir}", "port=0", "model=offline", "shutdown_timeout=0.2", *settings]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        os.set_blocking(child.stdout.fileno(), False)
        lines += child.stdout.readlines()
        try:
            yield child, lines
        finally:
            child.kill()


def test_a_server_process_says_where_it_is_and_stops_cleanly(data_dir: str) -> None:
    with running(data_dir) as (child, lines):
        card_path = Path(data_dir, "server.json")
        card = json.loads(card_path.read_text())
        assert card["pid"] == child.pid
        assert lines[0].strip().endswith(card["url"])
        assert stat.S_IMODE(card_path.stat().st_mode) == 0o600
        with urllib.request.urlopen(card["url"] + "/health", timeout=5) as answer:
            assert json.load(answer)["status"] == "ok"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
        assert not card_path.exists()


def test_the_start_says_where_the_key_is_and_never_the_key(data_dir: str) -> None:
    with running(data_dir) as (child, lines):
        key = Path(data_dir, "initial-api-key").read_text().strip()
        child.terminate()
        _, errors = child.communicate(timeout=10)
    assert any("initial-api-key" in line for line in lines)
    assert key not in "".join(lines) + errors


def test_a_server_without_isolation_warns_loudly(data_dir: str) -> None:
    with running(data_dir, "sandbox=none") as (child, lines):
        child.terminate()
        child.communicate(timeout=10)
    assert any(line.startswith("WARNING") and "--sandbox none" in line for line in lines)


def test_a_process_that_cannot_have_its_port_ends_before_it_starts_anything(data_dir: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments = [f"data_dir={data_dir}", f"port={other.getsockname()[1]}"]
        done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode != 0
    assert "is taken" in done.stderr
    assert os.listdir(data_dir) == []
