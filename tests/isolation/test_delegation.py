"""Finding a usable part of the cgroup v2 tree: for a service, a user, root without systemd, and a container. On plain folders.

With the real kernel and the real systemd the same is done by `tests/guest/test_real_cgroups.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ash.isolation import delegation
from ash.isolation.delegation import AT_TOP, CONTAINER, DELEGATED, GIVEN, LEAF, CgroupsUnavailable, Site, Surroundings

V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
V2 = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
SERVICE = "/system.slice/ash.service"


class Host:
    """A made-up host whose cgroup v2 tree is a plain folder."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.make("/", is_real_top=True)

    def make(self, path: str, *, is_real_top: bool = False, procs: str = "", controllers: str = "cpuset cpu io memory pids") -> Path:
        folder = self.top / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"cgroup.controllers": controllers, "cgroup.subtree_control": "", "cgroup.procs": procs}
        for name, text in texts.items() if is_real_top else {**texts, "cgroup.events": "populated 1\n"}.items():
            (folder / name).write_text(text)
        return folder

    def facts(self, own: str = SERVICE, **other: Any) -> Surroundings:
        mountinfo = V2.replace("/sys/fs/cgroup/unified", str(self.top).replace(" ", "\\040"))
        facts = Surroundings(mountinfo, f"0::{own}\n", "0::/init.scope\n", is_root=True, is_container=False)
        return facts._replace(**other)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "a tree")


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths that systemd has marked as delegated."""
    found: set[str] = set()
    monkeypatch.setattr(delegation, "_is_marked", lambda path: path in found)
    return found


# What the kernel's files say


def test_the_cgroup2_mount_is_found_among_those_of_version_1() -> None:
    assert delegation.find_mounts(V1 + V2) == [("/sys/fs/cgroup/unified", "/", True)]


def test_a_read_only_mount_is_told_from_a_writable_one() -> None:
    assert delegation.find_mounts(V2.replace(" rw,relatime -", " ro,relatime -"))[0][2] is False


def test_the_own_path_is_that_of_version_2() -> None:
    assert delegation.own_path("4:memory:/a\n0::/system.slice/ash.service\n") == SERVICE


def test_a_mark_is_read_from_the_folders_attributes(tmp_path: Path) -> None:
    assert not delegation._is_marked(str(tmp_path))
    try:
        os.setxattr(tmp_path, "user.delegate", b"1")
    except OSError:
        pytest.skip("the file system of the temporary folder has no user attributes")
    assert delegation._is_marked(str(tmp_path))


# Which place is taken


def test_a_delegated_service_uses_its_own_cgroup(host: Host, marks: set[str]) -> None:
    marks.add(str(host.make(SERVICE)))
    assert delegation.find_site(host.facts()) == Site(str(host.top / "system.slice/ash.service"), DELEGATED)


def test_a_service_that_systemd_started_in_a_subgroup_uses_the_one_above(host: Host, marks: set[str]) -> None:
    marks.add(str(host.make(SERVICE)))
    host.make(f"{SERVICE}/main")
    assert delegation.find_site(host.facts(f"{SERVICE}/main")).kind == LEAF


def test_a_server_that_is_in_its_leaf_already_uses_the_one_above(host: Host, marks: set[str]) -> None:
    host.make(f"{SERVICE}/{delegation.SERVER_LEAF}")
    site = delegation.find_site(host.facts(f"{SERVICE}/{delegation.SERVER_LEAF}"))
    assert site == Site(str(host.top / "system.slice/ash.service"), LEAF)


def test_a_users_systemd_keeps_its_own_cgroup(host: Host, marks: set[str]) -> None:
    marks.add(str(host.make("/user.slice/user@1000.service")))
    host.make("/user.slice/user@1000.service/ash.service")
    assert delegation.find_site(host.facts("/user.slice/user@1000.service/ash.service")).kind == AT_TOP


def test_an_ordinary_user_uses_a_cgroup_that_is_writable(host: Host, marks: set[str]) -> None:
    host.make(SERVICE)
    assert delegation.find_site(host.facts(is_root=False)).kind == DELEGATED


def test_an_ordinary_user_in_a_login_session_is_told_what_to_do(host: Host, marks: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CgroupsUnavailable, match="belongs to somebody else") as caught:
        delegation.find_site(host.facts("/session.scope", is_root=False))
    assert "systemd-run --user --scope -p Delegate=yes" in caught.value.fix


@pytest.mark.parametrize("own", ["/", "/user.slice/session-3.scope"])
def test_root_without_a_delegated_cgroup_takes_one_at_the_top(host: Host, marks: set[str], own: str) -> None:
    if own != "/":
        host.make(own, procs="1\n2\n")
    assert delegation.find_site(host.facts(own)) == Site(str(host.top / "ash"), AT_TOP, str(host.top))


def test_a_machine_made_from_a_containers_image_is_none(host: Host, marks: set[str]) -> None:
    assert delegation.find_site(host.facts("/", init_cgroup="0::/\n", is_container=True)).kind == AT_TOP


def test_in_a_container_its_own_top_is_used(host: Host, marks: set[str]) -> None:
    host.make("/", procs="1\n")
    facts = host.facts("/", init_cgroup="0::/\n", is_container=True)
    assert delegation.find_site(facts) == Site(str(host.top), CONTAINER)


def test_a_namespace_of_which_the_first_process_is_not_part_is_no_container(host: Host, marks: set[str]) -> None:
    host.make("/", procs="1\n")
    with pytest.raises(CgroupsUnavailable, match="also holds processes of others"):
        delegation.find_site(host.facts("/", init_cgroup="0::/../../init.scope\n"))


def test_a_container_that_sees_the_hosts_tree_never_leaves_its_own_cgroup(host: Host, marks: set[str]) -> None:
    host.make("/docker/c1", procs="1\n2\n")
    with pytest.raises(CgroupsUnavailable, match="it is in a container"):
        delegation.find_site(host.facts("/docker/c1", is_container=True))
    host.make("/docker/c1", procs=f"{os.getpid()}\n")
    assert delegation.find_site(host.facts("/docker/c1", is_container=True)).kind == DELEGATED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mountinfo": V1}, "no cgroup v2 tree is mounted"),
        ({"mountinfo": V2.replace(" rw,relatime -", " ro,relatime -")}, "mounted read-only"),
        ({"mountinfo": V2.replace(" / /sys", " /other /sys")}, "does not show this server's own cgroup"),
        ({"cgroup": "0::/../elsewhere\n"}, "does not show this server's own cgroup"),
    ],
)
def test_a_tree_that_cannot_be_used_says_why_and_what_to_do(host: Host, change: dict[str, str], reason: str) -> None:
    with pytest.raises(CgroupsUnavailable, match=reason) as caught:
        delegation.find_site(host.facts(**change))
    assert caught.value.fix


def test_a_tree_that_was_mounted_over_another_is_the_one_that_counts(host: Host, marks: set[str]) -> None:
    facts = host.facts("/", init_cgroup="0::/\n")
    host.make("/")
    outer = facts.mountinfo.replace(" / ", " /../.. ", 1)
    assert delegation.find_site(facts._replace(mountinfo=outer + facts.mountinfo)).kind == CONTAINER


# Taking it


def test_the_controllers_are_handed_down(host: Host) -> None:
    folder = host.make(SERVICE)
    tree = delegation.take(Site(str(folder), DELEGATED))
    assert (folder / "cgroup.subtree_control").read_text() == "+memory +pids +cpu +io"
    assert tree.controllers == ("memory", "pids", "cpu", "io")


def test_the_server_moves_into_a_leaf_and_nobody_else_does(host: Host) -> None:
    folder = host.make(SERVICE, procs=f"{os.getpid()}\n")
    delegation.take(Site(str(folder), DELEGATED))
    assert (folder / delegation.SERVER_LEAF / "cgroup.procs").read_text() == str(os.getpid())


def test_processes_of_others_in_the_own_cgroup_are_named_and_left_alone(host: Host) -> None:
    folder = host.make(SERVICE, procs=f"1\n{os.getpid()}\n")
    with pytest.raises(CgroupsUnavailable, match=r"also holds other processes: 1 \(\S+\)"):
        delegation.take(Site(str(folder), DELEGATED))
    assert not (folder / delegation.SERVER_LEAF).exists()


def test_the_last_process_of_a_probe_is_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """bubblewrap's first process in its pid namespace leaves a moment after the bubblewrap that was started."""
    folder = host.make(SERVICE, procs=f"{os.getpid()}\n")
    looks = iter([[7], [7], []])
    monkeypatch.setattr(delegation, "_others_in", lambda path: next(looks))
    monkeypatch.setattr(delegation, "_name_of", lambda pid: "bwrap")
    delegation.take(Site(str(folder), DELEGATED))
    assert (folder / delegation.SERVER_LEAF / "cgroup.procs").read_text() == str(os.getpid())


def test_in_a_container_all_processes_move(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host.make("/", procs="1\n7\n")
    moved = []

    def move(path: str, pid: int) -> None:
        moved.append(pid)
        (folder / "cgroup.procs").write_text("9\n" if pid == 7 else "")

    monkeypatch.setattr(delegation, "_move", move)
    delegation.take(Site(str(folder), CONTAINER))
    assert moved == [1, 7, 9]


def test_processes_that_a_container_cannot_see_keep_it_from_moving_any(host: Host) -> None:
    folder = host.make("/", procs="0\n1\n")
    with pytest.raises(CgroupsUnavailable, match=r"0 \(of another pid namespace\)"):
        delegation.take(Site(str(folder), CONTAINER))


def test_root_gets_a_cgroup_at_the_top_that_is_removed_again(host: Host) -> None:
    tree = delegation.take(Site(str(host.top / "ash"), AT_TOP, str(host.top)), tag="t")
    assert (host.top / "cgroup.subtree_control").read_text() == "+memory +pids +cpu +io"
    assert tree.is_made
    (host.top / "ash" / "cgroup.subtree_control").unlink()
    tree.close()
    assert not (host.top / "ash").exists()


def test_a_controller_that_is_refused_does_not_keep_the_others_out(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host.make(SERVICE, controllers="cpu memory pids")
    written = []

    def write(path: str, text: str) -> None:
        if "+cpu" in text:
            raise OSError(22, "Invalid argument")
        written.append(text)

    monkeypatch.setattr(delegation, "_write", write)
    tree = delegation.take(Site(str(folder), DELEGATED))
    assert (tree.controllers, written) == (("memory", "pids"), ["+memory", "+pids"])
    assert tree.missing["cpu"].endswith("does not hand it down: Invalid argument")
    assert tree.missing["io"].endswith("was not given this controller")


def test_controllers_that_an_operator_has_handed_down_need_no_write(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host.make("/prepared")
    (folder / "cgroup.subtree_control").write_text("cpu io memory pids\n")
    monkeypatch.setattr(delegation, "_write", None)
    assert delegation.take(Site(str(folder), GIVEN)).controllers == ("memory", "pids", "cpu", "io")


@pytest.mark.parametrize(
    ("controllers", "reason"), [("hugetlb", "none of the controllers memory, pids, cpu, io"), (None, "not a cgroup v2 folder")]
)
def test_a_folder_that_offers_nothing_says_so(host: Host, controllers: str | None, reason: str) -> None:
    folder = host.make("/x", controllers=controllers or "")
    if controllers is None:
        (folder / "cgroup.controllers").unlink()
    with pytest.raises(CgroupsUnavailable, match=reason):
        delegation.open_tree(str(folder))


# Only looking


def test_describing_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch, marks: set[str]) -> None:
    marks.add(str(host.make(SERVICE, procs=f"{os.getpid()}\n", controllers="memory pids")))
    monkeypatch.setattr(delegation, "look_around", host.facts)
    monkeypatch.setattr(delegation, "_write", None)
    report = delegation.describe_tree()
    assert (report.kind, report.controllers, report.problem) == (DELEGATED, ("memory", "pids"), "")
    assert set(report.missing) == {"cpu", "io"}
    assert "Delegate=yes" in report.fix
    assert not (host.top / "system.slice/ash.service" / delegation.SERVER_LEAF).exists()


def test_describing_a_host_without_cgroups_gives_the_reason_and_the_fix(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegation, "look_around", lambda: host.facts(mountinfo=V1))
    report = delegation.describe_tree()
    assert report.problem == "no cgroup v2 tree is mounted"
    assert "systemd.unified_cgroup_hierarchy=1" in report.fix


def test_this_host_can_be_described() -> None:
    report = delegation.describe_tree()
    assert bool(report.problem) != bool(report.controllers)
