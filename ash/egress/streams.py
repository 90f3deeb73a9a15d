"""Byte streams of the proxy: counted and held to a rate where they leave the server, and joined in pairs. Reads no byte's meaning."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ash.egress.limits import MIB, Account, HostCount, Totals
from ash.egress.rules import EgressPolicy

CHUNK = 256 * 1024
BUFFER = 128 * 1024
"""Bytes of one direction that wait in the server before its sender is made to wait."""
CLOSE_SECONDS = 5.0
POLICY_SECONDS = 2.0
"""How soon a tunnel notices that the operator's policy has changed."""

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class VolumeReached(ConnectionError):
    """The session has used up the bytes that the policy gives it."""


class Meter:
    """Counts one connection's bytes and says how long to wait after them."""

    def __init__(self, account: Account, host: str, totals: Totals, policy: Callable[[], EgressPolicy]) -> None:
        self._account, self._name, self._totals, self._policy = account, host, totals, policy
        self._host = HostCount()
        self.last = time.monotonic()
        self._owed = 0.0

    def connected(self) -> None:
        """From now on there is something to count."""
        self._host = self._account.count_for(self._name)
        self._host.connections += 1
        self._totals.connections += 1

    def count(self, *, up: int = 0, down: int = 0) -> None:
        policy = self._policy()
        self.last = time.monotonic()
        self._host.up += up
        self._host.down += down
        self._totals.up += up
        self._totals.down += down
        self._account.bytes += up + down
        if policy.total_mb and self._account.bytes > policy.total_mb * MIB:
            raise VolumeReached("the session's volume is used up")
        self._owed = self._account.bucket.take(up + down, policy.bandwidth_mb_per_second * MIB)

    async def pay(self) -> None:
        """Wait as long as the bytes counted last were too early."""
        owed, self._owed = self._owed, 0.0
        if owed > 0:
            await asyncio.sleep(owed)


class MeteredReader(asyncio.StreamReader):
    """What comes back from a host. Only `read` counts; nothing here reads in another way."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(limit=BUFFER)
        self._meter = meter

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        if data:
            self._meter.count(down=len(data))
            await self._meter.pay()
        return data


class MeteredWriter(asyncio.StreamWriter):
    """What goes to a host."""

    def __init__(self, meter: Meter, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._meter = meter

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        self._meter.count(up=len(data))
        super().write(data)

    async def drain(self) -> None:
        await super().drain()
        await self._meter.pay()


async def open_metered(connected: socket.socket, meter: Meter) -> Pair:
    """Streams over a connected socket, which they take over."""
    loop = asyncio.get_running_loop()
    reader = MeteredReader(meter)
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        transport, _ = await loop.create_connection(lambda: protocol, sock=connected)
    except BaseException:
        connected.close()
        raise
    return reader, MeteredWriter(meter, transport, protocol, reader, loop)


async def open_accepted(accepted: socket.socket) -> Pair:
    """Streams over a connection that was accepted, which they take over; `start_tls` makes them a TLS server's."""
    found: list[asyncio.StreamWriter] = []
    reader = asyncio.StreamReader(limit=BUFFER)
    protocol = asyncio.StreamReaderProtocol(reader, lambda _, writer: found.append(writer))
    try:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, accepted)
    except BaseException:
        accepted.close()
        raise
    return reader, found[0]


async def close(writer: asyncio.StreamWriter) -> None:
    """Send what is left, for a moment, and be done."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            writer.close()
            await writer.wait_closed()
    except (TimeoutError, OSError):
        return
    finally:
        writer.transport.abort()


async def give_way() -> None:
    """Let others have their turn. What was received at once may hold thousands of small pieces, which nothing else would interrupt."""
    await asyncio.sleep(0)


class Ended(Exception):
    """A connection has had its time, or is no longer allowed."""


@contextlib.asynccontextmanager
async def watched(watching: Watch) -> AsyncIterator[asyncio.TaskGroup]:
    """A group of tasks that serve one connection. The block ends early, without an error, when one breaks or its time is over."""
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watching.run())
            yield group
            watcher.cancel()
    except BaseExceptionGroup as errors:
        rest = errors.split((OSError, Ended))[1]
        if rest is not None:
            raise _first(rest) from None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def join(inside: Pair, outside: Pair, watching: Watch) -> None:
    """Pass bytes both ways until both ends have closed, one broke, or its time is over."""
    async with watched(watching) as group:
        copies = [group.create_task(_copy(inside[0], outside[1])), group.create_task(_copy(outside[0], inside[1]))]
        await asyncio.wait(copies)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK):
        target.write(data)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()


class Watch:
    """Ends a connection on which nothing was sent for too long, whose time is over, or that a new policy forbids."""

    def __init__(self, meter: Meter, policy: Callable[[], EgressPolicy], is_allowed: Callable[[], bool]) -> None:
        self._meter, self._policy, self._is_allowed = meter, policy, is_allowed

    async def run(self) -> None:
        """Raises Ended when it is time."""
        known = self._policy()
        end = time.monotonic() + known.tunnel_seconds
        while (left := min(end, self._meter.last + known.idle_seconds) - time.monotonic()) > 0:
            await asyncio.sleep(min(left, POLICY_SECONDS))
            if self._policy() != known:
                known = self._policy()
                if not self._is_allowed():
                    break
        raise Ended
