"""The life of a sandbox as a list of moments, each with a way to do something to it just then. For tests, and for servers that tests kill.

A deed is a function of `Victim`. It is done exactly once; whatever comes of it for the sandbox's user is no matter here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from ash.errors import AshError
from ash.isolation import folders, launch
from ash.isolation.link import Link
from ash.isolation.starting import Starter
from ash.sandbox import Sandbox
from tests.sandboxes import FAKE_BRIDGE, Pool, open_pool, until


class Victim(NamedTuple):
    """As much as there is of a sandbox at that moment."""

    run_dir: str
    monitor: int | None = None
    sandbox: Sandbox | None = None

    @property
    def init(self) -> int | None:
        """The first process of its pid namespace."""
        return next(iter(launch.find_children(self.monitor)), None) if self.monitor is not None else None

    @property
    def bridge(self) -> int | None:
        return next(iter(launch.find_children(self.init)), None) if self.init is not None else None


Deed = Callable[[Victim], None]


def _kill(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _hang_up(victim: Victim) -> None:
    if victim.sandbox is not None:
        victim.sandbox._link._writer.transport.abort()


def _kill_tools(victim: Victim) -> None:
    for pid in launch.find_descendants(victim.bridge) if victim.bridge is not None else ():
        _kill(pid)


def _freeze(victim: Victim) -> None:
    if victim.bridge is not None:
        os.kill(victim.bridge, signal.SIGSTOP)


DEEDS: dict[str, Deed] = {
    "kill the monitor": lambda victim: _kill(victim.monitor),
    "kill the first process": lambda victim: _kill(victim.init),
    "kill the bridge": lambda victim: _kill(victim.bridge),
    "kill the tools": _kill_tools,
    "stop the bridge": _freeze,
    "hang up": _hang_up,
    "remove the run folder": lambda victim: shutil.rmtree(victim.run_dir, ignore_errors=True),
}


def _of(sandbox: Sandbox) -> Victim:
    return Victim(sandbox.handle.run_dir, sandbox._process._monitor, sandbox)


@contextlib.contextmanager
def _around_spawn(before: Callable[[Victim], None] | None, after: Callable[[Victim], None]) -> Iterator[None]:
    original = Starter._spawn

    def spawn(self: Starter, isolation: Any, place: Any, *rest: Any) -> Any:
        if before is not None:
            before(Victim(place.run_dir))
        started = original(self, isolation, place, *rest)
        after(Victim(place.run_dir, started[0].pid))
        return started

    with patch.object(Starter, "_spawn", spawn):
        yield


async def _bear(outcome: Awaitable[Any]) -> None:
    """Wait for something that may fail, as its user would: with an error that says so, and in bounded time."""
    async with asyncio.timeout(20):
        with contextlib.suppress(AshError):
            await outcome


async def before_it_is_spawned(pool: Pool, deed: Deed) -> None:
    with _around_spawn(deed, lambda victim: None):
        await _bear(pool.take())


async def when_it_is_spawned(pool: Pool, deed: Deed) -> None:
    with _around_spawn(None, deed):
        await _bear(pool.take())


async def when_its_first_process_is_made(pool: Pool, deed: Deed) -> None:
    """Before the server has heard which one that is."""

    def wait(victim: Victim) -> None:
        deadline = time.monotonic() + 5
        while victim.init is None and time.monotonic() < deadline:
            time.sleep(0.0002)
        deed(victim)

    with _around_spawn(None, wait):
        await _bear(pool.take())


async def before_it_is_connected(pool: Pool, deed: Deed) -> None:
    spawned: list[Victim] = []
    original = Link.open.__func__  # type: ignore[attr-defined]

    async def connect(cls: type[Link], *arguments: Any) -> Link:
        deed(spawned[-1])
        return await original(cls, *arguments)  # type: ignore[no-any-return]

    with _around_spawn(None, spawned.append), patch.object(Link, "open", classmethod(connect)):
        await _bear(pool.take())


async def before_it_is_ready(pool: Pool, deed: Deed) -> None:
    original = Sandbox.ready

    async def ready(self: Sandbox) -> None:
        deed(_of(self))
        await original(self)

    with patch.object(Sandbox, "ready", ready):
        await _bear(pool.take())


async def while_it_waits_warm(pool: Pool, deed: Deed) -> None:
    deed(_of(await _warm(pool)))


async def while_it_is_filled(pool: Pool, deed: Deed) -> None:
    warm, original = await _warm(pool), folders.fill

    def fill(*arguments: Any, **named: Any) -> None:
        deed(_of(warm))
        original(*arguments, **named)

    with patch.object(folders, "fill", fill):
        await _bear(pool.take())


async def _warm(pool: Pool) -> Sandbox:
    sandbox = await pool._start_warm()
    pool._pool.give_back(sandbox)
    return sandbox


async def while_it_is_initialized(pool: Pool, deed: Deed) -> None:
    sandbox = await pool.take()
    beginning = asyncio.create_task(sandbox.init({}, {}, [], timeout=1.0))
    await asyncio.sleep(0)
    deed(_of(sandbox))
    await _bear(beginning)


async def in_a_turn(pool: Pool, deed: Deed) -> None:
    sandbox = await pool.take()
    await sandbox.init({}, {}, [])
    await sandbox.query("t1", "silent", {})
    deed(_of(sandbox))


async def in_a_command(pool: Pool, deed: Deed) -> None:
    sandbox = await pool.take()
    with patch("ash.isolation.running.EXEC_GRACE", 0.5):
        running = asyncio.create_task(sandbox.exec("(setsid sleep 300 &) ; sleep 300", timeout=1.0))
        await until(lambda: len(launch.find_descendants(sandbox.handle.pid)) > 3)
        deed(_of(sandbox))
        await _bear(running)


async def while_it_is_stopped(pool: Pool, deed: Deed) -> None:
    sandbox = await pool.take()
    stopping = asyncio.create_task(sandbox.stop(grace=0.3))
    await asyncio.sleep(0)
    deed(_of(sandbox))
    await _bear(stopping)


MOMENTS: dict[str, Callable[[Pool, Deed], Awaitable[None]]] = {
    moment.__name__.replace("_", " "): moment
    for moment in (
        before_it_is_spawned, when_it_is_spawned, when_its_first_process_is_made, before_it_is_connected, before_it_is_ready,
        while_it_waits_warm, while_it_is_filled, while_it_is_initialized, in_a_turn, in_a_command, while_it_is_stopped,
    )
}  # fmt: skip
IN_SHUTDOWN = "while the server shuts down"


def require_isolation(pool: Pool) -> None:
    if pool.status().isolation == "unavailable":
        pytest.skip(f"this host cannot isolate: {pool.status().warnings[0]}")


@contextlib.asynccontextmanager
async def opened(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE, start_timeout=3.0) as pool:
        require_isolation(pool)
        yield pool


async def in_shutdown(data_dir: str, deed: Deed) -> Pool:
    async with opened(data_dir) as pool:
        victim = _of(await pool.take())
        asyncio.get_running_loop().call_soon(deed, victim)
    return pool


def die(victim: Victim) -> None:
    """What a server does that is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(data_dir: str, moment: str) -> None:
    async def run() -> None:
        if moment == IN_SHUTDOWN:
            await in_shutdown(data_dir, die)
        async with opened(data_dir) as pool:
            await MOMENTS[moment](pool, die)

    asyncio.run(run())
