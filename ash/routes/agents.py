"""/api/agents: deploy, list, show and delete agents. What a folder must look like is said in `ash.agents`."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any

from aiohttp import web

from ash import dialect
from ash.auth import GUARD
from ash.errors import Forbidden, InvalidRequest
from ash.models import Json
from ash.routes import fields
from ash.routes.parts import parts
from ash.routes.requests import MIB, read_json, require_deployer, tenant

_FILE = fields.record({"path": fields.text(4096, 1), "content": fields.text(2**31)}, required=("path", "content"))
_DEPLOY: fields.Table = {
    "name": fields.text(255, 1, r"[a-zA-Z0-9_-]+"),
    "path": fields.text(4096, 1),
    "systemPrompt": fields.text(1_000_000),
    "files": fields.list_of(_FILE, 1_000_000),
    "env": fields.mapping_of(fields.text(100_000)),
    "config": fields.mapping,
}


async def deploy(request: web.Request) -> web.Response:
    here = parts(request)
    require_deployer(request, here.policies.current)
    body = fields.parse(await read_json(request, here.config.max_body_mb * MIB), _DEPLOY, required=("name",))
    path, encoded = body.get("path"), body.get("files")
    if path is not None and not request.app[GUARD].is_direct(request):
        raise Forbidden(
            "A `path` names a folder that the server reads with its own rights, so it is only taken from the server's own user or root, "
            "on its machine and without a proxy; send the files instead"
        )
    here.sessions.check_agent_limits(tenant(request), body["name"], body.get("config") or {})
    files = None if encoded is None else await asyncio.to_thread(_decode, encoded)
    agent = await here.agents.deploy(
        tenant(request), body["name"], files=files, path=path,
        system_prompt=body.get("systemPrompt"), env=body.get("env"), config=body.get("config"),
    )  # fmt: skip
    return web.json_response({"agent": dialect.agent(agent)}, status=201)


def _decode(files: list[Json]) -> list[tuple[str, bytes]]:
    """Each file's content, taken out of its record as it is decoded: one copy of an upload in memory is enough."""
    return [(file["path"], _content(file.pop("content"), f"files[{position}].content")) for position, file in enumerate(files)]


def _content(text: Any, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{name} is not base64: {error}") from error


async def list_agents(request: web.Request) -> web.Response:
    found = await parts(request).agents.list(tenant(request))
    return web.json_response({"agents": [dialect.agent(agent) for agent in found]})


async def get(request: web.Request) -> web.Response:
    agent = await parts(request).agents.get(tenant(request), request.match_info["name"])
    return web.json_response({"agent": dialect.agent(agent)})


async def delete(request: web.Request) -> web.Response:
    require_deployer(request, parts(request).policies.current)
    await parts(request).agents.delete(tenant(request), request.match_info["name"])
    return web.json_response({"ok": True})


ROUTES = (
    web.post("/api/agents", deploy),
    web.get("/api/agents", list_agents),
    web.get("/api/agents/{name}", get),
    web.delete("/api/agents/{name}", delete),
)
