"""Hosts to reach and a proxy to reach them through, all on loopback. Names are resolved by a table; nothing leaves the machine."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from ash.egress import SOCKET_NAME, Egress, EgressAccess, EgressPolicy
from ash.models import Json

LOOPBACK = "127.0.0.0/8"
OPEN = EgressPolicy(allow=("*:*",), allow_private=(LOOPBACK,), connect_seconds=5.0)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Table:
    """A resolver. Each look-up of a name takes the next of its answers; the last one stays."""

    def __init__(self, **names: list[str]) -> None:
        self.answers = {name.replace("_", "."): [given] for name, given in names.items()}
        self.asked: list[str] = []

    async def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        if name not in self.answers:
            raise OSError(f"{name} is not in the table")
        given = self.answers[name]
        return given.pop(0) if len(given) > 1 else given[0]


class Way:
    """One sandbox's proxy, as a program inside would see it."""

    def __init__(self, egress: Egress, folder: str, events: list[tuple[str, str, Json]], table: Table) -> None:
        self.egress, self.folder, self.events, self.table = egress, folder, events, table
        self.policy = OPEN

    @property
    def path(self) -> str:
        return os.path.join(self.folder, SOCKET_NAME)

    def bind(self, *hosts: str, session: str = "s1", denied: tuple[str, ...] = (), sandbox: str = "box") -> None:
        self.egress.bind(sandbox, self.access(*hosts, session=session, denied=denied))

    def access(self, *hosts: str, session: str = "s1", denied: tuple[str, ...] = (), credentials: tuple[Any, ...] = ()) -> EgressAccess:
        return EgressAccess(session, "default", "helper", hosts, denied, credentials)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path, limit=1 << 20)

    async def say(self, *parts: str | bytes) -> bytes:
        """Everything that comes back when `parts` are sent and the connection is left open."""
        reader, writer = await self.connect()
        try:
            for part in parts:
                writer.write(part.encode() if isinstance(part, str) else part)
                await writer.drain()
            async with asyncio.timeout(5):
                return await reader.read(-1)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def get(self, url: str, *headers: str) -> bytes:
        lines = "".join(f"{header}\r\n" for header in ("Connection: close", *headers))
        return await self.say(f"GET {url} HTTP/1.1\r\nHost: whatever\r\n{lines}\r\n")

    async def tunnel(self, target: str) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        """The head of the answer to CONNECT, and the streams behind it."""
        reader, writer = await self.connect()
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        async with asyncio.timeout(5):
            return await reader.readuntil(b"\r\n\r\n"), reader, writer

    def refusals(self) -> list[Json]:
        return [data for _, kind, data in self.events if kind == "egress.refused"]


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@asynccontextmanager
async def open_way(folder: str, table: Table | None = None, **more: Any) -> AsyncIterator[Way]:
    events: list[tuple[str, str, Json]] = []
    found: list[Way] = []

    async def record(session: str, kind: str, data: Json) -> None:
        events.append((session, kind, data))

    table = table or Table()
    async with Egress(policy_of=lambda tenant, agent: found[0].policy, record=record, resolve=table, **more) as egress:
        found.append(Way(egress, folder, events, table))
        await egress.open("box", folder)
        yield found[0]


@asynccontextmanager
async def host(handler: Handler, address: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server on loopback; gives its port."""
    server = await asyncio.start_server(handler, address, 0, limit=1 << 20)
    try:
        port: int = server.sockets[0].getsockname()[1]
        yield port
    finally:
        server.close()


def answering(*answers: bytes, heard: list[bytes] | None = None) -> Handler:
    """A host that reads the head of one request and sends `answers`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if heard is not None:
                heard.append(head)
            for answer in answers:
                writer.write(answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    return handle


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A host that sends back what it gets."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
