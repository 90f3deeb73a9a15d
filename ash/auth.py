"""Who may call: an API key, or a process of the server's own user on this machine. It authenticates; tenants own what they own below.

A request that carries a key is judged by the key alone. Without one it must come straight from a local process of the
same user, as the kernel says, and must not be the work of a web page or a proxy: those are local too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from aiohttp import web

from ash import peer
from ash.config import Config
from ash.errors import Unauthorized
from ash.keys import Keys
from ash.models import DEFAULT_TENANT

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TENANT: web.RequestKey[str] = web.RequestKey("tenant", str)
KEY_ID: web.RequestKey[str | None] = web.RequestKey("key_id")
"""The id of the API key that a request came with; None for one that needed none."""
GUARD: web.AppKey[Guard] = web.AppKey("guard")
PUBLIC_PATHS = frozenset({"/health"})

_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_PROXY_HEADERS = ("Forwarded", "Via", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP")


class Caller(NamedTuple):
    """For whom a request speaks, and the API key it came with, if it did."""

    tenant_id: str
    key_id: str | None


class Guard:
    """Names the caller of a request, or refuses it."""

    def __init__(self, config: Config, keys: Keys) -> None:
        self._keys = keys
        self.trusts_local = config.auth == "local" and (config.host == "localhost" or peer.is_loopback(config.host))
        self._users = {0, os.geteuid()}
        self._is_own_user: WeakKeyDictionary[asyncio.BaseTransport, bool] = WeakKeyDictionary()

    async def check(self, request: web.Request) -> Caller:
        """Raises Unauthorized."""
        header = request.headers.get("Authorization")
        if header is not None:
            return await self._check_key(header)
        reason = self._why_not_local(request)
        if reason is None:
            return Caller(DEFAULT_TENANT, None)
        error = Unauthorized("Missing Authorization header")
        error.hint = f"{reason}; send `Authorization: Bearer <API key>`"
        raise error

    async def _check_key(self, header: str) -> Caller:
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer" or not key or " " in key:
            raise Unauthorized("Invalid Authorization header format")
        found = await self._keys.check(key)
        if found is None:
            raise Unauthorized("Invalid API key")
        return Caller(found.tenant_id, found.id)

    def _why_not_local(self, request: web.Request) -> str | None:
        """Why a request without a key is not trusted; None when it is."""
        if not self.trusts_local:
            return "This server asks every caller for a key"
        suspicion = _suspicion(request)
        if suspicion is not None:
            return suspicion
        if not self.is_from_own_user(request):
            return "Only the server's own user and root, on this machine, need no key"
        return None

    def is_direct(self, request: web.Request) -> bool:
        """Whether a request comes from the server's own user or root, on this machine and without a proxy in between."""
        return not _has_proxy_header(request) and self.is_from_own_user(request)

    def is_from_own_user(self, request: web.Request) -> bool:
        """Whether the connection's other end belongs to one of ours. Asked once a connection: its ends never change."""
        transport = request.transport
        if transport is None:
            return False
        if transport not in self._is_own_user:
            self._is_own_user[transport] = self._ask_kernel(_end(transport, "sockname"), _end(transport, "peername"))
        return self._is_own_user[transport]

    def _ask_kernel(self, own: peer.Address, other: peer.Address) -> bool:
        return peer.is_loopback(own[0]) and peer.is_loopback(other[0]) and peer.find_uid(own, other) in self._users


def _end(transport: asyncio.BaseTransport, name: str) -> peer.Address:
    address = transport.get_extra_info(name) or ("", 0)
    return address[0], address[1]


def _has_proxy_header(request: web.Request) -> bool:
    headers = request.headers
    return any(name in headers for name in _PROXY_HEADERS) or any(name.lower().startswith("x-forwarded") for name in headers)


def _suspicion(request: web.Request) -> str | None:
    """What shows that a local connection may carry somebody else's request; None when nothing does."""
    headers = request.headers
    hosts = headers.getall("Host", [])
    if len(hosts) != 1 or not _is_local_host(hosts[0]):
        return "The Host header does not name this machine as localhost, 127.0.0.1 or [::1]"
    if _has_proxy_header(request):
        return "The request came through a proxy"
    if any(origin != f"http://{hosts[0]}" for origin in headers.getall("Origin", [])):
        return "The request comes from a web page of another origin"
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return "The request comes from a web page of another site"
    return None


def _is_local_host(host: str) -> bool:
    name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    name = name if colon else host
    return name.lower() in _LOCAL_HOSTS and (not colon or (port.isascii() and port.isdigit()))


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every path needs a caller with a name, known or not; only PUBLIC_PATHS do not."""
    if request.path not in PUBLIC_PATHS:
        request[TENANT], request[KEY_ID] = await request.app[GUARD].check(request)
    return await handler(request)
