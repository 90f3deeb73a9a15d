"""/api/sessions over HTTP, but for messages and streams."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ash.errors import CapacityReached, SandboxFailed
from tests import fakes
from tests.harness import Server, eventually

Start = Callable[..., Awaitable[Server]]


async def change(server: Server, id: str, verb: str, expect: int = 200) -> Any:
    answer = await server.call("POST", f"/api/sessions/{id}/{verb}", expect=expect)
    return answer.get("session", answer)


async def test_a_session_is_created_active_with_everything_typed_clients_need(server: Server) -> None:
    await server.deploy()
    body = {"agent": "helper", "model": "m", "allowedTools": ["Read"], "mcpServers": {"x": {"url": "http://x"}}, "unknown": True}
    made = (await server.call("POST", "/api/sessions", body, expect=201))["session"]
    assert uuid.UUID(made["id"]).version == uuid.UUID(made["sandboxId"]).version == 4
    assert (made["status"], made["agentName"], made["model"], made["turn"]) == ("active", "helper", "m", None)
    assert made["config"] == {"allowedTools": ["Read"], "mcpServers": {"x": {"url": "http://x"}}}
    assert made["createdAt"].endswith("Z")
    assert (await server.call("GET", f"/api/sessions/{made['id']}", expect=200))["session"].keys() == made.keys() | {"resources"}


async def test_what_a_session_was_given_reaches_its_sandbox_and_secrets_stay_off_the_wire(server: Server) -> None:
    options = {"systemPrompt": "Be brief.", "permissionMode": "default", "disallowedTools": ["Bash"], "extraEnv": {"TOKEN": "s3cret"}}
    id = await server.session(**options)
    _, given, transcript = server.sandboxes.claimed[0].inits[0]
    assert {key: given[key] for key in ("systemPrompt", "permissionMode", "disallowedTools", "env")} == {
        "systemPrompt": "Be brief.", "permissionMode": "default", "disallowedTools": ["Bash"], "env": {"TOKEN": "s3cret"},
    }  # fmt: skip
    assert transcript == []
    assert "s3cret" not in str(await server.call("GET", f"/api/sessions/{id}"))


async def test_the_variables_and_headers_of_mcp_servers_are_shown_by_name_only(server: Server) -> None:
    servers = {
        "env": {"command": "run", "args": ["-v"], "env": {"TOKEN": "s3cret"}},
        "x": {"url": "http://x", "headers": {"Authorization": "Bearer s3cret"}},
        "y": {"url": "http://y", "headers": ["Authorization: s3cret"]},
    }
    id = await server.session(mcpServers=servers)
    shown = (await server.call("GET", f"/api/sessions/{id}"))["session"]["config"]["mcpServers"]
    assert shown == {
        "env": {"command": "run", "args": ["-v"], "env": {"TOKEN": "***"}},
        "x": {"url": "http://x", "headers": {"Authorization": "***"}},
        "y": {"url": "http://y", "headers": "***"},
    }
    assert server.sandboxes.claimed[0].inits[0][1]["mcpServers"] == servers
    assert "s3cret" not in str(await server.call("GET", "/api/sessions"))


@pytest.mark.parametrize(("body", "complaint"), [
    ({}, "agent is required"),
    ({"agent": ""}, "agent must have 1 to 255 characters"),
    ({"agent": "a", "model": "m" * 101}, "model must have"),
    ({"agent": "a", "extraEnv": {"A": None}}, "extraEnv.A must be a string"),
    ({"agent": "a", "mcpServers": {"x": {}}}, "mcpServers.x must be an object with a url or a command"),
    ({"agent": "a", "mcpServers": {"x": {"command": "c", "args": [1]}}}, "mcpServers.x.args[0] must be a string"),
    ({"agent": "a", "permissionMode": "yolo"}, "permissionMode must be one of bypassPermissions"),
    ({"agent": "a", "allowedTools": "Bash"}, "allowedTools must be a list"),
    ({"agent": "a", "subagents": []}, "subagents must be an object"),
])  # fmt: skip
async def test_an_unusable_request_for_a_session_is_refused_with_what_is_wrong(
    server: Server, body: dict[str, Any], complaint: str
) -> None:
    assert complaint in (await server.call("POST", "/api/sessions", body, expect=400))["error"]


async def test_an_unknown_agent_is_404(server: Server) -> None:
    assert "not found" in (await server.call("POST", "/api/sessions", {"agent": "nobody"}, expect=404))["error"]


@pytest.mark.parametrize(("broken", "status"), [(CapacityReached("Sandbox capacity reached"), 503), (SandboxFailed("no bridge"), 500)])
async def test_a_sandbox_that_cannot_be_had_is_said_and_leaves_a_session_in_error(server: Server, broken: Exception, status: int) -> None:
    await server.deploy()
    server.sandboxes.broken = broken
    answer = await server.call("POST", "/api/sessions", {"agent": "helper"}, expect=status)
    assert str(broken) in answer["error"]
    assert [session["status"] for session in (await server.call("GET", "/api/sessions"))["sessions"]] == ["error"]


async def test_the_list_filters_pages_and_counts(server: Server) -> None:
    await server.deploy("other")
    ids = [await server.session() for _ in range(3)]
    await server.call("POST", "/api/sessions", {"agent": "other"}, expect=201)
    await change(server, ids[0], "pause")

    async def found(query: str) -> list[str]:
        return [session["id"] for session in (await server.call("GET", f"/api/sessions?{query}", expect=200))["sessions"]]

    assert await found("agent=helper") == ids[::-1]
    assert await found("status=paused") == [ids[0]]
    assert await found("agent=helper&limit=1&offset=1") == [ids[1]]
    assert len(await found("agent=&unknown=1")) == 4
    assert (await server.call("GET", "/api/sessions?limit=1&includeTotal=true"))["total"] == 4
    assert "total" not in await server.call("GET", "/api/sessions")


@pytest.mark.parametrize(("query", "complaint"), [
    ("limit=0", "limit must be a whole number from 1 to 1000"),
    ("limit=x", "limit must be a whole number from 1 to 1000, got 'x'"),
    ("offset=-1", "offset must be a whole number of at least 0"),
    ("offset=99999999999999999999", "offset must be a whole number"),
    ("status=sleeping", "status must be one of starting, active"),
    ("includeTotal=maybe", "includeTotal must be true or false"),
])  # fmt: skip
async def test_an_unusable_query_is_refused_with_what_is_wrong(server: Server, query: str, complaint: str) -> None:
    assert complaint in (await server.call("GET", f"/api/sessions?{query}", expect=400))["error"]


async def test_a_session_can_be_paused_resumed_stopped_and_ended(server: Server) -> None:
    id = await server.session()
    assert (await change(server, id, "pause"))["status"] == "paused"
    assert (await change(server, id, "pause", 400))["error"] == 'Cannot pause session with status "paused"'
    assert (await change(server, id, "resume"))["status"] == "active"
    assert (await change(server, id, "stop"))["status"] == "stopped"
    assert (await change(server, id, "resume"))["status"] == "active"
    for _ in range(2):
        assert (await server.call("DELETE", f"/api/sessions/{id}", expect=200))["session"]["status"] == "ended"
    assert (await change(server, id, "resume", 410))["code"] == "session_ended"


async def test_a_fork_is_a_paused_copy_that_knows_its_parent(server: Server) -> None:
    id = await server.session()
    await server.frames(id, "remember me")
    fork = await change(server, id, "fork", 201)
    assert (fork["status"], fork["parentSessionId"]) == ("paused", id)
    messages = (await server.call("GET", f"/api/sessions/{fork['id']}/messages"))["messages"]
    assert "remember me" in messages[0]["content"]


async def test_a_changed_config_holds_from_the_next_message(server: Server) -> None:
    id = await server.session(allowedTools=["Read"])
    body = {"model": "other", "allowedTools": ["Write"], "betas": ["b"], "initialAgent": None, "unknown": 1}
    session = (await server.call("PATCH", f"/api/sessions/{id}/config", body, expect=200))["session"]
    assert (session["model"], session["config"]["allowedTools"]) == ("other", ["Write"])
    await server.frames(id)
    assert server.sandboxes.claimed[-1].inits[-1][1]["allowedTools"] == ["Write"]
    assert (await server.call("PATCH", f"/api/sessions/{id}/config", {"model": 1}, expect=400))["code"] == "invalid_request"


async def test_interrupting_ends_the_turn_and_says_whether_there_was_one(server: Server) -> None:
    server.sandboxes.script = fakes.wait
    id = await server.session()
    assert await change(server, id, "interrupt") == {"interrupted": False}
    turn = await server.parts.sessions.send("default", id, "hi", {})
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["turn"] == {"id": turn.id, "state": "running"}
    await eventually(lambda: server.sandboxes.claimed[0].queries)
    assert await change(server, id, "interrupt") == {"interrupted": True}
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["turn"] is None


async def test_a_command_runs_in_the_session(server: Server) -> None:
    id = await server.session()
    body = {"command": "ls", "timeout": 1500, "cwd": "src", "env": {"A": "b"}, "stdin": "in"}
    answer = await server.call("POST", f"/api/sessions/{id}/exec", body, expect=200)
    assert answer == {"exitCode": 0, "stdout": "ran ls", "stderr": "in", "timedOut": False, "truncated": False}
    assert server.sandboxes.claimed[0].commands == [("ls", {"timeout": 1.5, "cwd": "src", "env": {"A": "b"}, "stdin": "in"})]


@pytest.mark.parametrize(("body", "complaint"), [
    ({}, "command is required"),
    ({"command": ""}, "command must have 1 to"),
    ({"command": "ls", "timeout": 0}, "timeout must be a whole number from 1 to 300000"),
    ({"command": "ls", "timeout": True}, "timeout must be a whole number"),
    ({"command": "ls", "timeout": 1.5}, "timeout must be a whole number"),
])  # fmt: skip
async def test_an_unusable_command_is_refused_with_what_is_wrong(server: Server, body: dict[str, Any], complaint: str) -> None:
    id = await server.session()
    assert complaint in (await server.call("POST", f"/api/sessions/{id}/exec", body, expect=400))["error"]


async def test_the_logs_of_a_session_can_be_read_from_a_place_on(server: Server) -> None:
    id = await server.session()
    for text in ("one", "two"):
        server.sandboxes.claimed[0].log(text)
    answer = await server.call("GET", f"/api/sessions/{id}/logs", expect=200)
    assert answer["source"] == "sandbox"
    assert [(line["index"], line["text"]) for line in answer["logs"]] == [(0, "one"), (1, "two")]
    assert [line["index"] for line in (await server.call("GET", f"/api/sessions/{id}/logs?after=0"))["logs"]] == [1]
    await server.call("GET", f"/api/sessions/{id}/logs?after=-2", expect=400)


async def test_a_session_shows_what_it_uses_while_it_has_a_sandbox(server: Server) -> None:
    id = await server.session()
    assert (await server.call("GET", f"/api/sessions/{id}", expect=200))["session"]["resources"] == fakes.USAGE
    assert "resources" not in (await server.call("GET", "/api/sessions", expect=200))["sessions"][0]
    await server.call("POST", f"/api/sessions/{id}/stop", expect=200)
    assert (await server.call("GET", f"/api/sessions/{id}", expect=200))["session"]["resources"] is None


async def test_a_limit_that_was_met_is_on_the_timeline(server: Server) -> None:
    id = await server.session()
    server.sandboxes.claimed[0].met = [{"limit": "processes", "message": "more were refused"}]
    await server.frames(id)
    rows = (await server.call("GET", f"/api/sessions/{id}/events?type=lifecycle", expect=200))["events"]
    assert {"action": "limit_reached", "limit": "processes", "message": "more were refused"} in [json.loads(row["data"]) for row in rows]
