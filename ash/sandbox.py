"""Sandboxes: start, pool, limit and stop the isolated process tree of a session, and talk to the bridge in it.

The front door of `ash.isolation`. Knows no sessions table, no SQL, no HTTP and no keys; treats all that comes out of a
sandbox as hostile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any

from ash import models
from ash.errors import CapacityReached, IsolationUnavailable, Overloaded, SandboxFailed
from ash.isolation import folders, hedge, leftovers, usage
from ash.isolation.files import Budget, File, list_files, open_workspace_file, pack, unpack
from ash.isolation.folders import Folders, Uids
from ash.isolation.headroom import Headroom
from ash.isolation.keyring import leave_session_keyring
from ash.isolation.pool import Pace, WarmPool
from ash.isolation.prepare import Choices, Isolation, prepare
from ash.isolation.records import ExecResult, Limits, Mount, PoolStatus, SandboxSpec
from ash.isolation.running import GONE_TIMEOUT, Sandbox
from ash.isolation.starting import Ground, OnClose, OnOpen, Starter, in_thread
from ash.isolation.turnstile import Turnstile
from ash.models import SandboxHandle
from ash.tasks import Tasks

__all__ = [
    "Budget", "ExecResult", "File", "Limits", "Mount", "PoolStatus", "Sandbox", "SandboxSpec", "Sandboxes", "Ticket",
    "list_files", "open_workspace_file", "pack", "unpack",
]  # fmt: skip

log = logging.getLogger(__name__)

COLD_STARTS_AT_ONCE = 2 * (os.cpu_count() or 1) + 2
WAIT_TIMEOUT = 15.0
"""Seconds that a start may wait for others to be done before it is refused."""
WATCH_INTERVAL = 2.0
"""Seconds between two looks at the host's memory and load."""
RELIEF_PAUSE = 10.0
"""Seconds without new warm sandboxes after an idle session had to give way."""
FIRST_PATIENCE, LEAST_PATIENCE, PATIENCE_FACTOR = 3.0, 1.0, 4.0
"""A cold start gets a second one beside it after so many seconds as long as none was measured; then after so many times what is slow
here, and not before one second."""
_SHORTAGES = {
    "memory": "The server is short of memory",
    "disk": "The server's disk is nearly full",
    "descriptors": "The server has no file descriptors left",
    "processes": "The server has no processes left",
}
_SHORTAGE_SECONDS = 5.0
"""What `Retry-After` says then: nobody knows, and the watch has looked twice by then."""


class Ticket:
    """The right to one sandbox: a warm one, or a place among all and a turn to start one, under this id."""

    def __init__(self, id: str = "", warm: Sandbox | None = None) -> None:
        self.id, self.warm = id, warm


class Sandboxes:
    """Every sandbox of this server, and a pool of warm ones. An async context manager: leaving it stops them all.

    `on_open(id, socket_path)` is awaited before a bridge starts, `on_close(id)` after its sandbox is gone. A host that cannot
    isolate agents is no reason not to start: `claim` then raises IsolationUnavailable, and `status` says why.
    `on_pressure(is_new)`, if anybody sets it, gives up one sandbox that is not in use, and says whether it found one.
    """

    def __init__(
        self, *, data_dir: str, isolation: str, limits: Limits, warm: int, maximum: int, start_timeout: float, orphan_timeout: float,
        python: str = "", cgroup_root: str = "", rootfs: str = "", mounts: tuple[Mount, ...] = (), ptrace: bool = False,
        bridge_source: str | None = None, on_open: OnOpen, on_close: OnClose,
        min_free_memory_mb: int = 0, min_free_disk_mb: int = 0, most_waiting: int = 100, headroom: Headroom | None = None,
    ) -> None:  # fmt: skip
        self._kind, self._limits, self._maximum = isolation, limits, maximum
        self._choices = Choices(python, cgroup_root, rootfs, mounts, ptrace, bridge_source)
        self._folders, self._uids = Folders(os.path.abspath(data_dir)), Uids(data_dir)
        self._isolation: Isolation | None = None
        self._unavailable = ""
        self._preparing = asyncio.Lock()
        self._tasks = Tasks()
        self._starter = Starter(
            self._folders, self._uids, self._tasks, start_timeout=start_timeout, orphan_timeout=orphan_timeout,
            on_open=on_open, on_close=on_close, on_gone=self._on_gone,
        )  # fmt: skip
        self._headroom = headroom or Headroom(data_dir, min_memory_mb=min_free_memory_mb, min_disk_mb=min_free_disk_mb)
        self._turnstile = Turnstile(COLD_STARTS_AT_ONCE, most_waiting, WAIT_TIMEOUT)
        # Without mounts a bridge holds the path of its folder, which must not change under it: nothing to keep warm.
        wanted = min(warm, maximum) if isolation == "bwrap" else 0
        self._pool = WarmPool(
            wanted, self._start_warm, self._tasks, pace=self._pace, room=self._count_room, is_busy=lambda: self._claiming > 0
        )
        self._claiming = 0
        self._start_timeout = start_timeout
        self._counts: Counter[str] = Counter()
        self._attempts = Tasks()
        self._relieved_at = -RELIEF_PAUSE
        self.on_pressure: Callable[[bool], Awaitable[bool]] | None = None
        self._replenisher: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._is_closing = False

    async def __aenter__(self) -> Sandboxes:
        # Here and not in a thread: sandboxes are started by the loop's own thread, and inherit what that one has.
        if problem := leave_session_keyring():
            log.warning("Sandboxes may read keys in the session keyring of whoever started this server: %s", problem)
        await asyncio.to_thread(self._folders.open)
        try:
            await asyncio.to_thread(self._uids.scan, self._folders.sessions)
            with contextlib.suppress(IsolationUnavailable):
                await self._require_isolation()
        except BaseException:
            self._folders.close()
            raise
        for warning in self.status().warnings:
            log.warning(warning)
        if self._pool.wanted:
            self._replenisher = self._tasks.start(self._pool.replenish(), "replenish warm sandboxes")
        self._watcher = self._tasks.start(self._watch(), "watch the host")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closing = True
        loops = [loop for loop in (self._replenisher, self._watcher) if loop is not None]
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await self._attempts.cancel()
        await asyncio.gather(*(sandbox.stop(grace=2.0) for sandbox in list(self._starter.alive.values())), return_exceptions=True)
        await self._tasks.wait(timeout=GONE_TIMEOUT)
        await self._tasks.cancel()
        if self._isolation is not None:
            self._isolation.close()
        self._folders.close()

    async def _require_isolation(self) -> Isolation:
        """How sandboxes are started. A host that could not is asked again: what was missing may have been installed."""
        async with self._preparing:
            if self._isolation is None:
                try:
                    self._isolation = await prepare(self._kind, self._folders, self._limits, self._choices)
                except IsolationUnavailable as error:
                    self._unavailable = str(error)
                    raise
                # Sessions may write for a while yet when new ones are refused already.
                self._isolation.min_free_disk_mb = self._headroom.min_disk_mb // 2
                self._pool.changed()
            return self._isolation

    def status(self) -> PoolStatus:
        isolation, warm = self._isolation, len(self._pool)
        starting, running = len(self._starter.starting), len(self._starter.alive.keys() - self._starter.starting) - warm
        kind = isolation.kind if isolation is not None else "unavailable"
        limits = isolation.describe_limits() if isolation is not None else {}
        warnings = isolation.warnings() if isolation is not None else [self._unavailable]
        if self._pool.last_failure:
            warnings.append(f"The last start of a warm sandbox failed: {self._pool.last_failure}")
        warnings += self._headroom.warnings()
        return PoolStatus(
            warm + starting + running, warm, starting, running, self._maximum, kind, limits, warnings,
            self._counts["warm_claims"], self._counts["cold_starts"], self._turnstile.waiting,
            {**self._counts, "evictions": self._pool.evictions}, self._turnstile.typical(), self._turnstile.slow() or 0.0,
        )  # fmt: skip

    async def usages(self) -> dict[str, dict[str, Any]]:
        """What each sandbox uses just now, by its id."""
        sources = [sandbox.usage_source for sandbox in list(self._starter.alive.values())]
        return await asyncio.to_thread(usage.read_all, sources)

    def pressure(self) -> dict[str, dict[str, Any]]:
        """How long work waits for CPU, memory and disk: on the `host`, and in the cgroup of all `sandboxes` where there is one."""
        tree = self._isolation.cgroups if self._isolation is not None else None
        return {"host": usage.read_pressure(None)} | ({"sandboxes": usage.read_pressure(tree.root)} if tree is not None else {})

    # The door

    @contextlib.asynccontextmanager
    async def admitted(self, spec: SandboxSpec) -> AsyncIterator[Ticket]:
        """The right to claim a sandbox within the block, asked for before anything of a new session is made.

        Raises CapacityReached, IsolationUnavailable, and Overloaded, which says when to come again.
        """
        if self._is_closing:
            raise SandboxFailed("the server is shutting down")
        await self._require_isolation()
        ticket = await self._admit(spec)
        try:
            yield ticket
        finally:
            self._give_back(ticket)

    async def check_wake(self) -> None:
        """Raises CapacityReached or Overloaded if a session that has no sandbox would be refused one now. Takes nothing."""
        self._turnstile.check(is_urgent=True)
        await self._require_headroom(is_new=False)
        await self._require_room(is_new=False)

    async def _admit(self, spec: SandboxSpec) -> Ticket:
        await self._require_headroom(is_new=spec.fresh)
        if spec.fresh and self._is_generic(spec) and (sandbox := self._pool.take()) is not None:
            return Ticket(warm=sandbox)
        return await self._admit_cold(is_new=spec.fresh)

    async def _admit_cold(self, *, is_new: bool) -> Ticket:
        ticket = Ticket(models.new_id())
        self._claiming += 1  # room that becomes free from here on is not for the pool
        try:
            self._turnstile.check(is_urgent=not is_new)
            await self._require_room(is_new=is_new)
            self._starter.starting.add(ticket.id)
            await self._turnstile.enter(is_urgent=not is_new)
        except BaseException as error:  # whatever it was, the place is free again
            self._release(ticket)
            self._counts["refused_queue"] += isinstance(error, Overloaded)
            raise
        return ticket

    def _release(self, ticket: Ticket) -> None:
        self._starter.starting.discard(ticket.id)
        self._claiming -= 1
        self._pool.changed()

    def _is_generic(self, spec: SandboxSpec) -> bool:
        return spec.limits is None or spec.limits == self._limits

    def _give_back(self, ticket: Ticket) -> None:
        """Idempotent."""
        if ticket.warm is not None:
            self._pool.give_back(ticket.warm)
        if ticket.id:
            self._turnstile.leave()
            self._release(ticket)
        ticket.id, ticket.warm = "", None

    async def _require_headroom(self, *, is_new: bool) -> None:
        """Raises Overloaded when this host has nothing left for one more, not even after another one went."""
        shortage = self._headroom.find_shortage(is_new=is_new)
        if shortage is not None and shortage != "disk" and (self._evict() or await self._relieve(is_new)):
            self._headroom.look_again()
            shortage = self._headroom.find_shortage(is_new=is_new)
        if shortage is not None:
            self._counts[f"refused_{shortage}"] += 1
            raise Overloaded(f"{_SHORTAGES[shortage]}; try again in a moment", retry_after=_SHORTAGE_SECONDS)

    async def _require_room(self, *, is_new: bool) -> None:
        """Room for one more: a warm sandbox gives way to a session, and an idle session to one that is not. Raises CapacityReached."""
        while not self._count_room() and not self._evict():
            if not await self._pool.settle() and not await self._relieve(is_new):
                self._counts["refused_capacity"] += 1
                raise CapacityReached(
                    f"Sandbox capacity reached: all {self._maximum} are in use. End or pause a session, or raise max_sandboxes"
                )

    async def _relieve(self, is_new: bool) -> bool:
        if self.on_pressure is None or not await self.on_pressure(is_new):
            return False
        self._relieved_at = time.monotonic()
        return True

    def _evict(self) -> bool:
        """End a warm sandbox, whose place counts as free at once."""
        victim = self._pool.evict()
        if victim is not None:
            self._starter.alive.pop(victim.id, None)
        return victim is not None

    def _count_room(self) -> int:
        return max(0, self._maximum - len(self._starter.own_ids()))

    # Claiming

    async def claim(self, spec: SandboxSpec, ticket: Ticket | None = None) -> Sandbox:
        """A sandbox on the session's folder, ready for `init`. Raises SandboxFailed, and without a ticket what `admitted` raises."""
        if ticket is None:
            async with self.admitted(spec) as ticket:
                return await self.claim(spec, ticket)
        try:
            return await self._claim(spec, ticket)
        except OSError as error:
            log.exception("a sandbox could not be started")
            raise SandboxFailed(f"a sandbox could not be started: {error.strerror or error}") from error
        finally:
            self._give_back(ticket)

    async def _claim(self, spec: SandboxSpec, ticket: Ticket) -> Sandbox:
        if ticket.warm is not None:
            warm, ticket.warm = ticket.warm, None
            if await self._settle(warm, spec):
                self._counts["warm_claims"] += 1
                return warm
            return await self.claim(spec)  # it died in this very moment
        sandbox = await self._start_cold(spec, ticket.id)
        self._counts["cold_starts"] += 1
        return sandbox

    async def _settle(self, sandbox: Sandbox, spec: SandboxSpec) -> bool:
        """Make a warm sandbox that of a session. False when it has died meanwhile."""
        if not sandbox.is_alive:
            return False
        try:
            # One rename, so it may block; from here on the sandbox's end leaves the folder to us.
            self._folders.claim_slot(sandbox.place.folder, spec.session_dir)
            sandbox.place = sandbox.place._replace(folder=spec.session_dir)
            await in_thread(folders.fill, spec.session_dir, spec.agent_dir, sandbox.place.uid, fresh=True, link=True)
        except BaseException:  # whatever went wrong, neither a half-filled sandbox nor its folder must live on
            await asyncio.shield(self._discard(sandbox, spec))
            raise
        if not sandbox.is_alive:
            await asyncio.shield(self._discard(sandbox, spec))
            return False
        return True

    async def _discard(self, sandbox: Sandbox, spec: SandboxSpec) -> None:
        """End a warm sandbox that did not become a session's. A slot that was not moved goes with it."""
        await sandbox.stop(grace=0)
        if sandbox.place.folder == spec.session_dir:
            await asyncio.to_thread(self._starter.remove_folder, spec.session_dir, sandbox.place.uid)

    async def _start_cold(self, spec: SandboxSpec, id: str) -> Sandbox:
        isolation = await self._require_isolation()
        try:
            uid = await in_thread(self._make_folder, id, spec)
            ground = Ground(id, spec.session_dir, uid, spec.limits or self._limits)
            return await hedge.first_ready(
                lambda: self._start(isolation, ground), lambda: self._start_beside(isolation, ground),
                self._patience(), self._may_hedge, self._attempts,
            )  # fmt: skip
        except BaseException:  # a fresh session that does not come to be leaves no folder, whatever went wrong
            if spec.fresh:
                await asyncio.shield(asyncio.to_thread(folders.remove_tree, spec.session_dir))
            self._uids.let_go(id)
            raise

    async def _start(self, isolation: Isolation, ground: Ground) -> Sandbox:
        if self._is_closing:
            raise SandboxFailed("the server is shutting down")
        began = time.monotonic()
        sandbox = await self._starter.start(isolation, ground)
        self._turnstile.took(time.monotonic() - began)
        return sandbox

    async def _start_beside(self, isolation: Isolation, ground: Ground) -> Sandbox:
        """A second one on the same folder. Neither was given anything to do yet, and one of them goes."""
        ground = ground._replace(id=models.new_id())
        self._counts["second_starts"] += 1
        self._starter.starting.add(ground.id)
        if ground.uid is not None:
            self._uids.share(ground.id, ground.uid)
        try:
            return await self._start(isolation, ground)
        finally:
            self._starter.starting.discard(ground.id)

    def _patience(self) -> float:
        slow = self._turnstile.slow()
        usual = FIRST_PATIENCE if slow is None else max(LEAST_PATIENCE, PATIENCE_FACTOR * slow)
        return min(usual, self._start_timeout / 2)

    def _may_hedge(self) -> bool:
        """Where everything is slow, one more makes it slower."""
        return self._turnstile.has_place and self._count_room() > 0 and not self._headroom.is_overloaded

    def _make_folder(self, id: str, spec: SandboxSpec) -> int | None:
        """The session's folder, ready to be mounted, and the uid it belongs to."""
        uid = None
        if self._uses_uids:
            uid = self._uids.take(id, None if spec.fresh else folders.find_owner(spec.session_dir))
        try:
            self._folders.make_session_dir(spec.session_dir, uid)
            if uid is not None and folders.find_owner(spec.session_dir) != uid:
                folders.adopt(spec.session_dir, uid)
        except OSError as error:
            raise SandboxFailed(f"the session's folder cannot be used: {error.strerror}") from error
        folders.fill(spec.session_dir, spec.agent_dir, uid, fresh=spec.fresh, link=self._kind == "bwrap")
        return uid

    @property
    def _uses_uids(self) -> bool:
        return self._isolation is not None and self._isolation.is_root

    # Warm sandboxes

    def _pace(self) -> Pace:
        was_full = time.monotonic() - self._relieved_at < RELIEF_PAUSE  # no session gives up its sandbox for one that only waits
        if self._isolation is None or was_full or self._headroom.is_short or self._headroom.find_shortage(is_new=True):
            return Pace.NOT
        return Pace.SLOW if self._headroom.is_overloaded or (os.cpu_count() or 1) < 2 else Pace.FULL

    async def _watch(self) -> None:
        """While memory is short, first the warm sandboxes go, then one idle session after another gives up its own."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            try:
                if self._headroom.is_short and not self._evict():
                    await self._relieve(True)
            except Exception:  # the edge of the loop: whatever it is, the watch must not end without a word
                log.exception("the host's memory could not be watched")
            if len(self._pool) < self._pool.wanted:
                self._pool.changed()

    async def _start_warm(self) -> Sandbox:
        id = models.new_id()
        slot = os.path.join(self._folders.slots, id)
        uid = self._uids.take(id) if self._uses_uids else None
        self._starter.starting.add(id)
        try:
            await in_thread(self._folders.make_session_dir, slot, uid)
            return await self._start(await self._require_isolation(), Ground(id, slot, uid, self._limits))
        except BaseException:  # whatever went wrong, the slot goes
            await asyncio.shield(asyncio.to_thread(self._starter.remove_folder, slot, uid))
            self._uids.let_go(id)
            raise
        finally:
            self._starter.starting.discard(id)

    def _on_gone(self, sandbox: Sandbox) -> None:
        self._pool.forget(sandbox)

    # What others left

    async def copy_folder(self, source: str, target: str) -> None:
        """A second session's folder with a copy of the first one's files, for a fork. Follows no link. Raises Overloaded."""
        if self._headroom.read().disk_mb < self._headroom.min_disk_mb:
            self._counts["refused_disk"] += 1
            raise Overloaded(f"{_SHORTAGES['disk']}; try again in a moment", retry_after=_SHORTAGE_SECONDS)
        id = models.new_id()
        uid = self._uids.take(id) if self._kind == "bwrap" and os.geteuid() == 0 else None
        try:
            await in_thread(folders.copy_session, source, target, uid)
        finally:
            self._uids.let_go(id)

    async def reap(self, handles: Iterable[SandboxHandle]) -> int:
        """End the sandboxes that a dead server left, and remove their run folders, slots and cgroups. Returns how many were alive.

        A sandbox is ended only if pid and start time are still those of its handle, and never while the server that
        started it lives.
        """
        tree = self._isolation.cgroups if self._isolation is not None else None
        shared = self._isolation.shared_files() if self._isolation is not None else set()
        return await leftovers.reap(handles, self._folders, tree, shared, self._starter.own_ids)
