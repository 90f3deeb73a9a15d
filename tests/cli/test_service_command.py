"""`ash service` without a machine of its own: what it writes, keeps and refuses, below a folder that stands for the system's."""

from __future__ import annotations

import argparse
import io
import os
import socket
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ash import notify
from ash.cli import service, unit
from ash.cli.terminal import Terminal
from ash.cli.unit import Plan
from ash.errors import AshError, ConfigError, Conflict, Forbidden, NotFound, SandboxFailed
from tests.cli.conftest import Ash

ROOT_PLAN = Plan("ash", "root", "", "/var/lib/ash", 0, "/etc/ash/ash.env", "/usr/bin/python3")
PROGRAM = "/usr/local/lib/ash/ash.pyz"
BREAKS_BUBBLEWRAP = (
    "ProtectKernelTunables", "ProtectKernelLogs", "ProcSubset", "RestrictNamespaces", "ProtectHostname", "ProtectControlGroups",
    "MemoryDenyWriteExecute", "PrivateNetwork", "PrivateUsers",
)  # fmt: skip
SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$1" in restart) exit {code} ;; esac
"""

System = Callable[..., Path]


def lines(plan: Plan) -> list[str]:
    return unit.unit_text(plan, PROGRAM).splitlines()


# The unit


def test_the_unit_delegates_its_cgroup_and_survives_a_sandbox_without_memory() -> None:
    assert {"Delegate=yes", "OOMPolicy=continue", "KillMode=mixed", "TasksMax=infinity", "Type=notify"} <= set(lines(ROOT_PLAN))
    assert f"ExecStart=/usr/bin/python3 -P {PROGRAM} start --data-dir /var/lib/ash" in lines(ROOT_PLAN)


@pytest.mark.parametrize("kind", unit.KINDS)
def test_no_unit_has_a_directive_under_which_sandboxes_do_not_start(kind: str) -> None:
    names = {line.partition("=")[0] for line in lines(ROOT_PLAN._replace(kind=kind, user="ash" if kind == "user" else ""))}
    assert not names.intersection(BREAKS_BUBBLEWRAP)
    assert "NoNewPrivileges" in names


def test_only_the_root_kind_has_capabilities() -> None:
    bounds = {
        kind: next(line for line in lines(ROOT_PLAN._replace(kind=kind, user="x")) if line.startswith("CapabilityBoundingSet="))
        for kind in unit.KINDS
    }
    assert "CAP_SYS_ADMIN" in bounds["root"]
    assert bounds["user"] == bounds["dynamic"] == "CapabilityBoundingSet="


def test_each_kind_says_who_it_runs_as() -> None:
    assert not [line for line in lines(ROOT_PLAN) if line.startswith(("User=", "DynamicUser="))]
    assert "User=bot" in lines(ROOT_PLAN._replace(kind="user", user="bot"))
    assert "DynamicUser=yes" in lines(ROOT_PLAN._replace(kind="dynamic"))


def test_a_data_folder_elsewhere_is_opened_and_one_in_a_home_too() -> None:
    there = lines(ROOT_PLAN._replace(data_dir="/srv/ash data"))
    assert 'ReadWritePaths="/srv/ash data"' in there
    assert not [line for line in there if line.startswith("StateDirectory=")]
    assert "ProtectHome=yes" in there
    assert "ProtectHome=no" in lines(ROOT_PLAN._replace(data_dir="/home/me/ash"))


def test_signs_that_mean_something_in_a_unit_are_taken_literally() -> None:
    start = next(line for line in lines(ROOT_PLAN._replace(data_dir='/srv/50% "$HOME" \\x')) if line.startswith("ExecStart="))
    assert start.endswith('--data-dir "/srv/50%% \\"$$HOME\\" \\\\x"')


def test_an_installed_unit_tells_what_it_was_asked_to_be() -> None:
    plan = ROOT_PLAN._replace(kind="user", user="bot", port=8080, made_user=True)
    assert unit.parse_unit(unit.unit_text(plan, PROGRAM)) == plan


@pytest.mark.parametrize("text", ["", "[Service]\nExecStart=/bin/true\n", "[X-Ash]\nOptions={}\n", "[X-Ash]\nOptions=[1\n", "[X-Ash]\n"])
def test_a_unit_of_somebody_else_is_not_taken_for_ours(text: str) -> None:
    assert unit.parse_unit(text) is None


# Installing, below a folder


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """Stands for a machine with systemd; a call gives its root. `code` is how `systemctl restart` ends."""
    places = {"UNITS": "etc/systemd/system", "PROGRAMS": "usr/local/lib/ash", "COMMANDS_DIR": "usr/local/bin", "ENV_DIR": "etc/ash"}
    for name, place in {**places, "_SYSTEMD": "run/systemd/system"}.items():
        (tmp_path / place).mkdir(parents=True)
        monkeypatch.setattr(service, name, str(tmp_path / place))
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(unit, "STATE_ROOT", str(tmp_path / "lib"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    source = tmp_path / "ash.pyz"
    source.write_bytes(b"new version")
    monkeypatch.setattr(service, "_own_file", lambda: str(source))
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def make(code: int = 0) -> Path:
        (tools / "systemctl").write_text(SYSTEMCTL.format(log=tmp_path / "calls", code=code))
        (tools / "systemctl").chmod(0o755)
        return tmp_path

    return make


def call(name: str, *arguments: str) -> str:
    """Runs one command in this process; what it printed."""
    command = service.COMMANDS[name]
    parser = argparse.ArgumentParser()
    assert command.configure is not None
    command.configure(parser)
    out = io.StringIO()
    _ = command.run(parser.parse_args(arguments), Terminal(out=out, err=io.StringIO()))
    return out.getvalue()


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text().splitlines()


def test_install_puts_everything_in_place_and_starts_it(system: System) -> None:
    root = system()
    assert "Installed the service ash, which runs as root" in call("install")
    assert calls(root) == ["daemon-reload", "--quiet enable ash.service", "restart ash.service"]
    assert (root / "usr/local/lib/ash/ash.pyz").read_bytes() == b"new version"
    assert stat.S_IMODE((root / "etc/ash/ash.env").stat().st_mode) == 0o600
    assert "ANTHROPIC_API_KEY" in (root / "etc/ash/ash.env").read_text()
    assert os.access(root / "usr/local/bin/ash", os.X_OK)
    assert unit.parse_unit((root / "etc/systemd/system/ash.service").read_text()) is not None


def test_the_installed_command_runs_the_installed_file(system: System) -> None:
    root = system()
    with zipfile.ZipFile(root / "ash.pyz", "w") as archive:
        archive.writestr("__main__.py", "import sys; print(sys.argv[1:])")
    _ = call("install", "--no-start")
    done = subprocess.run([root / "usr/local/bin/ash", "a b", "$c"], capture_output=True, text=True, check=True)
    assert done.stdout == "['a b', '$c']\n"


def test_installing_again_upgrades_and_keeps_what_was_chosen(system: System) -> None:
    root = system()
    _ = call("install", "--dynamic-user", "--port", "8080")
    before = (root / "etc/systemd/system/ash.service").read_text()
    (root / "etc/ash/ash.env").write_text("ANTHROPIC_API_KEY=mine\n")
    (root / "ash.pyz").write_bytes(b"newer version")
    assert "Upgraded the service ash, which runs as a dynamic user" in call("install")
    assert (root / "etc/systemd/system/ash.service").read_text() == before
    assert (root / "etc/ash/ash.env").read_text() == "ANTHROPIC_API_KEY=mine\n"
    assert (root / "usr/local/lib/ash/ash.pyz").read_bytes() == b"newer version"
    assert (root / "usr/local/lib/ash/ash.pyz.previous").read_bytes() == b"new version"


def test_the_same_file_again_keeps_the_version_before_it(system: System) -> None:
    root = system()
    _ = call("install")
    assert "Renewed" in call("install")
    assert not (root / "usr/local/lib/ash/ash.pyz.previous").exists()


def test_a_start_that_fails_says_how_to_go_back(system: System) -> None:
    root = system()
    _ = call("install")
    (root / "ash.pyz").write_bytes(b"broken version")
    _ = system(code=1)
    with pytest.raises(SandboxFailed, match=r"the service does not start(.|\n)*mv .*ash\.pyz\.previous"):
        call("install")


def test_no_start_leaves_the_running_one_alone(system: System) -> None:
    root = system()
    assert "systemctl start ash" in call("install", "--no-start")
    assert not [line for line in calls(root) if line.startswith("restart")]


def test_a_second_service_has_everything_of_its_own(system: System) -> None:
    root = system()
    _ = call("install")
    _ = call("install", "--name", "ash-two", "--port", "4200")
    text = (root / "etc/systemd/system/ash-two.service").read_text()
    assert f"{root}/lib/ash-two --port 4200" in text
    assert (root / "etc/ash/ash-two.env").exists()
    _ = call("uninstall", "--name", "ash-two", "--yes")
    assert (root / "usr/local/bin/ash").exists()
    assert not (root / "usr/local/bin/ash-two").exists()


def test_a_service_with_data_keeps_its_kind(system: System) -> None:
    root = system()
    _ = call("install")
    (root / "lib/ash").mkdir()
    (root / "lib/ash/ash.db").touch()
    with pytest.raises(Conflict, match="runs as root and has data"):
        call("install", "--dynamic-user")
    assert "Renewed" in call("install", "--root")


def test_what_is_not_ours_is_not_replaced(system: System) -> None:
    root = system()
    (root / "usr/local/bin/ash").write_text("#!/bin/sh\n")
    with pytest.raises(Conflict, match="is not Ash's"):
        call("install")
    (root / "usr/local/bin/ash").unlink()
    (root / "etc/systemd/system/ash.service").write_text("[Service]\n")
    with pytest.raises(Conflict, match="was not written by"):
        call("install")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--name", "../x"], "--name"),
        (["--user", "a b"], "no user name"),
        (["--user", "root"], "leave it out"),
        (["--port", "70000"], "between 1 and 65535"),
        (["--port", "80", "--dynamic-user"], "put a proxy"),
        (["--dynamic-user", "--data-dir", "/srv/ash"], "leave out --data-dir"),
        (["--data-dir", "/srv/a\nb"], "control characters"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(system: System, options: list[str], complaint: str) -> None:
    root = system()
    with pytest.raises(ConfigError, match=complaint):
        call("install", *options)
    assert not (root / "calls").exists()
    assert not list((root / "etc/systemd/system").iterdir())


def test_uninstall_removes_all_of_it(system: System) -> None:
    root = system()
    _ = call("install")
    (root / "lib/ash/sessions").mkdir(parents=True)
    (root / "lib/ash/ash.db").touch()
    (root / "etc/systemd/system/ash.service.d").mkdir()
    assert "Removed the service ash." in call("uninstall", "--yes")
    assert "--quiet disable --now ash.service" in calls(root)
    left = [path for path in root.rglob("*") if path.is_file() and path.parent != root and "tools" not in path.parts]
    assert left == []
    assert not (root / "lib/ash").exists()
    with pytest.raises(NotFound, match="ash service install"):
        call("uninstall", "--yes")


def test_uninstall_can_keep_the_data(system: System) -> None:
    root = system()
    _ = call("install")
    (root / "lib/ash").mkdir()
    assert f"Kept: {root}/lib/ash" in call("uninstall", "--keep-data")
    assert (root / "lib/ash").exists()
    assert (root / "etc/ash/ash.env").exists()
    assert not (root / "usr/local/bin/ash").exists()


def test_a_folder_that_is_no_data_folder_stays(system: System) -> None:
    root = system()
    (root / "precious").mkdir()
    (root / "precious/file").touch()
    _ = call("install", "--data-dir", str(root / "precious"))
    assert f"Kept: {root}/precious" in call("uninstall", "--yes")
    assert (root / "precious/file").exists()


def test_nothing_is_removed_without_a_word(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    root = system()
    _ = call("install")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match="--yes, or --keep-data"):
        call("uninstall")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n")
    with pytest.raises(AshError, match="nothing was removed"):
        call("uninstall")
    assert (root / "usr/local/bin/ash").exists()


def test_only_root_installs(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = system()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Forbidden, match="sudo"):
        call("install")
    assert "ExecStart=" in call("install", "--print"), "which changes nothing, and so is for everybody"


def test_without_systemd_it_says_what_to_do(system: System, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _ = system()
    monkeypatch.setattr(service, "_SYSTEMD", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="ash start --detach"):
        call("install")


def test_a_checkout_is_no_file_to_install(ash: Ash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "systemctl").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(service, "_SYSTEMD", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = ash("service", "install", "--name", "ash-no-such-service")
    assert done.code == 2
    assert "ash.pyz service install" in done.err


# What the server tells systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listener


def test_the_service_manager_hears_when_the_server_is_ready_reloads_and_stops(manager: socket.socket) -> None:
    with manager:
        assert notify.is_supervised()
        notify.ready("listens")
        notify.reloading()
        notify.stopping("SIGTERM")
        said = [manager.recv(1000).decode() for _ in range(3)]
    assert said[0] == "READY=1\nSTATUS=listens"
    assert said[1].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert said[2] == "STOPPING=1\nSTATUS=SIGTERM"


def test_an_abstract_socket_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0ash-test-notify-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@ash-test-notify-{os.getpid()}")
        notify.ready("listens")
        assert listener.recv(1000).startswith(b"READY=1")


def test_no_manager_and_a_deaf_one_do_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.ready("listens")
    assert not notify.is_supervised()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify.ready("listens")
