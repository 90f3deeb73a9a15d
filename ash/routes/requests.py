"""What every handler needs of a request: its tenant, its session id, its query and its JSON body within a limit. It answers nothing."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from aiohttp import web

from ash.auth import TENANT
from ash.errors import InvalidRequest, PayloadTooLarge
from ash.routes import fields

MIB = 1024 * 1024
SMALL_BODY = 8 * MIB
"""Enough for the longest system prompt, however it is escaped."""

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def tenant(request: web.Request) -> str:
    return request[TENANT]


def session_id(request: web.Request) -> str:
    return fields.uuid("params/id", request.match_info["id"])


def query(request: web.Request, table: fields.Table) -> dict[str, Any]:
    """The parameters of the query string that `table` names; the last one where a name is given twice."""
    return fields.parse(dict(request.query), table)


async def read_json(request: web.Request, limit: int = SMALL_BODY) -> Any:
    """The body as JSON, whatever its content type says; an empty body is an empty object."""
    body = await _read(request, limit)
    if not body.strip():
        return {}
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_parse_float)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise InvalidRequest("The body is not usable: its JSON is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from error
    if _SURROGATE_ESCAPE.search(body):
        _check_text(value)
    return value


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
