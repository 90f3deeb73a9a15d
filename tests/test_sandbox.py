"""Sandboxes as their users see them, without isolation and with a small bridge that misbehaves on demand: what ends, what stays."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ash.errors import CapacityReached, ConfigError, IsolationUnavailable, SandboxFailed, Timeout
from ash.isolation import launch
from ash.models import SandboxHandle
from ash.sandbox import Sandbox
from tests.sandboxes import FAKE_BRIDGE, Pool, end_of, is_alive, leftovers, make_agent, one_by_one, open_pool, until


@pytest.fixture
async def pool(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir, isolation="none", bridge_source=FAKE_BRIDGE, maximum=3) as found:
        yield found
    assert leftovers(data_dir) == []
    assert sorted(found.closed) == sorted(found.opened)


async def turn(sandbox: Sandbox, content: str) -> None:
    await sandbox.init({}, {}, [])
    await sandbox.query("t1", content, {})


async def test_a_session_runs_commands_and_turns(pool: Pool) -> None:
    sandbox = await pool.take("s1")
    await turn(sandbox, "hello")
    events = one_by_one(sandbox.batches())
    assert [(await anext(events))["ev"] for _ in range(2)] == ["message", "done"]
    result = await sandbox.exec("cat CLAUDE.md; cat; echo oops >&2; exit 3", stdin="given")
    assert result == (3, "be kindgiven", "oops\n", False, False)


async def test_parallel_commands_do_not_mix(pool: Pool) -> None:
    sandbox = await pool.take()
    results = await asyncio.gather(*(sandbox.exec(f"echo {number}") for number in range(20)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]


async def test_a_refused_init_says_why(pool: Pool) -> None:
    sandbox = await pool.take()
    with pytest.raises(SandboxFailed, match="no such thing"):
        await sandbox.init({}, {"refuse": True}, [])


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("garbage", "broke the bridge protocol: a line that is not JSON"),
        ("skip", "broke the bridge protocol: event 3 after event 1"),
        ("foreign", "broke the bridge protocol: message for a turn that is not running"),
        ("forged", "broke the bridge protocol: exec_result for a command that was not given"),
        ("die", "was killed by SIGKILL"),
        ("exit", "ended with exit code 3: Traceback: something broke"),
        ("hang up", "the agent's process"),
    ],
)
async def test_a_bridge_that_misbehaves_ends_its_own_sandbox_only(pool: Pool, deed: str, reason: str) -> None:
    bystander, sandbox = await pool.take(), await pool.take()
    await turn(sandbox, deed)
    await end_of(sandbox)
    assert reason in (sandbox.failure or "")
    assert (await bystander.exec("echo fine")).stdout == "fine\n"
    with pytest.raises(SandboxFailed):
        await sandbox.exec("true")
    await until(lambda: pool.status().total == 1)


async def test_an_endless_line_ends_the_sandbox(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = await pool.take()
    monkeypatch.setattr(sandbox._link._lines, "_limit", 3_000_000)
    await turn(sandbox, "long")
    await end_of(sandbox)
    assert "a line longer than" in (sandbox.failure or "")


@pytest.mark.parametrize("deed", ["flood", "log flood"])
async def test_a_flood_neither_blocks_the_server_nor_survives_a_stop(pool: Pool, deed: str) -> None:
    bystander, sandbox = await pool.take(), await pool.take()
    await turn(sandbox, deed)
    for _ in range(5):
        async with asyncio.timeout(5):
            await bystander.exec("true")
    async with asyncio.timeout(5):
        await sandbox.stop(grace=0.2)
    assert not is_alive(sandbox.handle.pid)


async def test_a_waiting_command_learns_that_its_sandbox_died(pool: Pool) -> None:
    sandbox = await pool.take()
    waiting = asyncio.create_task(sandbox.exec("sleep 60", timeout=60))
    await until(lambda: len(launch.find_descendants(sandbox.handle.pid)) > 0)
    os.kill(sandbox.handle.pid, signal.SIGKILL)
    with pytest.raises(SandboxFailed, match="SIGKILL"):
        async with asyncio.timeout(5):
            await waiting


async def test_a_bridge_that_never_answers_is_not_waited_for(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.isolation.running.EXEC_GRACE", 0.1)
    sandbox = await pool.take()
    os.kill(sandbox.handle.pid, signal.SIGSTOP)
    with pytest.raises(Timeout, match="did not answer"):
        await sandbox.exec("true", timeout=0.1)


async def test_stopping_twice_and_at_once_is_fine(pool: Pool) -> None:
    sandbox = await pool.take("s1")
    await asyncio.gather(sandbox.stop(), sandbox.stop(grace=0))
    await sandbox.stop()
    assert sandbox.failure == "the sandbox was stopped"
    assert (pool.session_dir("s1") / "workspace" / "CLAUDE.md").exists()
    assert pool.closed == [sandbox.id]


async def test_a_bridge_that_ignores_requests_to_end_is_killed(pool: Pool) -> None:
    sandbox = await pool.take()
    os.kill(sandbox.handle.pid, signal.SIGSTOP)
    async with asyncio.timeout(5):
        await sandbox.stop(grace=0.1)
    assert not is_alive(sandbox.handle.pid)


async def test_a_stop_that_is_cancelled_still_ends_the_sandbox(pool: Pool) -> None:
    sandbox = await pool.take()
    os.kill(sandbox.handle.pid, signal.SIGSTOP)
    stopping = asyncio.create_task(sandbox.stop(grace=30))
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await until(lambda: not is_alive(sandbox.handle.pid))


async def test_the_log_tells_the_life_of_a_sandbox(pool: Pool) -> None:
    sandbox = await pool.take()
    await turn(sandbox, "exit")
    await end_of(sandbox)
    await sandbox.stop()
    assert [(line["level"], line["text"][:26]) for line in sandbox.logs()] == [
        ("system", "sandbox started"), ("stderr", "Traceback: something broke"), ("system", "sandbox ended: the agent's"),
    ]  # fmt: skip


async def test_capacity_is_enforced_and_freed_again(pool: Pool) -> None:
    first, *_ = [await pool.take() for _ in range(3)]
    with pytest.raises(CapacityReached, match="capacity reached"):
        await pool.take("too-many")
    assert not pool.session_dir("too-many").exists()
    await first.stop(grace=0)
    await pool.take()


async def test_a_start_that_fails_says_what_was_printed_and_leaves_nothing(pool: Pool) -> None:
    agent = make_agent(pool.data_dir, "digest-2", BROKEN="")
    with pytest.raises(SandboxFailed, match="the agent said: do not start"):
        await pool.take("s1", agent=agent)
    assert not pool.session_dir("s1").exists()
    assert pool.status().total == 0


async def test_a_start_that_takes_too_long_is_given_up(data_dir: str) -> None:
    agent = make_agent(data_dir, "digest-2", MUTE="")
    async with open_pool(data_dir, isolation="none", bridge_source=FAKE_BRIDGE, start_timeout=0.5) as pool:
        with pytest.raises(SandboxFailed, match=r"not ready within 0\.5 s"):
            await pool.take("s1", agent=agent)
    assert leftovers(data_dir) == []


async def test_a_claim_that_is_cancelled_leaves_nothing(pool: Pool) -> None:
    agent = make_agent(pool.data_dir, "digest-2", MUTE="")
    claiming = asyncio.create_task(pool.take("s1", agent=agent))
    await until(lambda: pool._starter.alive)
    pid = next(iter(pool._starter.alive.values())).handle.pid
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert not is_alive(pid)
    assert leftovers(pool.data_dir) == []


async def test_without_isolation_the_warning_is_loud_and_nothing_is_kept_warm(data_dir: str) -> None:
    async with open_pool(data_dir, isolation="none", bridge_source=FAKE_BRIDGE, warm=2) as pool:
        status = pool.status()
        assert (status.isolation, status.warm, status.starting) == ("none", 0, 0)
        assert "unprotected" in status.warnings[0]


async def test_without_isolation_the_environment_is_still_built_from_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary")
    sandbox = await pool.take("s1")
    printed = (await sandbox.exec("env")).stdout
    assert "canary" not in printed
    assert f"HOME={pool.session_dir('s1')}/home" in printed


async def test_without_isolation_children_in_other_sessions_end_too(pool: Pool) -> None:
    sandbox = await pool.take()
    await sandbox.exec("setsid sleep 300 > /dev/null 2>&1 < /dev/null & sleep 0.05")
    family = launch.find_descendants(sandbox.handle.pid)
    await sandbox.stop(grace=0)
    assert not any(is_alive(pid) for pid in family)


async def test_a_very_long_data_folder_works(data_dir: str) -> None:
    folder = os.path.join(data_dir, "x" * 120)
    async with open_pool(folder, isolation="none", bridge_source=FAKE_BRIDGE) as pool:
        sandbox = await pool.take()
        assert len(pool.opened[sandbox.id]) <= 107
        assert (await sandbox.exec("echo fine")).stdout == "fine\n"


async def test_the_gateways_socket_can_be_opened_where_the_pool_says(pool: Pool) -> None:
    sandbox = await pool.take()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(pool.opened[sandbox.id])
    assert Path(sandbox.handle.run_dir, "gw", "gateway.sock").is_socket()


async def test_a_cgroup_holds_the_process_and_goes_with_it(data_dir: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    async with open_pool(data_dir, isolation="none", bridge_source=FAKE_BRIDGE, cgroup_root=str(tmp_path)) as pool:
        sandbox = await pool.take()
        folder = Path(sandbox.handle.cgroup or "")
        assert (folder / "cgroup.procs").read_text() == "0\n"
        assert (folder / "memory.max").read_text() == str(256 * 1024 * 1024)
        assert pool.status().limits["memory"] == "256 MiB (cgroup v2)"
        (folder / "memory.events").write_text("oom_kill 1\n")
        os.kill(sandbox.handle.pid, signal.SIGKILL)
        await end_of(sandbox)
        assert "ran out of memory" in (sandbox.failure or "")
    assert (folder / "cgroup.kill").read_text() == "1"


async def test_a_cgroup_root_that_does_not_work_stops_the_start(data_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cgroup_root cannot be used"):
        async with open_pool(data_dir, isolation="none", cgroup_root=str(tmp_path)):
            pass


async def test_an_interpreter_that_does_not_work_stops_the_start(data_dir: str) -> None:
    with pytest.raises(ConfigError, match="/bin/true"):
        async with open_pool(data_dir, isolation="none", python="/bin/true"):
            pass


async def test_without_bubblewrap_the_server_starts_and_claims_say_what_to_install(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    async with open_pool(data_dir, warm=2) as pool:
        status = pool.status()
        assert status.isolation == "unavailable"
        assert "bubblewrap is not installed" in status.warnings[0]
        with pytest.raises(IsolationUnavailable, match="install"):
            await pool.take("s1")
        monkeypatch.undo()
        monkeypatch.setattr(pool, "_kind", "none")
        await pool.take("s1")


async def test_a_handle_of_another_process_ends_nothing(pool: Pool) -> None:
    handle = SandboxHandle("gone", os.getpid(), 1, None, "/nowhere", "/nowhere", None)
    assert await pool.reap([handle, handle._replace(id="gone2", pid=2**22 + 1)]) == 0


async def test_reaping_spares_what_lives_and_removes_the_rest(pool: Pool) -> None:
    sandbox = await pool.take()
    for folder in ("run/dead/gw", "sessions/.slots/dead/workspace"):
        os.makedirs(os.path.join(pool.data_dir, folder))
    assert await pool.reap([sandbox.handle]) == 0
    assert (await sandbox.exec("echo alive")).stdout == "alive\n"
    assert leftovers(pool.data_dir) == [sandbox.id]


async def test_a_fork_copies_the_files_of_a_session(pool: Pool) -> None:
    sandbox = await pool.take("s1")
    await sandbox.exec("echo kept > note")
    await pool.copy_folder(str(pool.session_dir("s1")), str(pool.session_dir("s2")))
    fork = await pool.take("s2", fresh=False)
    assert (await fork.exec("cat note CLAUDE.md")).stdout == "kept\nbe kind"
