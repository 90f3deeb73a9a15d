"""/api/sessions/{id}/files and /workspace: what a session's agent wrote, listed, read, and moved out and in as one archive."""

from __future__ import annotations

import asyncio
import base64
import binascii
import mimetypes
import tempfile
from typing import Any, BinaryIO
from urllib.parse import quote

from aiohttp import web

from ash.errors import InvalidRequest, PayloadTooLarge
from ash.models import timestamp
from ash.routes import fields
from ash.routes.parts import parts
from ash.routes.requests import MIB, query, read_json, session_id, tenant

_LIST: fields.Table = {"includeHidden": fields.query_flag}
_READ: fields.Table = {"format": fields.choice("raw", "json")}
_BUNDLE: fields.Table = {"bundle": fields.text(2**31, 1)}
_MAX_JSON = MIB
_PIECE = 256 * 1024
_ARCHIVES = ("application/gzip", "application/x-gzip", "application/x-tar", "application/octet-stream")


async def list_files(request: web.Request) -> web.Response:
    hidden = query(request, _LIST).get("includeHidden", True)
    found, is_cut = await parts(request).workspaces.list(tenant(request), session_id(request), hidden=hidden)
    files = [{"path": file.path, "size": file.size, "modifiedAt": timestamp(file.modified_at)} for file in found]
    return web.json_response({"files": files, "source": "sandbox", **({"truncated": True} if is_cut else {})})


async def read_file(request: web.Request) -> web.StreamResponse:
    path, wanted = request.match_info["path"], query(request, _READ).get("format", "raw")
    file, size = await parts(request).workspaces.open(tenant(request), session_id(request), path)
    with file:
        return await (_send(request, file, size, path) if wanted == "raw" else _answer(file, size, path))


async def _answer(file: BinaryIO, size: int, path: str) -> web.Response:
    if size > _MAX_JSON:
        raise InvalidRequest(f"File too large ({size} bytes, max {_MAX_JSON}) for format=json; read it with format=raw")
    content = await asyncio.to_thread(file.read, _MAX_JSON)
    return web.json_response({"path": path, "content": content.decode(errors="replace"), "size": size, "source": "sandbox"})


async def _send(request: web.Request, file: BinaryIO, size: int, path: str, kind: str = "") -> web.StreamResponse:
    """With the size it had when it was opened. A file that is cut off meanwhile breaks the answer, so that nobody takes it for whole."""
    name = path.rpartition("/")[2]
    answer = web.StreamResponse(headers={
        "Content-Type": kind or mimetypes.guess_type(name)[0] or "application/octet-stream",
        # Hostile content on this server's origin: never shown, always saved.
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        "X-Ash-Source": "sandbox",
    })  # fmt: skip
    answer.content_length = size
    await answer.prepare(request)
    while size and (piece := await asyncio.to_thread(file.read, min(_PIECE, size))):
        await answer.write(piece)
        size -= len(piece)
    if size and request.transport is not None:
        request.transport.abort()
    return answer


async def download(request: web.Request) -> web.StreamResponse:
    id = session_id(request)
    with _temporary(parts(request).config.data_dir) as file:
        await parts(request).workspaces.pack(tenant(request), id, file)
        size = file.tell()
        file.seek(0)
        return await _send(request, file, size, f"{id}.tar.gz", "application/gzip")


async def upload(request: web.Request) -> web.Response:
    """The archive as the body itself, or as `{"bundle": base64}`."""
    here, id = parts(request), session_id(request)
    await here.sessions.get(tenant(request), id)
    with _temporary(here.config.data_dir) as file:
        if request.content_type in _ARCHIVES:
            await _receive(request, file, here.config.max_body_mb * MIB)
        else:
            body = fields.parse(await read_json(request, here.config.max_body_mb * MIB), _BUNDLE, required=("bundle",))
            file.write(await asyncio.to_thread(_decode, body["bundle"]))
        if not file.tell():
            raise InvalidRequest("Empty bundle")
        file.seek(0)
        count = await here.workspaces.unpack(tenant(request), id, file)
    return web.json_response({"message": "Workspace restored", "files": count})


async def _receive(request: web.Request, file: BinaryIO, limit: int) -> None:
    size = 0
    async for piece in request.content.iter_chunked(_PIECE):
        size += len(piece)
        if size > limit:
            raise PayloadTooLarge(f"The request body is too large: the limit here is {limit // MIB} MiB (max_body_mb)")
        await asyncio.to_thread(file.write, piece)


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"bundle is not base64: {error}") from error


def _temporary(folder: str) -> Any:
    """A file without a name on the disk of the data folder: /tmp may be memory."""
    return tempfile.TemporaryFile(dir=folder)


ROUTES = (
    web.get("/api/sessions/{id}/files", list_files),
    web.get("/api/sessions/{id}/files/{path:.+}", read_file),
    web.get("/api/sessions/{id}/workspace", download),
    web.post("/api/sessions/{id}/workspace", upload),
)
