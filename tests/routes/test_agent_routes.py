"""/api/agents over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Server, as_nobody, needs_root


def file(path: str, content: bytes) -> dict[str, str]:
    return {"path": path, "content": base64.b64encode(content).decode()}


async def test_an_agent_can_be_deployed_listed_shown_and_deleted(server: Server) -> None:
    made = (await server.call("POST", "/api/agents", {"name": "a", "files": [file("CLAUDE.md", b"Hi")]}, expect=201))["agent"]
    assert uuid.UUID(made["id"]).version == 4
    assert (made["name"], made["version"], made["tenantId"]) == ("a", 1, "default")
    assert (await server.call("GET", "/api/agents/a", expect=200))["agent"] == made
    assert (await server.call("GET", "/api/agents", expect=200))["agents"] == [made]
    assert await server.call("DELETE", "/api/agents/a", expect=200) == {"ok": True}
    assert (await server.call("GET", "/api/agents/a", expect=404))["error"] == "Agent not found"
    assert (await server.call("DELETE", "/api/agents/a", expect=404))["code"] == "agent_not_found"


async def test_deploying_again_raises_the_version_and_agents_are_listed_by_name(server: Server) -> None:
    assert [(await server.deploy(name))["version"] for name in ("b", "a", "b")] == [1, 1, 2]
    assert [agent["name"] for agent in (await server.call("GET", "/api/agents"))["agents"]] == ["a", "b"]


async def test_the_values_of_an_agents_environment_are_never_shown(server: Server) -> None:
    body = {"name": "a", "systemPrompt": "x", "env": {"TOKEN": "s3cret"}, "unknown": 1}
    made = (await server.call("POST", "/api/agents", body, expect=201))["agent"]
    assert made["env"] == {"TOKEN": "***"}
    assert "s3cret" not in json.dumps(await server.call("GET", "/api/agents"))


@pytest.mark.parametrize(("body", "complaint"), [
    ({}, "name is required"),
    ({"name": None}, "name is required"),
    ({"name": 5}, "name must be a string, got 5"),
    ({"name": "a b"}, "name must match"),
    ({"name": "a" * 256}, "name must have 1 to 255 characters; it has 256"),
    ({"name": "a", "files": {}}, "files must be a list"),
    ({"name": "a", "files": ["x"]}, "files[0] must be an object"),
    ({"name": "a", "files": [{"path": "CLAUDE.md"}]}, "files[0].content is required"),
    ({"name": "a", "files": [{"path": "CLAUDE.md", "content": "!"}]}, "files[0].content is not base64"),
    ({"name": "a", "files": [{"path": "CLAUDE.md", "content": "ü"}]}, "files[0].content is not base64"),
    ({"name": "a", "env": {"A": 1}}, "env.A must be a string"),
    ({"name": "a", "systemPrompt": "x" * 1_000_001}, "systemPrompt must have 0 to 1,000,000 characters"),
    ({"name": "a", "path": "/no/such/folder"}, "CLAUDE.md"),
    ({"name": "a", "path": "a\0b"}, ""),
])  # fmt: skip
async def test_an_unusable_deploy_is_refused_with_what_is_wrong(server: Server, body: dict[str, Any], complaint: str) -> None:
    answer = await server.call("POST", "/api/agents", body)
    assert answer["statusCode"] in (400, 422), answer
    assert complaint in answer["error"]


async def test_a_folder_on_the_servers_machine_is_deployed_by_its_path(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "CLAUDE.md").write_text("Hi")
        os.chmod(folder, 0o755)
        assert (await server.call("POST", "/api/agents", {"name": "a", "path": folder}, expect=201))["agent"]["version"] == 1


async def test_a_path_is_not_taken_from_behind_a_proxy(server: Server) -> None:
    _, key = await server.parts.keys.create("default", "test")
    headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": "192.0.2.1"}
    answer = await server.call("POST", "/api/agents", {"name": "a", "path": "/etc"}, expect=403, headers=headers)
    assert "send the files instead" in answer["error"]


@needs_root
async def test_a_path_is_not_taken_from_another_user_of_this_machine_even_with_a_key(server: Server) -> None:
    _, key = await server.parts.keys.create("default", "test")
    bodies = [json.dumps({"name": "a", **given}) for given in ({"path": "/etc"}, {"systemPrompt": "x"})]
    code = f"""
for body in {bodies!r}:
    c = http.client.HTTPConnection("127.0.0.1", {server.port})
    c.request("POST", "/api/agents", body, {{"Authorization": "Bearer {key}"}})
    a = c.getresponse(); print(a.status, b"send the files instead" in a.read(), flush=True)
"""
    with as_nobody(code) as child:
        out, _ = await asyncio.to_thread(child.communicate, timeout=10)
    assert out.splitlines() == [b"403 True", b"201 False"]


async def test_fifty_megabytes_of_files_can_be_deployed(server: Server) -> None:
    part = base64.b64encode(os.urandom(10_000_000)).decode()
    files = [file("CLAUDE.md", b"Hi"), *({"path": f"data/{number}.bin", "content": part} for number in range(5))]
    body = io.BytesIO(json.dumps({"name": "big", "files": files}).encode())
    async with server.http.post(server.url + "/api/agents", data=body) as answer:
        assert answer.status == 201, await answer.text()
        digest = (await answer.json())["agent"]["path"].rpartition("/")[2]
    assert os.path.getsize(os.path.join(server.parts.agents.folder(digest), "data", "4.bin")) == 10_000_000
