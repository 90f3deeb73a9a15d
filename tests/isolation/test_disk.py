"""The disk watcher on real processes and files, and what is read of the kernel's own quotas."""

from __future__ import annotations

import asyncio
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ash.isolation import disk, launch, quota, tree
from ash.isolation.disk import Watcher
from ash.isolation.quota import DiskUse, QuotaUnavailable
from ash.isolation.records import Limits
from ash.isolation.tree import Tree
from tests.sandboxes import until

MIB = 1 << 20
LIMITS = Limits(256, 100, 64, 1024, disk_mb=8, max_files=50)

# A bridge that says what became of its child: a shell that runs what stands in its environment.
PARENT = "import subprocess, os, time; subprocess.Popen(['/bin/sh', '-c', os.environ['TOOL']]); time.sleep(60)"
WRITER = """
import sys, time
file = open("workspace/big", "wb", 0)
while True:
    try:
        file.write(bytes(1 << 20)); time.sleep(0.002)
    except OSError as error:
        open("/dev/stdout", "w").write(f"{error.errno}\\n"); time.sleep(0.05)
"""


@pytest.fixture
def session(tmp_path: Path) -> Path:
    for part in disk.PARTS:
        (tmp_path / part).mkdir()
    return tmp_path


@pytest.fixture
def start(session: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that stands for a bridge, with one child that runs the given Python code; all end after the test."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, parent: str = PARENT) -> subprocess.Popen[str]:
        (session / "tool.py").write_text(code)
        tool = f"exec {sys.executable} -I -S {session}/tool.py"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", parent], cwd=session, env={"TOOL": tool}, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        for pid in reversed(list(tree.list_processes(process.pid))):
            os.kill(pid, 9)
        process.communicate()


def make_watcher(session: Path, pid: int, limits: Limits = LIMITS, **more: int) -> tuple[Watcher, list[str]]:
    said: list[str] = []
    processes = Tree(pid, has_namespace=False)
    floor = more.get("min_free_mb", 0)
    watcher = Watcher(
        lambda: str(session), processes, limits, min_free_mb=floor, on_limit=lambda limit, _: said.append(limit), end=said.append
    )
    return watcher, said


def step(watcher: Watcher) -> None:
    watcher._report(watcher.check())


def test_a_measurement_counts_blocks_files_folders_and_links_and_each_file_once(session: Path) -> None:
    (session / "workspace/deep/er").mkdir(parents=True)
    (session / "workspace/deep/er/one").write_bytes(bytes(MIB))
    os.link(session / "workspace/deep/er/one", session / "home/two")
    os.truncate(session / "workspace/deep/er/one", 100 * MIB)
    (session / "home/link").symlink_to("/usr")
    use = disk.measure(str(session))
    assert use.files == 7
    assert MIB <= use.bytes < 2 * MIB


def test_a_removed_file_that_is_still_open_counts(session: Path) -> None:
    file = (session / "workspace/gone").open("wb")
    file.write(bytes(3 * MIB))
    file.flush()
    os.unlink(file.name)
    assert disk.measure(str(session)).bytes < MIB
    assert disk.measure_removed([os.getpid()], str(session)) == 3 * MIB
    file.close()


async def test_at_the_limit_a_writer_gets_an_error_and_may_go_on_once_there_is_room(
    session: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(WRITER)
    watcher, said = make_watcher(session, process.pid)
    assert process.stdout is not None

    def is_held() -> bool:
        step(watcher)
        return watcher.is_held

    await until(is_held)
    assert process.stdout.readline() == "27\n"  # EFBIG
    assert said == ["disk"]
    size = disk.measure(str(session)).bytes
    step(watcher)
    assert disk.measure(str(session)).bytes == size
    os.truncate(session / "workspace/big", 0)
    await until(lambda: not is_held())
    await until(lambda: disk.measure(str(session)).bytes > MIB)


async def test_a_flood_of_empty_files_ends_the_tool_and_not_the_session(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("import time\nfor n in range(60): open(f'workspace/{n}', 'w')\ntime.sleep(60)")
    watcher, said = make_watcher(session, process.pid)
    await until(lambda: len(os.listdir(session / "workspace")) == 60)
    step(watcher)
    assert said == ["files"]
    await until(lambda: len([pid for pid in tree.list_processes(process.pid) if not is_zombie(pid)]) == 1)
    assert process.poll() is None


async def test_who_goes_on_making_files_loses_the_sandbox(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("import time; time.sleep(60)")
    watcher, said = make_watcher(session, process.pid)
    for number in range(200):
        (session / "workspace" / str(number)).touch()
        if number > 50:
            step(watcher)
    assert said[0] == "files"
    assert "was ended" in said[1]


def test_a_removed_file_that_is_only_mapped_counts(session: Path) -> None:
    with (session / "workspace/gone").open("w+b") as file:
        file.write(bytes(3 * MIB))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 4096)
        os.unlink(file.name)
    # Python keeps a descriptor of its own beside the mapping, a program in C would not.
    held = [path for path in disk._list_held(os.getpid()) if "/map_files/" in path]
    assert any(path.startswith(f"/proc/{os.getpid()}/map_files/") for path in held)
    if os.geteuid() == 0 and os.path.exists(held[0]):
        assert 3 * MIB in [os.stat(path).st_blocks * 512 for path in held if os.path.exists(path)]
    mapped.close()


def test_a_removed_file_that_one_thread_alone_holds_counts(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    code = f"""
import ctypes, os, sys, threading
def hold():
    if ctypes.CDLL(None).unshare(0x400): os._exit(3)
    file = open({str(session / "workspace/gone")!r}, "wb"); file.write(bytes(3 << 20)); file.flush(); os.unlink(file.name)
    print("held", flush=True); threading.Event().wait(60)
threading.Thread(target=hold).start()
"""
    process = start("", parent=code)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert disk.measure_removed([process.pid], str(session)) == 3 * MIB


def test_who_goes_on_writing_slowly_loses_the_sandbox_too(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    watcher, said = make_watcher(session, start("import time; time.sleep(60)").pid)
    for number in range(60):
        with (session / "workspace/slow").open("ab") as file:  # as a mapped file grows, which no file size limit stops
            file.write(bytes(2 * MIB))
        if number > 4:
            step(watcher)
    assert said[0] == "disk"
    assert "was ended" in said[1]


async def test_a_held_sandbox_may_make_folders_and_empty_files(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("import time; time.sleep(60)")
    watcher, said = make_watcher(session, process.pid)
    await until(lambda: len(list(tree.list_processes(process.pid))) == 2)
    (session / "workspace/big").write_bytes(bytes(9 * MIB))
    for number in range(10):
        step(watcher)
        (session / "workspace" / str(number)).touch()
    assert said == ["disk"]
    assert len([pid for pid in tree.list_processes(process.pid) if not is_zombie(pid)]) == 2


async def test_nothing_is_done_to_a_process_that_only_has_the_pid_of_one_that_is_gone(
    session: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("import time; time.sleep(60)")
    watcher, _ = make_watcher(session, process.pid)
    await until(lambda: len(list(tree.list_processes(process.pid))) == 2)
    watcher._tree = Tree(process.pid, has_namespace=False, start_time=1)
    (session / "workspace/big").write_bytes(bytes(9 * MIB))
    step(watcher)
    tree.signal_tools(watcher._tree, signal.SIGKILL)
    assert watcher.is_held
    assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] != 0
    assert len([pid for pid in tree.list_processes(process.pid) if not is_zombie(pid)]) == 2


async def test_a_watcher_outlives_whatever_goes_wrong_while_it_measures(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, _ = make_watcher(session, os.getpid())
    asked: list[int] = []

    def fail() -> None:
        asked.append(1)
        raise subprocess.TimeoutExpired("prlimit", 10)

    monkeypatch.setattr(watcher, "check", fail)
    monkeypatch.setattr(watcher, "interval", lambda: 0.01)
    running = asyncio.ensure_future(watcher.run())
    await until(lambda: len(asked) > 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_the_next_look_comes_before_the_hosts_disk_can_be_full(session: Path) -> None:
    free = os.statvfs(session).f_bavail * os.statvfs(session).f_frsize
    watcher, _ = make_watcher(session, os.getpid(), LIMITS._replace(disk_mb=0, max_files=0), min_free_mb=max(1, (free >> 20) - 3000))
    watcher.check()
    assert disk.HOST_SHORTEST <= watcher.interval() < 5


async def test_who_moves_folders_about_is_measured_all_the_same(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    for number in range(40):
        (session / "workspace/a" / str(number)).mkdir(parents=True)
        (session / "workspace/a" / str(number) / "file").write_bytes(bytes(MIB // 4))
    process = start("import os\nwhile True:\n  os.rename('workspace/a', 'home/a')\n  os.rename('home/a', 'workspace/a')")
    await until(lambda: len(list(tree.list_processes(process.pid))) == 2)
    for _ in range(20):
        assert disk.measure_moving(str(session), Tree(process.pid, has_namespace=False)).bytes >= 0
    watcher, said = make_watcher(session, process.pid, LIMITS._replace(max_files=0))

    def has_said() -> bool:
        step(watcher)
        return bool(said)

    await until(has_said)
    assert said == ["disk"]


def test_a_sandbox_that_does_nothing_is_not_measured_again(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    watcher, _ = make_watcher(session, start("import time; time.sleep(60)").pid)
    watcher.check()
    watcher._cpu = tree.count_cpu_seconds(tree.list_processes(watcher._tree.pid))
    (session / "workspace/unseen").write_bytes(bytes(MIB))
    watcher.check()
    assert watcher.use.files <= 2


def test_a_full_disk_of_the_host_stops_every_writer(session: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    watcher, said = make_watcher(session, start("import time; time.sleep(60)").pid, min_free_mb=1 << 40)
    step(watcher)
    assert said == ["host_disk"]
    assert watcher.is_held


@pytest.mark.parametrize(
    ("used", "expected"), [(DiskUse(0, 0), 0.5), (DiskUse(470 * MIB, 0), disk.SHORTEST), (DiskUse(0, 10**6), disk.SHORTEST)]
)
def test_the_next_measurement_comes_before_the_limit_can_be_reached(session: Path, used: DiskUse, expected: float) -> None:
    watcher, _ = make_watcher(session, os.getpid(), Limits(256, 100, 64, 1024, disk_mb=477, max_files=10**6))
    watcher.use = used
    assert watcher.interval() == pytest.approx(expected, rel=0.01)


def is_zombie(pid: int) -> bool:
    return launch.find_start_time(pid) is None


# The kernel's own


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1 0 8:1 / / rw - tmpfs tmpfs rw", "tmpfs has no project quota"),
        ("1 0 8:1 / / rw - ext4 /dev/sda1 rw", "tune2fs -O project,quota"),
        ("1 0 8:1 / / rw - xfs /dev/sda1 rw,noquota", "mounted without project quota"),
    ],
)
def test_a_file_system_without_project_quota_is_named_with_the_way_to_get_it(line: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(QuotaUnavailable, match=reason):
        quota.find_project_quota(str(tmp_path), line)


def test_the_file_system_is_that_of_the_longest_mount_point(tmp_path: Path) -> None:
    lines = f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {tmp_path} rw,nosuid - xfs /dev/b rw,prjquota\n"
    lines += f"3 1 8:3 / {tmp_path}x rw - btrfs /dev/c rw"
    kind, options, place = quota.find_file_system(str(tmp_path / "deeper"), lines)
    assert (kind, place) == ("xfs", str(tmp_path))
    assert {"prjquota", "nosuid"} <= options
