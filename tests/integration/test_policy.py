"""The operator's policy over real sandboxes: what an agent's own commands meet inside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ash.config import Config
from tests.harness import Server, eventually, serving

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")

ASK = """
import http.client, json, socket, sys
request = json.loads(sys.argv[1])
connection = http.client.HTTPConnection("gateway")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/ash/gateway.sock")
headers = {"content-type": "application/json", "x-api-key": "sk-ant-of-the-agent", "authorization": "Bearer of-the-agent"}
connection.request("POST", sys.argv[2], json.dumps({"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **request}), headers)
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


@pytest.fixture
async def start(make_config: Callable[..., Config]) -> AsyncIterator[Callable[[str], Awaitable[Server]]]:
    """Starts a server with real sandboxes under a policy."""
    async with AsyncExitStack() as stack:

        async def start(policy: str) -> Server:
            config = make_config(warm_sandboxes=0)
            path = Path(config.data_dir, "policy.toml")
            path.write_text(policy)
            path.chmod(0o600)
            server = await stack.enter_async_context(serving(config))
            if server.parts.sandboxes.status().isolation != "bwrap":
                pytest.skip(f"this host cannot isolate agents: {server.parts.sandboxes.status().warnings}")
            await server.deploy()
            return server

        yield start


async def session(server: Server, **options: Any) -> str:
    return str((await server.call("POST", "/api/sessions", {"agent": "helper", **options}, expect=201))["session"]["id"])


async def run(server: Server, id: str, command: str, timeout: int = 20_000) -> Any:
    return await server.call("POST", f"/api/sessions/{id}/exec", {"command": command, "timeout": timeout}, expect=200)


async def ask(server: Server, id: str, request: dict[str, Any], path: str = "/v1/messages") -> str:
    """What the gateway answers to a program of the agent."""
    await server.call("POST", f"/api/sessions/{id}/exec", {"command": "cat > ask.py", "stdin": ASK}, expect=200)
    found = await run(server, id, f"python3 ask.py '{json.dumps(request)}' {path}")
    assert found["exitCode"] == 0, found["stderr"]
    return str(found["stdout"])


async def test_from_inside_only_the_allowed_models_and_no_way_through_the_provider(start: Callable[[str], Awaitable[Server]]) -> None:
    server = await start('[models]\nallow = ["offline"]\n')
    id = await session(server)
    assert (await ask(server, id, {"model": "offline"})).startswith("200 ")
    assert (await ask(server, id, {"model": "claude-opus-5-5"})).startswith("403 ")
    assert (await ask(server, id, {"model": "claude-opus-5-5"}, "/v1/messages/count_tokens")).startswith("403 ")
    for way in ({"mcp_servers": [{"type": "url", "url": "https://x"}]}, {"tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}):
        answer = await ask(server, id, {"model": "offline", **way})
        assert answer.startswith("403 ")
        assert "provider_features" in answer
    assert (await ask(server, id, {"model": "offline"}, "/v1/files")).startswith("404 ")


async def test_a_mount_is_seen_inside_and_cannot_be_written(start: Callable[[str], Awaitable[Server]], tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "hello").write_text("#!/bin/sh\necho from the operator\n")
    for path in (tools / "hello", tools, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    server = await start(f"[[mounts]]\nsource = '{tools}'\ntarget = '/opt/tools'\n")
    id = await session(server)
    assert (await run(server, id, "/opt/tools/hello"))["stdout"] == "from the operator\n"
    found = await run(
        server, id, "touch /opt/tools/mine; rm /opt/tools/hello; echo x > /opt/tools/hello; mount -o remount,rw /opt/tools; true"
    )
    assert "Read-only file system" in found["stderr"]
    assert os.listdir(tools) == ["hello"]


async def test_a_sessions_own_limits_hold_inside(start: Callable[[str], Awaitable[Server]]) -> None:
    server = await start("[limits]\nmax_processes = 300\n")
    usual, small = await session(server), await session(server, limits={"maxFileMb": 2, "maxProcesses": 24, "toolTimeout": 1})
    write = "head -c 4000000 /dev/zero > big; stat -c %s big"
    assert (await run(server, usual, write))["stdout"] == "4000000\n"
    assert (await run(server, small, write))["stdout"] == f"{2 << 20}\n"
    fork = "for i in $(seq 40); do sleep 5 & done 2>/dev/null; jobs -p | wc -l; kill $(jobs -p)"
    assert int((await run(server, usual, fork))["stdout"] or 0) == 40
    assert "40" not in (await run(server, small, fork))["stdout"]
    assert (await run(server, small, "sleep 60"))["timedOut"]
    assert not (await run(server, usual, "sleep 1.5"))["timedOut"]


async def test_a_turn_with_a_tool_that_does_not_end_ends_at_its_limit_and_the_session_goes_on(
    start: Callable[[str], Awaitable[Server]],
) -> None:
    server = await start("")
    id = await session(server, limits={"turnTimeout": 2}, permissionMode="bypassPermissions")
    frames = await server.frames(id, "Run the command `sleep 60`")
    assert [frame.data for frame in frames if frame.event == "error"] == [
        {"error": "the turn took longer than 2 s, the session's limit (turn_timeout), and was ended"}
    ]
    assert frames[-1].data["status"] == "failed"
    found = await server.frames(id, "Run the command `echo still here`")
    assert found[-1].data["status"] == "completed"


async def test_an_idle_session_gives_up_its_sandbox_at_its_own_time_and_wakes(start: Callable[[str], Awaitable[Server]]) -> None:
    server = await start("")
    id = await session(server, limits={"idleTimeout": 0.5})
    await run(server, id, "echo kept > file")
    await eventually(lambda: server.parts.sessions.status()["active_sandboxes"] == 0, 20)
    assert (await run(server, id, "cat file"))["stdout"] == "kept\n"
