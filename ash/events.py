"""The event log: appends of all sessions are committed in groups, and any number of followers read history, then live.

It is the only source of every stream. It keeps no queue per follower, and an event reaches a follower only once it is in the store.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from ash import models
from ash.errors import StoreFailed
from ash.models import Event, NewEvent
from ash.store import Store
from ash.tasks import Tasks

_EVENTS_PER_COMMIT = 500
_PAGE = 200
"""Events a follower reads at once. A page is what one slow follower keeps in memory."""


class _Append:
    """One call of `append`, waiting to be committed."""

    def __init__(self, session_id: str, events: Sequence[NewEvent], is_synced: bool) -> None:
        self.session_id = session_id
        self.events = events
        self.is_synced = is_synced
        self.stored: asyncio.Future[list[Event]] = asyncio.get_running_loop().create_future()

    def finish(self, events: list[Event]) -> None:
        if not self.stored.done():  # the caller may have been cancelled
            self.stored.set_result(events)

    def fail(self, error: BaseException) -> None:
        if not self.stored.done():
            self.stored.set_exception(error)


class _Channel:
    """What all followers of one session share: a count that moves with every commit, and the events of the last commit.

    A follower that keeps up takes those and never asks the database; one that does not reads the log.
    """

    def __init__(self) -> None:
        self.count = 0
        self.followers = 0
        self._latest: list[Event] = []
        self._moved = asyncio.Event()

    def publish(self, events: list[Event]) -> None:
        self._latest = events
        self.wake()

    def wake(self) -> None:
        self.count += 1
        self._moved.set()
        self._moved = asyncio.Event()

    def following(self, after: int) -> list[Event]:
        """The events of the last commit, if they are the very next ones after `after`."""
        return self._latest if self._latest and self._latest[0].seq == after + 1 else []

    def is_end(self, after: int) -> bool:
        """Whether `after` is known to be the end of the log. Nothing is known before the first commit that was followed."""
        return bool(self._latest) and self._latest[-1].seq <= after

    async def moved(self, seen: int) -> None:
        if self.count == seen:
            await self._moved.wait()


class EventLog:
    """An async context manager; leaving it ends the followers and commits what was appended. Enter it inside its store's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks = Tasks()
        self._pending: deque[_Append] = deque()
        self._in_flight: list[_Append] = []
        self._has_work = asyncio.Event()
        self._is_open = False
        self._is_followed = True
        self.broken = asyncio.Event()
        """Set when the writer has died: nothing can be recorded any more, and the server has to stop."""
        self._channels: dict[str, _Channel] = {}

    async def __aenter__(self) -> Self:
        self._is_open = True
        _ = self._tasks.start(self._commit_forever(), "event log", lambda error: self._break())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close_followers()
        self._is_open = False
        self._has_work.set()
        try:
            await self._tasks.wait()
        finally:
            await self._tasks.cancel()
            self._stop()

    # Appending

    async def append(self, session_id: str, events: Sequence[NewEvent], *, sync: bool = False) -> list[Event]:
        """Add to a session's log; returns once that is committed, and with `sync` once it is on the disk.

        Calls are recorded in the order in which they are made. A cancelled call may still be recorded.
        """
        if not self._is_open:
            raise StoreFailed("The event log is closed")
        if not events:
            return []
        append = _Append(session_id, events, sync)
        self._pending.append(append)
        self._has_work.set()
        return await append.stored

    async def _commit_forever(self) -> None:
        """Commit at once when idle; what arrives during a commit goes into the next one together."""
        while self._is_open or self._pending:
            if self._pending:
                await self._commit(self._take())
                self._in_flight = []
            else:
                self._has_work.clear()
                await self._has_work.wait()

    def _take(self) -> list[_Append]:
        self._in_flight, size = [], 0
        while self._pending and size < _EVENTS_PER_COMMIT:
            append = self._pending.popleft()
            self._in_flight.append(append)
            size += len(append.events)
        return self._in_flight

    async def _commit(self, batch: list[_Append]) -> None:
        writes = [(append.session_id, append.events) for append in batch]
        try:
            stored = await self._store.append_events(writes, models.now(), sync=any(append.is_synced for append in batch))
        except StoreFailed as error:
            _refuse(batch, error.message)
        except Exception as error:  # noqa: BLE001 - the edge of the loop: the error belongs to a caller, the log goes on
            if len(batch) == 1:
                batch[0].fail(error)
                return
            # Nothing of the batch was recorded, and one of its appends is at fault: only that one may fail.
            for append in batch:
                await self._commit([append])
        else:
            self._announce(batch, stored)

    def _announce(self, batch: list[_Append], stored: list[list[Event]]) -> None:
        news: dict[str, list[Event]] = {}
        for append, events in zip(batch, stored, strict=True):
            append.finish(events)
            if append.session_id in self._channels:
                news[append.session_id] = news.get(append.session_id, []) + events
        for session_id, events in news.items():
            self._channels[session_id].publish(events)

    def _break(self) -> None:
        self.broken.set()
        self._stop()

    def _stop(self) -> None:
        """Without the writer nothing can be recorded any more: say so to everyone who waits or will come."""
        self._is_open = False
        _refuse([*self._in_flight, *self._pending], "The event log was closed before the event could be recorded")
        self._pending.clear()

    # Following

    async def read(self, session_id: str, *, after: int = 0, limit: int = 1000, types: Sequence[str] | None = None) -> list[Event]:
        return await self._store.read_events(session_id, after=after, limit=limit, types=types)

    async def follow(self, session_id: str, after: int, *, types: Collection[str] | None = None) -> AsyncGenerator[list[Event], None]:
        """The events after `after`, then each new one as it is committed, in order, without a gap or a repeat.

        Ends when followers are closed, even before what is left of the log. Whoever stops earlier calls `aclose()` (contextlib.aclosing).
        """
        with self._joined(session_id) as channel:
            while self._is_followed:
                seen = channel.count
                events = channel.following(after) or await self._page(channel, session_id, after)
                if not events:
                    await channel.moved(seen)
                    continue
                after = events[-1].seq
                if shown := [event for event in events if types is None or event.type in types]:
                    yield shown

    async def _page(self, channel: _Channel, session_id: str, after: int) -> list[Event]:
        return [] if channel.is_end(after) else await self.read(session_id, after=after, limit=_PAGE)

    def close_followers(self) -> None:
        """End every `follow`, those to come included. Appending goes on."""
        self._is_followed = False
        for channel in self._channels.values():
            channel.wake()

    @contextmanager
    def _joined(self, session_id: str) -> Iterator[_Channel]:
        channel = self._channels.setdefault(session_id, _Channel())
        channel.followers += 1
        try:
            yield channel
        finally:
            channel.followers -= 1
            if channel.followers == 0:
                del self._channels[session_id]


def _refuse(appends: Iterable[_Append], message: str) -> None:
    for append in appends:
        append.fail(StoreFailed(message))  # one each: every caller adds its own traceback
