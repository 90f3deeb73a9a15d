"""HTTP/1.1 between a program inside and a host, both over TLS: request by request, with credentials put in and kept from coming back.

Both sides are framed by h11, so that no two readers see different requests; bodies stream, and whoever reads slowly slows the other
down. It never logs a header or a body, and no error that it writes holds one.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import h11

from ash.egress.forward import passed_on
from ash.egress.front import next_event
from ash.egress.injection import HTTPS, BoundCredential, Header, inject
from ash.egress.redaction import Redactor, needles
from ash.egress.rules import parse_host, shown
from ash.egress.streams import give_way
from ash.egress.tls import TlsStream
from ash.errors import AshError, InvalidRequest, UpstreamError
from ash.tasks import Tasks

MAX_HEAD = 128 * 1024
HOLD_SECONDS = 0.25
"""How long the end of a stream is held back when nothing follows it: it must not stall. A host that stops in the middle of a secret for
longer wants to give it away, and could do so otherwise."""
LINGER_SECONDS = 1.0
_UNPACK_BYTES = 256 * 1024
_UPGRADE = b"websocket"
"""The one protocol that may follow HTTP on a connection. Others could carry further requests, without the credential."""
_DROPPED_FROM_REQUESTS = frozenset((b"host", b"accept-encoding", b"content-length", b"sec-websocket-extensions", b"expect"))

Open = Callable[[], Awaitable[TlsStream]]


class Peer:
    """One side: HTTP over its TLS stream."""

    def __init__(self, stream: TlsStream, role: Any, tasks: Tasks) -> None:
        self.http = h11.Connection(role, max_incomplete_event_size=MAX_HEAD)
        self._stream, self._tasks = stream, tasks
        self._reading: asyncio.Task[bytes] | None = None

    async def event(self) -> Any:
        """Raises h11.RemoteProtocolError."""
        while (event := next_event(self.http)) is h11.NEED_DATA:
            self.http.receive_data(await self.receive())
        return event

    def start_receiving(self) -> asyncio.Task[bytes]:
        """A read under way, which the next `receive` takes over."""
        if self._reading is None:
            self._reading = self._tasks.start(self._read(), "read from an intercepted connection")
        return self._reading

    async def receive(self) -> bytes:
        """Some bytes; none at the end. A cancelled wait loses nothing."""
        data = await asyncio.shield(self.start_receiving())
        self._reading = None
        return data

    async def _read(self) -> bytes:
        with suppress(OSError):  # lost is ended: HTTP knows whether that was too early
            return await self._stream.read()
        return b""

    async def send(self, event: Any) -> None:
        if data := self.http.send(event):
            await self._stream.write(data)

    async def write(self, data: bytes) -> None:
        if data:
            await self._stream.write(data)

    async def is_silent(self, seconds: float) -> bool:
        """Whether nothing more comes for so long."""
        done, _ = await asyncio.wait((self.start_receiving(),), timeout=seconds)
        return not done

    def abort(self) -> None:
        self._stream.abort()


class Misdirected(AshError):
    """A request for another host than the connection's."""

    code, status = "misdirected_request", 421


class Exchange:
    """The requests of one connection of the program inside, to the one host that it is for."""

    def __init__(self, inside: TlsStream, host: str, port: int, credentials: tuple[BoundCredential, ...], open: Open, tasks: Tasks) -> None:
        self._inside, self._tasks, self._open = Peer(inside, h11.SERVER, tasks), tasks, open
        self._host, self._credentials = host, credentials
        self._names = (shown(parse_host(host)), shown(parse_host(host), port))
        self._target = self._names[port != HTTPS]
        """As it stands in a Host header."""
        self._outside: Peer | None = None
        self._forms = {form for credential in credentials for form in needles(credential.secret.reveal())}
        self._redact = Redactor(self._forms).redact
        self._has_answered = self._is_complete = self._is_head = False

    async def run(self) -> None:
        """Until one side ends. Raises OSError when the program inside breaks off."""
        try:
            while isinstance(request := await self._inside.event(), h11.Request):
                if not await self._pass_on(request) or not await self._is_asked_again():
                    break
        except h11.RemoteProtocolError as error:
            await self._complain(error.error_status_hint, f"this is not a request that can be passed on: {error}")
        except AshError as error:
            await self._complain(error.status, error.message, error.hint)
        except h11.LocalProtocolError:
            return  # one side has spoken out of turn, and there is nobody left to tell
        await self._linger()

    async def _complain(self, status: int, message: str, hint: str = "") -> None:
        """Say in an answer what is wrong, where none has begun."""
        if self._has_answered or self._inside.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        text = self._redact(f"Ash: {message}.\n{hint}".rstrip("\n").encode("utf-8", "replace")) + b"\n"
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text))), ("Connection", "close")]
        await self._inside.send(h11.Response(status_code=status, headers=headers))
        if not self._is_head:
            await self._inside.send(h11.Data(data=text))
        await self._inside.send(h11.EndOfMessage())

    async def _linger(self) -> None:
        """Read on for a moment, so that a program that is still sending comes to read its answer."""
        with suppress(TimeoutError, h11.ProtocolError, OSError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._inside.http.their_state is h11.SEND_BODY and isinstance(await self._inside.event(), h11.Data):
                    pass

    # One request

    async def _pass_on(self, request: h11.Request) -> bool:
        """False when the connection ends with this answer."""
        self._has_answered = self._is_complete = False
        self._is_head = request.method == b"HEAD"
        head = self._head(request)
        if self._outside is None:
            self._outside = Peer(await self._open(), h11.CLIENT, self._tasks)
        with self._reported():
            await self._outside.send(head)
        upload = self._tasks.start(self._upload(self._outside), "pass a request's body on")
        try:
            await self._download(self._outside)
            return self._is_complete and upload.done() and self._start_next(self._outside)
        finally:
            upload.cancel()

    def _start_next(self, outside: Peer) -> bool:
        if any(side.http.our_state is not h11.DONE or side.http.their_state is not h11.DONE for side in (self._inside, outside)):
            return False
        for side in (self._inside, outside):
            side.http.start_next_cycle()
        return True

    async def _is_asked_again(self) -> bool:
        """Until the program inside says something more. The host's hanging up is passed on to it, as if there were nobody in between."""
        if self._outside is None or self._inside.http.trailing_data[0]:
            return True
        inside, outside = self._inside.start_receiving(), self._outside.start_receiving()
        await asyncio.wait((inside, outside), return_when=asyncio.FIRST_COMPLETED)
        return not outside.done()

    def _head(self, request: h11.Request) -> h11.Request:
        """The request as it goes to the host. Raises InvalidRequest, EgressRefused."""
        if request.method in (b"CONNECT", b"TRACE"):
            raise InvalidRequest(f"{request.method.decode()} is not passed on")
        if not request.target.startswith(b"/") and request.target != b"*":
            raise InvalidRequest("the request's first line must hold a path, as in GET /path")
        if [value.decode("latin-1").lower() in self._names for name, value in request.headers if name == b"host"] != [True]:
            # A server may answer to other names as well; the credential is for this one.
            raise Misdirected(f"the Host header must be {self._target}, the host of this connection")
        kept = [(name, value) for name, value in passed_on(request.headers) if name.lower() not in _DROPPED_FROM_REQUESTS]
        headers = [(b"Host", self._target.encode()), *inject(kept, self._credentials), (b"Accept-Encoding", b"identity")]
        return h11.Request(method=request.method, target=request.target, headers=[*headers, *_framing(request), *_upgrade(request)])

    async def _upload(self, outside: Peer) -> None:
        """The request's body. What goes wrong here shows in the answer."""
        with suppress(OSError, h11.LocalProtocolError):
            if self._inside.http.they_are_waiting_for_100_continue:
                await self._inside.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            try:
                while isinstance(event := await self._inside.event(), h11.Data):
                    await outside.send(h11.Data(data=event.data))
                    await give_way()
            except h11.RemoteProtocolError:
                outside.abort()  # the host must not wait for the rest, nor take it for whole
            else:
                await outside.send(h11.EndOfMessage())

    # Its answer

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, h11.RemoteProtocolError) as error:
            raise UpstreamError(f"{self._target} closed the connection early, or does not speak HTTP/1.1") from error

    async def _download(self, outside: Peer) -> None:
        while not self._has_answered:
            with self._reported():
                event = await outside.event()
            if isinstance(event, h11.InformationalResponse):
                await self._inform(event, outside)
                await give_way()
            elif isinstance(event, h11.Response):
                await self._answer(event, outside)
            else:
                raise UpstreamError(f"{self._target} closed the connection without an answer")

    async def _inform(self, event: h11.InformationalResponse, outside: Peer) -> None:
        if event.status_code == 100:
            return  # said already
        is_upgrade = event.status_code == 101
        headers = self._redacted(event.headers.raw_items() if is_upgrade else passed_on(event.headers))
        reason = self._redact(event.reason)
        await self._inside.send(h11.InformationalResponse(status_code=event.status_code, headers=headers, reason=reason))
        if is_upgrade:
            self._has_answered = True
            await self._splice(outside)

    async def _answer(self, event: h11.Response, outside: Peer) -> None:
        named = dict(event.headers)
        unpacker = self._unpacker(event, named)
        dropped = {b"content-length"} if b"transfer-encoding" in named or unpacker else set()
        dropped |= {b"content-encoding"} if unpacker else set()
        headers = [header for header in self._redacted(passed_on(event.headers)) if header[0].lower() not in dropped]
        if b"close" in named.get(b"connection", b"").lower() or event.http_version < b"1.1":
            headers.append((b"Connection", b"close"))
        self._has_answered = True
        await self._inside.send(h11.Response(status_code=event.status_code, headers=headers, reason=self._redact(event.reason)))
        with suppress(h11.RemoteProtocolError):  # it broke off, and so does what the program inside gets
            await self._pour(outside, unpacker)

    def _unpacker(self, event: h11.Response, named: dict[bytes, bytes]) -> Unpacker | None:
        """For a host that compresses although it was asked not to: a secret would not be seen in there."""
        coding = named.get(b"content-encoding", b"identity").strip().lower()
        if coding == b"identity" or event.status_code in (204, 304) or self._is_head:
            return None
        if coding not in (b"gzip", b"x-gzip") or event.status_code == 206:
            raise UpstreamError(f"{self._target} compresses its answer although it was asked not to, so that it cannot be checked")
        return Unpacker()

    def _redacted(self, headers: Iterable[Header]) -> list[Header]:
        return [(self._redact(name), self._redact(value)) for name, value in headers]

    async def _pour(self, outside: Peer, unpacker: Unpacker | None) -> None:
        """The body, piece by piece."""
        redactor = Redactor(self._forms)
        while isinstance(event := await outside.event(), h11.Data):
            for piece in unpacker.feed(event.data) if unpacker else (bytes(event.data),):
                await self._send_data(redactor.feed(piece))
                await give_way()
            if redactor.holds and not outside.http.trailing_data[0] and await outside.is_silent(HOLD_SECONDS):
                await self._send_data(redactor.flush())
        if isinstance(event, h11.EndOfMessage):
            await self._send_data(redactor.flush())
            await self._inside.send(h11.EndOfMessage(headers=self._redacted(event.headers.raw_items())))
            self._is_complete = True

    async def _send_data(self, data: bytes) -> None:
        if data:
            await self._inside.send(h11.Data(data=data))

    async def _splice(self, outside: Peer) -> None:
        """After HTTP: bytes, both ways, until one side ends."""
        copies = (copy(self._inside, outside, Redactor(())), copy(outside, self._inside, Redactor(self._forms)))
        running = [self._tasks.start(work, "pass an upgraded connection on") for work in copies]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()


async def copy(source: Peer, target: Peer, redactor: Redactor) -> None:
    """Bytes as they come, until there are no more."""
    data = source.http.trailing_data[0]
    with suppress(OSError):
        while True:
            await target.write(redactor.feed(data))
            if redactor.holds and await source.is_silent(HOLD_SECONDS):
                await target.write(redactor.flush())
            if not (data := await source.receive()):
                break
        await target.write(redactor.flush())


def _framing(request: h11.Request) -> list[Header]:
    """How long the body is, said in one way. Raises InvalidRequest for a request that says it in two."""
    named = dict(request.headers)
    if b"transfer-encoding" in named and (b"content-length" in named or request.http_version < b"1.1"):
        raise InvalidRequest("a request must not have both Transfer-Encoding and Content-Length, nor Transfer-Encoding in HTTP/1.0")
    if b"transfer-encoding" in named:
        return [(b"Transfer-Encoding", b"chunked")]
    return [(b"Content-Length", named[b"content-length"])] if b"content-length" in named else []


def _upgrade(request: h11.Request) -> list[Header]:
    wanted = [value.strip().lower() for name, value in request.headers if name == b"upgrade"]
    return [(b"Connection", b"Upgrade"), (b"Upgrade", _UPGRADE)] if wanted == [_UPGRADE] else []


class Unpacker:
    """Undoes gzip, in pieces of bounded size. Raises UpstreamError for what is none."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(31)

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                yield self._inflate.decompress(data, _UNPACK_BYTES)
                data = self._inflate.unconsumed_tail
                if self._inflate.eof:
                    data, self._inflate = self._inflate.unused_data, zlib.decompressobj(31)
        except zlib.error as error:
            raise UpstreamError("the host's answer is not compressed as it says") from error
