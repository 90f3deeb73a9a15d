"""TLS over streams of others: what breaks off or was never TLS ends, and never turns in circles."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ash.egress.authority import Authority
from ash.egress.tls import TlsStream

Serve = Callable[[TlsStream], Coroutine[Any, Any, None]]
AUTHORITY = Authority(["api.test"])


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server that wraps its end and serves it."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = TlsStream(reader, writer, AUTHORITY.context("api.test"), server_side=True)
        try:
            await serve(stream)
            done.set_result(None)
        except OSError as error:  # TimeoutError is one
            done.set_exception(error)
        finally:
            await stream.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    try:
        yield reader, writer
        writer.close()
        async with asyncio.timeout(5):
            await done
    finally:
        writer.close()
        server.close()


def client(pair: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> TlsStream:
    return TlsStream(*pair, ssl.create_default_context(cadata=AUTHORITY.pem.decode()), server_side=False, host="api.test")


async def echo(stream: TlsStream) -> None:
    await stream.handshake(5)
    while data := await stream.read():
        await stream.write(data)


async def test_large_amounts_pass_both_ways() -> None:
    sent, got = b"0123456789abcdef" * 65536, bytearray()
    async with serving(echo) as pair, asyncio.timeout(10):
        stream = client(pair)
        await stream.handshake(5)
        writing = asyncio.ensure_future(stream.write(sent))
        while len(got) < len(sent):
            got += await stream.read()
        await writing
        await stream.close()
    assert bytes(got) == sent


async def test_a_goodbye_and_a_bare_end_are_both_an_end() -> None:
    for is_polite in (True, False):
        async with serving(echo) as pair, asyncio.timeout(5):
            stream = client(pair)
            await stream.handshake(5)
            await stream.write(b"x")
            assert await stream.read() == b"x"
            if is_polite:
                await stream.close()
            else:
                stream.abort()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"", b"\x00" * 100_000])
async def test_what_is_no_tls_is_an_error(garbage: bytes) -> None:
    async def serve(stream: TlsStream) -> None:
        with pytest.raises(OSError):  # noqa: PT011 - of which kind is the library's affair
            await stream.handshake(5)

    async with serving(serve) as (_, writer):
        writer.write(garbage)
        writer.write_eof()


async def test_a_handshake_that_does_not_come_ends_in_time() -> None:
    async def serve(stream: TlsStream) -> None:
        await stream.handshake(0.05)

    with pytest.raises(TimeoutError):
        async with serving(serve) as (reader, _), asyncio.timeout(5):
            assert await reader.read() == b""
