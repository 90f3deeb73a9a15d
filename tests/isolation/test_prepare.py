"""Finding out what a host can do: interpreters, what the sandboxes share, the stage, and what is said when it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash.errors import ConfigError, SandboxFailed
from ash.isolation import bundle, host, interpreter, stage
from ash.isolation.folders import Folders
from ash.isolation.prepare import Isolation, kernel_version
from ash.isolation.records import Limits

FAKE_BRIDGE = str(Path(__file__).with_name("fake_bridge.py"))

# Interpreters


def describe(version: list[int], prefix: str, executable: str) -> str:
    return json.dumps([version, prefix, executable, "cafe"])


def test_an_interpreter_under_usr_needs_no_mount() -> None:
    assert interpreter.parse_description(describe([3, 11, 2], "/usr", "/usr/bin/env")).prefix is None


def test_an_interpreter_elsewhere_brings_its_prefix() -> None:
    assert interpreter.parse_description(describe([3, 12, 1], "/nowhere/py", "/nowhere/py/bin/python")).prefix == "/nowhere/py"


def test_an_old_interpreter_is_refused_with_its_version() -> None:
    with pytest.raises(ConfigError, match=r"Python 3\.9\.1 is too old"):
        interpreter.parse_description(describe([3, 9, 1], "/usr", "/usr/bin/python3"))


@pytest.mark.parametrize("path", ["python3", "/nowhere/python3", "/bin/true", "/etc/passwd"])
async def test_something_that_is_no_interpreter_is_refused_by_name(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        await interpreter.describe(path)


async def test_our_own_interpreter_describes_itself() -> None:
    found = await interpreter.describe(sys.executable)
    assert found.version == ".".join(str(part) for part in sys.version_info[:3])


def test_the_systems_interpreters_come_first() -> None:
    found = interpreter.candidates()
    assert found[-1] == sys.executable
    assert all(os.access(path, os.X_OK) for path in found)


@pytest.mark.parametrize("inside", ["/", "{home}", "{home}/.local", "{above}", "{data}", "{above_data}"])
def test_a_prefix_that_holds_more_than_an_interpreter_is_refused(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, data = tmp_path / "people" / "me", tmp_path / "place" / "data"
    monkeypatch.setenv("HOME", str(home))
    prefix = inside.format(home=home, above=home.parent, data=data, above_data=data.parent)
    with pytest.raises(ConfigError, match=r"would be shown to every sandbox.*give a Python"):
        interpreter.check_prefix(prefix, str(data))


@pytest.mark.parametrize("prefix", ["/usr", "/opt/python", "{home}/.pyenv/versions/3.12.1", "{home}/.local/share/uv/python/cpython-3.12"])
def test_an_interpreters_own_folder_is_taken(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    interpreter.check_prefix(prefix.format(home=tmp_path), str(tmp_path / ".ash"))


# What the sandboxes share


def test_the_bridge_is_packed_once_and_starts_from_the_zip(tmp_path: Path) -> None:
    sources = bundle.bridge_sources()
    path = bundle.build_bridge(str(tmp_path), sys.executable, "v", sources)
    assert bundle.build_bridge(str(tmp_path), sys.executable, "v", sources) == path
    script = f"import sys; sys.path.insert(0, {path!r}); import ash.bridge; print(ash.bridge.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == f"{path}/ash/bridge.pyc"


def test_another_source_or_interpreter_gives_another_file(tmp_path: Path) -> None:
    real, fake = bundle.bridge_sources(), bundle.bridge_sources(FAKE_BRIDGE)
    paths = {bundle.build_bridge(str(tmp_path), sys.executable, version, sources) for version in "ab" for sources in (real, fake)}
    assert len(paths) == 4


def test_the_zip_holds_the_bridge_and_nothing_of_the_server(tmp_path: Path) -> None:
    path = bundle.build_bridge(str(tmp_path), sys.executable, "v", bundle.bridge_sources())
    names = {name.split("/")[1].partition(".")[0] for name in zipfile.ZipFile(path).namelist()}
    assert names == {"__init__", "errors", "protocol", "sse", "bridge", "runtime"}


def test_the_interpreter_that_compiles_runs_in_its_box(tmp_path: Path) -> None:
    boxed: list[list[str]] = []

    @contextlib.contextmanager
    def box(command: list[str]) -> Iterator[tuple[list[str], tuple[int, ...]]]:
        boxed.append(command)
        yield [sys.executable, *command[1:]], ()

    path = bundle.build_bridge(str(tmp_path), "/nowhere/python3", "v", {"ash/bridge.py": "x = 1\n"}, box)
    assert [command[0] for command in boxed] == ["/nowhere/python3"]
    assert zipfile.ZipFile(path).namelist() == ["ash/bridge.py", "ash/bridge.pyc"]


def test_a_failed_compilation_leaves_the_sources(tmp_path: Path) -> None:
    path = bundle.build_bridge(str(tmp_path), "/bin/false", "v", {"ash/bridge.py": "x = 1\n"})
    assert zipfile.ZipFile(path).namelist() == ["ash/bridge.py"]


def test_the_shared_etc_names_no_user_of_the_host(tmp_path: Path) -> None:
    etc = Path(bundle.build_etc(str(tmp_path)))
    assert {line.split(":")[0] for line in (etc / "passwd").read_text().splitlines()} == {"root", "agent", "nobody"}
    assert not {"shadow", "sudoers", "machine-id", "ssh", "fstab"} & {entry.name for entry in etc.iterdir()}
    assert bundle.build_etc(str(tmp_path)) == str(etc)


def test_earlier_versions_are_pruned_and_run_folders_are_not(tmp_path: Path) -> None:
    etc = bundle.build_etc(str(tmp_path))
    (tmp_path / "etc-0123456789abcdef").mkdir()
    (tmp_path / "bridge-0123456789abcdef.zip").touch()
    (tmp_path / "0b7d2a5e").mkdir()
    bundle.prune(str(tmp_path), {etc})
    assert {entry.name for entry in tmp_path.iterdir()} == {os.path.basename(etc), "0b7d2a5e"}


# The stage


def test_the_stage_takes_no_place_that_holds_the_data(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert stage.pick_place([str(one / "data")], [str(one), str(two)]) == str(two)
    with pytest.raises(SandboxFailed, match="can be used"):
        stage.pick_place([str(one / "data")], [str(one)])


def test_paths_on_the_stage_are_translated_and_others_are_not() -> None:
    found = stage.Stage(-1, "/mnt", {"sessions": "/var/data/sessions", "run": "/var/data/run"})
    assert found.locate("/var/data/sessions/x/workspace") == "/mnt/sessions/x/workspace"
    assert found.locate("/var/data/run") == "/mnt/run"
    assert found.locate("/var/data/running") == "/var/data/running"


def test_a_root_server_never_starts_bwrap_as_root() -> None:
    prefix = stage.launch_prefix(stage.Stage(7, "/mnt", {}), 70000, None)
    assert prefix[prefix.index("--setuid") + 1] == "70000"
    assert prefix[prefix.index("--setgid") + 1] == "70000"


def test_a_process_that_cannot_enter_its_cgroup_does_not_start(tmp_path: Path) -> None:
    prefix = stage.launch_prefix(None, None, str(tmp_path / "nowhere"))
    done = subprocess.run([*prefix, "echo", "started"], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (stage.NO_CGROUP_EXIT, "")


def test_a_process_is_in_its_cgroup_before_it_starts(tmp_path: Path) -> None:
    done = subprocess.run([*stage.launch_prefix(None, None, str(tmp_path)), "cat", f"{tmp_path}/cgroup.procs", "/proc/self/oom_score_adj"],
                          capture_output=True, text=True, check=True, timeout=30)  # fmt: skip
    assert done.stdout.split() == ["0", "500"]


# What is said


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=debian\n", "run `apt-get install -y bubblewrap`"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "run `apt-get install -y bubblewrap`"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "run `dnf install -y bubblewrap`"),
        ("ID=alpine\n", "run `apk add bubblewrap`"),
        ("", "install the package `bubblewrap` with this system's package manager"),
    ],
)
def test_the_command_that_installs_bubblewrap_fits_the_system(release: str, command: str) -> None:
    assert host.install_command(release, is_root=True) == command


def test_an_ordinary_user_is_told_to_use_sudo() -> None:
    assert host.install_command("ID=debian\n", is_root=False) == "run `sudo apt-get install -y bubblewrap`"


def test_a_failure_repeats_what_bubblewrap_said() -> None:
    assert "setting up uid map: Permission denied" in host.explain_failure("bwrap: setting up uid map: Permission denied\n")
    assert "0.8 or newer" in host.explain_failure("bwrap: Unknown option --disable-userns\n")


@pytest.mark.parametrize(
    ("said", "directive"),
    [
        ("bwrap: cannot open /proc/sys/user/max_user_namespaces: Read-only file system", "ProtectKernelTunables="),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "ProtectKernelLogs="),
        ("bwrap: Can't read /proc/sys/kernel/overflowuid: No such file or directory", "ProcSubset="),
        ("bwrap: Can't set hostname to sandbox: Operation not permitted", "ProtectHostname="),
        ("bwrap: loopback: Failed to create NETLINK_ROUTE socket: Address family not supported by protocol", "RestrictAddressFamilies="),
        ("bwrap: Failed to make / slave: Operation not permitted", "@mount"),
        ("", "SystemCallErrorNumber="),
    ],
)
def test_a_directive_of_a_systemd_unit_that_stands_in_the_way_is_named(said: str, directive: str) -> None:
    assert directive in host.explain_failure(said)


@pytest.mark.parametrize(("release", "version"), [("6.18.44-fc", (6, 18)), ("5.14.0", (5, 14)), ("4.19", (4, 19)), ("odd", (0, 0))])
def test_kernel_releases_are_read(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


def test_limits_say_what_is_not_in_force_and_why(tmp_path: Path) -> None:
    isolation = Isolation("none", Folders(str(tmp_path)), Limits(512, 100, 64, 10))
    isolation.no_cgroup_reason = "no writable cgroup v2 tree is mounted"
    limits = isolation.describe_limits()
    assert limits["cpu"] == "not limited: no writable cgroup v2 tree is mounted"
    assert limits["processes"].startswith("not limited")
    isolation.prlimit = None
    assert isolation.describe_limits()["memory"].startswith("not limited")
    assert any("util-linux" in warning for warning in isolation.warnings())
