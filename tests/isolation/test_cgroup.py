"""The cgroup v2 writer: on plain folders that look like a cgroup tree, and where this host has a writable one, on real cgroups.

Real cgroups without controllers can be made, killed, frozen and removed like others; limits are tested in `tests/guest`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash.isolation import cgroup as cgroups
from ash.isolation import delegation, launch
from ash.isolation.cgroup import CgroupTree
from ash.isolation.records import Limits
from ash.models import SandboxHandle
from tests.sandboxes import is_alive

LIMITS = Limits(memory_mb=256, cpu_percent=150, max_processes=64, max_file_mb=10, cpu_weight=50, io_mb_per_second=20)
MIB = 1024 * 1024
ALL = ("memory", "pids", "cpu", "io")


@pytest.fixture
def tree(tmp_path: Path) -> CgroupTree:
    found = CgroupTree(str(tmp_path), ALL, tag="tag")
    found.device = "8:0"
    return found


# Limits


def test_a_sandbox_gets_its_limits_before_any_process(tree: CgroupTree) -> None:
    path = Path(tree.create("one", LIMITS))
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "memory.max": str(256 * MIB),
        "memory.high": str(cgroups.high_mark(256 * MIB)),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "64",
        "cpu.max": "150000 100000",
        "cpu.weight": "50",
        "io.max": f"8:0 rbps={20 * MIB} wbps={20 * MIB}",
        "cgroup.max.descendants": "0",
    }


def test_only_controllers_that_exist_are_written() -> None:
    assert dict(cgroups.limit_files(LIMITS, ("pids",))).keys() == {"cgroup.max.descendants", "pids.max"}


def test_zero_is_no_limit() -> None:
    files = dict(cgroups.limit_files(Limits(0, 0, 0, 0), ALL, "8:0"))
    assert (files["memory.max"], files["memory.high"], files["pids.max"], files["cpu.max"]) == ("max", "max", "max", "max 100000")
    assert "io.max" not in files


def test_a_folder_without_a_disk_of_its_own_has_no_io_limit() -> None:
    assert "io.max" not in dict(cgroups.limit_files(LIMITS, ALL, ""))


@pytest.mark.parametrize("limit_mb", [32, 256, 2048, 16384, 262144])
def test_the_high_mark_is_just_below_the_limit(limit_mb: int) -> None:
    limit, mark = limit_mb * MIB, cgroups.high_mark(limit_mb * MIB)
    assert 0 < limit - mark <= min(limit / 50, 64 * MIB) + 64 * 1024
    assert mark % 65536 == 0  # the kernel keeps whole pages, of whichever size


def test_a_cgroup_whose_limit_is_refused_does_not_stay(tree: CgroupTree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, text: str) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(cgroups, "_write", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        tree.create("one", LIMITS)
    assert os.listdir(tree.root) == []


def test_a_limit_that_an_older_kernel_lacks_is_left_out(tree: CgroupTree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_some(path: str, text: str) -> None:
        if path.endswith(("memory.swap.max", "memory.oom.group", "memory.high", "io.max")):
            raise PermissionError(13, "Permission denied")
        Path(path).write_text(text)

    monkeypatch.setattr(cgroups, "_write", refuse_some)
    path = tree.create("one", LIMITS)
    tree.check(path, LIMITS)
    assert [word.partition(":")[0] for word in tree.lacking] == ["memory.high", "memory.swap.max", "memory.oom.group", "io.max"]
    assert tree.controllers == ("memory", "pids", "cpu")
    assert tree.missing["io"] == "this kernel does not have it"


def test_what_is_read_back_decides_whether_a_limit_is_in_force(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    tree.check(path, LIMITS)
    assert (tree.controllers, tree.lacking) == (ALL, [])
    Path(path, "memory.max").write_text("max\n")
    Path(path, "io.max").write_text(f"8:0 rbps={20 * MIB} wbps={20 * MIB} riops=max wiops=max\n")
    tree.check(path, LIMITS)
    assert tree.controllers == ("pids", "cpu", "io")
    assert tree.missing["memory"] == f"the kernel keeps 'max' instead of '{256 * MIB}'"


# The disk


def write_device(numbers: Path, device: int, *, partition: bool) -> None:
    disk = numbers / "devices" / "sda"
    entry = disk / "sda2" if partition else disk
    entry.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    if partition:
        (entry / "dev").write_text("8:2\n")
        (entry / "partition").write_text("2\n")
    (numbers / f"{os.major(device)}:{os.minor(device)}").symlink_to(entry)


@pytest.mark.parametrize("partition", [True, False])
def test_a_partition_is_limited_by_its_whole_disk(tmp_path: Path, partition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "major", lambda device: 8)
    write_device(tmp_path, os.stat(tmp_path).st_dev, partition=partition)
    assert cgroups.find_device(str(tmp_path), str(tmp_path)) == ("8:0", "")


def test_a_file_system_without_a_disk_says_so() -> None:
    assert cgroups.find_device("/proc")[1].startswith("its file system has no disk of its own")


def test_a_disk_that_is_not_shown_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "major", lambda device: 8)
    assert cgroups.find_device(str(tmp_path), str(tmp_path))[1].startswith("the kernel shows no disk 8:")


# Events


@pytest.mark.parametrize(
    ("events", "whose"),
    [
        ("low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n", None),
        ("max 9\noom 1\noom_kill 4\noom_group_kill 1\n", "sandbox"),
        ("max 9\noom 0\noom_kill 1\n", "host"),
        ("oom 3\noom_kill 0\n", None),
        ("nonsense\n", None),
    ],
)
def test_out_of_memory_is_read_from_the_events(tmp_path: Path, events: str, whose: str | None) -> None:
    (tmp_path / "memory.events").write_text(events)
    assert cgroups.find_oom(str(tmp_path)) == whose


def test_without_events_nothing_ran_out(tmp_path: Path) -> None:
    assert cgroups.find_oom(str(tmp_path)) is None
    assert cgroups.count_met_limits(str(tmp_path)) == (0, 0)


def test_refused_forks_are_counted(tmp_path: Path) -> None:
    (tmp_path / "pids.events").write_text("max 12\n")
    assert cgroups.count_met_limits(str(tmp_path)) == (0, 12)


# The end, on plain folders


def test_killing_writes_the_kill_file(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    cgroups.kill(path)
    assert Path(path, "cgroup.kill").read_text() == "1"


def test_an_empty_cgroup_is_removed_with_those_inside_and_a_busy_one_reported(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner" / "most").mkdir(parents=True)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").touch()
    assert cgroups.remove(str(tmp_path / "empty"))
    assert cgroups.remove(str(tmp_path / "gone"))
    assert not cgroups.remove(str(tmp_path / "busy"), timeout=0.05)


def test_leftovers_are_this_data_folders_sandboxes_and_nothing_else(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    for name in (delegation.SERVER_LEAF, f"{cgroups.PREFIX}other-two", "user.slice"):
        Path(tree.root, name).mkdir()
    assert list(tree.leftovers()) == [("one", path)]


def test_two_data_folders_have_different_tags_wherever_they_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    tags = {cgroups.tag_of(str(tmp_path / name)) for name in ("one", "two")}
    (tmp_path / "one").rename(tmp_path / "three")
    assert len(tags) == 2
    assert cgroups.tag_of(str(tmp_path / "three")) in tags


def handle(id: str, cgroup: str | None) -> SandboxHandle:
    return SandboxHandle(id, 1, 1, cgroup, "/run", "/session", None)


def test_a_recorded_cgroup_is_found_in_another_tree_and_a_strangers_is_not(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    assert cgroups.find_recorded(handle("one", path), "tag") is None  # a folder that is no cgroup
    Path(path, "cgroup.procs").touch()
    assert cgroups.find_recorded(handle("one", path), "tag") == path
    assert cgroups.find_recorded(handle("two", path), "tag") is None
    assert cgroups.find_recorded(handle("one", path), "other") is None
    assert cgroups.find_recorded(handle("one", None), "tag") is None
    assert cgroups.find_recorded(handle("one", "/"), "tag") is None


def test_a_root_that_was_made_goes_with_its_last_sandbox(tmp_path: Path) -> None:
    root = tmp_path / "ash"
    root.mkdir()
    tree = CgroupTree(str(root), ())
    tree.is_made = True
    (root / "other").mkdir()
    tree.close()
    assert root.exists()
    (root / "other").rmdir()
    tree.close()
    assert not root.exists()


# Real cgroups


def find_real_root() -> str:
    """A writable cgroup v2 folder of this host in which cgroups can be made; the controllers do not matter. Empty when there is none."""
    for place, _, writable in delegation.find_mounts(Path("/proc/self/mountinfo").read_text()):
        if writable and os.access(place, os.W_OK) and os.access(f"{place}/cgroup.procs", os.W_OK):
            return place
    return ""


real_root = find_real_root()
needs_real = pytest.mark.skipif(not real_root, reason="no cgroup v2 here that this user may write; `make test-vm` has one")


@pytest.fixture
def real() -> Iterator[CgroupTree]:
    """A tree of real cgroups, without limits."""
    tree = CgroupTree(real_root, (), tag=f"test-{os.getpid()}")
    yield tree
    for _, path in list(tree.leftovers()):
        cgroups.kill(path)
        assert cgroups.remove(path)


@pytest.fixture
def family(real: CgroupTree) -> Iterator[tuple[str, list[int]]]:
    """A cgroup with a shell and what it started in it."""
    path = real.create("one", LIMITS)
    script = f"echo 0 > {path}/cgroup.procs; sleep 300 & setsid sleep 300 & wait"
    with subprocess.Popen(["/bin/sh", "-c", script]) as shell:
        while len(pids := list(cgroups.find_processes(path))) < 3:
            assert shell.poll() is None
        yield path, pids
        for pid in (*launch.find_descendants(shell.pid), shell.pid):
            os.kill(pid, 9)


@needs_real
def test_a_real_cgroup_is_killed_at_once_and_removed(family: tuple[str, list[int]]) -> None:
    path, pids = family
    assert not cgroups.remove(path, timeout=0)
    cgroups.kill(path)
    assert cgroups.remove(path, timeout=5)
    assert [pid for pid in pids if is_alive(pid)] == []


@needs_real
def test_without_the_kill_file_each_process_is_killed(family: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, pids = family
    write = cgroups._write

    def write_like_an_older_kernel(file: str, text: str) -> None:
        if file.endswith("cgroup.kill"):
            raise PermissionError(13, "Permission denied")
        write(file, text)

    monkeypatch.setattr(cgroups, "_write", write_like_an_older_kernel)
    cgroups.kill(path)
    assert cgroups.remove(path, timeout=5)
    assert [pid for pid in pids if is_alive(pid)] == []


@needs_real
def test_a_frozen_cgroup_can_be_killed(family: tuple[str, list[int]]) -> None:
    path, pids = family
    cgroups.set_frozen(path, True)
    cgroups.kill(path)
    assert cgroups.remove(path, timeout=5)
    assert [pid for pid in pids if is_alive(pid)] == []


@needs_real
def test_nothing_can_be_made_inside_a_sandboxes_cgroup(real: CgroupTree) -> None:
    path = real.create("one", LIMITS)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        os.mkdir(f"{path}/inner")


@needs_real
def test_a_limit_that_a_real_cgroup_did_not_take_is_told_not_raised(real: CgroupTree) -> None:
    path = real.create("one", LIMITS)
    real.controllers = ("memory",)
    real.check(path, LIMITS)
    assert set(real.missing) == {"memory"}
    assert not real.controllers
