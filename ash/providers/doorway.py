"""The connections of a sandbox to the gateway: so many and no more, each with a time limit. Knows no session and reads no request."""

from __future__ import annotations

import asyncio
import resource
from typing import cast

from aiohttp import web

MAX_CONNECTIONS = 40
"""More than the calls a sandbox may have at once, so that the ones beyond those still hear why."""
IDLE_SECONDS = 15.0
"""From the connection, or from the answer before, to the end of a request's head."""
_DESCRIPTORS = 65_536
"""Enough for a thousand sandboxes; an unlimited number would slow down children that close all of theirs."""


class Doorway:
    """Makes one sandbox's connections; `close` ends those that are open."""

    def __init__(self, server: web.Server) -> None:
        self.server = server
        self.transports: set[asyncio.Transport] = set()

    def __call__(self) -> _Connection:
        return _Connection(self)

    def close(self) -> None:
        for transport in list(self.transports):
            transport.abort()


class _Connection(web.RequestHandler):
    """One that comes when the doorway is full is closed before it can say anything."""

    __slots__ = ("_doorway", "_entered")

    def __init__(self, doorway: Doorway) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(doorway.server, loop=loop, keepalive_timeout=IDLE_SECONDS, access_log=None)  # type: ignore[arg-type]
        self._doorway = doorway
        self._entered: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        entering = cast(asyncio.Transport, transport)
        if len(self._doorway.transports) >= MAX_CONNECTIONS:
            entering.abort()
            return
        self._doorway.transports.add(entering)
        self._entered = entering
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._entered is not None:
            self._doorway.transports.discard(self._entered)
            super().connection_lost(exc)


def raise_descriptor_limit() -> None:
    """Every sandbox costs the server some descriptors; the usual soft limit of 1024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
