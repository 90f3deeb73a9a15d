"""What `ash doctor` measures of the host: what holds here is found to hold, and each layer that is taken away is found missing."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

from ash.errors import IsolationUnavailable
from ash.isolation import bwrap, checks, delegation, host, machine, prepare
from ash.isolation.cgroup import CONTROLLERS
from ash.isolation.folders import Folders
from ash.isolation.machine import Finding
from ash.isolation.prepare import Choices
from ash.isolation.records import Limits
from ash.isolation.seccomp import ALLOW

LIMITS = Limits(256, 100, 40, 10, disk_mb=100, max_files=1000)
INSIDE = {"user-namespaces", "capabilities", "read-only", "network", "environment", "sandbox-python", "seccomp"}
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


async def measure(folder: str) -> dict[str, Finding]:
    return {finding.id: finding for finding in await checks.check_sandbox(folder, LIMITS, Choices())}


@pytest.fixture
async def sound(data_dir: str) -> dict[str, Finding]:
    """What is found here; tests that take something away need a host where it is there."""
    found = await measure(data_dir)
    if found["user-namespaces"].verdict != "ok":
        pytest.skip(f"this host cannot isolate: {found['user-namespaces'].found}")
    return found


# The sandbox


@needs_bwrap
async def test_what_holds_inside_is_found_to_hold_and_nothing_is_left(data_dir: str, sound: dict[str, Finding]) -> None:
    assert sound.keys() >= INSIDE
    assert {id: finding for id, finding in sound.items() if finding.verdict != "ok"} == {}
    assert os.listdir(data_dir) == []


@needs_bwrap
async def test_without_the_filter_the_calls_that_get_through_are_named(
    data_dir: str, sound: dict[str, Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_all = struct.pack("<HBBI", 0x06, 0, 0, ALLOW)
    monkeypatch.setattr("ash.isolation.seccomp.compile_filter", lambda machine, **options: allow_all)
    found = (await measure(data_dir))["seccomp"]
    assert found.verdict == "fail"
    assert "clone3" in found.found
    assert found.fix


@needs_bwrap
async def test_without_its_own_network_the_cards_are_named(
    data_dir: str, sound: dict[str, Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    if set(os.listdir("/sys/class/net")) <= {"lo"}:
        pytest.skip("this host has no network card")
    shared = [part for part in bwrap.namespace_arguments() if part != "--unshare-all"]
    parts = ["--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    monkeypatch.setattr(bwrap, "namespace_arguments", lambda: [*parts, *shared])
    assert (await measure(data_dir))["network"].verdict == "fail"


@needs_bwrap
async def test_a_variable_that_gets_inside_is_named(data_dir: str, sound: dict[str, Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    original = bwrap.options
    monkeypatch.setattr(bwrap, "options", lambda *given, **named: [*original(*given, **named), "--setenv", "LEAKED", "x"])
    found = (await measure(data_dir))["environment"]
    assert (found.verdict, "LEAKED" in found.found) == ("fail", True)


@needs_bwrap
async def test_a_host_that_cannot_isolate_is_told_why_and_what_to_do(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*given: object) -> None:
        raise IsolationUnavailable("Agents cannot be isolated: setting up uid map: Permission denied")

    monkeypatch.setattr("ash.isolation.prepare.prepare_sandbox", refuse)
    found = (await measure(data_dir))["user-namespaces"]
    assert (found.verdict, "uid map" in found.found, bool(found.fix)) == ("fail", True, True)


async def test_without_bubblewrap_the_command_that_installs_it_is_given(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.isolation.checks.shutil.which", lambda *given, **named: None)
    found = await measure(data_dir)
    assert [(finding.id, finding.verdict) for finding in found.values()] == [("bubblewrap", "fail")]
    assert host.install_hint() in found["bubblewrap"].fix


# The kernel


@pytest.mark.parametrize(("release", "verdict"), [("6.1.0-18-amd64", "ok"), ("5.10.0", "warn"), ("4.19.0", "fail")])
def test_an_old_kernel_is_warned_of(release: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.uname()
    monkeypatch.setattr("os.uname", lambda: os.uname_result((real.sysname, real.nodename, release, real.version, real.machine)))
    [found] = [finding for finding in checks.check_kernel() if finding.id == "kernel"]
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "ok")


@pytest.mark.parametrize(("machine", "verdict"), [("x86_64", "ok"), ("aarch64", "ok"), ("riscv64", "fail")])
def test_a_machine_without_a_filter_fails(machine: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert {finding.id: finding.verdict for finding in checks.check_kernel()}["architecture"] == verdict


# Control groups


def test_a_tree_that_cannot_be_used_is_a_warning_for_each_controller_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    report = delegation.TreeReport("/x", "delegated", (), {}, "it belongs to somebody else", "ask them")
    monkeypatch.setattr(delegation, "describe_tree", lambda root: report)
    found = list(checks.check_cgroups("", 0, LIMITS))
    assert [(finding.id, finding.verdict, finding.fix) for finding in found] == [
        (f"cgroup.{name}", "warn", "ask them") for name in CONTROLLERS
    ]
    assert all("it belongs to somebody else" in finding.found for finding in found)


def test_a_folder_that_is_no_cgroup_is_found_out_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything looks right until a process is to be put into it."""
    (tmp_path / "cgroup.controllers").write_text("memory pids cpu io")
    (tmp_path / "cgroup.subtree_control").write_text("memory pids cpu io")
    (tmp_path / "cgroup.procs").write_text("")
    monkeypatch.setattr("ash.isolation.checks._TRIAL_TIMEOUT", 0.3)
    found = list(checks.check_cgroups(str(tmp_path), 0, LIMITS))
    assert [finding.verdict for finding in found] == ["fail"]
    assert found[0].fix


# Disk, memory, clock


def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount() -> None:
    assert machine.file_system("/proc/self") == "proc"
    assert machine.nearest("/proc/none/of/this") == "/proc"


@pytest.mark.parametrize(
    ("kind", "verdict"), [("ext4", "ok"), ("tmpfs", "warn"), ("nfs4", "fail"), ("fuse.sshfs", "fail"), ("overlay", "ok")]
)
def test_a_file_system_that_cannot_hold_the_database_fails(
    kind: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "file_system", lambda path: kind)
    assert {finding.id: finding.verdict for finding in machine.check_disk(str(tmp_path), LIMITS)}["file-system"] == verdict


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs("/")
    small = os.statvfs_result((4096, 4096, 1000, 1000, 1000, 1000, 10, 10, *real[8:]))
    monkeypatch.setattr("os.statvfs", lambda path: small)


def test_a_disk_that_is_nearly_full_is_warned_of_in_full_and_in_brief(small_disk: None, tmp_path: Path) -> None:
    found = {finding.id: finding.verdict for finding in machine.check_disk(str(tmp_path), LIMITS)}
    assert (found["disk-space"], found["disk-files"]) == ("warn", "warn")
    assert any("MiB are free" in text for text in machine.brief(str(tmp_path), {}))


def test_sessions_without_a_quota_are_warned_of(tmp_path: Path) -> None:
    found = {finding.id: finding for finding in machine.check_disk(str(tmp_path), LIMITS._replace(disk_mb=0, max_files=0))}
    assert (found["disk-quota"].verdict, "--disk-mb" in found["disk-quota"].fix) == ("warn", True)


@pytest.mark.parametrize(("memory_mb", "verdict"), [(32, "ok"), (1 << 30, "warn")])
def test_sandboxes_that_do_not_fit_into_memory_are_warned_of(memory_mb: int, verdict: str) -> None:
    assert next(iter(machine.check_memory(LIMITS._replace(memory_mb=memory_mb), 1))).verdict == verdict


def test_a_clock_that_stands_before_the_database_is_warned_of() -> None:
    assert machine.check_clock().verdict == "ok"
    assert machine.check_clock(4e9).verdict == "warn"


def test_a_clock_in_another_century_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert machine.check_clock().verdict == "fail"


def test_in_brief_only_what_is_missing_is_said(tmp_path: Path) -> None:
    assert [text for text in machine.brief(str(tmp_path), {}) if "cgroup" in text] == []
    [said] = [text for text in machine.brief(str(tmp_path), {"memory": "somebody else has it", "io": "none"}) if "cgroup" in text]
    assert "memory" in said
    assert "somebody else has it" in said
    assert "ash doctor" in said


async def test_a_start_says_in_brief_what_it_found(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "brief", lambda folder, missing: [f"little is left in {folder}"])
    places = Folders(data_dir)
    places.open()
    try:
        isolation = await prepare.prepare("none", places, LIMITS, Choices())
        isolation.close()
    finally:
        places.close()
    assert f"little is left in {data_dir}" in isolation.warnings()
