"""Limits, out of memory, reaping and delegation on a real cgroup v2 with its controllers: run by `make test-vm` in the test guest.

Needs root, bubblewrap and a writable tree with the memory controller; the tests of delegation need systemd as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import ash
from ash.errors import SandboxFailed
from ash.isolation import cgroup as cgroups
from ash.isolation import delegation, launch
from ash.isolation.records import Limits, SandboxSpec
from ash.sandbox import Sandbox
from tests.sandboxes import LIMITS, Pool, end_of, is_alive, make_agent, open_pool, until

PROJECT = str(Path(ash.__file__).parents[1])
MIB = 1024 * 1024
IN_FORCE = ["256 MiB (cgroup v2)", "100 % of one core (cgroup v2)", "40 (cgroup v2)"]
"""Memory, CPU and processes, as /health shows them."""
PATIENT = {"start_timeout": 120.0}
_report = delegation.describe_tree()
pytestmark = [
    pytest.mark.skipif(
        "memory" not in _report.controllers, reason="no cgroup v2 with the memory controller here; `make test-vm` runs this"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]
needs_systemd = pytest.mark.skipif(not os.path.isdir("/run/systemd/system"), reason="systemd does not run here")


@pytest.fixture
async def pool(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir, **PATIENT) as found:
        assert found._isolation is not None, found.status().warnings
        assert found._isolation.cgroups is not None, found.status().limits
        yield found
        root = found._isolation.cgroups.root
    assert not Path(root).exists() or list_groups(root) == []


@pytest.fixture
async def sandbox(pool: Pool) -> Sandbox:
    return await pool.take("s1")


async def take(pool: Pool, session_id: str, limits: Limits) -> Sandbox:
    spec = SandboxSpec(session_id, str(pool.session_dir(session_id)), make_agent(pool.data_dir), True, limits)
    return await pool.claim(spec)


def group_of(sandbox: Sandbox) -> Path:
    assert sandbox.handle.cgroup is not None
    return Path(sandbox.handle.cgroup)


def list_groups(root: str) -> list[str]:
    return [entry.name for entry in os.scandir(root) if entry.name.startswith(cgroups.PREFIX)]


async def output(sandbox: Sandbox, command: str, timeout: float = 60) -> str:
    result = await sandbox.exec(command, timeout=timeout)
    assert result.exit_code == 0, result
    return result.stdout


# What is set


async def test_every_limit_is_in_the_kernel_and_the_server_knows_it(pool: Pool, sandbox: Sandbox) -> None:
    group = group_of(sandbox)
    found = {name: (group / name).read_text().strip() for name, _ in cgroups.limit_files(LIMITS, cgroups.CONTROLLERS)}
    assert found == {
        "memory.max": str(256 * MIB),
        "memory.high": str(cgroups.high_mark(256 * MIB)),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "40",
        "cpu.max": "100000 100000",
        "cpu.weight": "100",
        "cgroup.max.descendants": "0",
    }
    limits = pool.status().limits
    assert [limits[name] for name in ("memory", "cpu", "processes")] == IN_FORCE
    assert pool._isolation is not None
    assert pool._isolation.cgroups is not None
    assert (pool._isolation.cgroups.missing, pool._isolation.cgroups.lacking) == ({}, [])


async def test_a_sessions_own_limits_are_in_force_for_it_alone(pool: Pool, sandbox: Sandbox) -> None:
    own = LIMITS._replace(memory_mb=512, max_processes=30, cpu_percent=50, cpu_weight=20, max_file_mb=3)
    other = await take(pool, "s2", own)
    assert other.limits == own
    names = ("memory.max", "pids.max", "cpu.max", "cpu.weight")
    assert [(group_of(other) / name).read_text().strip() for name in names] == [str(512 * MIB), "30", "50000 100000", "20"]
    assert (group_of(sandbox) / "memory.max").read_text().strip() == str(256 * MIB)
    assert (await other.exec("head -c 5000000 /dev/zero > big; stat -c %s big; df -m --output=size /tmp | tail -1")).stdout.split() == [
        str(3 * MIB), "128",
    ]  # fmt: skip


async def test_every_process_of_a_sandbox_is_in_its_cgroup(sandbox: Sandbox) -> None:
    await output(sandbox, "sleep 300 > /dev/null 2>&1 < /dev/null & setsid sleep 300 > /dev/null 2>&1 < /dev/null &")
    name = group_of(sandbox).name
    family = [sandbox.handle.pid, *launch.find_descendants(sandbox.handle.pid)]
    monitor = int(Path(f"/proc/{sandbox.handle.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert len(family) >= 4
    for pid in (monitor, *family):
        assert delegation.own_path(Path(f"/proc/{pid}/cgroup").read_text()).endswith(f"/{name}")
    assert set(cgroups.find_processes(str(group_of(sandbox)))) == {monitor, *family}
    assert (
        await output(sandbox, "cat /proc/self/cgroup; grep -c cgroup /proc/mounts; true") == "0::/\n0\n"
    )  # the own one looks like the top


def disk_of(folder: str) -> str:
    return cgroups.find_device(folder)[0]


async def test_the_disk_is_slowed_down(pool: Pool) -> None:
    device = disk_of(pool.data_dir)
    if not device:
        pytest.skip("the temporary folder is not on a disk")
    sandbox = await take(pool, "slow", LIMITS._replace(io_mb_per_second=4))
    assert (group_of(sandbox) / "io.max").read_text().split()[:3] == [device, f"rbps={4 * MIB}", f"wbps={4 * MIB}"]
    began = time.monotonic()
    await output(sandbox, "head -c 8000000 /dev/zero > big; dd if=big of=copy bs=1M oflag=direct 2>/dev/null; sync big copy", timeout=120)
    seconds = time.monotonic() - began
    written = (await sandbox.usage())["ioWriteBytes"]
    assert written >= 8_000_000
    assert written / seconds < 2 * 4 * MIB


# Exhaustion

MEMORY_BOMB = """python3 -c '
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = bytearray(150 << 20)
        for place in range(0, len(held), 4096): held[place] = 1
        time.sleep(60)
time.sleep(60)
'"""


async def test_a_memory_bomb_ends_its_sandbox_with_the_reason_and_nobody_else(pool: Pool, sandbox: Sandbox) -> None:
    bystander = await pool.take("s2")
    with pytest.raises(SandboxFailed):
        await sandbox.exec(MEMORY_BOMB, timeout=60)
    await end_of(sandbox)
    assert "ran out of memory: all that runs in it may use 256 MiB" in (sandbox.failure or "")
    assert sandbox.limit_reached == "memory"
    assert await output(bystander, "echo fine") == "fine\n"
    assert cgroups.find_oom(str(group_of(bystander))) is None
    await until(lambda: not group_of(sandbox).exists(), timeout=20)
    again = await pool.take("s1", fresh=False)
    assert await output(again, "cat CLAUDE.md") == "be kind"


async def test_memory_in_files_of_the_memory_file_system_counts_as_well(pool: Pool, sandbox: Sandbox) -> None:
    hold = MEMORY_BOMB.replace("range(4)", "range(1)")
    assert (await sandbox.exec(hold.replace("sleep(60)", "sleep(1)"), timeout=60)).exit_code == 0
    fill = "for n in 1 2 3 4 5 6 7; do head -c 9M /dev/zero > /tmp/$n; head -c 9M /dev/zero > /dev/shm/$n; done; "
    with pytest.raises(SandboxFailed):
        await sandbox.exec(fill + hold, timeout=60)
    await end_of(sandbox)
    assert sandbox.limit_reached == "memory"


async def test_a_sandbox_that_is_killed_otherwise_did_not_run_out_of_memory(sandbox: Sandbox) -> None:
    os.kill(launch.find_children(sandbox.handle.pid)[0], signal.SIGKILL)
    await end_of(sandbox)
    assert "SIGKILL" in (sandbox.failure or "")
    assert sandbox.limit_reached is None


async def test_cached_files_do_not_count_as_running_out(sandbox: Sandbox) -> None:
    more_than_the_limit = "for n in $(seq 32); do head -c 9M /dev/zero > $n; done; cat * > /dev/null; echo fine"
    assert await output(sandbox, more_than_the_limit, timeout=300) == "fine\n"
    assert sandbox.limits_met() == []


FORK_BOMB = """python3 -c '
import os, time
count = 0
try:
    while True:
        if os.fork() == 0: time.sleep(20); os._exit(0)
        count += 1
except OSError as error:
    print(count, error.strerror, flush=True)
os.kill(0, 9)
'"""


async def test_a_fork_bomb_is_held_by_the_cgroup_and_noted(pool: Pool, sandbox: Sandbox) -> None:
    bystander = await pool.take("s2")
    found, fine = await asyncio.gather(sandbox.exec(FORK_BOMB, timeout=60), output(bystander, "echo fine"))
    count, reason = found.stdout.split(" ", 1)
    assert (0 < int(count) < LIMITS.max_processes, reason, fine) == (True, "Resource temporarily unavailable\n", "fine\n")
    assert [met["limit"] for met in sandbox.limits_met()] == ["processes"]
    assert sandbox.limits_met() == []
    assert (await sandbox.usage())["refusedForks"] > 0
    assert await output(sandbox, "echo alive") == "alive\n"


SPIN = "timeout 6 sh -c 'while :; do :; done'"


async def test_a_spinning_sandbox_gets_no_more_cpu_than_its_share_and_its_pressure_shows(pool: Pool) -> None:
    sandbox = await take(pool, "spin", LIMITS._replace(cpu_percent=20))
    before, began = await sandbox.usage(), time.monotonic()
    await output(sandbox, f"{SPIN} & {SPIN} & wait; true", timeout=120)
    seconds, after = time.monotonic() - began, await sandbox.usage()
    assert 0 < after["cpuSeconds"] - before["cpuSeconds"] < 0.2 * seconds * 1.25 + 0.2
    assert after["throttledSeconds"] > 1
    assert after["pressure"]["cpu"]["some10"] > 5


async def test_usage_has_a_figure_for_everything(sandbox: Sandbox) -> None:
    await output(sandbox, "python3 -c 'held = bytearray(b\"x\") * (50 << 20)'; head -c 3M /dev/zero > file; sync file")
    found = await sandbox.usage()
    assert found["source"] == "cgroup"
    assert 60 * MIB > found["memoryPeakBytes"] - found["memoryBytes"] > 20 * MIB
    assert (found["memoryLimitBytes"], found["processesLimit"], found["oomKills"], found["refusedForks"]) == (256 * MIB, 40, 0, 0)
    assert found["processes"] >= 3
    assert found["cpuSeconds"] > 0
    assert found["ioWriteBytes"] >= 3 * MIB
    assert set(found["pressure"]) == {"cpu", "memory", "io"}
    assert None not in found["pressure"].values()


# The end


async def test_nothing_is_left_after_a_stop(pool: Pool, sandbox: Sandbox) -> None:
    group = group_of(sandbox)
    await output(sandbox, "setsid sleep 300 > /dev/null 2>&1 < /dev/null &")
    await sandbox.stop(grace=1)
    assert not group.exists()
    assert list_groups(str(group.parent)) == []


SERVER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from tests.sandboxes import open_pool, until

async def main():
    async with open_pool(sys.argv[1], warm=1, start_timeout=120.0) as pool:
        sandbox = await pool.take("s1")
        await sandbox.exec("setsid sleep 300 > /dev/null 2>&1 < /dev/null & echo kept > note")
        await until(lambda: pool.status().warm == 1, 60)
        print(*[f"{item.handle.pid} {item.handle.cgroup}" for item in pool._starter.alive.values()], flush=True)
        await asyncio.sleep(300)

asyncio.run(main())
"""


def kill_a_server(data_dir: str) -> dict[int, Path]:
    """Pids and cgroups of the sandboxes of a server that was killed without warning."""
    with subprocess.Popen([sys.executable, "-c", SERVER, data_dir, PROJECT], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        words = server.stdout.readline().split()
        server.kill()
    assert len(words) == 4
    return {int(pid): Path(path) for pid, path in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("loses_handles", [False, True])
async def test_what_a_killed_server_left_is_reaped_even_without_its_handles(data_dir: str, loses_handles: bool) -> None:
    left = await asyncio.to_thread(kill_a_server, data_dir)
    assert all(path.is_dir() and is_alive(pid) for pid, path in left.items())
    if loses_handles:
        for entry in Path(data_dir, "run").iterdir():
            if entry.is_dir() and (entry / "gw").exists():
                shutil.rmtree(entry)
    async with open_pool(data_dir, **PATIENT) as pool:
        await pool.reap([])
        assert not any(path.exists() or is_alive(pid) for pid, path in left.items())
        assert await output(await pool.take("s1", fresh=False), "cat note") == "kept\n"


async def test_a_server_leaves_the_cgroups_of_another_data_folder_alone(pool: Pool, sandbox: Sandbox, tmp_path: Path) -> None:
    async with open_pool(str(tmp_path), **PATIENT) as other:
        assert await other.reap([]) == 0
        assert group_of(await other.take()).parent == group_of(sandbox).parent
    assert await output(sandbox, "echo alive") == "alive\n"
    assert group_of(sandbox).exists()


# Delegation, by the real systemd

PROBE = """
import asyncio, json, os, sys, tempfile
sys.path.insert(0, sys.argv[1])
from ash.isolation import delegation
from tests.sandboxes import open_pool

async def main():
    with tempfile.TemporaryDirectory(prefix="ash-") as data_dir:
        report = delegation.describe_tree()
        async with open_pool(data_dir, start_timeout=120.0) as pool:
            sandbox = await pool.take()
            inside = (await sandbox.exec("echo alive")).stdout
            own = delegation.own_path(open("/proc/self/cgroup").read())
            group = sandbox.handle.cgroup
            held = os.path.isdir(group) and open(group + "/memory.max").read().strip() if group else None
            limits = pool.status().limits
        print(json.dumps({"report": report._asdict(), "own": own, "group": group, "held": held, "inside": inside, "limits": limits,
                          "left": bool(group) and os.path.exists(group), "uid": os.getuid()}), flush=True)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A copy of the source that every user can read, and its packages."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("ash", "tests"):
        shutil.copytree(os.path.join(PROJECT, name), copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "probe.py").write_text(PROBE)
    for folder in (copy, *copy.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/") and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o711)
    copy.chmod(0o755)
    yield str(copy)
    shutil.rmtree(copy)


def probe(project: str, *options: str, before: str = "") -> dict[str, Any]:
    """What a server sees that systemd starts with these options. The script is in a file: systemd would expand its variables."""
    script = Path(project, "start.sh")
    script.write_text(f"{before}\nexec {sys.executable} -B {project}/probe.py {project}\n")
    given = [f"--property={option}" for option in options]
    words = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *given, "/bin/sh", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_systemd
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_service_with_delegation_limits_its_sandboxes_below_itself(project: str, user: str) -> None:
    found = probe(project, "Delegate=yes", f"User={user}")
    assert found["inside"] == "alive\n", found
    assert (found["report"]["kind"], found["report"]["problem"], found["report"]["missing"]) == ("delegated", "", {})
    assert found["own"].endswith(f".service/{delegation.SERVER_LEAF}")
    assert os.path.dirname(found["own"]) in found["group"]
    assert (found["held"], found["left"]) == (str(256 * MIB), False)
    assert [found["limits"][name] for name in ("memory", "cpu", "processes")] == IN_FORCE


@needs_systemd
def test_a_service_that_is_given_some_controllers_uses_those(project: str) -> None:
    found = probe(project, "Delegate=memory pids", "User=nobody")
    assert found["held"] == str(256 * MIB)
    assert {"memory", "pids"} <= set(found["report"]["controllers"])


@needs_systemd
def test_an_ordinary_users_service_without_delegation_says_what_to_do(project: str) -> None:
    found = probe(project, "User=nobody")
    assert (found["group"], found["inside"]) == (None, "alive\n")
    assert "belongs to somebody else" in found["limits"]["memory"] + found["limits"]["cpu"]
    assert "Delegate=yes" in found["report"]["fix"]


@needs_systemd
def test_root_without_delegation_takes_a_cgroup_at_the_top_and_moves_nobody(project: str) -> None:
    found = probe(project)
    assert (found["report"]["kind"], found["report"]["root"]) == ("top", "/sys/fs/cgroup/ash")
    assert delegation.SERVER_LEAF not in found["own"]
    assert (found["held"], found["left"]) == (str(256 * MIB), False)
    assert not os.path.exists("/sys/fs/cgroup/ash")  # it goes with the server


@needs_systemd
def test_another_process_in_a_delegated_cgroup_is_named_and_not_moved(project: str) -> None:
    found = probe(project, "Delegate=yes", before="sleep 300 &")
    assert found["group"] is None
    assert "also holds other processes" in found["report"]["problem"]
    assert "(sleep)" in found["limits"]["cpu"]


CONTAINER = """
own=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)
mkdir $own/outside $own/container
echo $$ > $own/outside/cgroup.procs
echo '+memory +pids +cpu +io' > $own/cgroup.subtree_control
exec unshare --pid --fork --mount --mount-proc /bin/sh -c "
echo 0 > $own/container/cgroup.procs
exec unshare --cgroup /bin/sh -c 'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; sleep 300 & INNER'
"
"""


@needs_systemd
def test_in_a_container_with_a_tree_of_its_own_all_its_processes_move_into_a_leaf(project: str) -> None:
    inner = f"{sys.executable} -B {project}/probe.py {project}"
    found = probe(project, "Delegate=yes", before=CONTAINER.replace("INNER", inner))
    assert (found["report"]["problem"], found["report"]["kind"], found["report"]["root"]) == ("", "container", "/sys/fs/cgroup")
    assert found["own"] == f"/{delegation.SERVER_LEAF}"
    assert (found["held"], found["left"], found["inside"]) == (str(256 * MIB), False, "alive\n")
