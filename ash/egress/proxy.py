"""The way out of the sandboxes to everything but the models: an HTTP proxy on one Unix socket per sandbox.

Default deny. Which socket a connection comes in on says which session asks; what the connection says of itself counts for
nothing. It passes bytes on and neither looks into a tunnel, unless an interceptor is to, nor logs what goes through it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import h11

from ash import models
from ash.egress import streams
from ash.egress.addresses import Resolve, SystemResolver
from ash.egress.dial import Dialer
from ash.egress.forward import forward
from ash.egress.front import Front, Target, explain, parse_target
from ash.egress.limits import MIB, Account, Bucket, Reports, Totals
from ash.egress.rules import Address, EgressPolicy, Refusal, find_refusal, shown
from ash.egress.streams import Meter, Pair, Watch
from ash.errors import AshError, EgressRefused, RateLimited, SandboxFailed
from ash.models import Json
from ash.tasks import Tasks

log = logging.getLogger(__name__)

SOCKET_NAME = "egress.sock"
ARRIVALS_PER_SECOND = 200
"""Connections of one sandbox that are taken per second; the others wait in the kernel. A flood would otherwise busy the server."""
_LOOKUPS = 4
"""Names of one sandbox that are resolved at once."""
_END_SECONDS = 5.0

Connect = Callable[[], Awaitable[Pair]]
PolicyOf = Callable[[str, str], EgressPolicy]
"""The policy for an agent, by tenant and name."""
Record = Callable[[str, str, Json], Awaitable[None]]
"""Takes session, event type and data."""


class EgressAccess(NamedTuple):
    """For whom a sandbox asks, which hosts its agent wants to reach and which not, and the credentials that are put in for it."""

    session_id: str
    tenant_id: str
    agent_name: str
    hosts: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    credentials: tuple[Any, ...] = ()


class Interceptor(Protocol):
    """What stands in a tunnel to put credentials in."""

    def covers(self, host: str, port: int) -> bool: ...

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, connect: Connect) -> None:
        """Speak with the program inside, whose connection is paused until `start_tls` or `resume_reading`, and with the host."""

    def environment(self) -> dict[str, str]: ...

    def succeed(self, previous: Any) -> None:
        """Go on where the one before, of the same sandbox, was."""

    async def open(self) -> None: ...


MakeInterceptor = Callable[[EgressAccess, str], Interceptor | None]


class _Gate:
    """One sandbox's socket, and what it has used."""

    def __init__(self, id: str, folder: str, listener: socket.socket) -> None:
        self.id, self.folder, self.listener = id, folder, listener
        self.access: EgressAccess | None = None
        self.policy: Callable[[], EgressPolicy] = EgressPolicy
        self.interceptor: Interceptor | None = None
        self.account, self.reports = Account(), Reports()
        self.arrivals = Bucket(burst_seconds=1.0)
        self.lookups = asyncio.Semaphore(_LOOKUPS)
        self.visits: set[asyncio.Task[None]] = set()
        self.admitted = 0
        """Visits that are served; the others are being refused."""
        self.pause: asyncio.TimerHandle | None = None


class Egress:
    """An async context manager. `open` before a sandbox starts, `bind` when it gets a session, `close` when it is gone.

    `policy_of` is asked at each connection. `record` takes the events of sessions.
    """

    def __init__(
        self, *, policy_of: PolicyOf, record: Record, interceptors: MakeInterceptor | None = None, resolve: Resolve | None = None
    ) -> None:  # fmt: skip
        self._policy_of, self._record, self._interceptors = policy_of, record, interceptors
        self._resolver = SystemResolver() if resolve is None else None
        self._own_ports: set[int] = set()
        self._tasks, self._lookups = Tasks(), Tasks()
        self._dialer = Dialer(resolve or self._resolver or SystemResolver(), self._own_ports, self._lookups)
        self._gates: dict[str, _Gate] = {}
        self._of_session: dict[str, _Gate] = {}
        self._totals = Totals()

    async def __aenter__(self) -> Egress:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sandbox_id in list(self._gates):
            await self.close(sandbox_id)
        await self._tasks.wait(timeout=_END_SECONDS)
        await self._tasks.cancel()
        await self._lookups.cancel()
        if self._resolver is not None:
            self._resolver.close()

    def protect(self, port: int) -> None:
        """A port that this server listens on: no sandbox gets there, whatever the policy says."""
        self._own_ports.add(port)

    # One socket per sandbox

    async def open(self, sandbox_id: str, folder: str) -> None:
        """Listen at egress.sock in `folder`. Until `bind`, every request on it is refused."""
        await self.close(sandbox_id)
        try:
            listener = _listen(os.path.join(folder, SOCKET_NAME))
        except OSError as error:
            raise SandboxFailed(f"the egress proxy cannot listen for this sandbox: {error.strerror or error}") from error
        self._gates[sandbox_id] = gate = _Gate(sandbox_id, folder, listener)
        self._accept_on(gate)

    def bind(self, sandbox_id: str, access: EgressAccess) -> dict[str, str]:
        """From now on the sandbox's socket speaks for this session. Returns the variables that its tools need."""
        gate = self._gates.get(sandbox_id)
        if gate is None:  # the sandbox has just died, which whoever uses it will hear
            return {}
        gate.access, gate.policy = access, lambda: self._policy_of(access.tenant_id, access.agent_name)
        before = gate.interceptor
        gate.interceptor = self._interceptors(access, gate.folder) if access.credentials and self._interceptors is not None else None
        if gate.interceptor is not None and before is not None:
            gate.interceptor.succeed(before)
        self._of_session[access.session_id] = gate
        return gate.interceptor.environment() if gate.interceptor is not None else {}

    async def prepare(self, sandbox_id: str) -> None:
        """Have ready what the tools of the session need before the first of them starts."""
        gate = self._gates.get(sandbox_id)
        if gate is not None and gate.interceptor is not None:
            await gate.interceptor.open()

    async def close(self, sandbox_id: str) -> None:
        """Stop listening, end the connections and record what was used. Does nothing for a sandbox that is not open."""
        gate = self._gates.pop(sandbox_id, None)
        if gate is None:
            return
        if gate.pause is not None:
            gate.pause.cancel()
        asyncio.get_running_loop().remove_reader(gate.listener)
        gate.listener.close()
        visits = set(gate.visits)
        for visit in visits:
            visit.cancel()
        if visits:
            await asyncio.wait(visits, timeout=_END_SECONDS)
        if gate.access is not None:
            await self._settle(gate, gate.access)

    async def _settle(self, gate: _Gate, access: EgressAccess) -> None:
        if self._of_session.get(access.session_id) is gate:
            del self._of_session[access.session_id]
        if not gate.account.is_empty:
            await self._report(access.session_id, models.EGRESS_RECORDED, gate.account.shown())

    # What is known

    def live(self, session_id: str) -> Json | None:
        """What the session's sandbox has used since it started; None when the session has none."""
        gate = self._of_session.get(session_id)
        return gate.account.shown() if gate is not None else None

    def status(self) -> Json:
        """Counters for metrics."""
        totals = self._totals
        return {
            "open": sum(len(gate.visits) for gate in self._gates.values()),
            "connections": totals.connections,
            "bytes": {"up": totals.up, "down": totals.down},
            "refused": dict(totals.refused),
            "failed": totals.failed,
        }

    # Connections

    def _accept_on(self, gate: _Gate) -> None:
        gate.pause = None
        asyncio.get_running_loop().add_reader(gate.listener, self._accept, gate)

    def _rest(self, gate: _Gate, seconds: float) -> None:
        """Leave arriving connections in the kernel for a while."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(gate.listener)
        gate.pause = loop.call_later(seconds, self._accept_on, gate)

    def _accept(self, gate: _Gate) -> None:
        try:
            accepted, _ = gate.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("sandbox %s: its connection to the egress proxy was not taken: %s", gate.id, error)
            self._rest(gate, 1.0)
            return
        accepted.setblocking(False)
        if (delay := gate.arrivals.take(1, ARRIVALS_PER_SECOND)) > 0:
            self._rest(gate, delay)
        visit = self._tasks.start(self._visit(gate, accepted), f"egress of sandbox {gate.id}")
        gate.visits.add(visit)
        visit.add_done_callback(gate.visits.discard)
        visit.add_done_callback(lambda _: accepted.close())  # one that is cancelled before it began has closed nothing

    async def _visit(self, gate: _Gate, accepted: socket.socket) -> None:
        """One connection, from the program inside to its end."""
        front = Front(await streams.open_accepted(accepted))
        try:
            await _Visit(self, gate, front).run()
            await streams.close(front.writer)
        except OSError:
            return  # the program inside has left; nobody reads an answer
        except Exception:  # the edge of a connection: it ends, the log says why, the others go on
            log.exception("sandbox %s: a connection failed inside the egress proxy", gate.id)
        finally:
            front.writer.transport.abort()

    @contextmanager
    def admitted(self, gate: _Gate) -> Iterator[None]:
        """A place for one connection. Raises RateLimited when the session, or all of them together, have too many."""
        policy, all_admitted = gate.policy(), sum(each.admitted for each in self._gates.values())
        if gate.admitted >= policy.connections:
            raise RateLimited(f"more than {policy.connections} connections at once; wait for one to end")
        if all_admitted >= policy.total_connections:
            raise RateLimited("the server has too many connections of sandboxes; try again in a moment")
        gate.admitted += 1
        try:
            yield
        finally:
            gate.admitted -= 1

    def check(self, gate: _Gate, target: Target) -> EgressAccess:
        """For whom the connection is. Raises EgressRefused."""
        access, policy = gate.access, gate.policy()
        if access is None:
            raise EgressRefused("this sandbox belongs to no session", reason="unbound")
        refusal = find_refusal(target.host, target.port, access.hosts, access.denied, policy)
        if refusal is None and policy.total_mb and gate.account.bytes > policy.total_mb * MIB:
            hint = "The operator can raise `total_mb` under [egress] in policy.toml."
            refusal = Refusal("volume", f"this session has used up its {policy.total_mb} MiB of network traffic", hint)
        if refusal is not None:
            raise EgressRefused(refusal.message, reason=refusal.reason, hint=refusal.hint)
        return access

    def is_allowed(self, gate: _Gate, host: str | Address, port: int) -> bool:
        access = gate.access
        return access is not None and find_refusal(host, port, access.hosts, access.denied, gate.policy()) is None

    def meter(self, gate: _Gate, target: Target) -> tuple[Meter, Watch]:
        meter = Meter(gate.account, shown(target.host), self._totals, gate.policy)
        return meter, Watch(meter, gate.policy, lambda: self.is_allowed(gate, target.host, target.port))

    async def dial(self, gate: _Gate, target: Target, meter: Meter) -> Pair:
        """A connection to an address that was checked. Raises EgressRefused, UpstreamError, Timeout."""
        connected = await self._dialer.connect(target.host, target.port, gate.policy(), gate.lookups)
        meter.connected()
        return await streams.open_metered(connected, meter)

    # Refusals

    def note(self, gate: _Gate, target: Target | None, refusal: Refusal) -> None:
        """Count what was not done; what was not allowed becomes an event, unless it was one a moment ago."""
        if refusal.reason in ("failed", "timeout"):
            self._totals.failed += 1
            return
        gate.account.refused += 1
        self._totals.refused[refusal.reason] += 1
        if gate.access is None or refusal.reason == "malformed":
            return
        host, port = (shown(target.host), target.port) if target is not None else ("", 0)
        data = gate.reports.take(host, port, refusal)
        if data is not None:
            _ = self._tasks.start(self._report(gate.access.session_id, models.EGRESS_REFUSED, data), "report a refusal")

    async def _report(self, session_id: str, kind: str, data: Json) -> None:
        try:
            await self._record(session_id, kind, data)
        except AshError as error:  # a full disk: the connection was refused all the same
            log.warning("session %s: an event of its network was not recorded: %s", session_id, error)


class _Visit:
    """The requests of one connection."""

    def __init__(self, egress: Egress, gate: _Gate, front: Front) -> None:
        self._egress, self._gate, self._front = egress, gate, front
        self._target: Target | None = None

    async def run(self) -> None:
        """Answer request after request, until the connection ends or becomes a tunnel."""
        try:
            with self._egress.admitted(self._gate):
                await self._serve()
        except AshError as error:
            await self._refuse(error)

    async def _serve(self) -> None:
        while (request := await self._front.request()) is not None:
            self._target = None
            self._target = target = parse_target(request)
            self._egress.check(self._gate, target)
            if target.is_tunnel:
                await self._tunnel(target)
                return
            if not await self._forward(request, target):
                return

    async def _refuse(self, error: AshError) -> None:
        status, refusal = explain(error)
        self._egress.note(self._gate, self._target, refusal)
        if self._front.can_answer:
            await self._front.refuse(status, refusal.reason, refusal.message, refusal.hint)

    async def _tunnel(self, target: Target) -> None:
        interceptor = self._gate.interceptor
        if interceptor is not None and interceptor.covers(shown(target.host), target.port):
            await self._intercept(interceptor, target)
            return
        meter, watching = self._egress.meter(self._gate, target)
        outside = await self._egress.dial(self._gate, target, meter)
        try:
            early = await self._front.open_tunnel()
            if early:
                outside[1].write(early)
            await streams.join((self._front.reader, self._front.writer), outside, watching)
        finally:
            await streams.close(outside[1])

    async def _intercept(self, interceptor: Interceptor, target: Target) -> None:
        meter, watching = self._egress.meter(self._gate, target)
        opened: list[Pair] = []

        async def connect() -> Pair:
            try:
                opened.append(await self._egress.dial(self._gate, target, meter))
            except AshError as error:  # the interceptor tells the program inside; the session is told here
                self._egress.note(self._gate, target, explain(error)[1])
                raise
            return opened[-1]

        # What comes before the interceptor has taken over would be lost on it.
        self._front.writer.transport.pause_reading()  # type: ignore[attr-defined]
        if await self._front.open_tunnel():
            return
        try:
            async with streams.watched(watching):
                await interceptor.serve(self._front.reader, self._front.writer, shown(target.host), target.port, connect)
        finally:
            for _, writer in opened:
                await streams.close(writer)

    async def _forward(self, request: h11.Request, target: Target) -> bool:
        meter, watching = self._egress.meter(self._gate, target)
        outside = await self._egress.dial(self._gate, target, meter)
        try:
            return await forward(self._front, request, target, outside, watching)
        finally:
            await streams.close(outside[1])


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(path)
        os.chmod(path, 0o666)  # the folder around it is what keeps others out
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener
