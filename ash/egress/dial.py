"""The one place that connects for a sandbox: resolves a name once, checks every address, connects to one of those and no other."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection

from ash.egress.addresses import Resolve, find_fault, find_forms, is_own, parse_answers
from ash.egress.rules import Address, EgressPolicy, networks, rule_set, shown
from ash.errors import EgressRefused, Timeout, UpstreamError
from ash.tasks import Tasks

MAX_TRIES = 4
"""Addresses of one name that are tried."""
MAX_ANSWERS = 32
"""Addresses of one name that are looked at: whoever owns the name may give thousands, and each is checked."""


class Dialer:
    """Connects. `own_ports` are those of this server, which no exception of the policy opens."""

    def __init__(self, resolve: Resolve, own_ports: Collection[int], tasks: Tasks) -> None:
        self._resolve, self._own_ports, self._tasks = resolve, own_ports, tasks

    async def connect(self, host: str | Address, port: int, policy: EgressPolicy, lookups: asyncio.Semaphore) -> socket.socket:
        """A connected socket. Raises EgressRefused, UpstreamError, Timeout."""
        target = shown(host, port)
        try:
            async with asyncio.timeout(policy.connect_seconds):
                addresses = [host] if not isinstance(host, str) else await self._look_up(host, lookups)
        except TimeoutError as error:
            raise Timeout(f"{target}: its name was not resolved within {policy.connect_seconds:g} s") from error
        for address in addresses:
            self._check(target, address, port, policy)
        try:
            async with asyncio.timeout(policy.connect_seconds):
                return await _connect_any(target, addresses[:MAX_TRIES], port)
        except TimeoutError as error:
            raise Timeout(f"{target} did not answer within {policy.connect_seconds:g} s") from error

    async def _look_up(self, name: str, lookups: asyncio.Semaphore) -> list[Address]:
        await lookups.acquire()
        asking = self._tasks.start(self._ask(name, lookups), "resolve a name")
        try:
            found = await asyncio.shield(asking)
            if isinstance(found, Exception):
                raise found
            addresses = parse_answers(found[:MAX_ANSWERS])
        except (OSError, ValueError) as error:
            raise UpstreamError(f"{name} cannot be resolved: {getattr(error, 'strerror', None) or error}") from error
        if not addresses:
            raise UpstreamError(f"{name} cannot be resolved: it has no address")
        return addresses

    async def _ask(self, name: str, lookups: asyncio.Semaphore) -> list[str] | OSError | ValueError:
        """Gives the place in `lookups` back when the resolver is done, not when nobody waits any more: its thread is busy until then."""
        try:
            return await self._resolve(name)
        except (OSError, ValueError) as error:
            return error
        finally:
            lookups.release()

    def _check(self, target: str, address: Address, port: int, policy: EgressPolicy) -> None:
        """One bad address spoils a name: a name that stands for both may be somebody's way in."""
        if any(rule_set(policy.deny).denies(form, port) for form in find_forms(address)):
            hint = "The operator can take it out of `deny` under [egress] in policy.toml."
            raise EgressRefused(f"{target} leads to an address that is denied by the operator's policy", reason="denied", hint=hint)
        fault = find_fault(address, networks(policy.allow_private))
        if fault is not None:
            hint = "Only the operator can open it, by `allow_private` under [egress] in policy.toml."
            raise EgressRefused(f"{target} leads to a {fault} address", reason="address", hint=hint)
        if port in self._own_ports and any(form.is_loopback or is_own(form) for form in find_forms(address)):
            raise EgressRefused(f"{target} is this server itself", reason="server", hint="No setting opens it.")


async def _connect_any(target: str, addresses: list[Address], port: int) -> socket.socket:
    problem: OSError | None = None
    for address in addresses:
        try:
            return await _connect(address, port)
        except OSError as error:
            problem = error
    reason = os.strerror(problem.errno) if problem is not None and problem.errno else str(problem)
    raise UpstreamError(f"{target} cannot be reached: {reason}") from problem


async def _connect(address: Address, port: int) -> socket.socket:
    connecting = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connecting, (str(address), port))
    except BaseException:  # whatever went wrong, the socket is nobody's
        connecting.close()
        raise
    return connecting
