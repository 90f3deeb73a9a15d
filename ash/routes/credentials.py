"""/api/credentials: the secrets that Ash uses upstream for the caller's tenant. A secret is taken, and never given back."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ash import dialect
from ash.config import Secret
from ash.credentials import TYPES, Binding
from ash.errors import InvalidRequest
from ash.routes import fields
from ash.routes.parts import parts
from ash.routes.requests import read_json, tenant


def _secret(name: str, value: Any) -> Secret:
    """Unlike other checks it never repeats what it was given."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string")
    return Secret(value)


_BINDING: fields.Table = {
    "agent": fields.text(255, 1),
    "host": fields.text(300, 1),
    "header": fields.text(100, 1),
    "template": fields.text(1000, 1),
    "variable": fields.text(100, 1),
}
_CREATE: fields.Table = {"type": fields.choice(*TYPES), "key": _secret, "label": fields.text(255), **_BINDING}


async def create(request: web.Request) -> web.Response:
    body = fields.parse(await read_json(request), _CREATE, required=("type", "key"))
    binding = Binding(**{name: body.get(name) for name in _BINDING})
    here = parts(request)
    made = await here.credentials.create(tenant(request), body["type"], body["key"], body.get("label", ""), binding)
    here.sessions.refresh()
    return web.json_response({"credential": dialect.credential(made)}, status=201)


async def list_credentials(request: web.Request) -> web.Response:
    found = await parts(request).credentials.list(tenant(request))
    return web.json_response({"credentials": [dialect.credential(credential) for credential in found]})


async def delete(request: web.Request) -> web.Response:
    """Not 204, as one of the published clients reads JSON from every answer."""
    here = parts(request)
    await here.credentials.delete(tenant(request), fields.uuid("params/id", request.match_info["id"]))
    here.sessions.refresh()
    return web.json_response({"ok": True})


ROUTES = (
    web.post("/api/credentials", create),
    web.get("/api/credentials", list_credentials),
    web.delete("/api/credentials/{id}", delete),
)
