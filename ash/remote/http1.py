"""HTTP/1.1 as a client needs it: the head of a request, and a parser of the response that takes bytes cut anywhere.

Pure: it opens no socket, so the synchronous and the asynchronous client share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ash.errors import InvalidRequest

_MAX_HEAD = 64 * 1024
_MAX_LINE = 4 * 1024


class BrokenResponse(ConnectionError):
    """The peer closed too early, or what it sent is not HTTP."""


class NothingFollows(BrokenResponse):
    """The answer to a stream that is to go on: there is nothing more to send, now or later."""

    def __init__(self) -> None:
        super().__init__("the server has no events to send")


class CannotConnect(ConnectionError):
    """No connection came about, so nothing was sent."""


class Head(NamedTuple):
    """Status line and headers of a response; header names in lower case."""

    status: int
    reason: str
    headers: dict[str, str]


def request_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """The bytes before the body. Raises InvalidRequest for a value that would break out of its line."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    for line in lines:
        if not line.isprintable():
            raise InvalidRequest(f"{line.partition(':')[0]} holds a line break or another control character")
    try:
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    except UnicodeEncodeError as error:
        raise InvalidRequest("a header holds a character that HTTP cannot carry; is the API key complete and correct?") from error


class ResponseParser:
    """Feed it what arrives; `head` is set once complete, `feed` returns the body's bytes, `is_complete` says it is over."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.is_complete = False
        self._buffer = bytearray()
        self._left: int | None = None  # bytes of body or chunk to come; None: up to the end of the connection
        self._step = "head"

    def feed(self, data: bytes) -> bytes:
        self._buffer += data
        body = bytearray()
        while not self.is_complete and self._advance(body):
            pass
        return bytes(body)

    def end(self) -> None:
        """The peer closed. Raises BrokenResponse unless the response may end here."""
        if self._step == "rest":
            self.is_complete = True
        if not self.is_complete:
            raise BrokenResponse(f"the connection was closed {'in the middle of the' if self.head else 'without an'} answer")

    def _advance(self, body: bytearray) -> bool:
        if self._step == "head":
            return self._take_head()
        if self._step in ("body", "rest", "chunk"):
            return self._take_body(body)
        return self._take_chunk_line()

    def _take_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD or (len(self._buffer) >= 5 and not self._buffer.startswith(b"HTTP/")):
                raise BrokenResponse("the answer is not HTTP")
            return False
        head = _parse_head(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        if head.status >= 200:  # below: an interim answer, the real one follows
            self.head = head
            self._begin_body(head)
        return True

    def _begin_body(self, head: Head) -> None:
        length = head.headers.get("content-length")
        if head.status in (204, 304):
            self.is_complete = True
        elif "chunked" in head.headers.get("transfer-encoding", "").lower():
            self._step = "size"
        elif length is not None:
            self._step, self._left = "body", _number(length, 10)
            self.is_complete = self._left == 0
        else:
            self._step = "rest"

    def _take_body(self, body: bytearray) -> bool:
        if not self._buffer:
            return False
        taken = self._buffer if self._left is None else self._buffer[: self._left]
        body += taken
        size = len(taken)
        del self._buffer[:size]
        if self._left is not None:
            self._left -= size
            if not self._left:
                self.is_complete = self._step == "body"
                self._step = "gap"
        return True

    def _take_chunk_line(self) -> bool:
        end = self._buffer.find(b"\n")
        if end < 0:
            if len(self._buffer) > _MAX_LINE:
                raise BrokenResponse("a chunk of the answer has no readable size")
            return False
        line = bytes(self._buffer[:end]).strip()
        del self._buffer[: end + 1]
        if self._step == "gap":  # the line break after a chunk
            self._step = "size"
        elif self._step == "trailer":
            self.is_complete = not line
        else:
            self._left = _number(line.partition(b";")[0].decode("latin-1"), 16)
            self._step = "chunk" if self._left else "trailer"
        return True


def _parse_head(raw: bytes) -> Head:
    first, *lines = raw.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or not (status.isascii() and status.isdigit()):
        raise BrokenResponse("the answer is not HTTP/1.1")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Head(int(status), reason, headers)


def _number(text: str, base: int) -> int:
    try:
        number = int(text.strip(), base)
    except ValueError as error:
        raise BrokenResponse(f"the answer has an unreadable length: {text!r:.60}") from error
    if number < 0:
        raise BrokenResponse(f"the answer has an unreadable length: {text!r:.60}")
    return number
