"""Who may call: keys, the server's own user on this machine, and everybody who only looks like it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from ash import peer
from tests.harness import Server, as_nobody, needs_root

Start = Callable[..., Awaitable[Server]]
LISTED = "/api/sessions"


async def status(server: Server, headers: dict[str, str] | None = None, path: str = LISTED, method: str = "GET") -> int:
    async with server.http.request(method, server.url + path, headers=headers or {}) as answer:
        return answer.status


async def refusal(server: Server, headers: dict[str, str] | None = None) -> Any:
    return await server.call("GET", LISTED, expect=401, headers=headers or {})


async def new_key(server: Server, tenant: str = "default") -> dict[str, str]:
    _, plain = await server.parts.keys.create(tenant, "test")
    return {"Authorization": f"Bearer {plain}"}


async def test_the_servers_own_user_needs_no_key_over_loopback(server: Server) -> None:
    assert await status(server) == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
async def test_the_names_of_this_machine_are_accepted_with_and_without_a_port(server: Server, host: str) -> None:
    assert await status(server, {"Host": host}) == 200
    assert await status(server, {"Host": f"{host}:{server.port}"}) == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:4100", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "localhost:x", "",
])  # fmt: skip
async def test_a_foreign_host_as_in_dns_rebinding_needs_a_key(server: Server, host: str) -> None:
    assert "Host" in (await refusal(server, {"Host": host}))["hint"]
    assert await status(server, {"Host": host, **await new_key(server)}) == 200


async def test_two_host_headers_need_a_key(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /api/sessions HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert (await reader.readline()).split()[1] in (b"400", b"401")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost", "http://localhost.evil.example"]
)
async def test_a_page_of_another_origin_needs_a_key(server: Server, origin: str) -> None:
    await refusal(server, {"Origin": origin})
    assert await status(server, {"Origin": origin, **await new_key(server)}) == 200


async def test_a_page_of_our_own_origin_needs_none(server: Server) -> None:
    assert await status(server, {"Origin": server.url}) == 200


@pytest.mark.parametrize("header", [
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded", "X-Real-IP", "CF-Connecting-IP",
])  # fmt: skip
async def test_a_request_through_a_proxy_needs_a_key(server: Server, header: str) -> None:
    await refusal(server, {header: "10.0.0.1"})
    assert await status(server, {header: "10.0.0.1", **await new_key(server)}) == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "strange"])
async def test_a_browser_that_says_the_request_is_from_another_site_needs_a_key(server: Server, site: str) -> None:
    await refusal(server, {"Sec-Fetch-Site": site})


@pytest.mark.parametrize("site", ["same-origin", "none"])
async def test_a_browser_on_our_own_pages_needs_none(server: Server, site: str) -> None:
    assert await status(server, {"Sec-Fetch-Site": site}) == 200


async def test_a_simple_cross_site_post_creates_nothing(server: Server) -> None:
    body = '{"name":"planted","systemPrompt":"x"}'
    headers = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    async with server.http.post(server.url + "/api/agents", data=body, headers=headers) as answer:
        assert answer.status == 401
    assert (await server.call("GET", "/api/agents"))["agents"] == []


@needs_root
async def test_another_local_user_needs_a_key(server: Server) -> None:
    key = (await new_key(server))["Authorization"]
    code = f"""
for headers in ({{}}, {{"Authorization": {key!r}}}):
    c = http.client.HTTPConnection("127.0.0.1", {server.port}); c.request("GET", "{LISTED}", headers=headers)
    print(c.getresponse().status, flush=True)
"""
    with as_nobody(code) as child:
        out, _ = await asyncio.to_thread(child.communicate, timeout=10)
    assert out.split() == [b"401", b"200"]


@pytest.mark.parametrize("settings", [{"auth": "always"}, {"host": "0.0.0.0"}, {"host": "::"}, {"host": "192.0.2.1"}])
async def test_everybody_needs_a_key_beyond_loopback_and_with_auth_always(start_server: Start, settings: dict[str, str]) -> None:
    server = await start_server(**settings)
    assert await status(server) == 401
    assert await status(server, await new_key(server)) == 200
    assert (await server.call("GET", "/health"))["auth"] == "always"


async def test_health_is_public_with_and_without_a_query(start_server: Start) -> None:
    server = await start_server(auth="always")
    assert await status(server, path="/health") == 200
    assert await status(server, {"Host": "evil.example"}, path="/health?probe=1") == 200
    assert await status(server, path="/metrics") == 401
    assert await status(server, path="/no/such/route") == 401


@pytest.mark.parametrize(("header", "error"), [
    ("Bearer nonsense", "Invalid API key"),
    ("Bearer ", "Invalid Authorization header format"),
    ("Bearer a b", "Invalid Authorization header format"),
    ("Basic YTpi", "Invalid Authorization header format"),
    ("", "Invalid Authorization header format"),
])  # fmt: skip
async def test_a_bad_key_is_refused_even_from_the_own_user(server: Server, header: str, error: str) -> None:
    answer = await refusal(server, {"Authorization": header})
    assert (answer["error"], answer["code"]) == (error, "unauthorized")


async def test_a_missing_key_is_said_in_fixed_words_with_a_hint(start_server: Start) -> None:
    server = await start_server(auth="always")
    async with server.http.get(server.url + LISTED) as answer:
        body = await answer.json()
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert body["error"] == body["message"] == "Missing Authorization header"
    assert "Authorization: Bearer" in body["hint"]


async def test_the_static_key_speaks_for_the_default_tenant(start_server: Start) -> None:
    server = await start_server(auth="always", api_key="static-key-ü")
    assert await status(server, {"Authorization": "Bearer static-key-ü"}) == 200
    assert await status(server, {"Authorization": "Bearer static-key"}) == 401
    keys = (await server.call("GET", "/api/api-keys", headers={"Authorization": "Bearer static-key-ü"}))["keys"]
    assert [key["id"] for key in keys] == ["env"]
    assert "static" not in str(keys)


async def test_a_connection_is_asked_about_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find_uid(own: peer.Address, other: peer.Address) -> int:
        asked.append(other)
        return os.geteuid()

    monkeypatch.setattr(peer, "find_uid", find_uid)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
        for _ in range(3):
            async with http.get(server.url + LISTED) as answer:
                assert answer.status == 200
    assert len(asked) == 1


async def test_another_tenants_things_do_not_exist(server: Server) -> None:
    id, other = await server.session(), await new_key(server, "other")
    assert (await server.call("GET", "/api/sessions", headers=other))["sessions"] == []
    assert (await server.call("GET", "/api/agents/helper", expect=404, headers=other))["error"] == "Agent not found"
    paths = [("POST", f"/{verb}") for verb in ("pause", "resume", "stop", "fork", "interrupt")]
    paths += [("GET", path) for path in ("", "/messages", "/events", "/logs", "/stream")]
    for method, path in [*paths, ("DELETE", ""), ("PATCH", "/config")]:
        answer = await server.call(method, f"/api/sessions/{id}{path}", expect=404, headers=other)
        assert answer["error"] == "Session not found", path
    bodies = {"/exec": {"command": "true"}, "/messages": {"content": "hi"}}
    for path, body in bodies.items():
        assert (await server.call("POST", f"/api/sessions/{id}{path}", body, expect=404, headers=other))["code"] == "session_not_found"
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["status"] == "active"
