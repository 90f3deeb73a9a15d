from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

from ash import models
from ash.errors import AshError, InvalidRequest, SessionNotFound, StoreFailed
from ash.events import EventLog
from ash.models import Event, NewEvent, Session
from ash.store import Store


class WatchedStore(Store):
    """The real store, which also notes each batch and can be told to wait or to fail."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.batches: list[list[str]] = []
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def append_events(self, batch: Sequence[tuple[str, Sequence[NewEvent]]], created_at: str, sync: bool) -> list[list[Event]]:
        self.batches.append([session_id for session_id, _ in batch])
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().append_events(batch, created_at, sync)

    async def read_events(self, session_id: str, *, after: int = 0, limit: int = 1000, types: Sequence[str] | None = None) -> list[Event]:
        self.reads += 1
        return await super().read_events(session_id, after=after, limit=limit, types=types)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[WatchedStore]:
    async with WatchedStore(str(tmp_path / "ash.db")) as opened:
        yield opened


@pytest.fixture
async def log(db: WatchedStore) -> AsyncIterator[EventLog]:
    async with EventLog(db) as opened:
        yield opened


@pytest.fixture
async def ids(db: WatchedStore) -> list[str]:
    found = [models.new_id() for _ in range(3)]
    for id in found:
        await db.create_session(Session(id, "default", "bot", 1, "d", "active", None, {}, None, id, models.now(), models.now()))
    return found


def delta(text: str) -> NewEvent:
    return NewEvent(models.TEXT_DELTA, {"delta": text})


def texts(events: Sequence[Event]) -> list[str]:
    return [event.data["delta"] for event in events]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for happens inside the product
            await asyncio.sleep(0.001)


async def take(events: AsyncGenerator[list[Event], None], count: int) -> list[Event]:
    taken: list[Event] = []
    async with asyncio.timeout(5), aclosing(events):
        async for batch in events:
            taken += batch
            if len(taken) >= count:
                break
    return taken


# Appending


async def test_an_append_returns_what_is_in_the_store(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    events = await log.append(ids[0], [delta("a"), delta("b")], sync=True)
    assert [event.seq for event in events] == [1, 2]
    assert await db.read_events(ids[0]) == events == await log.read(ids[0])
    assert await log.append(ids[0], []) == []


async def test_an_idle_log_commits_at_once(log: EventLog, ids: list[str]) -> None:
    started = time.perf_counter()
    for _ in range(20):
        await log.append(ids[0], [delta("a")])
    assert time.perf_counter() - started < 2.0


async def test_what_arrives_during_a_commit_is_committed_together(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    db.gate.clear()
    appends = [asyncio.ensure_future(log.append(ids[number % 3], [delta(str(number))])) for number in range(7)]
    await until(lambda: bool(db.batches))
    late = [asyncio.ensure_future(log.append(id, [delta("late")])) for id in ids]
    await asyncio.sleep(0)
    db.gate.set()
    assert [events[0].seq for events in await asyncio.gather(*appends)] == [1, 1, 1, 2, 2, 2, 3]
    await asyncio.gather(*late)
    assert [len(batch) for batch in db.batches] == [7, 3]


async def test_appends_of_a_session_keep_the_order_of_their_calls(log: EventLog, ids: list[str]) -> None:
    await asyncio.gather(*(log.append(ids[0], [delta(str(number))]) for number in range(1200)))
    assert texts(await log.read(ids[0], limit=2000)) == [str(number) for number in range(1200)]


async def test_only_the_append_at_fault_fails(log: EventLog, ids: list[str]) -> None:
    results = await asyncio.gather(
        log.append(ids[0], [delta("good")]),
        log.append(models.new_id(), [delta("no such session")]),
        log.append(ids[1], [NewEvent("text.delta", {"delta": object()})]),
        log.append(ids[0], [delta("better")]),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [list, SessionNotFound, InvalidRequest, list]
    assert texts(await log.read(ids[0])) == ["good", "better"]


async def test_a_store_that_fails_tells_every_appender_and_the_log_recovers(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    db.error = StoreFailed("the disk is full")
    results = await asyncio.gather(*(log.append(id, [delta("a")]) for id in ids), return_exceptions=True)
    assert [str(result) for result in results] == ["the disk is full"] * 3
    assert len(db.batches) == 1
    db.error = None
    assert [event.seq for event in await log.append(ids[0], [delta("b")])] == [1]


async def test_a_cancelled_append_does_not_disturb_the_others(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    db.gate.clear()
    cancelled, kept = (asyncio.ensure_future(log.append(ids[0], [delta(text)])) for text in "ab")
    await until(lambda: bool(db.batches))
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    db.gate.set()
    assert [event.seq for event in await kept] == [2]
    assert texts(await log.read(ids[0])) == ["a", "b"]


async def test_leaving_the_log_commits_what_was_appended(db: WatchedStore, ids: list[str]) -> None:
    async with EventLog(db) as log:
        appends = [asyncio.ensure_future(log.append(ids[0], [delta(text)])) for text in "abc"]
        await asyncio.sleep(0)
    assert [events[0].seq for events in await asyncio.gather(*appends)] == [1, 2, 3]
    with pytest.raises(StoreFailed, match="closed"):
        await log.append(ids[0], [delta("d")])


async def test_a_dead_writer_fails_its_appenders_and_refuses_new_ones(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    db.gate.clear()
    running = asyncio.ensure_future(log.append(ids[0], [delta("a")]))
    await until(lambda: bool(db.batches))
    waiting = asyncio.ensure_future(log.append(ids[0], [delta("b")]))
    await asyncio.sleep(0)
    await log._tasks.cancel()
    await log.__aexit__(None, None, None)
    for append in (running, waiting, log.append(ids[0], [delta("c")])):
        with pytest.raises(AshError, match="closed"):
            await append


# Following


async def test_a_follower_gets_history_then_live_without_gap_or_repeat(log: EventLog, ids: list[str]) -> None:
    async def write() -> None:
        for number in range(300):
            await log.append(ids[0], [delta(str(number)), delta("x")])
            await log.append(ids[1], [delta("of another session")])

    await log.append(ids[0], [delta("history")] * 450)
    followers = [asyncio.ensure_future(take(log.follow(ids[0], after), 1050 - after)) for after in (0, 10, 449, 450, 600)]
    await write()
    for after, events in zip((0, 10, 449, 450, 600), await asyncio.gather(*followers), strict=True):
        assert [event.seq for event in events] == list(range(after + 1, 1051))


async def test_a_follower_sees_an_event_only_once_it_is_in_the_store(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    db.gate.clear()
    following = asyncio.ensure_future(take(log.follow(ids[0], 0), 1))
    append = asyncio.ensure_future(log.append(ids[0], [delta("a")]))
    await until(lambda: bool(db.batches))
    assert not following.done()
    db.gate.set()
    assert await following == await append


async def test_a_follower_of_types_gets_only_those(log: EventLog, ids: list[str]) -> None:
    following = asyncio.ensure_future(take(log.follow(ids[0], 0, types=[models.TURN_ENDED]), 2))
    for _ in range(2):
        await log.append(ids[0], [delta("a"), NewEvent(models.TURN_ENDED, {}), delta("b")])
    assert [event.seq for event in await following] == [2, 5]


async def test_a_follower_that_stood_still_continues_where_it_was(log: EventLog, ids: list[str]) -> None:
    async with aclosing(log.follow(ids[0], 0)) as events:
        await log.append(ids[0], [delta("first")])
        seen = await anext(events)
        for number in range(500):
            await log.append(ids[0], [delta(str(number))])
        while len(seen) < 501:
            seen += await asyncio.wait_for(anext(events), 5)
    assert [event.seq for event in seen] == list(range(1, 502))


async def test_many_followers_of_one_session_cost_no_reads_while_they_keep_up(db: WatchedStore, log: EventLog, ids: list[str]) -> None:
    followers = [asyncio.ensure_future(take(log.follow(ids[0], 0), 20)) for _ in range(1000)]
    await until(lambda: db.reads == 1000)
    await log.append(ids[0], [delta("0")])
    for number in range(1, 20):
        await log.append(ids[0], [delta(str(number))])
    assert all(texts(events) == [str(number) for number in range(20)] for events in await asyncio.gather(*followers))
    assert db.reads < 1100
    assert log._channels == {}


async def test_closing_the_followers_ends_them_and_those_to_come(log: EventLog, ids: list[str]) -> None:
    events = log.follow(ids[0], 0)
    await log.append(ids[0], [delta("a")])
    assert texts(await anext(events)) == ["a"]
    following = asyncio.ensure_future(take(events, 99))
    await asyncio.sleep(0)
    log.close_followers()
    assert await following == []
    assert await take(log.follow(ids[0], 0), 99) == []
    assert [event.seq for event in await log.append(ids[0], [delta("b")])] == [2]


async def test_a_follower_that_is_cancelled_leaves_nothing_behind(log: EventLog, ids: list[str]) -> None:
    following = asyncio.ensure_future(take(log.follow(ids[0], 0), 1))
    await until(lambda: bool(log._channels))
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    assert log._channels == {}
