"""The warm pool and the door before it, with real sandboxes: within what the host has left, and nobody gets half a sandbox."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ash.errors import CapacityReached, Overloaded, SandboxFailed, SandboxUnresponsive
from ash.isolation import launch
from ash.isolation.turnstile import Turnstile
from ash.sandbox import Sandbox, SandboxSpec
from tests.integration.moments import require_isolation
from tests.integration.remains import descriptors, gone
from tests.sandboxes import FAKE_BRIDGE, Pool, SaidHeadroom, is_alive, make_agent, open_pool, until

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture
async def pool(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr("ash.sandbox.WATCH_INTERVAL", 0.05)
    headroom = SaidHeadroom(min_memory_mb=100, min_disk_mb=100)
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE, warm=2, maximum=4, headroom=headroom) as found:
        require_isolation(found)
        yield found


async def full(pool: Pool) -> None:
    await until(lambda: pool.status().warm == 2)


def spec_of(pool: Pool, id: str) -> SandboxSpec:
    return SandboxSpec(id, str(pool.session_dir(id)), make_agent(pool.data_dir), True)


# The pool


async def test_two_start_at_once_where_there_is_capacity_and_one_where_there_is_not(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.isolation.pool.SLOW_DELAY", 0.01)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    at_once, most = 0, list[int]()

    class Counting(Pool):
        async def _start_warm(self) -> Sandbox:
            nonlocal at_once
            at_once += 1
            most.append(at_once)
            try:
                return await super()._start_warm()
            finally:
                at_once -= 1

    for pressure, expected in ((0.0, 2), (99.0, 1)):
        most.clear()
        headroom = SaidHeadroom()
        headroom.say(cpu_pressure=pressure)
        async with Counting(data_dir, bridge_source=FAKE_BRIDGE, warm=3, headroom=headroom) as pool:
            require_isolation(pool)
            await until(lambda: pool.status().warm == 3)
        assert max(most) == expected


async def test_nothing_is_kept_warm_while_memory_is_short_and_the_pool_fills_when_it_is_not(pool: Pool) -> None:
    await full(pool)
    warm = [sandbox.handle.pid for sandbox in pool._pool._ready]
    pool.headroom.say(memory_mb=50)
    await until(lambda: not any(is_alive(pid) for pid in warm))
    assert (pool.status().warm, pool.status().starting, pool.status().counts["evictions"]) == (0, 0, 2)
    assert any("Memory is short" in warning for warning in pool.status().warnings)
    pool.headroom.say()
    await full(pool)


async def test_when_nothing_warm_is_left_sessions_are_asked_to_give_way(pool: Pool) -> None:
    asked: list[bool] = []

    async def relieve(is_new: bool) -> bool:
        asked.append(is_new)
        return False

    pool.on_pressure = relieve
    await full(pool)
    pool.headroom.say(memory_mb=50)
    await until(lambda: asked)
    assert pool.status().warm == 0


async def test_the_pool_waits_while_sessions_start(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.isolation.pool.REFILL_DELAY", 0.0)
    await full(pool)
    async with pool.admitted(spec_of(pool, "s1")._replace(fresh=False)):
        first = await pool.take()
        assert pool.status().starting == 1
        await asyncio.sleep(0.1)
        assert (pool.status().warm, pool.status().starting) == (1, 1), "only the session's own start is under way"
    await full(pool)
    await first.stop(grace=0)


# The door


@pytest.mark.parametrize(("left", "word"), [({"memory_mb": 50}, "memory"), ({"disk_mb": 50}, "disk"), ({"descriptors": 5}, "descriptors")])
async def test_a_new_session_is_refused_before_the_host_is_full(pool: Pool, left: dict[str, int], word: str) -> None:
    await full(pool)
    pool.headroom.say(**left)
    with pytest.raises(Overloaded, match=word) as refused:
        await pool.take("s1")
    assert refused.value.retry_after > 0
    assert not pool.session_dir("s1").exists()
    assert pool.status().counts[f"refused_{word}"] == 1


async def test_no_copy_of_a_session_is_made_on_a_disk_that_is_nearly_full(pool: Pool) -> None:
    await pool.take("s1")
    pool.headroom.say(disk_mb=50)
    with pytest.raises(Overloaded, match="disk"):
        await pool.copy_folder(str(pool.session_dir("s1")), str(pool.session_dir("s2")))
    assert not pool.session_dir("s2").exists()


async def test_a_session_that_wakes_may_use_the_reserve(pool: Pool) -> None:
    sandbox = await pool.take("s1")
    await sandbox.stop(grace=0)
    pool.headroom.say(memory_mb=60, disk_mb=10)
    await pool.check_wake()
    assert (await (await pool.take("s1", fresh=False)).exec("cat CLAUDE.md")).stdout == "be kind"
    pool.headroom.say(memory_mb=40)
    with pytest.raises(Overloaded):
        await pool.check_wake()


async def test_a_full_server_asks_for_room_and_takes_it(pool: Pool) -> None:
    sandboxes = [await pool.take() for _ in range(4)]
    with pytest.raises(CapacityReached, match="capacity reached"):
        await pool.take("refused")

    async def relieve(is_new: bool) -> bool:
        await sandboxes.pop(0).stop(grace=0)
        return True

    pool.on_pressure = relieve
    await pool.take("s1")
    assert (len(sandboxes), pool.status().total) == (3, 4)
    assert not pool.session_dir("refused").exists()


async def test_a_warm_sandbox_that_is_being_started_gives_way_too(pool: Pool) -> None:
    await full(pool)
    taken = [await pool.take() for _ in range(3)]
    pool._pool._changed.set()
    await until(lambda: pool.status().warm + pool.status().starting == 1)
    taken.append(await pool.take())
    assert len({sandbox.id for sandbox in taken}) == 4
    assert pool.status().total <= 4


async def test_more_starts_than_can_wait_are_refused_and_the_others_go_on(pool: Pool) -> None:
    pool._turnstile = Turnstile(at_once=1, most_waiting=1, patience=10)
    mute = make_agent(pool.data_dir, "digest-2", MUTE="")
    pool._pool.wanted = 0
    while (warm := pool._pool.take()) is not None:
        await warm.stop(grace=0)
    stuck = asyncio.create_task(pool.take("stuck", agent=mute))
    await until(lambda: pool._starter.alive)
    waiting = asyncio.create_task(pool.take("waiting"))
    await until(lambda: pool.status().waiting == 1)
    with pytest.raises(Overloaded):
        await pool.take("refused")
    assert not pool.session_dir("refused").exists()
    stuck.cancel()
    assert (await (await waiting).exec("echo fine")).stdout == "fine\n"
    assert pool.status().waiting == 0


async def test_a_ticket_that_is_not_used_takes_nothing(pool: Pool) -> None:
    await full(pool)
    waiting = [sandbox.id for sandbox in pool._pool._ready]
    async with pool.admitted(spec_of(pool, "s1")):
        assert pool.status().warm == 1
    assert [sandbox.id for sandbox in pool._pool._ready] == waiting
    async with pool.admitted(spec_of(pool, "s1")._replace(fresh=False)):
        assert pool.status().starting == 1
    assert (pool.status().starting, pool._turnstile.is_free, pool._claiming) == (0, True, 0)


# What is not ready in time


async def test_a_start_that_hangs_gets_a_second_one_and_nothing_of_it_stays(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    original = Sandbox.ready

    async def ready(self: Sandbox) -> None:
        started.append(self.id)
        await (asyncio.Event().wait() if len(started) == 1 else original(self))

    monkeypatch.setattr("ash.sandbox.FIRST_PATIENCE", 0.2)
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE) as pool:
        require_isolation(pool)
        before = descriptors()
        monkeypatch.setattr(Sandbox, "ready", ready)
        sandbox = await pool.take("s1")
        assert started[1:] == [sandbox.id]
        assert (await sandbox.exec("cat CLAUDE.md")).stdout == "be kind"
        await until(lambda: list(pool._starter.alive) == [sandbox.id])
        assert (pool.status().counts["second_starts"], pool.status().running) == (1, 1)
        if sandbox.handle.uid is not None:
            await until(lambda: pool._uids._held == {sandbox.id: sandbox.handle.uid})
        await sandbox.stop(grace=0)
        await gone(pool, before)


async def test_when_both_hang_the_first_reason_is_given_and_both_are_gone(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.sandbox.FIRST_PATIENCE", 0.2)
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE, start_timeout=1.0) as pool:
        require_isolation(pool)
        before = descriptors()
        with pytest.raises(SandboxFailed, match="not ready within 1 s"):
            await pool.take("s1", agent=make_agent(data_dir, "digest-2", MUTE=""))
        assert pool.status().counts["second_starts"] == 1
        assert not pool.session_dir("s1").exists()
        await gone(pool, before)


async def test_no_second_start_where_everything_is_slow(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.sandbox.FIRST_PATIENCE", 0.1)
    headroom = SaidHeadroom()
    headroom.say(cpu_pressure=99.0)
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE, start_timeout=0.5, headroom=headroom) as pool:
        require_isolation(pool)
        with pytest.raises(SandboxFailed, match="not ready"):
            await pool.take("s1", agent=make_agent(data_dir, "digest-2", MUTE=""))
        assert "second_starts" not in pool.status().counts


async def test_a_cancelled_race_leaves_nothing(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.sandbox.FIRST_PATIENCE", 0.1)
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE) as pool:
        require_isolation(pool)
        before = descriptors()
        claiming = asyncio.create_task(pool.take("s1", agent=make_agent(data_dir, "digest-2", MUTE="")))
        await until(lambda: len(pool._starter.alive) == 2)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        assert not pool.session_dir("s1").exists()
        await gone(pool, before)


async def test_starts_under_way_end_with_the_server(data_dir: str) -> None:
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE) as pool:
        require_isolation(pool)
        claiming = asyncio.create_task(pool.take("s1", agent=make_agent(data_dir, "digest-2", MUTE="")))
        await until(lambda: pool._starter.alive)
        pid = next(iter(pool._starter.alive.values())).handle.pid
    with pytest.raises(SandboxFailed, match="shutting down"):
        await claiming
    assert not is_alive(pid)
    assert not Path(data_dir, "sessions", "s1").exists()


async def test_a_warm_sandbox_that_does_not_take_its_agent_says_so_in_time(pool: Pool) -> None:
    await full(pool)
    os.kill(launch.find_children(pool._pool._ready[0].handle.pid)[0], signal.SIGSTOP)
    sandbox = await pool.take("s1")
    with pytest.raises(SandboxUnresponsive, match="did not take its agent"):
        await sandbox.init({}, {}, [], timeout=0.2)
    os.kill(sandbox.handle.pid, signal.SIGKILL)
    with pytest.raises(SandboxUnresponsive):
        await sandbox.init({}, {}, [])
