"""/api/credentials, and what sessions do with them: their model key, their placeholders, their end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from ash.models import Json
from tests.harness import Server

SECRET = "sk-ant-0123456789"
HOST = {"type": "custom", "key": SECRET, "agent": "helper", "host": "api.test", "variable": "TOKEN"}


async def store(server: Server, **fields: str) -> Json:
    body = {"type": "anthropic", "key": SECRET, **fields}
    return dict((await server.call("POST", "/api/credentials", body, expect=201))["credential"])


def told(server: Server) -> Json:
    """The variables that the newest sandbox was told last."""
    return dict(server.sandboxes.claimed[-1].inits[-1][1]["env"])


async def test_a_credential_is_stored_listed_and_deleted_and_never_given_back(server: Server) -> None:
    made = await store(server, label="mine")
    assert made == {
        "id": made["id"],
        "type": "anthropic",
        "label": "mine",
        "active": True,
        "createdAt": made["createdAt"],
        "lastUsedAt": None,
    }
    listed = await server.call("GET", "/api/credentials", expect=200)
    assert listed == {"credentials": [made]}
    assert SECRET not in str(listed)
    assert await server.call("DELETE", f"/api/credentials/{made['id']}", expect=200) == {"ok": True}
    gone = await server.call("DELETE", f"/api/credentials/{made['id']}", expect=404)
    assert (gone["error"], gone["code"]) == ("Credential not found", "credential_not_found")
    await server.call("DELETE", "/api/credentials/nonsense", expect=400)


async def test_a_refusal_does_not_repeat_the_secret(server: Server) -> None:
    for wrong in (
        {**HOST, "key": [SECRET]},
        {**HOST, "key": {"a": SECRET}},
        {**HOST, "key": SECRET + "\n"},
        {**HOST, "type": "x"},
        {**HOST, "host": "*"},
        {"type": "custom"},
    ):
        assert SECRET not in str(await server.call("POST", "/api/credentials", wrong, expect=400))


async def test_the_fields_of_a_host_are_shown(server: Server) -> None:
    await server.deploy()
    made = (await server.call("POST", "/api/credentials", HOST, expect=201))["credential"]
    assert {name: made[name] for name in ("agent", "host", "header", "variable")} == {
        "agent": "helper", "host": "api.test", "header": "Authorization", "variable": "TOKEN",
    }  # fmt: skip
    assert "template" not in made
    assert (await server.call("POST", "/api/credentials", HOST, expect=409))["code"] == "conflict"


async def test_another_tenants_credential_cannot_be_seen_deleted_or_used(server: Server) -> None:
    made = await store(server)
    _, key = await server.parts.keys.create("other", "theirs")
    theirs = {"Authorization": f"Bearer {key}"}
    assert await server.call("GET", "/api/credentials", headers=theirs) == {"credentials": []}
    await server.call("DELETE", f"/api/credentials/{made['id']}", expect=404, headers=theirs)
    await server.call("POST", "/api/agents", {"name": "spy", "systemPrompt": "."}, expect=201, headers=theirs)
    answer = await server.call("POST", "/api/sessions", {"agent": "spy", "credentialId": made["id"]}, expect=400, headers=theirs)
    assert answer["error"] == "Invalid or inaccessible credential"


# Sessions


async def test_tools_get_a_placeholder_and_never_the_secret(server: Server) -> None:
    await server.deploy()
    await server.call("POST", "/api/credentials", HOST, expect=201)
    id = await server.session()
    assert told(server)["TOKEN"].startswith("ash-placeholder-")
    assert told(server)["SSL_CERT_FILE"] == "/run/ash/ca.pem"
    before = told(server)["TOKEN"]
    for verb in ("pause", "resume"):
        await server.call("POST", f"/api/sessions/{id}/{verb}")
    await server.frames(id)
    assert told(server)["TOKEN"] == before
    shown = [await server.call("GET", f"/api/sessions/{id}{path}") for path in ("", "/events", "/messages")]
    assert SECRET not in json.dumps([shown, server.sandboxes.claimed[-1].inits])


async def test_a_credential_stored_or_deleted_meanwhile_holds_from_the_next_message(server: Server) -> None:
    id = await server.session()
    made = (await server.call("POST", "/api/credentials", HOST, expect=201))["credential"]
    assert "TOKEN" not in told(server)
    await server.frames(id)
    assert "TOKEN" in told(server)
    await server.call("DELETE", f"/api/credentials/{made['id']}", expect=200)
    await server.frames(id)
    assert "TOKEN" not in told(server)


async def test_a_session_whose_own_credential_was_deleted_says_so(server: Server) -> None:
    made = await store(server)
    id = await server.session(credentialId=made["id"])
    await server.call("DELETE", f"/api/credentials/{made['id']}", expect=200)
    [error] = [frame.data for frame in await server.frames(id) if frame.event == "error"]
    assert "was deleted" in error["error"]


async def test_a_session_is_told_which_credentials_it_cannot_use(server: Server) -> None:
    made = await store(server, type="bedrock")
    await server.deploy()
    for id, words in ((made["id"], "type bedrock"), ("00000000-0000-4000-8000-000000000000", "Invalid or inaccessible credential")):
        answer = await server.call("POST", "/api/sessions", {"agent": "helper", "credentialId": id}, expect=400)
        assert words in answer["error"]


async def test_without_isolation_a_credential_for_a_host_is_refused_and_not_left_out_in_silence(
    start_server: Callable[..., Awaitable[Server]],
) -> None:
    server = await start_server(sandbox="none")
    await server.deploy()
    await server.call("POST", "/api/credentials", HOST, expect=201)
    assert "egress proxy" in (await server.call("POST", "/api/sessions", {"agent": "helper"}, expect=422))["error"]


# The model's key


@pytest.fixture
async def provider() -> AsyncIterator[tuple[str, list[str | None]]]:
    """A Messages API that notes the keys it is shown."""
    keys: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        keys.append(request.headers.get("x-api-key"))
        return web.json_response({"type": "message", "content": [], "usage": {"input_tokens": 1, "output_tokens": 1}})

    app = web.Application()
    app.router.add_post("/v1/messages", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", keys
    await runner.cleanup()


async def ask_model(server: Server) -> int:
    """What a bridge's model call through its gateway is answered with."""
    import aiohttp

    socket = f"{server.sandboxes.claimed[-1].handle.run_dir}/gw/gateway.sock"
    body = {"model": "claude-sonnet-5-5", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as http,
        http.post("http://gateway/v1/messages", json=body, headers={"x-api-key": "the-agents-own"}) as answer,
    ):
        await answer.read()
        return answer.status


async def test_model_calls_carry_the_sessions_key_also_after_a_wake_and_in_a_fork(
    start_server: Callable[..., Awaitable[Server]], provider: tuple[str, list[str | None]]
) -> None:
    url, keys = provider
    server = await start_server(model="", anthropic_base_url=url, anthropic_api_key="sk-ant-the-servers")
    made = await store(server)
    id = await server.session(credentialId=made["id"])
    assert await ask_model(server) == 200
    await server.call("POST", f"/api/sessions/{id}/pause", expect=200)
    fork = (await server.call("POST", f"/api/sessions/{id}/fork", expect=201))["session"]["id"]
    for session in (id, fork):
        await server.call("POST", f"/api/sessions/{session}/resume", expect=200)
        await server.frames(session)
        assert await ask_model(server) == 200
    assert keys == [SECRET] * 3


async def test_a_deleted_key_is_used_no_more_and_the_servers_does_not_step_in(
    start_server: Callable[..., Awaitable[Server]], provider: tuple[str, list[str | None]]
) -> None:
    url, keys = provider
    server = await start_server(model="", anthropic_base_url=url, anthropic_api_key="sk-ant-the-servers")
    made = await store(server)
    await server.session(credentialId=made["id"])
    await server.call("DELETE", f"/api/credentials/{made['id']}", expect=200)
    assert await ask_model(server) == 401
    assert keys == []


async def test_a_session_with_a_key_of_its_own_does_not_get_the_demo_model(start_server: Callable[..., Awaitable[Server]]) -> None:
    server = await start_server(model="")
    made = await store(server)
    await server.session(credentialId=made["id"])
    assert server.sandboxes.claimed[-1].inits[-1][1]["model"].startswith("claude-")
