"""/api/sessions/{id}/files and /workspace: what a session's agent wrote, listed, read, and moved out and in as one archive."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import mimetypes
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from aiohttp import web

from ash.errors import InvalidRequest, PayloadTooLarge, RangeNotSatisfiable
from ash.models import timestamp
from ash.routes import fields
from ash.routes.parts import parts
from ash.routes.requests import MIB, query, read_json, session_id, tenant

TRANSFER_TIMEOUT = 30.0
"""Seconds in which a client has to take or give something of a file; then it is dropped."""
_LIST: fields.Table = {"includeHidden": fields.query_flag}
_READ: fields.Table = {"format": fields.choice("raw", "json")}
_BUNDLE: fields.Table = {"bundle": fields.text(2**31, 1)}
_MAX_JSON = MIB
_PIECE = 256 * 1024
_ARCHIVES = ("application/gzip", "application/x-gzip", "application/x-tar", "application/octet-stream")
_SOURCE_TYPES = {".ts": "text/typescript", ".tsx": "text/typescript", ".py": "text/x-python", ".md": "text/markdown", ".toml": "text/plain"}
"""Where the usual table has nothing, or a film."""


class _Content(NamedTuple):
    """What a raw answer sends. `tag` names exactly this content; without one it cannot be asked for in parts."""

    file: BinaryIO
    size: int
    name: str
    type: str
    tag: str = ""


async def list_files(request: web.Request) -> web.Response:
    hidden = query(request, _LIST).get("includeHidden", True)
    found, is_cut = await parts(request).workspaces.list(tenant(request), session_id(request), hidden=hidden)
    files = [{"path": file.path, "size": file.size, "modifiedAt": timestamp(file.modified_at)} for file in found]
    return web.json_response({"files": files, "source": "sandbox", **({"truncated": True} if is_cut else {})})


async def read_file(request: web.Request) -> web.StreamResponse:
    path, wanted = request.match_info["path"], query(request, _READ).get("format", "raw")
    file, state = await parts(request).workspaces.open(tenant(request), session_id(request), path)
    with file:
        if wanted == "json":
            return await _answer(file, state.st_size, path)
        name = path.rpartition("/")[2]
        tag = f'"{state.st_ino:x}-{state.st_mtime_ns:x}-{state.st_size:x}"'
        return await _send(request, _Content(file, state.st_size, name, _type_of(name), tag))


def _type_of(name: str) -> str:
    """By the end of the name alone: the agent has chosen all of it, and the library takes a whole name for a URL."""
    ending = os.path.splitext(name)[1].lower()
    return _SOURCE_TYPES.get(ending) or mimetypes.guess_type(f"file{ending}")[0] or "application/octet-stream"


async def _answer(file: BinaryIO, size: int, path: str) -> web.Response:
    if size > _MAX_JSON:
        raise InvalidRequest(f"File too large ({size} bytes, max {_MAX_JSON}) for format=json; read it with format=raw")
    content = await asyncio.to_thread(file.read, size)
    return web.json_response({"path": path, "content": content.decode(errors="replace"), "size": len(content), "source": "sandbox"})


async def _send(request: web.Request, content: _Content) -> web.StreamResponse:
    """With the size it had when it was opened. A file that is cut off meanwhile breaks the answer, so that nobody takes it for whole."""
    start, end = _find_range(request, content)
    answer = web.StreamResponse(headers={
        "Content-Type": content.type,
        # Hostile content on this server's origin: never shown, always saved.
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(content.name, safe='')}",
        "X-Ash-Source": "sandbox",
    })  # fmt: skip
    if content.tag:
        answer.headers.update({"Accept-Ranges": "bytes", "ETag": content.tag})
    if end - start < content.size:
        answer.set_status(206)
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size}"
    answer.content_length = end - start
    with contextlib.suppress(ConnectionError):  # the client has left
        await answer.prepare(request)
        if request.method != "HEAD" and not await _copy(answer, content.file, start, end - start) and request.transport is not None:
            request.transport.abort()
    return answer


async def _copy(answer: web.StreamResponse, file: BinaryIO, start: int, left: int) -> bool:
    """False when the file ends too early or the client takes nothing any more."""
    await asyncio.to_thread(file.seek, start)
    while left and (piece := await asyncio.to_thread(file.read, min(_PIECE, left))):
        left -= len(piece)
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT):
                await answer.write(piece)
        except TimeoutError:
            return False
    return not left


def _find_range(request: web.Request, content: _Content) -> tuple[int, int]:
    """From where to where. As HTTP has it, what is no single range, or is meant for other content, is not looked at."""
    try:
        wanted = request.http_range if request.headers.get("If-Range", content.tag) == content.tag != "" else slice(None)
    except ValueError:
        return 0, content.size
    if wanted.start is None:
        return 0, content.size
    start = wanted.start if wanted.start >= 0 else max(0, content.size + wanted.start)
    end = content.size if wanted.stop is None else min(wanted.stop, content.size)
    if start >= end:
        raise RangeNotSatisfiable(f"The file has {content.size} bytes, and the range {request.headers['Range']!r:.100} lies behind them")
    return start, end


async def download(request: web.Request) -> web.StreamResponse:
    id, workspaces = session_id(request), parts(request).workspaces
    await parts(request).sessions.get(tenant(request), id)
    with workspaces.archive(tenant(request)) as file:
        await workspaces.pack(tenant(request), id, file)
        return await _send(request, _Content(file, file.tell(), f"{id}.tar.gz", "application/gzip"))


async def upload(request: web.Request) -> web.Response:
    """The archive as the body itself, or as `{"bundle": base64}`."""
    here, id = parts(request), session_id(request)
    await here.workspaces.check_writable(tenant(request), id)
    with here.workspaces.archive(tenant(request)) as file:
        if request.content_type in _ARCHIVES:
            await _receive(request, file, here.config.max_body_mb * MIB)
        else:
            body = fields.parse(await read_json(request, here.config.max_body_mb * MIB), _BUNDLE, required=("bundle",))
            await asyncio.to_thread(_decode, body.pop("bundle"), file)
        if not file.tell():
            raise InvalidRequest("Empty bundle")
        file.seek(0)
        count = await here.workspaces.unpack(tenant(request), id, file)
    return web.json_response({"message": "Workspace restored", "files": count})


async def _receive(request: web.Request, file: BinaryIO, limit: int) -> None:
    too_large = PayloadTooLarge(f"The request body is too large: the limit here is {limit // MIB} MiB (max_body_mb)")
    if (request.content_length or 0) > limit:
        raise too_large
    size = 0
    with _receiving():
        while piece := await asyncio.wait_for(request.content.read(_PIECE), TRANSFER_TIMEOUT):
            size += len(piece)
            if size > limit:
                raise too_large
            await asyncio.to_thread(file.write, piece)


@contextlib.contextmanager
def _receiving() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise InvalidRequest(f"Nothing came for {TRANSFER_TIMEOUT:g} s; send the archive again") from error
    except (web.RequestPayloadError, ConnectionError) as error:
        raise InvalidRequest("The request body ended early or is not encoded as its headers say") from error


def _decode(text: str, file: BinaryIO) -> None:
    try:
        file.write(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"bundle is not base64: {error}") from error


ROUTES = (
    web.get("/api/sessions/{id}/files", list_files),
    web.get(r"/api/sessions/{id}/files/{path:[\s\S]+}", read_file),
    web.get("/api/sessions/{id}/workspace", download, allow_head=False),
    web.post("/api/sessions/{id}/workspace", upload),
)
