"""One asyncio HTTP connection for one request, the twin of `connection`. A cancelled request closes its socket at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ash.errors import Overloaded, Unauthorized
from ash.remote.calls import Call
from ash.remote.folder import Upload
from ash.remote.http1 import BrokenResponse, CannotConnect, Head, NothingFollows, ResponseParser
from ash.remote.server import Server, answer, pause_before_retry, with_stored_key

T = TypeVar("T")
R = TypeVar("R")
_RECEIVE = 64 * 1024


class AsyncConnection:
    """Opened by `connect`. Raises OSError (CannotConnect, BrokenResponse, TimeoutError, …) and nothing else."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float) -> None:
        self._reader, self._writer = reader, writer
        self._parser = ResponseParser()
        self._early = b""
        self.timeout = timeout

    async def send(self, head: bytes, body: bytes | Upload | None) -> None:
        try:
            self._writer.write(head + (body if isinstance(body, bytes) else b""))
            if isinstance(body, Upload):
                pieces = body.pieces()
                while piece := await asyncio.to_thread(next, pieces, b""):
                    self._writer.write(piece)
                    await self._drain()
            await self._drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have answered and closed before it read all of it; that answer says why

    async def _drain(self) -> None:
        async with asyncio.timeout(self.timeout):
            await self._writer.drain()

    async def read_head(self) -> Head:
        while self._parser.head is None:
            self._early += await self._receive()
        return self._parser.head

    async def read(self) -> bytes:
        """Some bytes of the body, as soon as there are any; empty at its end."""
        body, self._early = self._early, b""
        while not body and not self._parser.is_complete:
            body = await self._receive()
        return body

    async def read_all(self) -> bytes:
        body = bytearray()
        while piece := await self.read():
            body += piece
        return bytes(body)

    async def _receive(self) -> bytes:
        async with asyncio.timeout(self.timeout):
            data = await self._reader.read(_RECEIVE)
        if not data:
            self._parser.end()
            return b""
        return self._parser.feed(data)

    def close(self) -> None:
        self._writer.transport.abort()


async def connect(server: Server, timeout: float) -> AsyncConnection:
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(server.host, server.port, ssl=server.tls())
    except OSError as error:
        raise CannotConnect(str(error.strerror or error) or "timed out") from _cause(error)
    return AsyncConnection(reader, writer, timeout)


def _cause(error: OSError) -> OSError:
    """asyncio joins the refusals of several addresses into one OSError; it is a refusal all the same."""
    return ConnectionRefusedError(*error.args) if "Connect call failed" in str(error) and "[Errno 111]" in str(error) else error


async def exchange(server: Server, call: Call[T]) -> T:
    """Send `call` and read its answer. Raises OSError for the connection, AshError for what the server answers."""
    return await _politely(_exchange, server, call)


async def _politely(send: Callable[[Server, Call[T]], Awaitable[R]], server: Server, call: Call[T]) -> R:
    """Once more with a key if the server asks for one, and a few times when it says that it is overloaded, after the time it asks for."""
    for attempt in itertools.count():
        try:
            return await send(server, call)
        except Unauthorized as refused:
            server = with_stored_key(server, refused)
        except Overloaded as refused:
            await asyncio.sleep(pause_before_retry(refused, attempt))
    raise AssertionError("a count without end has ended")


async def _exchange(server: Server, call: Call[T]) -> T:
    connection = await connect(server, server.timeout + call.timeout)
    try:
        await connection.send(server.head(call), call.body)
        head = await connection.read_head()
        result: Any = answer(call, head, await connection.read_all())
    finally:
        connection.close()
    return result  # type: ignore[no-any-return]


async def open_stream(server: Server, call: Call[None]) -> AsyncConnection:
    """The connection of an event stream, at the first byte of its body."""
    return await _politely(_open_stream, server, call)


async def _open_stream(server: Server, call: Call[None]) -> AsyncConnection:
    connection = await connect(server, server.timeout)
    try:
        await connection.send(server.head(call), call.body)
        head = await connection.read_head()
        if head.status == 204:
            raise NothingFollows()
        if head.status != 200 or not head.headers.get("content-type", "").startswith("text/event-stream"):
            answer(call, head, await connection.read_all())
            raise BrokenResponse(f"{server.url} did not answer with a stream of events; is this address an Ash server?")
        connection.timeout = server.stream_timeout
    except BaseException:
        connection.close()
        raise
    return connection
