"""The event-stream format (https://html.spec.whatwg.org/multipage/server-sent-events.html), both ways. Pure; no I/O.

Data is always one line of ASCII-escaped JSON: readers that split lines the way Python's str.splitlines does would
otherwise cut an event at a raw U+2028, and lose it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

KEEPALIVE = b": ping\n\n"


class Frame(NamedTuple):
    """One event of a stream. `id` is the cursor to continue after; None where the sender gave none."""

    event: str
    data: Any
    id: str | None = None


def encode(event: str, data: object, id: int | str | None = None) -> bytes:
    """One frame; `event:` stands directly before `data:`, the order in which published clients read them.

    Raises ValueError for a name or an id that is not printable ASCII: it could end its line and begin a frame of its own.
    """
    if not all(text.isascii() and text.isprintable() for text in (event, str(id))):
        raise ValueError(f"an event's name and id must be printable ASCII, got {event!r:.60} and {id!r:.60}")
    body = json.dumps(data, separators=(",", ":"))
    cursor = "" if id is None else f"id: {id}\n"
    return f"{cursor}event: {event}\ndata: {body}\n\n".encode("ascii")


class Decoder:
    """Turns chunks of bytes, cut anywhere, into frames. A frame whose data is not JSON keeps its text as data.

    `max_bytes` bounds one frame, so that a hostile sender cannot grow memory; beyond it `feed` raises ValueError.
    """

    def __init__(self, max_bytes: int = 64 * 1024 * 1024) -> None:
        self._max = max_bytes
        self._buffer = bytearray()
        self._scanned = 0
        self._event = ""
        self._data: list[str] = []
        self._size = 0
        self.last_id: str | None = None

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """Every frame that `chunk` completes, in order."""
        self._buffer += chunk
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            frame = self._line(line.rstrip(b"\r"))
            if frame is not None:
                yield frame
        self._scanned = len(self._buffer)
        if self._size + len(self._buffer) > self._max:
            raise ValueError(f"an event of the stream is larger than {self._max} bytes")

    def _line(self, line: bytes) -> Frame | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"event":
            self._event = text
        elif name == b"data":
            self._data.append(text)
            self._size += len(value)
        elif name == b"id":
            self.last_id = text
        return None

    def _dispatch(self) -> Frame | None:
        text, event = "\n".join(self._data), self._event
        has_data = bool(self._data)
        self._data, self._event, self._size = [], "", 0
        if not has_data:
            return None
        try:
            data = json.loads(text)
        except ValueError:
            data = text
        return Frame(event or "message", data, self.last_id)
