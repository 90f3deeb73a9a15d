"""The bubblewrap command line as pure data: what is mounted, in which order, and what the process may use."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from ash.isolation import bwrap
from ash.isolation.bwrap import Mounts, System
from ash.isolation.records import Limits

LIMITS = Limits(512, 100, 64, 10)
SYSTEM = System(("--ro-bind", "/usr", "/usr"), "/data/run/etc-1", (("/etc/ssl/certs", "ssl/certs"),), None)
SESSION = bwrap.session_arguments(Mounts("/s/workspace", "/s/home", "/s/agent", "/r/gw"), "/r/bridge.zip")


def binds(arguments: list[str], kind: str) -> dict[str, str]:
    """Destination to source of every bind of a kind."""
    return {arguments[i + 2]: arguments[i + 1] for i, word in enumerate(arguments) if word == kind}


def test_every_namespace_is_unshared_and_every_capability_dropped() -> None:
    arguments = bwrap.options(SYSTEM)
    for flag in ("--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--clearenv"):
        assert flag in arguments
    assert arguments[arguments.index("--cap-drop") + 1] == "ALL"


def test_a_sandbox_outlives_its_server() -> None:
    assert "--die-with-parent" not in bwrap.options(SYSTEM)


def test_only_workspace_and_home_are_writable() -> None:
    assert set(binds(bwrap.options(SYSTEM, session=SESSION), "--bind")) == {"/workspace", "/home/agent"}


def test_nothing_of_the_host_but_usr_and_chosen_parts_of_etc_is_bound() -> None:
    read_only = binds(bwrap.options(SYSTEM, session=SESSION), "--ro-bind")
    assert set(read_only) == {"/usr", "/proc/sys", "/etc", "/etc/ssl/certs", "/opt/ash/bridge.zip", "/run/ash", "/agent"}
    assert read_only["/etc"] == "/data/run/etc-1"


def test_tmp_is_mounted_before_every_bind_that_could_lie_below_it() -> None:
    arguments = bwrap.options(SYSTEM, session=SESSION)
    assert arguments.index("/tmp") < min(arguments.index(path) for path in ("/workspace", "/agent", "/run/ash"))


def test_tmp_has_a_size_limit() -> None:
    arguments = bwrap.options(SYSTEM, tmp_mb=3)
    place = arguments.index("/tmp")
    assert arguments[place - 3 : place] == ["--size", str(3 * 1024 * 1024), "--tmpfs"]


def test_the_root_becomes_read_only_after_everything_is_mounted() -> None:
    arguments = bwrap.options(SYSTEM, session=SESSION)
    assert arguments.index("/") > max(i for i, word in enumerate(arguments) if "bind" in word)


def test_an_interpreter_elsewhere_brings_its_prefix() -> None:
    system = SYSTEM._replace(prefix=("/stage/python", "/opt/python"))
    assert binds(bwrap.options(system), "--ro-bind")["/opt/python"] == "/stage/python"


def test_merged_folders_are_links_and_others_are_bound(tmp_path: Path) -> None:
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "lib64").mkdir()
    arguments = bwrap.usr_arguments(str(tmp_path))
    assert arguments == ("--symlink", "usr/bin", "/bin", "--ro-bind", f"{tmp_path}/lib64", "/lib64")


def test_the_bridge_is_started_with_the_agreed_arguments() -> None:
    argv = bwrap.boot_arguments("/usr/bin/python3", "/b.zip", 9, 60.0)
    assert argv[:5] == ["/usr/bin/python3", "-I", "-S", "-B", "-c"]
    assert argv[5] == "import sys; sys.path.insert(0, '/b.zip'); from ash.bridge import main; main()"
    assert argv[6:] == ["--listen-fd", "9", "--orphan-timeout", "60"]


def test_rlimits_carry_the_settings() -> None:
    flags = bwrap.limit_arguments("prlimit", LIMITS, processes=True)
    assert {"--core=0", "--nproc=64", f"--fsize={10 * 1024 * 1024}", f"--data={512 * 1024 * 1024}"} <= set(flags)


def test_processes_are_not_limited_where_the_limit_would_count_the_users_own() -> None:
    assert not any(flag.startswith("--nproc") for flag in bwrap.limit_arguments("prlimit", LIMITS, processes=False))


def test_a_limit_never_exceeds_what_the_server_itself_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 20))
    assert "--nofile=20" in bwrap.limit_arguments("prlimit", LIMITS, processes=False)


def test_a_small_memory_setting_leaves_room_for_the_stacks_of_threads() -> None:
    assert bwrap.data_limit_mb(LIMITS._replace(memory_mb=32)) == bwrap.MEMORY_FLOOR_MB
