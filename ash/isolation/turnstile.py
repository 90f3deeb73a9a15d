"""The queue before cold starts: so many at once, so many that wait, so long. Who would only wait in vain is told when to come again."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections import deque

from ash.errors import Overloaded

DEFAULT_SECONDS = 0.2
"""What a start is taken to last before one was measured."""
MEMORY = 50
"""The last so many starts tell how long one takes."""


class Turnstile:
    """`enter` before a start, `leave` after it. Urgent ones, for sessions that exist already, pass those for new ones."""

    def __init__(self, at_once: int, most_waiting: int, patience: float) -> None:
        self._at_once, self._most_waiting, self._patience = at_once, most_waiting, patience
        self._inside = 0
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._others: deque[asyncio.Future[None]] = deque()
        self._seconds: deque[float] = deque(maxlen=MEMORY)

    @property
    def waiting(self) -> int:
        return len(self._urgent) + len(self._others)

    @property
    def has_place(self) -> bool:
        """Whether there is a place besides those taken."""
        return self._inside < self._at_once

    @property
    def is_free(self) -> bool:
        return self.has_place and not self.waiting

    def took(self, seconds: float) -> None:
        """How long a start lasted."""
        self._seconds.append(seconds)

    def typical(self) -> float:
        return statistics.median(self._seconds) if self._seconds else DEFAULT_SECONDS

    def slow(self) -> float | None:
        """What nineteen of twenty starts stay under; None before there is something to go by."""
        return sorted(self._seconds)[int((len(self._seconds) - 1) * 0.95)] if self._seconds else None

    def retry_after(self) -> float:
        """Seconds until who comes again should find room: until those who wait now have had their turn."""
        return min(60.0, max(1.0, (self.waiting + 1) * self.typical() / self._at_once))

    def check(self, *, is_urgent: bool = False) -> None:
        """Raises Overloaded when nobody more may wait. Each of the two lines has its own bound, so that new ones cannot fill both."""
        if len(self._urgent if is_urgent else self._others) >= self._most_waiting:
            raise self._refusal()

    def _refusal(self) -> Overloaded:
        return Overloaded("The server has as many sessions to start as it can; try again in a moment", retry_after=self.retry_after())

    async def enter(self, *, is_urgent: bool) -> None:
        """Raises Overloaded when too many wait, or after `patience` seconds."""
        if self.is_free:
            self._inside += 1
            return
        self.check(is_urgent=is_urgent)
        line = self._urgent if is_urgent else self._others
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(place)
        try:
            async with asyncio.timeout(self._patience):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():  # let in at the very moment it gave up
                self.leave()
            with contextlib.suppress(ValueError):
                line.remove(place)
            if isinstance(error, TimeoutError):
                raise self._refusal() from error
            raise

    def leave(self) -> None:
        """Hands the place on to the next one that still waits."""
        for line in (self._urgent, self._others):
            while line:
                place = line.popleft()
                if not place.done():
                    place.set_result(None)
                    return
        self._inside -= 1
