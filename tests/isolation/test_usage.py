"""What sandboxes use: from the files of a cgroup, from the processes where there is none, and the pressure on a host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ash.isolation import usage
from ash.isolation.records import Limits, SandboxSpec
from ash.isolation.usage import Source
from tests.sandboxes import make_agent, open_pool

LIMITS = Limits(memory_mb=256, cpu_percent=100, max_processes=40, max_file_mb=10)
PRESSURE = "some avg10=1.50 avg60=0.10 avg300=0.00 total=12\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=3\n"
FILES = {
    "memory.current": "1000000\n",
    "memory.peak": "2000000\n",
    "memory.max": "268435456\n",
    "memory.events": "low 0\nhigh 3\nmax 5\noom 1\noom_kill 2\noom_group_kill 1\n",
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nnr_throttled 7\nthrottled_usec 1250000\n",
    "pids.current": "5\n",
    "pids.max": "40\n",
    "pids.events": "max 9\n",
    "io.stat": "253:0 rbytes=50 wbytes=60 rios=1 wios=1 dbytes=0 dios=0\n8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n",
    "cpu.pressure": PRESSURE,
    "memory.pressure": PRESSURE,
    "io.pressure": PRESSURE,
}


def source(cgroup: str | None, device: str = "8:0", pid: int = 1) -> Source:
    return Source("one", pid, cgroup, LIMITS, device)


@pytest.fixture
def group(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_cgroups_files_become_figures(group: Path) -> None:
    waits = {"some10": 1.5, "full10": 0.25}
    assert usage.read(source(str(group))) == {
        "source": "cgroup",
        "memoryBytes": 1000000,
        "memoryPeakBytes": 2000000,
        "memoryLimitBytes": 268435456,
        "cpuSeconds": 2.5,
        "throttledSeconds": 1.25,
        "processes": 5,
        "processesLimit": 40,
        "oomKills": 2,
        "refusedForks": 9,
        "pressure": {"cpu": waits, "memory": waits, "io": waits},
        "ioReadBytes": 4096,
        "ioWriteBytes": 8192,
    }


def test_without_a_known_disk_all_are_added_up(group: Path) -> None:
    found = usage.read(source(str(group), device=""))
    assert (found["ioReadBytes"], found["ioWriteBytes"]) == (4146, 8252)


def test_what_a_kernel_does_not_have_is_none(group: Path) -> None:
    for name in ("memory.peak", "io.stat", "io.pressure", "pids.max", "pids.events", "memory.max", "memory.events"):
        (group / name).unlink()
    found = usage.read(source(str(group)))
    names = ("memoryPeakBytes", "memoryLimitBytes", "ioReadBytes", "processesLimit", "oomKills", "refusedForks")
    assert [found[name] for name in names] == [None] * len(names)
    assert found["pressure"]["io"] is None
    assert found["memoryBytes"] == 1000000


def test_a_cgroup_that_is_gone_has_the_same_fields(group: Path) -> None:
    assert usage.read(source(str(group / "gone"))).keys() == usage.read(source(str(group))).keys()


def test_without_a_cgroup_the_processes_below_the_first_are_added_up(group: Path) -> None:
    script = "import subprocess, sys; held = bytearray(b'x') * (40 << 20); subprocess.run(['cat'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        while (found := usage.read(source(None, pid=process.pid)))["processes"] < 2:
            assert process.poll() is None
        process.stdin.close()
    assert found["source"] == "proc"
    assert 40 << 20 < found["memoryBytes"] < 400 << 20
    assert found["cpuSeconds"] > 0
    assert found["processesLimit"] == 40
    assert found["pressure"] is None
    assert found.keys() == usage.read(source(str(group))).keys()


def test_a_process_that_is_gone_uses_nothing() -> None:
    found = usage.read(source(None, pid=2**22 + 1))
    assert (found["memoryBytes"], found["processes"]) == (0, 0)


def test_many_are_read_at_once_each_by_its_own_means(group: Path) -> None:
    sources = [source(str(group)), source(None, pid=os.getpid())._replace(id="two")]
    found = usage.read_all(sources)
    assert [found[id]["source"] for id in ("one", "two")] == ["cgroup", "proc"]
    assert set(found["one"]) == set(found["two"]) == {"source", "memoryBytes", "cpuSeconds", "processes"}


def test_the_hosts_pressure_has_every_resource() -> None:
    assert set(usage.read_pressure(None)) == {"cpu", "memory", "io"}


def test_pressure_that_was_switched_off_is_none(tmp_path: Path) -> None:
    assert usage.read_pressure(str(tmp_path)) == {"cpu": None, "memory": None, "io": None}


# Of a real sandbox


async def test_a_sandbox_shows_what_it_uses_and_the_limits_of_its_own(data_dir: str) -> None:
    own = LIMITS._replace(max_processes=20, max_file_mb=3, memory_mb=512)
    async with open_pool(data_dir) as pool:
        if pool.status().isolation == "unavailable":
            pytest.skip(f"this host cannot isolate: {pool.status().warnings[0]}")
        sandbox = await pool.claim(SandboxSpec("s1", str(pool.session_dir("s1")), make_agent(data_dir), True, own))
        assert sandbox.limits == own
        show = "awk '/Max (file size|data size|processes)/ { print $(NF-1) }' /proc/self/limits; df -m --output=size /tmp | tail -1"
        assert (await sandbox.exec(show)).stdout.split() == [str(3 << 20), str(512 << 20), "20", "128"]
        found = await sandbox.usage()
        assert found["memoryBytes"] > 1 << 20
        assert found["processes"] >= 2
        assert set(await pool.usages()) == {sandbox.id}
