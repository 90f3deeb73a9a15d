"""Attacks from inside real sandboxes, with the real bridge, and what must hold around them: uids, limits, ends, leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ash.attack.report import FAIL, NOT_APPLICABLE
from ash.errors import ConfigError, SandboxFailed
from ash.isolation import folders, launch
from ash.isolation.folders import UIDS
from ash.sandbox import Sandbox
from tests.integration import battlefield
from tests.integration.battlefield import ATTACKS
from tests.sandboxes import FAKE_BRIDGE, LIMITS, Pool, end_of, is_alive, leftovers, make_agent, open_pool, until

NOBODY = 65534
# Probes that work on this host where no sandbox is: that shows that it is the sandbox which stops them. What is missing here
# needs a place of the sandbox, a network, or root.
WORKS_WITHOUT = {
    "see the host's users", "read a file of the data folder", "list the data folder", "read the server's program",
    "read another session's file", "follow a link out of the workspace",
    "look into /sys", "look into /run and /var", "see processes of the host", "find a process of the host by its name",
    "signal the server", "find a secret in an environment", "find an API key", "reach a port of the host",
    "connect to a socket of the host", "connect to an abstract socket of the host", "reach another session's gateway",
    "gain privileges by executing", "run without a filter", "write a file beyond the limit", "take memory beyond the limit",
    "start processes beyond the limit",
}  # fmt: skip
is_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="needs root: becomes another user")
pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def require_isolation(pool: Pool) -> None:
    status = pool.status()
    if status.isolation == "unavailable":
        pytest.skip(f"this host cannot isolate: {status.warnings[0]}")


@pytest.fixture
async def pool(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir) as found:
        require_isolation(found)
        yield found
    assert leftovers(data_dir) == []


@pytest.fixture
async def sandbox(pool: Pool) -> Sandbox:
    return await pool.take("s1")


async def output(sandbox: Sandbox, command: str) -> str:
    result = await sandbox.exec(command)
    assert result.exit_code == 0, result
    return result.stdout


# Attacks


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[str, str]]:
    """What came of each probe in a sandbox of a server run by whoever runs the tests."""

    async def fight() -> dict[str, tuple[str, str]]:
        battlefield.plant_key()
        with tempfile.TemporaryDirectory(prefix="ash-") as data_dir:
            async with open_pool(data_dir) as pool:
                require_isolation(pool)
                async with battlefield.prepared(pool) as facts:
                    return await battlefield.attack(pool, facts)

    return asyncio.run(fight())


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What came of the same attacks where the server is an ordinary user's."""
    command = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "/usr/bin/python3", "-B"]
    script = str(Path(__file__).with_name("ordinary_user.py"))
    with tempfile.TemporaryDirectory(prefix="ash-code-") as copy:
        for name in ("ash", "tests"):
            shutil.copytree(os.path.join(battlefield.PROJECT, name), os.path.join(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
        os.chmod(copy, 0o755)
        done = subprocess.run([*command, script.replace(battlefield.PROJECT, copy), copy], capture_output=True, text=True,
                              cwd="/", env={"PATH": os.defpath, "HOME": "/nonexistent"}, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    if "unavailable" in found:
        pytest.skip(f"this host cannot isolate for ordinary users: {found['unavailable']}")
    return found


def expect_stopped(verdict: str, why: str) -> None:
    if verdict == NOT_APPLICABLE:
        pytest.skip(why)
    assert verdict != FAIL, why


@pytest.mark.parametrize("attack", ATTACKS)
def test_from_inside_nobody_can(attack: str, verdicts: dict[str, tuple[str, str]]) -> None:
    expect_stopped(*verdicts[attack])


@needs_root
@pytest.mark.parametrize("attack", ATTACKS)
def test_from_inside_a_sandbox_of_an_ordinary_user_nobody_can(attack: str, report: dict[str, Any]) -> None:
    expect_stopped(*report["attacks"][attack])


@needs_root
def test_an_ordinary_users_sandbox_is_that_user_on_the_host_and_bounded(report: dict[str, Any]) -> None:
    assert report["host_uid"] == report["uid"] == NOBODY
    assert report["handle_uid"] is None
    assert 0 < report["bomb"]["forks"] < LIMITS.max_processes
    assert report["bomb"]["after"] == "alive\n"


async def test_the_attacks_would_work_without_a_sandbox(pool: Pool, tmp_path: Path) -> None:
    async with battlefield.prepared(pool) as facts:
        found = await battlefield.run_on_host(facts, str(tmp_path))
    assert WORKS_WITHOUT - {name for name, (verdict, _) in found.items() if verdict == FAIL} == set()


@needs_root
async def test_on_the_host_a_sandbox_is_never_root_and_has_a_uid_of_its_own(pool: Pool) -> None:
    first, second = await pool.take(), await pool.take()
    for sandbox in (first, second):
        for pid in (sandbox.handle.pid, *launch.find_descendants(sandbox.handle.pid)):
            uids = Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split()[:4]
            assert uids == [str(sandbox.handle.uid)] * 4
    assert first.handle.uid in UIDS
    assert first.handle.uid != second.handle.uid


@needs_root
async def test_bubblewrap_itself_never_runs_as_root(sandbox: Sandbox) -> None:
    monitors = [pid for pid in launch.find_descendants(os.getpid()) if Path(f"/proc/{pid}/comm").read_text() == "bwrap\n"]
    assert monitors
    for pid in monitors:
        assert Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split()[0] != "0"


async def test_a_fork_bomb_is_bounded_and_the_sandbox_lives_on(pool: Pool, sandbox: Sandbox) -> None:
    bystander = await pool.take()
    bomb, fine = await asyncio.gather(battlefield.fork_bomb(sandbox), output(bystander, "echo fine"))
    assert 0 < bomb["forks"] < LIMITS.max_processes
    assert (bomb["after"], fine) == ("alive\n", "fine\n")


async def test_the_tools_people_expect_are_there(sandbox: Sandbox) -> None:
    assert (await output(sandbox, "whoami; pwd; echo $HOME; hostname")).split() == ["agent", "/workspace", "/home/agent", "sandbox"]
    await output(sandbox, "ls /usr/bin > /dev/null; python3 -c 'import ssl, multiprocessing as m; m.Lock()'; touch /tmp/x ~/x /workspace/x")


async def test_nothing_but_stdio_and_sockets_is_open_in_the_bridge(sandbox: Sandbox) -> None:
    bridge = launch.find_children(sandbox.handle.pid)[0]
    links = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{bridge}/fd")}
    rest = {os.path.basename(link) for link in links if not link.startswith(("socket:", "pipe:", "anon_inode:", "/dev/null"))}
    assert rest <= {"bridge.log", "bridge.zip"}


# The folders


async def test_a_warm_sandboxes_mounts_follow_when_its_slot_becomes_a_sessions_folder(data_dir: str) -> None:
    async with open_pool(data_dir, warm=1) as pool:
        require_isolation(pool)
        await until(lambda: pool.status().warm == 1)
        waiting = pool._pool._ready[0].id
        sandbox = await pool.take("s1")
        assert sandbox.id == waiting
        await output(sandbox, "echo inside > /workspace/note; echo inside > ~/note")
        folder = pool.session_dir("s1")
        assert (folder / "workspace" / "note").read_text() == (folder / "home" / "note").read_text() == "inside\n"
        (folder / "workspace" / "later").write_text("outside")
        assert await output(sandbox, "cat /workspace/later /agent/CLAUDE.md CLAUDE.md") == "outsidebe kindbe kind"


async def test_a_session_that_wakes_finds_its_files_with_the_same_owner(pool: Pool) -> None:
    first = await pool.take("s1")
    await output(first, "echo kept > note; chmod 600 note")
    await first.stop()
    second = await pool.take("s1", fresh=False)
    assert await output(second, "cat note; echo more >> note") == "kept\n"
    assert second.handle.uid == first.handle.uid
    assert second.id != first.id


async def test_a_new_version_is_seen_after_waking(pool: Pool) -> None:
    await (await pool.take("s1")).stop(grace=0)
    sandbox = await pool.take("s1", agent=make_agent(pool.data_dir, "digest-2", **{"CLAUDE.md": "be brief"}), fresh=False)
    assert await output(sandbox, "cat /agent/CLAUDE.md; cat CLAUDE.md") == "be briefbe kind"


@needs_root
async def test_a_data_folder_in_a_private_home_works(pool: Pool) -> None:
    assert os.stat(pool.data_dir).st_mode & 0o077 == 0
    assert await output(await pool.take(), "echo fine") == "fine\n"


@needs_root
async def test_nothing_is_mounted_on_the_host(sandbox: Sandbox) -> None:
    assert "ash-stage" not in Path("/proc/self/mountinfo").read_text()


async def test_a_very_long_data_folder_works(data_dir: str) -> None:
    async with open_pool(os.path.join(data_dir, "x" * 120), warm=1) as pool:
        require_isolation(pool)
        sandbox = await pool.take()
        assert len(pool.opened[sandbox.id]) <= 107
        assert await output(sandbox, "echo fine") == "fine\n"


# The gateway's socket

CALL = "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/ash/gateway.sock'); print(s.recv(99).decode())\""


@contextlib.asynccontextmanager
async def gateway(path: str, word: bytes) -> AsyncIterator[None]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(word)
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    os.chmod(path, 0o666)
    async with server:
        yield
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def test_the_gateway_is_reached_inside_and_so_is_that_of_a_later_server(pool: Pool, sandbox: Sandbox) -> None:
    for word in (b"first", b"second"):
        async with gateway(pool.opened[sandbox.id], word):
            assert (await output(sandbox, CALL)).strip() == word.decode()


# The end


async def test_processes_that_hid_themselves_end_with_their_sandbox(sandbox: Sandbox) -> None:
    hide = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  os.closerange(0, 99); time.sleep(300)\n os._exit(0)"
    await output(sandbox, f"python3 -c '{hide}'; nohup setsid sleep 300 > /dev/null 2>&1 < /dev/null &")
    family = [sandbox.handle.pid, *launch.find_descendants(sandbox.handle.pid)]
    assert len(family) >= 3
    await sandbox.stop(grace=1)
    assert [pid for pid in family if is_alive(pid)] == []


async def test_a_killed_bridge_is_reported_and_takes_everything_along(pool: Pool, sandbox: Sandbox) -> None:
    await output(sandbox, "setsid sleep 300 > /dev/null 2>&1 < /dev/null &")
    family = [sandbox.handle.pid, *launch.find_descendants(sandbox.handle.pid)]
    os.kill(launch.find_children(sandbox.handle.pid)[0], signal.SIGKILL)
    await end_of(sandbox)
    assert "SIGKILL" in (sandbox.failure or "")
    await until(lambda: not any(is_alive(pid) for pid in family))
    await until(lambda: pool.closed == [sandbox.id])


async def test_a_killed_first_process_is_reported(sandbox: Sandbox) -> None:
    os.kill(sandbox.handle.pid, signal.SIGKILL)
    await end_of(sandbox)
    assert "the agent's process" in (sandbox.failure or "")


@pytest.mark.parametrize("deed", ["garbage", "long", "die", "exit", "hang up"])
async def test_a_hostile_bridge_ends_its_own_sandbox_only(data_dir: str, deed: str) -> None:
    async with open_pool(data_dir, bridge_source=FAKE_BRIDGE) as pool:
        require_isolation(pool)
        bystander, sandbox = await pool.take(), await pool.take()
        await sandbox.init({}, {}, [])
        await sandbox.query("t1", deed, {})
        await end_of(sandbox)
        await until(lambda: not is_alive(sandbox.handle.pid))
        assert await output(bystander, "echo fine") == "fine\n"


# The pool


@pytest.fixture
async def warm_pool(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir, warm=2, maximum=3) as found:
        require_isolation(found)
        await until(lambda: found.status().warm == 2)
        yield found
    assert leftovers(data_dir) == []


async def test_a_warm_sandbox_is_claimed_once_and_replaced(warm_pool: Pool) -> None:
    first, second = await asyncio.gather(warm_pool.take(), warm_pool.take())
    assert first.id != second.id
    await until(lambda: warm_pool.status().warm == 1)
    assert warm_pool.status()[:5] == (3, 1, 0, 2, 3)


async def test_a_warm_sandbox_that_died_is_not_handed_out(warm_pool: Pool) -> None:
    dead = list(warm_pool._pool._ready)
    for sandbox in dead:
        os.kill(sandbox.handle.pid, signal.SIGKILL)
    while any(is_alive(sandbox.handle.pid) for sandbox in dead):
        pass  # without letting the pool hear of it
    claimed = await warm_pool.take("s1")
    assert await output(claimed, "cat CLAUDE.md") == "be kind"
    assert claimed.id not in {sandbox.id for sandbox in dead}
    await until(lambda: warm_pool.status().warm == 2)


async def test_a_warm_sandbox_that_cannot_be_filled_leaves_nothing(warm_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_half(session_dir: str, *arguments: Any, **named: Any) -> None:
        Path(session_dir, "workspace", "half").touch()
        raise SandboxFailed("No space left on device")

    doomed = warm_pool._pool._ready[0]
    with monkeypatch.context() as patched:
        patched.setattr(folders, "fill", fill_half)
        with pytest.raises(SandboxFailed, match="No space left"):
            await warm_pool.take("s1")
    assert not is_alive(doomed.handle.pid)
    assert not warm_pool.session_dir("s1").exists()
    assert doomed.handle.uid not in warm_pool._uids._used
    assert await output(await warm_pool.take("s1"), "cat CLAUDE.md") == "be kind"


async def test_a_claim_cancelled_while_it_is_filled_leaves_nothing(warm_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def fill_late(session_dir: str, *arguments: Any, **named: Any) -> None:
        began.set()
        go_on.wait(5)
        os.makedirs(os.path.join(session_dir, "workspace", "late"))

    monkeypatch.setattr(folders, "fill", fill_late)
    claiming = asyncio.create_task(warm_pool.take("s1"))
    await until(began.is_set)
    claiming.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert not warm_pool.session_dir("s1").exists()


async def test_the_pool_survives_an_error_that_nobody_foresaw(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0

    async def break_once(pool: Pool) -> Sandbox:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise RecursionError("nobody foresaw this")
        return await original(pool)

    original = Pool._start_warm
    monkeypatch.setattr(Pool, "_start_warm", break_once)
    monkeypatch.setattr("ash.isolation.pool.RETRY_DELAYS", (0.01,))
    async with open_pool(data_dir, warm=1) as pool:
        require_isolation(pool)
        await until(lambda: pool.status().warm == 1)
    assert tried == 2


@needs_root
async def test_two_sessions_that_share_a_uid_never_run_with_it_together(pool: Pool) -> None:
    first, second = await pool.take("s1"), await pool.take("s2")
    await output(second, "echo kept > note")
    await second.stop()
    assert first.handle.uid is not None
    await asyncio.to_thread(folders.adopt, str(pool.session_dir("s2")), first.handle.uid)
    woken = await pool.take("s2", fresh=False)
    assert woken.handle.uid != first.handle.uid
    assert await output(woken, "cat note /agent/CLAUDE.md; echo more >> note") == "kept\nbe kind"


async def test_a_warm_sandbox_gives_way_when_all_places_are_taken(warm_pool: Pool) -> None:
    for name in ("s1", "s2", "s3"):
        await (await warm_pool.take(name)).stop(grace=0)
    await until(lambda: warm_pool.status().warm == 2)
    woken = [await warm_pool.take(name, fresh=False) for name in ("s1", "s2", "s3")]
    assert [await output(sandbox, "echo fine") for sandbox in woken] == ["fine\n"] * 3
    assert warm_pool.status()[:4] == (3, 0, 0, 3)


@needs_root
async def test_an_interpreter_in_a_private_home_is_brought_along(data_dir: str) -> None:
    try:
        async with open_pool(data_dir, python=sys.executable) as pool:
            require_isolation(pool)
            version = ".".join(str(part) for part in sys.version_info[:3])
            sandbox = await pool.take()
            bridge = launch.find_children(sandbox.handle.pid)[0]
            assert os.path.realpath(f"/proc/{bridge}/exe") == os.path.realpath(sys.executable)
            assert pool._isolation is not None
            assert pool._isolation.python.version == version
            assert (await sandbox.exec(f"touch '{os.path.dirname(os.path.realpath(sys.executable))}/x'")).exit_code != 0
    except ConfigError as error:
        pytest.skip(f"the tests' interpreter cannot be mounted: {error}")


# After a server that was killed

SERVER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from tests.sandboxes import open_pool, until

async def main():
    async with open_pool(sys.argv[1], warm=1) as pool:
        sandbox = await pool.take("s1")
        await sandbox.exec("echo kept > note")
        await until(lambda: pool.status().warm == 1)
        print(*[item.handle.pid for item in pool._starter.alive.values()], flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def killed_server(data_dir: str) -> list[int]:
    """The pids of sandboxes whose server was killed without warning."""
    return kill_a_server(data_dir, SERVER)


def kill_a_server(data_dir: str, script: str) -> list[int]:
    with subprocess.Popen([sys.executable, "-c", script, data_dir, battlefield.PROJECT], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        server.kill()
    if not line:
        pytest.skip("this host cannot isolate")
    return [int(word) for word in line.split()]


async def test_sandboxes_of_a_killed_server_live_on_until_the_next_one_reaps_them(data_dir: str, killed_server: list[int]) -> None:
    assert len(killed_server) == 2
    assert all(is_alive(pid) for pid in killed_server)
    async with open_pool(data_dir) as pool:
        assert await pool.reap([]) == 2
        assert not any(is_alive(pid) for pid in killed_server)
        assert leftovers(data_dir) == []
        assert await output(await pool.take("s1", fresh=False), "cat note") == "kept\n"


async def test_sandboxes_of_another_living_server_are_left_alone(pool: Pool, sandbox: Sandbox, data_dir: str) -> None:
    async with open_pool(data_dir) as second:
        assert await second.reap([sandbox.handle]) == 0
    assert await output(sandbox, "echo alive") == "alive\n"


async def test_a_bridge_that_nobody_comes_back_for_ends_itself(data_dir: str) -> None:
    script = SERVER.replace("warm=1", "warm=0, orphan_timeout=1.0").replace("pool.status().warm == 1", "True")
    pids = await asyncio.to_thread(kill_a_server, data_dir, script)
    await until(lambda: not any(is_alive(pid) for pid in pids))
