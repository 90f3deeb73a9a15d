"""What every handler needs of a request: its tenant, its session id, its query and its JSON body within a limit. It answers nothing."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from aiohttp import web

from ash.auth import GUARD, KEY_ID, TENANT
from ash.errors import Forbidden, InvalidRequest, PayloadTooLarge
from ash.policy import Policy
from ash.routes import fields

MIB = 1024 * 1024
SMALL_BODY = 8 * MIB
"""Enough for the longest system prompt, however it is escaped."""

MAX_VALUES = 2_000_000
"""A body may be large because of its strings. Objects in memory take many times their text, so their number has a limit of its own."""

_PIECE = MIB
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def tenant(request: web.Request) -> str:
    return request[TENANT]


def require_deployer(request: web.Request, policy: Policy) -> None:
    """Raise Forbidden for a caller whom the operator does not let deploy."""
    if not policy.deploy.allows(request[KEY_ID], is_local=request.app[GUARD].is_direct(request)):
        who = f"with the API key {request[KEY_ID]}" if request[KEY_ID] else "without a key"
        raise Forbidden(
            f"Who calls {who} may not deploy or delete agents here: `allow` under [deploy] in the operator's policy names others"
        )


def session_id(request: web.Request) -> str:
    return fields.uuid("params/id", request.match_info["id"])


def query(request: web.Request, table: fields.Table) -> dict[str, Any]:
    """The parameters of the query string that `table` names; the last one where a name is given twice."""
    return fields.parse(dict(request.query), table)


async def read_json(request: web.Request, limit: int = SMALL_BODY) -> Any:
    """The body as JSON, whatever its content type says; an empty body is an empty object."""
    body = await _read(request, limit)
    # A parse holds the interpreter even in a thread of its own; that this is never for long is what MAX_VALUES is for.
    return await asyncio.to_thread(_parse, body) if len(body) > MIB else _parse(body)


def _parse(body: bytes) -> Any:
    if not body or body.isspace():
        return {}
    _check_count(body)
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_parse_float)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise InvalidRequest("The body is not usable: its JSON is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from error
    if _SURROGATE_ESCAPE.search(body):
        _check_text(value)
    return value


def _check_count(body: bytes) -> None:
    count = 0
    for piece in _outside_strings(body):
        count += sum(piece.count(mark) for mark in b"[{,")  # each value but the first comes behind one of them
        if count > MAX_VALUES:
            raise PayloadTooLarge(f"The request body is too large: it holds more than {MAX_VALUES:,} values")


def _outside_strings(body: bytes) -> Iterator[bytes]:
    """The JSON text without its strings, piece by piece: every call in here is short, so that other threads get their turn."""
    is_inside, cut_escape = False, b""
    for start in range(0, len(body), _PIECE):
        plain = (cut_escape + body[start : start + _PIECE]).replace(b"\\\\", b"").replace(b'\\"', b"")
        cut_escape = b"\\" if plain.endswith(b"\\") else b""
        parts = plain.split(b'"')
        yield b"".join(parts[is_inside::2])
        is_inside ^= len(parts) % 2 == 0


async def _read(request: web.Request, limit: int) -> bytes:
    too_large = PayloadTooLarge(f"The request body is too large: the limit here is {limit // MIB} MiB")
    if (request.content_length or 0) > limit:
        raise too_large
    chunks, size = [], 0
    try:
        async for chunk in request.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise too_large
    except (web.RequestPayloadError, ConnectionError) as error:
        raise InvalidRequest("The request body ended early or is not encoded as its headers say") from error
    return b"".join(chunks)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON value")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is too large a number")
    return value


def _check_text(value: Any) -> None:
    """Half of a surrogate pair is legal in a JSON escape but is no text: it could not be stored, nor sent on."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The body holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, which is no character"
        ) from error
