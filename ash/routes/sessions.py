"""/api/sessions: create, find and change sessions, and run commands in them. What a change means is said in `ash.sessions`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ash import dialect
from ash.errors import InvalidRequest
from ash.models import STATUSES, Json, Session
from ash.routes import fields
from ash.routes.parts import Parts, parts
from ash.routes.requests import MIB, query, read_json, session_id, tenant

_MCP_SERVER = {"url": fields.text(4096, 1), "command": fields.text(4096, 1), "args": fields.list_of(fields.text(100_000), 1000)}
_NAMES = fields.list_of(fields.text(1000, 1), 1000)
_PERMISSION_MODES = ("bypassPermissions", "permissionsByAgent", "default", "acceptEdits", "plan", "dontAsk")


def _mcp_server(name: str, value: Any) -> Any:
    """Checked where it matters, and kept whole."""
    if not isinstance(value, dict) or not (value.get("url") or value.get("command")):
        raise InvalidRequest(f"{name} must be an object with a url or a command")
    fields.record({**_MCP_SERVER, "env": fields.mapping_of(fields.text(100_000))})(name, value)
    return value


_CONFIG: fields.Table = {
    "model": fields.text(100, 1),
    "allowedTools": _NAMES,
    "disallowedTools": _NAMES,
    "betas": _NAMES,
    "subagents": fields.mapping,
    "initialAgent": fields.text(255),
    "permissionMode": fields.choice(*_PERMISSION_MODES),
    "systemPrompt": fields.text(1_000_000),
}
_CREATE: fields.Table = {
    **_CONFIG,
    "agent": fields.text(255, 1),
    "credentialId": fields.text(255),
    "extraEnv": fields.mapping_of(fields.text(100_000)),
    "limits": fields.mapping,
    "mcpServers": fields.mapping_of(_mcp_server),
}
_LIST: fields.Table = {
    "agent": fields.text(255),
    "status": fields.choice(*STATUSES),
    "limit": fields.query_integer(1, 1000),
    "offset": fields.query_integer(0),
    "includeTotal": fields.query_flag,
}
_EXEC: fields.Table = {
    "command": fields.text(1_000_000, 1),
    "timeout": fields.integer(1, 300_000),
    "cwd": fields.text(4096, 1),
    "env": fields.mapping_of(fields.text(100_000)),
    "stdin": fields.text(MIB),
}
_LOGS: fields.Table = {"after": fields.query_integer(-1)}


def _wire(here: Parts, session: Session) -> Json:
    return dialect.session(session, limits=here.sessions.limits_of(session), **here.sessions.live(session.id))


def _answer(here: Parts, session: Session, status: int = 200) -> web.Response:
    return web.json_response({"session": _wire(here, session)}, status=status)


async def create(request: web.Request) -> web.Response:
    here = parts(request)
    options = fields.parse(await read_json(request), _CREATE, required=("agent",))
    agent, model = options.pop("agent"), options.pop("model", None)
    return _answer(here, await here.sessions.create(tenant(request), agent, model=model, options=options), status=201)


async def list_sessions(request: web.Request) -> web.Response:
    here, wanted = parts(request), query(request, _LIST)
    with_total = wanted.pop("includeTotal", False)
    found, total = await here.sessions.list(tenant(request), **{name: value for name, value in wanted.items() if value != ""})
    body: Json = {"sessions": [_wire(here, session) for session in found]}
    return web.json_response({**body, "total": total} if with_total else body)


async def get(request: web.Request) -> web.Response:
    here = parts(request)
    session = await here.sessions.get(tenant(request), session_id(request))
    resources = await here.sessions.resources(session.id)
    return web.json_response({"session": {**_wire(here, session), "resources": resources}})


async def update_config(request: web.Request) -> web.Response:
    here, id = parts(request), session_id(request)
    changes = fields.parse(await read_json(request), _CONFIG, keep_null=True)
    return _answer(here, await here.sessions.update_config(tenant(request), id, changes))


def _change(name: str, status: int = 200) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler for a change that takes nothing but the session. A body is not looked at: clients send one or none."""

    async def handler(request: web.Request) -> web.Response:
        here = parts(request)
        return _answer(here, await getattr(here.sessions, name)(tenant(request), session_id(request)), status)

    return handler


async def interrupt(request: web.Request) -> web.Response:
    """Answers when the turn has ended; `interrupted` is false when none was running."""
    return web.json_response({"interrupted": await parts(request).sessions.interrupt(tenant(request), session_id(request))})


async def exec_command(request: web.Request) -> web.Response:
    here, id = parts(request), session_id(request)
    body = fields.parse(await read_json(request), _EXEC, required=("command",))
    timeout = body.get("timeout", 30_000) / 1000
    result = await here.sessions.exec(
        tenant(request), id, body["command"], timeout=timeout, cwd=body.get("cwd"), env=body.get("env"), stdin=body.get("stdin")
    )
    return web.json_response({
        "exitCode": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "timedOut": result.timed_out,
        "truncated": result.truncated,
    })  # fmt: skip


async def logs(request: web.Request) -> web.Response:
    after = query(request, _LOGS).get("after", -1)
    found = await parts(request).sessions.logs(tenant(request), session_id(request), after)
    return web.json_response({"logs": found, "source": "sandbox"})


ROUTES = (
    web.post("/api/sessions", create),
    web.get("/api/sessions", list_sessions),
    web.get("/api/sessions/{id}", get),
    web.delete("/api/sessions/{id}", _change("end")),
    web.post("/api/sessions/{id}/pause", _change("pause")),
    web.post("/api/sessions/{id}/resume", _change("resume")),
    web.post("/api/sessions/{id}/stop", _change("stop")),
    web.post("/api/sessions/{id}/fork", _change("fork", status=201)),
    web.post("/api/sessions/{id}/interrupt", interrupt),
    web.patch("/api/sessions/{id}/config", update_config),
    web.post("/api/sessions/{id}/exec", exec_command),
    web.get("/api/sessions/{id}/logs", logs),
)
