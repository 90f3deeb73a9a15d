"""The sandbox's side of a proxy connection: reads requests strictly, within limits, and writes answers. Connects to nothing.

h11 parses; what it leaves open and what could be read in two ways is refused here.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, NamedTuple

import h11

from ash.egress.rules import Address, Refusal, parse_host, parse_port
from ash.egress.streams import CHUNK, Pair
from ash.errors import AshError, EgressRefused, InvalidRequest, Timeout

MAX_HEAD = 32 * 1024
"""Bytes of a request's line and headers."""
MAX_LINES = 300
"""Of any head. One of very many short lines would take long to read, and nothing else could be done meanwhile."""
HEAD_SECONDS = 15.0
"""From the connection, or from the answer before, to the end of a request's head."""
LINGER_SECONDS = 1.0
"""How long a refused request's body is read on, so that its sender comes to read the answer."""
_LINGER_BYTES = 1024 * 1024
_ABSOLUTE = re.compile(r"http://(?P<authority>[^/?#]*)(?P<path>[^#]*)", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[(?P<bracket>[0-9A-Fa-f:.]+)\]|(?P<plain>[^:@\[\]]+))(?::(?P<port>[0-9]*))?")
_BLANK_LINE = re.compile(rb"\n\r?\n")
TUNNEL_OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Target(NamedTuple):
    """Where a request is to go. `path` is empty for a tunnel."""

    host: str | Address
    port: int
    path: str
    is_tunnel: bool


class Front:
    """One connection from a sandbox, with one request after the other."""

    def __init__(self, pair: Pair) -> None:
        self.reader, self.writer = pair
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._has_answered = False

    async def request(self) -> h11.Request | None:
        """The next request's head; None when there is none. Raises InvalidRequest, Timeout."""
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                event = await self.event()
        except TimeoutError as error:
            if not self.http.trailing_data[0]:
                return None
            slow = Timeout(f"no complete request came within {HEAD_SECONDS:g} s")
            slow.status = 408
            raise slow from error
        if isinstance(event, h11.Request):
            _check(event)
            return event
        return None

    async def event(self) -> Any:
        """The next event of the request. Raises InvalidRequest for what is not HTTP."""
        try:
            while (event := next_event(self.http)) is h11.NEED_DATA:
                # In small bites as long as it is a head, which h11 then refuses before it has become too long.
                self.http.receive_data(await self.reader.read(MAX_HEAD // 4 if self.http.their_state is h11.IDLE else CHUNK))
        except h11.RemoteProtocolError as error:
            raise InvalidRequest(f"this is not a request that a proxy understands: {error}") from error
        return event

    async def send(self, event: Any) -> None:
        self._has_answered = self._has_answered or isinstance(event, h11.Response)
        data = self.http.send(event)
        if data:
            self.writer.write(data)
            await self.writer.drain()

    async def open_tunnel(self) -> bytes:
        """Say that the tunnel is open. Returns what was sent through it already."""
        self._has_answered = True
        self.writer.write(TUNNEL_OPEN)
        await self.writer.drain()
        return self.http.trailing_data[0]

    @property
    def can_answer(self) -> bool:
        return not self._has_answered and not self.writer.is_closing()

    async def refuse(self, status: int, word: str, message: str, hint: str = "") -> None:
        """Answer with a text that says why, and end the connection. The status line says it too: tools show no more of a refused tunnel."""
        text = f"Ash: {message}.\n" + (f"{hint}\n" if hint else "")
        body = text.encode("utf-8", "replace")
        phrase = re.sub(r"[^\x20-\x7e]", "?", message)[:200]
        head = (
            f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
            f"Ash-Egress: {word}\r\nConnection: close\r\n\r\n"
        )
        self.writer.write(head.encode("ascii") + body)
        await self.writer.drain()
        await self._linger()

    async def _linger(self) -> None:
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                self.writer.write_eof()
                left = _LINGER_BYTES
                while left > 0 and (data := await self.reader.read(CHUNK)):
                    left -= len(data)
        except (TimeoutError, OSError):
            return

    def next_cycle(self) -> bool:
        """Get ready for another request. False when the connection ends with this one."""
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
            self._has_answered = False
            return True
        return False


def next_event(http: h11.Connection) -> Any:
    """h11's next event. Raises h11.RemoteProtocolError for a head with too many lines, before it is parsed."""
    if http.their_state in (h11.IDLE, h11.SEND_RESPONSE):
        held = http.trailing_data[0]
        if held.count(b"\n") > MAX_LINES and _BLANK_LINE.split(held, 1)[0].count(b"\n") > MAX_LINES:
            raise h11.RemoteProtocolError(f"it has more than {MAX_LINES} headers", error_status_hint=431)
    return http.next_event()


def _check(request: h11.Request) -> None:
    """What two readers may take for requests of different lengths is not passed on."""
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        raise InvalidRequest("a request must not have both Transfer-Encoding and Content-Length, nor Transfer-Encoding in HTTP/1.0")
    if request.method == b"CONNECT" and (b"transfer-encoding" in names or b"content-length" in names):
        raise InvalidRequest("a CONNECT request has no body")
    if names.count(b"host") > 1:
        raise InvalidRequest("a request has one Host header at most")


def parse_target(request: h11.Request) -> Target:
    """Where the request is to go, by its first line alone. Raises InvalidRequest."""
    text = request.target.decode("ascii")
    if request.method == b"CONNECT":
        host, port = _parse_authority(text)
        if port is None:
            raise InvalidRequest("CONNECT needs a port, as in CONNECT example.com:443")
        return Target(host, port, "", True)
    match = _ABSOLUTE.fullmatch(text)
    if match is None:
        raise InvalidRequest(
            "this is a proxy: ask for http://host/path, or use CONNECT for everything else"
            if text.startswith("/") or text == "*"
            else "only http:// is passed on like this; use CONNECT for everything else"
        )
    host, port = _parse_authority(match["authority"])
    path = match["path"]
    return Target(host, 80 if port is None else port, path if path.startswith("/") else f"/{path}", False)


def _parse_authority(text: str) -> tuple[str | Address, int | None]:
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r:.80} is not a host")
    try:
        host = parse_host(match["bracket"] or match["plain"])
        return host, parse_port(match["port"]) if match["port"] else None
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def explain(error: AshError) -> tuple[int, Refusal]:
    """Status and words of an error, as the program inside gets them."""
    if isinstance(error, EgressRefused):
        return error.status, Refusal(error.reason, error.message, error.hint)
    reason = {400: "malformed", 408: "timeout", 429: "busy", 504: "timeout"}.get(error.status, "failed")
    return error.status, Refusal(reason, error.message, "")
