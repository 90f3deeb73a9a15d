"""The warm pool: generic sandboxes that were started before anyone asked, replenished in the background and evicted for want of room.

Knows no sessions: who claims one makes it that of a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from enum import IntEnum

from ash.errors import AshError
from ash.isolation.running import Sandbox
from ash.tasks import Tasks

log = logging.getLogger(__name__)

RETRY_DELAYS = (1.0, 5.0, 15.0, 60.0)
"""Seconds before the pool tries again to start a warm sandbox after a failure, and the next ones."""
REFILL_DELAY = 0.15
"""Seconds before a pool that is not empty starts another sandbox: the session that took the last one is about to be used."""
SLOW_DELAY = 5.0
"""Seconds between two starts while the host is overloaded. Not for ever: then each new session would wait for a start of its own."""
YIELD_TIMEOUT = 2.0
"""Most seconds that the pool gives way to the starts of sessions."""


class Pace(IntEnum):
    """How fast the pool may fill: not at all, one now and then, or that many at once."""

    NOT = 0
    SLOW = 1
    FULL = 2


class WarmPool:
    """`start` starts one warm sandbox; `pace` and `room` say how many more are allowed now; while `is_busy`, sessions come first.

    `changed` tells it to look again.
    """

    def __init__(
        self, wanted: int, start: Callable[[], Awaitable[Sandbox]], tasks: Tasks, *,
        pace: Callable[[], Pace], room: Callable[[], int], is_busy: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.wanted, self.last_failure, self.evictions = wanted, "", 0
        self._start, self._tasks = start, tasks
        self._pace, self._room, self._is_busy = pace, room, is_busy
        self._ready: deque[Sandbox] = deque()
        self._changed, self._at_rest = asyncio.Event(), asyncio.Event()
        self._at_rest.set()
        self._failures = 0

    def __len__(self) -> int:
        return len(self._ready)

    def changed(self) -> None:
        self._changed.set()

    def take(self) -> Sandbox | None:
        """The sandbox that has waited longest and lives."""
        while self._ready:
            self._changed.set()
            sandbox = self._ready.popleft()
            if sandbox.is_alive:
                return sandbox
        return None

    def give_back(self, sandbox: Sandbox) -> None:
        """One that was taken and stayed as it was."""
        if sandbox.is_alive:
            self._ready.appendleft(sandbox)
        self._changed.set()

    def evict(self) -> Sandbox | None:
        """End a warm sandbox, in the background, because its place is needed."""
        if not self._ready:
            return None
        victim = self._ready.popleft()
        self.evictions += 1
        _ = self._tasks.start(victim.stop(grace=0), f"evict warm sandbox {victim.id}")
        return victim

    async def settle(self) -> bool:
        """Wait for the starts that are under way: what comes of them can be evicted. False when there are none."""
        if self._at_rest.is_set():
            return False
        await self._at_rest.wait()
        return True

    def forget(self, sandbox: Sandbox) -> None:
        """One that has ended."""
        with contextlib.suppress(ValueError):
            self._ready.remove(sandbox)
        self._changed.set()

    async def replenish(self) -> None:
        """Keep the pool full. A start that fails is tried again, later and later."""
        while True:
            self._changed.clear()
            count = min(self.wanted - len(self._ready), self._room(), self._pace())
            if count <= 0:
                await self._changed.wait()
                if self._ready:  # whoever took the last one is still busy with it; another waits, so there is time
                    await asyncio.sleep(REFILL_DELAY)
            elif not await self._give_way():
                self._at_rest.clear()
                try:
                    started = await asyncio.gather(*(self._add() for _ in range(count)))
                finally:
                    self._at_rest.set()
                await asyncio.sleep(self._pause(all(started)))

    async def _give_way(self) -> bool:
        """Wait while sessions start sandboxes of their own, for a while. Whether it had to, and things may have changed."""
        if not self._is_busy():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(YIELD_TIMEOUT):
                while self._is_busy():
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    def _pause(self, went_well: bool) -> float:
        self._failures = 0 if went_well else self._failures + 1
        if not went_well:
            return RETRY_DELAYS[min(self._failures, len(RETRY_DELAYS)) - 1]
        is_slow = self._pace() is Pace.SLOW and len(self._ready) < self.wanted
        return SLOW_DELAY if is_slow else 0.0

    async def _add(self) -> bool:
        try:
            self._ready.append(await self._start())
        except Exception as error:  # the edge of the loop: whatever it is, the pool must not end without a word
            self.last_failure = str(error) or type(error).__name__
            is_foreseen = isinstance(error, AshError | OSError)
            log.warning("a warm sandbox did not start: %s", self.last_failure, exc_info=None if is_foreseen else error)
            return False
        self.last_failure = ""
        return True
