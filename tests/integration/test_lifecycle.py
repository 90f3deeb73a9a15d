"""Zero zombies: each part of a sandbox is killed at each moment of its life, and so is its server; nothing of what it owned may be left."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ash.isolation.leftovers import OWNED
from ash.sandbox import Sandbox
from tests.integration import battlefield, moments
from tests.integration.moments import DEEDS, IN_SHUTDOWN, MOMENTS, require_isolation
from tests.integration.remains import descriptors, everything_of, gone, processes_of
from tests.sandboxes import FAKE_BRIDGE, leftovers, open_pool, until

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
KILL_SERVER = "import sys; sys.path.insert(0, sys.argv[1]); from tests.integration import moments; moments.main(*sys.argv[2:])"


async def test_the_search_finds_what_a_living_sandbox_has(data_dir: str) -> None:
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE) as pool:
        require_isolation(pool)
        before = descriptors()
        sandbox = await pool.take("s1")
        found = everything_of(pool, before)
        expected = OWNED.keys() - {"slot"} - ({"cgroup"} if sandbox.handle.cgroup is None else set())
        assert found.keys() == expected - ({"uid"} if sandbox.handle.uid is None else set())
        assert len(found["processes"]) == 3, "the monitor, the first process, the bridge"
        await sandbox.stop(grace=0)
        await gone(pool, before)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_whatever_dies_at_this_moment_nothing_is_left(data_dir: str, moment: str) -> None:
    async with moments.opened(data_dir) as pool:
        before = descriptors()
        for name, deed in DEEDS.items():
            await MOMENTS[moment](pool, deed)
            for sandbox in list(pool._starter.alive.values()):
                async with asyncio.timeout(10):
                    await sandbox.stop(grace=0.2)
            await gone(pool, before, f"after {name} {moment}")
        survivor = await pool.take()
        assert (await survivor.exec("echo fine")).stdout == "fine\n"


@pytest.mark.parametrize("deed", DEEDS)
async def test_whatever_dies_while_the_server_shuts_down_nothing_is_left(data_dir: str, deed: str) -> None:
    pool = await moments.in_shutdown(data_dir, DEEDS[deed])
    assert leftovers(data_dir) == []
    assert not pool.opened.keys() - set(pool.closed)
    await until(lambda: not processes_of(data_dir))


@pytest.mark.parametrize("moment", [*MOMENTS, IN_SHUTDOWN])
async def test_of_a_server_killed_at_any_moment_the_next_one_finds_and_ends_everything(data_dir: str, moment: str) -> None:
    command = [sys.executable, "-c", KILL_SERVER, battlefield.PROJECT, data_dir, moment]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    if "cannot isolate" in done.stderr:
        pytest.skip("this host cannot isolate")
    assert done.returncode == -9, done.stderr
    async with open_pool(data_dir) as pool:
        before = descriptors()
        await pool.reap([])
        await gone(pool, before)


async def test_thirty_sandboxes_that_end_in_every_way_leave_nothing(data_dir: str) -> None:
    async with moments.opened(data_dir) as pool:
        await (await pool.take()).stop()
        before = descriptors()
        ways: tuple[Callable[[Sandbox], Awaitable[Any]], ...] = (
            lambda sandbox: sandbox.stop(), lambda sandbox: sandbox.stop(grace=0), lambda sandbox: sandbox.exec("kill -9 $PPID"),
        )  # fmt: skip
        for number in range(10):
            sandboxes = [await pool.take() for _ in ways]
            await asyncio.gather(*(way(sandbox) for way, sandbox in zip(ways, sandboxes, strict=True)), return_exceptions=True)
            await gone(pool, before, f"in round {number}")
        assert pool.status().cold_starts == 31
