"""The cgroup v2 writer, on plain folders that look like a cgroup tree, and on the text of /proc files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash.isolation import cgroup as cgroups
from ash.isolation.cgroup import CgroupsUnavailable, CgroupTree
from ash.isolation.records import Limits

LIMITS = Limits(memory_mb=256, cpu_percent=150, max_processes=64, max_file_mb=10)
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
V2 = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.fixture
def tree(tmp_path: Path) -> CgroupTree:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return cgroups.open_tree(str(tmp_path))


def test_the_cgroup2_mount_is_found_among_those_of_version_1() -> None:
    assert cgroups.find_mount(V1 + V2) == "/sys/fs/cgroup/unified"


def test_a_read_only_mount_is_not_used() -> None:
    assert cgroups.find_mount(V2.replace(" rw,relatime -", " ro,relatime -")) is None


def test_a_mount_with_a_space_in_its_path_is_found() -> None:
    assert cgroups.find_mount(V2.replace("unified", "my\\040tree")) == "/sys/fs/cgroup/my tree"


def test_the_own_path_is_that_of_version_2() -> None:
    assert cgroups.own_path("4:memory:/a\n0::/system.slice/ash.service\n") == "/system.slice/ash.service"


def test_the_controllers_are_handed_down(tree: CgroupTree) -> None:
    assert Path(tree.root, "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_a_sandbox_gets_its_limits_before_any_process(tree: CgroupTree) -> None:
    path = Path(tree.create("one", LIMITS))
    found = {file.name: file.read_text() for file in path.iterdir()}
    assert found == {
        "memory.max": str(256 * 1024 * 1024),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "64",
        "cpu.max": "150000 100000",
    }


def test_only_controllers_that_exist_are_written() -> None:
    assert cgroups.limit_files(LIMITS, ("pids",)) == [("pids.max", "64")]


def test_a_tree_without_the_controllers_says_so(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    with pytest.raises(CgroupsUnavailable, match="none of the controllers memory, pids, cpu"):
        cgroups.open_tree(str(tmp_path))


def test_a_folder_that_is_no_cgroup_says_so(tmp_path: Path) -> None:
    with pytest.raises(CgroupsUnavailable, match="not a cgroup v2 folder"):
        cgroups.open_tree(str(tmp_path / "nowhere"))


def test_killing_writes_the_kill_file(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    cgroups.kill(path)
    assert Path(path, "cgroup.kill").read_text() == "1"


def test_out_of_memory_is_read_from_the_events(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    assert cgroups.count_oom_kills(path) == 0
    Path(path, "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert cgroups.count_oom_kills(path) == 2


def test_an_empty_cgroup_is_removed_and_a_busy_one_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "busy" / "inner").mkdir(parents=True)
    assert cgroups.remove(str(tmp_path / "empty"))
    assert cgroups.remove(str(tmp_path / "gone"))
    assert not cgroups.remove(str(tmp_path / "busy"), timeout=0.05)


def test_leftovers_are_the_sandboxes_and_nothing_else(tree: CgroupTree) -> None:
    path = tree.create("one", LIMITS)
    Path(tree.root, cgroups.SERVER_LEAF).mkdir()
    assert list(tree.leftovers()) == [path]
    assert tree.owns(path)
    assert not tree.owns(str(Path(tree.root, cgroups.SERVER_LEAF)))
    assert not tree.owns("/sys/fs/cgroup/ash-sandbox-one")
