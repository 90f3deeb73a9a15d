"""What an operator may show to sandboxes, and that a link in a root file system never leads out of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ash.errors import ConfigError
from ash.isolation import bundle, bwrap, interpreter, outside
from ash.isolation.records import Mount

# A root file system


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    for name in ("usr/bin", "etc", "opt/tool", "opt/ash", "home/me", "dev", "var/lib"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "lib"):
        (folder / name).symlink_to(f"usr/{name}")
    (folder / "usr/bin/sh").touch(0o755)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir()
    return str(tmp_path / "data")


def test_a_path_in_a_root_file_system_is_found_as_inside(root: Path) -> None:
    (root / "etc/up").symlink_to("../../../../../usr")
    (root / "etc/absolute").symlink_to("/usr/bin")
    assert outside.resolve(str(root), "/bin/sh") == f"{root}/usr/bin/sh"
    assert outside.resolve(str(root), "etc/up/bin/../bin/sh") == f"{root}/usr/bin/sh"
    assert outside.resolve(str(root), "/etc/absolute/nothing") == f"{root}/usr/bin/nothing"
    assert outside.resolve(str(root), "/../../..") == f"{root}"


def test_links_in_a_circle_end(root: Path) -> None:
    (root / "etc/a").symlink_to("b")
    (root / "etc/b").symlink_to("a")
    assert outside.resolve(str(root), "/etc/a") == ""


def test_a_root_file_system_is_taken(root: Path, data: str) -> None:
    assert outside.check_rootfs(str(root), data) == str(root)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("usr", "absolute path"),
        ("/", "this machine's own"),
        ("/nowhere", "no such folder"),
        ("/proc", "of the kernel's"),
        ("{data}/root", "shares files with the data folder"),
        ("{data}", "shares files with the data folder"),
        ("{above}", "shares files with the data folder"),
        ("{root}/usr", "no folder usr/"),
    ],
)
def test_a_folder_that_is_no_root_file_system_is_refused(path: str, reason: str, root: Path, data: str) -> None:
    os.mkdir(f"{data}/root")
    with pytest.raises(ConfigError, match=reason):
        outside.check_rootfs(path.format(root=root, data=data, above=root.parent), data)


def test_a_root_file_system_that_others_can_change_is_refused(root: Path, data: str) -> None:
    (root / "usr").chmod(0o775)
    with pytest.raises(ConfigError, match="chmod go-w"):
        outside.check_rootfs(str(root), data)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a folder away")
def test_a_root_file_system_of_another_user_is_refused(root: Path, data: str) -> None:
    os.chown(root, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        outside.check_rootfs(str(root), data)


def test_a_root_file_system_without_a_shell_is_refused(root: Path, data: str) -> None:
    (root / "usr/bin/sh").unlink()
    with pytest.raises(ConfigError, match="/bin/sh"):
        outside.check_rootfs(str(root), data)


def test_a_shell_that_links_out_is_none(root: Path, data: str) -> None:
    (root / "usr/bin/sh").unlink()
    (root / "usr/bin/sh").symlink_to("../../../../../../../../usr/bin/env")
    with pytest.raises(ConfigError, match="/bin/sh"):
        outside.check_rootfs(str(root), data)


def test_all_of_a_root_file_system_is_shown_but_the_places_of_the_sandbox(root: Path) -> None:
    arguments = bwrap.rootfs_arguments(str(root), "/stage/root")
    shown = {arguments[i + 2]: arguments[i : i + 2] for i in range(0, len(arguments), 3)}
    assert shown == {
        "/bin": ("--symlink", "usr/bin"),
        "/lib": ("--symlink", "usr/lib"),
        "/usr": ("--ro-bind", "/stage/root/usr"),
        "/var": ("--ro-bind", "/stage/root/var"),
        "/opt/tool": ("--ro-bind", "/stage/root/opt/tool"),
    }


def test_etc_takes_nothing_from_behind_a_link_that_leads_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (root / "etc/timezone").symlink_to("/../../../secret")
    (root / "etc/services").symlink_to(f"{tmp_path}/secret")
    (root / "etc/protocols").symlink_to("/usr/own")
    (root / "usr/own").write_text("own")
    (root / "etc/alternatives").symlink_to(f"{tmp_path}")
    etc = Path(bundle.build_etc(str(tmp_path), str(root)))
    assert not (etc / "timezone").exists()
    assert not (etc / "services").exists()
    assert (etc / "protocols").read_text() == "own"
    assert bwrap.etc_folders(str(root)) == ()
    assert {line.split(":")[0] for line in (etc / "passwd").read_text().splitlines()} == {"root", "agent", "nobody"}


def test_folders_of_etc_come_from_the_root_file_system(root: Path) -> None:
    (root / "etc/pki/tls/certs").mkdir(parents=True)
    (root / "etc/ssl").mkdir()
    (root / "etc/ssl/certs").symlink_to("/etc/pki/tls/certs")
    certificates = f"{root}/etc/pki/tls/certs"
    assert bwrap.etc_folders(str(root)) == ((certificates, "ssl/certs"), (certificates, "pki/tls/certs"))


def test_only_interpreters_of_the_root_file_system_are_tried(root: Path) -> None:
    assert interpreter.candidates(str(root)) == []
    for name in ("python3.9", "python3.12", "python3.11"):
        (root / "usr/bin" / name).touch(0o755)
    (root / "usr/bin/python3").symlink_to("python3.12")
    assert interpreter.candidates(str(root)) == [f"/usr/bin/{name}" for name in ("python3", "python3.12", "python3.11")]


def test_a_program_is_found_by_the_path_inside(root: Path) -> None:
    (root / "usr/sbin").mkdir()
    (root / "usr/sbin/prlimit").touch(0o755)
    (root / "usr/bin/prlimit").touch(0o644)
    assert outside.find_program(str(root), "prlimit", "/usr/bin:/usr/sbin") == "/usr/sbin/prlimit"
    assert outside.find_program(str(root), "nothing", "/usr/bin:/usr/sbin") is None


# Mounts


def test_mounts_get_their_real_source(tmp_path: Path, data: str) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "link").symlink_to("tools")
    found = outside.check_mounts([Mount(f"{tmp_path}/link", "/opt/tools"), Mount("/etc/passwd", "/data/users")], data)
    assert found == (Mount(f"{tmp_path}/tools", "/opt/tools"), Mount("/etc/passwd", "/data/users"))


TARGETS = (
    "/", "/agent", "/agent/x", "/workspace/data", "/home/agent", "/home", "/run/ash", "/run", "/proc/x", "/sys", "/dev/shm", "/etc",
    "/etc/ssl", "/tmp", "/tmp/x", "/opt", "/opt/ash", "/usr", "/usr/local", "/bin", "/lib64/x", "data", "/data/", "/data/../etc",
    "/./data", "//data", "/a//b",
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_the_sandboxs_own_is_refused(target: str, tmp_path: Path, data: str) -> None:
    (tmp_path / "tools").mkdir()
    with pytest.raises(ConfigError, match="its target"):
        outside.check_mounts([Mount(f"{tmp_path}/tools", target)], data)


@pytest.mark.parametrize(
    "source", ["/", "/proc", "/proc/1", "/sys/kernel", "/dev", "/run", "/nowhere", "tools", "{data}", "{data}/x", "{above}", "{link}"]
)
def test_a_source_that_shows_too_much_is_refused(source: str, tmp_path: Path, data: str) -> None:
    os.mkdir(f"{data}/x")
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(ConfigError, match="source"):
        outside.check_mounts([Mount(source.format(data=data, above=tmp_path, link=tmp_path / "link"), "/data")], data)


def test_a_socket_is_no_source(tmp_path: Path, data: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        with pytest.raises(ConfigError, match="neither a folder nor a file"):
            outside.check_mounts([Mount(f"{tmp_path}/s", "/data")], data)


@pytest.mark.parametrize("second", ["/data", "/data/more", "/"])
def test_two_mounts_do_not_meet(second: str, tmp_path: Path, data: str) -> None:
    (tmp_path / "tools").mkdir()
    mounts = [Mount(f"{tmp_path}/tools", "/data"), Mount(f"{tmp_path}/tools", second)]
    with pytest.raises(ConfigError, match="its target"):
        outside.check_mounts(mounts, data)
