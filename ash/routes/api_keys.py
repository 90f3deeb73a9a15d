"""/api/api-keys: the keys of the caller's tenant. A key is shown once, when it is made, and never again."""

from __future__ import annotations

from aiohttp import web

from ash import dialect
from ash.keys import STATIC_KEY_ID
from ash.models import DEFAULT_TENANT, Json
from ash.routes import fields
from ash.routes.parts import parts
from ash.routes.requests import read_json, tenant

_CREATE: fields.Table = {"label": fields.text(255)}
_STATIC_KEY: Json = {"id": STATIC_KEY_ID, "label": "ASH_API_KEY (environment variable)", "keyPrefix": "••••••••", "createdAt": ""}


async def create(request: web.Request) -> web.Response:
    body = fields.parse(await read_json(request), _CREATE)
    key, plain = await parts(request).keys.create(tenant(request), body.get("label", "dashboard-key"))
    return web.json_response({"id": key.id, "key": plain}, status=201)


async def list_keys(request: web.Request) -> web.Response:
    here = parts(request)
    keys = [dialect.api_key(key) for key in await here.keys.list(tenant(request))]
    if here.config.api_key and tenant(request) == DEFAULT_TENANT:
        keys.append(_STATIC_KEY)
    return web.json_response({"keys": keys})


async def delete(request: web.Request) -> web.Response:
    await parts(request).keys.delete(tenant(request), request.match_info["id"])
    return web.json_response({"ok": True})


ROUTES = (
    web.post("/api/api-keys", create),
    web.get("/api/api-keys", list_keys),
    web.delete("/api/api-keys/{id}", delete),
)
