"""TLS over a pair of asyncio streams that somebody else opened, as either end of it. Knows nothing of what it carries.

Not `StreamWriter.start_tls`: that swaps the transport under the streams, past whatever their owner counts and slows down.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
CHUNK = 64 * 1024
CLOSE_SECONDS = 2.0


class TlsStream:
    """One end of a TLS connection. Owns the two streams: `close` closes them. One reader and one writer at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, *,
        server_side: bool, host: str | None = None,
    ) -> None:  # fmt: skip
        self._reader, self._writer = reader, writer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=host)

    async def handshake(self, seconds: float) -> None:
        """Raises ssl.SSLError, ConnectionError, TimeoutError."""
        async with asyncio.timeout(seconds):
            await self._until(self._tls.do_handshake)

    async def read(self) -> bytes:
        """Some bytes; none at the end. An end without TLS's own goodbye is one too: what it cut off is HTTP's to notice."""
        try:
            return await self._until(self._read_records)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    def _read_records(self) -> bytes:
        """The library gives one record at a time; what is there already is taken together."""
        data = self._tls.read(CHUNK)
        with contextlib.suppress(ssl.SSLError):  # no more for now, or ever: the next call says which
            while data and len(data) < CHUNK and (more := self._tls.read(CHUNK)):
                data += more
        return data

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            while piece:
                piece = piece[await self._until(lambda piece=piece: self._tls.write(piece)) :]  # type: ignore[misc]  # a lambda's default

    async def _until(self, step: Callable[[], T]) -> T:
        """Repeat `step` until it needs no more bytes from the other end. What it wants to say is sent in between."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._reader.read(CHUNK)
                if data:
                    self._incoming.write(data)
                elif self._incoming.eof:
                    raise ConnectionResetError("the connection ended in the middle") from None
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await self._flush()  # the alert that says what is wrong
                raise
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            self._writer.write(data)
        await self._writer.drain()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        """Say goodbye, for those who would take a bare end for an attack, and close. Bounded, and fails in silence."""
        with contextlib.suppress(OSError, TimeoutError, ssl.SSLError):
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._flush()
        self._writer.close()
