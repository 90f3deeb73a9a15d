"""/api/sessions/{id}/messages, /events and /stream: start turns, list what was said, and follow the log as it grows.

The log is the only source of a stream. A handler starts a turn or joins one; the turn never depends on who listens.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ash import __version__, dialect, models
from ash.errors import InvalidRequest
from ash.models import ENDED, Event, Json
from ash.routes import fields
from ash.routes.parts import Parts, parts
from ash.routes.requests import MIB, query, read_json, session_id, tenant
from ash.routes.streams import SessionStream, TurnStream, is_session_end

MESSAGE_BODY = 50 * MIB
_MAX_CONTENT, _MAX_BLOCKS = 500_000, 20
_LATE_ENDS = 100
_BLOCK_TYPES = ("text", "image", "document")
_SHOWN_BY_OTHERS = ("mcp_status",)  # a timeline type that clients may ask for and that has no rows here

_LIST: fields.Table = {"limit": fields.query_integer(1, 1000), "after": fields.query_integer(0)}
_EVENTS: fields.Table = {**_LIST, "type": fields.choice(*dialect.TIMELINE_TYPES, *_SHOWN_BY_OTHERS)}
_STREAM: fields.Table = {"after": fields.query_integer(0)}


def _content(name: str, value: Any) -> Any:
    """A string or a list of blocks, checked and passed on untouched."""
    if isinstance(value, str):
        return fields.text(_MAX_CONTENT, 1)(name, value)
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a string or a list of blocks")
    if not 1 <= len(value) <= _MAX_BLOCKS:
        raise InvalidRequest(f"{name} must have 1 to {_MAX_BLOCKS} blocks; it has {len(value)}")
    for position, block in enumerate(value):
        _check_block(f"{name}[{position}]", block)
    return value


def _check_block(name: str, block: Any) -> None:
    kind = fields.mapping(name, block).get("type")
    fields.choice(*_BLOCK_TYPES)(f"{name}.type", kind)
    if kind == "text" and not isinstance(block.get("text"), str):
        raise InvalidRequest(f"{name}.text must be a string")
    if kind != "text" and not isinstance(block.get("source"), dict):
        raise InvalidRequest(f"{name}.source must be an object")


_SEND: fields.Table = {
    "content": _content,
    "includePartialMessages": fields.boolean,
    "model": fields.text(100, 1),
    "maxTurns": fields.integer(1),
    "maxBudgetUsd": fields.number(0),
    "effort": fields.choice("low", "medium", "high", "max"),
    "thinking": fields.mapping,
    "outputFormat": fields.mapping,
}


async def send(request: web.Request) -> web.StreamResponse:
    """Start a turn and stream it; with a Last-Event-ID, go on with the stream of the turn that holds that event instead."""
    here, id, cursor = parts(request), session_id(request), _last_event_id(request)
    if cursor is not None:
        return await _rejoin(request, here, id, cursor)
    limit = min(MESSAGE_BODY, here.config.max_body_mb * MIB)
    options = fields.parse(await read_json(request, limit), _SEND, required=("content",))
    content = options.pop("content")
    turn = await here.sessions.send(tenant(request), id, content, options)
    # The turn's first event as it is in the log, but for its content, which may be tens of megabytes and is not shown.
    started = Event(id, turn.first_seq, models.TURN_STARTED, {"turnId": turn.id, "version": __version__}, "")
    return await TurnStream(request, here, id, turn.first_seq - 1, turn.id).run(first=started)


async def _rejoin(request: web.Request, here: Parts, id: str, cursor: int) -> web.StreamResponse:
    await here.sessions.get(tenant(request), id)
    await _check_cursor(here, id, cursor)
    turn_id = await _find_turn(here, id, cursor)
    if turn_id is None:
        return web.Response(status=204)
    return await TurnStream(request, here, id, cursor, turn_id).run()


async def _find_turn(here: Parts, id: str, cursor: int) -> str | None:
    """The id of the turn that holds event `cursor`, or of the first one for 0; None when its end is not after `cursor`."""
    first = [] if cursor else await here.log.read(id, limit=1, types=(models.TURN_STARTED,))
    found = await here.store.find_turn(id, first[0].seq if first else cursor)
    if found is None:
        return None
    start, turn_id = found
    # Beside its own end there are only those of earlier turns that were recorded late.
    ends = await here.log.read(id, after=start, limit=_LATE_ENDS, types=(models.TURN_ENDED,))
    return None if any(end.seq <= cursor and end.data.get("turnId") == turn_id for end in ends) else turn_id


async def _check_cursor(here: Parts, id: str, cursor: int) -> None:
    last = await here.store.last_seq(id)
    if cursor > last:
        raise InvalidRequest(f"There is no event {cursor} to continue after: the session's log ends at {last}")


def _last_event_id(request: web.Request) -> int | None:
    value = request.headers.get("Last-Event-ID", "").strip()
    return int(fields.query_integer(0)("Last-Event-ID", value)) if value else None


async def follow(request: web.Request) -> web.StreamResponse:
    """The session's stream across turns, from its first event or after `?after` or Last-Event-ID, until the session has ended."""
    here, id = parts(request), session_id(request)
    session = await here.sessions.get(tenant(request), id)
    cursor = _last_event_id(request)
    after = cursor if cursor is not None else query(request, _STREAM).get("after", 0)
    await _check_cursor(here, id, after)
    is_live = session.status != ENDED  # which it becomes behind its last event: then the log is whole
    if await _is_over(here, id, after, is_live):
        return web.Response(status=204)  # the one answer after which a browser's EventSource does not come back
    return await SessionStream(request, here, id, after=after).run(is_live=is_live)


async def _is_over(here: Parts, id: str, after: int, is_live: bool) -> bool:
    """Whether nothing can follow event `after`: it says that the session has ended, as it may a moment before the session does."""
    around = await here.log.read(id, after=after - 1, limit=2)
    has_seen_end = any(event.seq == after and is_session_end(event) for event in around)
    return has_seen_end or (not is_live and not any(event.seq > after for event in around))


async def list_messages(request: web.Request) -> web.Response:
    here, id, wanted = parts(request), session_id(request), query(request, _LIST)
    session = await here.sessions.get(tenant(request), id)
    rows = await here.store.list_messages(id, after=wanted.get("after", 0), limit=wanted.get("limit", 100))
    return web.json_response({"messages": [dialect.message(event, session.tenant_id, sequence) for sequence, event in rows]})


async def list_events(request: web.Request) -> web.Response:
    here, id, wanted = parts(request), session_id(request), query(request, _EVENTS)
    session = await here.sessions.get(tenant(request), id)
    types = dialect.timeline_sources(wanted.get("type"))
    found = await here.log.read(id, after=wanted.get("after", 0), limit=wanted.get("limit", 200), types=types) if types else []
    rows: list[Json] = [dialect.timeline(event, session.tenant_id) for event in found]
    return web.json_response({"events": rows})


ROUTES = (
    web.post("/api/sessions/{id}/messages", send),
    web.get("/api/sessions/{id}/messages", list_messages),
    web.get("/api/sessions/{id}/events", list_events),
    web.get("/api/sessions/{id}/stream", follow, allow_head=False),
)
