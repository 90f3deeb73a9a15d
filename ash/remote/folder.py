"""An agent folder as the body of an upload: which files go, and the JSON that carries them, made piece by piece.

It reads the folder it is given and never leaves it: a link that points outside is refused.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ash.errors import AgentUnusable
from ash.skipped import is_skipped

_PIECE = 3 * 256 * 1024  # a multiple of 3, so that the base64 of the pieces joins without padding

Progress = Callable[[int, int], None]
"""Called with the bytes sent and the bytes to send."""


class File(NamedTuple):
    """A file to upload. `path` is relative to the folder, with `/`."""

    path: str
    source: str
    size: int


class Upload(NamedTuple):
    """A request body whose length is known before its first byte is made."""

    files: list[File]
    fields: dict[str, object]
    on_progress: Progress | None = None

    @property
    def size(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else 4 * -(-part.size // 3) for part in self._parts())

    def pieces(self) -> Iterator[bytes]:
        """The body. Raises AgentUnusable when a file changes while it is read."""
        sent, total = 0, self.size
        for part in self._parts():
            for piece in [part] if isinstance(part, bytes) else _encoded(part):
                yield piece
                sent += len(piece)
                if self.on_progress is not None:
                    self.on_progress(sent, total)

    def _parts(self) -> Iterator[bytes | File]:
        opening = json.dumps(self.fields)[:-1]
        yield (opening + (", " if self.fields else "") + '"files": [').encode()
        for position, file in enumerate(self.files):
            yield f'{"," if position else ""}{{"path": {json.dumps(file.path)}, "content": "'.encode()
            yield file
            yield b'"}'
        yield b"]}"


def _encoded(file: File) -> Iterator[bytes]:
    left = file.size
    try:
        with open(file.source, "rb") as stream:
            while left and (piece := stream.read(min(_PIECE, left))):
                left -= len(piece)
                yield base64.b64encode(piece)
            if left or stream.read(1):
                raise AgentUnusable(f"{file.path} changed while it was being uploaded; deploy again")
    except OSError as error:
        raise AgentUnusable(f"cannot read {file.source}: {error.strerror}") from error


def scan(folder: str) -> list[File]:
    """The files of an agent folder that are uploaded, sorted. Raises AgentUnusable where the folder cannot be an agent."""
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise AgentUnusable(f"{folder} is not a folder; an agent is a folder with a CLAUDE.md file")
    if not os.path.isfile(os.path.join(root, "CLAUDE.md")):
        raise AgentUnusable(f"{folder} has no CLAUDE.md; write the agent's instructions into {os.path.join(folder, 'CLAUDE.md')}")
    return sorted(_walk(root))


def _walk(root: str) -> Iterator[File]:
    for parent, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not is_skipped(name, is_folder=True)]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise AgentUnusable(f"{os.path.join(parent, name)} is a link to a folder; put the folder itself there, or remove the link")
        for name in names:
            if not is_skipped(name, is_folder=False):
                yield _file(root, os.path.join(parent, name))


def _file(root: str, source: str) -> File:
    target = os.path.realpath(source)
    if os.path.commonpath((root, target)) != root:
        raise AgentUnusable(f"{source} is a link that leads out of the agent folder; put the file itself there, or remove the link")
    if not os.path.isfile(target):
        raise AgentUnusable(f"{source} is not an ordinary file and cannot be uploaded; remove it")
    path = os.path.relpath(source, root).replace(os.sep, "/")
    if not path.isprintable():
        raise AgentUnusable(f"the file name {path!r} cannot be uploaded; rename it")
    return File(path, target, os.path.getsize(target))


def _unreadable(error: OSError) -> None:
    raise AgentUnusable(f"cannot read {error.filename}: {error.strerror}") from error


def agent_name(folder: str) -> str:
    """The name an agent gets from its folder: what is not a letter, a digit, `_` or `-` becomes `-`."""
    name = os.path.basename(os.path.realpath(folder))
    return re.sub(r"[^a-zA-Z0-9_-]+", "-", name).strip("-") or "agent"
