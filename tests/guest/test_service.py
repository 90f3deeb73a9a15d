"""`ash service` on a machine that nobody prepared, once for each kind of service: install, use, abuse, kill, upgrade, uninstall.

Changes the machine as an operator would, so it runs in the test guest alone (`make test-vm`). The tests of one kind run in their
order on one installation; the last one takes it away.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ash.client import AshClient
from ash.errors import AshError

pytestmark = pytest.mark.skipif(not os.path.exists("/etc/ash-test-guest"), reason="not in the test guest; `make test-vm` runs this")

PYZ = "/root/ash.pyz"
ASH = "/usr/local/bin/ash"
URL = "http://127.0.0.1:4100"
GROUP = Path("/sys/fs/cgroup/system.slice/ash.service")
DATA = Path("/var/lib/ash")
OPTIONS = {"root": [], "user": ["--user", "ash"], "dynamic": ["--dynamic-user"]}
SMALL = "ASH_MEMORY_MB=128\nASH_MAX_PROCESSES=64\nASH_WARM_SANDBOXES=1\nASH_START_TIMEOUT=120\nASH_MODEL=offline\n"
"""Limits that an emulated machine can afford to run into."""
PATIENCE = 900.0
FORK_BOMB = """
import os, time
count = 0
try:
    while count < 500:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        count += 1
except OSError:
    print(count)
"""
EAT_MEMORY = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        kept = bytearray(20 << 20)
        time.sleep(60)
        os._exit(0)
"""


def run(*command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False, env=environment()
    )


def environment() -> dict[str, str]:
    """A login's: nothing of the tests' own."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


def done(*command: str) -> str:
    result = run(*command)
    assert result.returncode == 0, result
    return result.stdout


def install(*options: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(done("python3", PYZ, "service", "install", "--json", *options))
    return answer


def status() -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(ASH, "service", "status", "--json").stdout)
    return answer


def until(claim: Callable[[], Any], timeout: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := claim()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module", params=list(OPTIONS))
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """One installation of each kind."""
    kind: str = request.param
    Path("/etc/ash").mkdir(exist_ok=True)
    Path("/etc/ash/ash.env").write_text(SMALL)
    assert install(*OPTIONS[kind])["url"] == URL
    yield kind
    if Path(ASH).exists():
        _ = run(ASH, "service", "uninstall", "--yes")


@pytest.fixture
def client(kind: str) -> Iterator[AshClient]:
    with AshClient(URL, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def session(client: AshClient, tmp_path: Path) -> Iterator[str]:
    """A session that has a sandbox."""
    (tmp_path / "CLAUDE.md").write_text("You are kind.")
    client.deploy_agent("kind", str(tmp_path))
    id = client.create_session("kind").id
    yield id
    with contextlib.suppress(AshError):
        client.end_session(id)


def main_pid() -> int:
    return int(done("systemctl", "show", "ash", "--property=MainPID", "--value"))


def property_of(name: str) -> str:
    return done("systemctl", "show", "ash", f"--property={name}", "--value").strip()


def sandbox_pids() -> list[int]:
    """Every process of the service but the server itself."""
    server = main_pid()
    return [pid for file in GROUP.glob("**/cgroup.procs") for pid in map(int, file.read_text().split()) if pid != server]


def owner(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split()[0])
    return -1


def sandbox_groups() -> set[str]:
    return {path.name for path in GROUP.glob("**/ash-sandbox-*")}


# One installation


def test_an_installed_service_runs_is_enabled_and_tells_so(kind: str) -> None:
    found = status()
    assert (found["active"], found["enabled"], found["restarts"], found["url"]) == (True, True, 0, URL)
    assert property_of("StatusText") == f"listens on {URL}"
    assert "active (running)" in done(ASH, "service", "status")
    assert done("systemd-analyze", "verify", "/etc/systemd/system/ash.service") == ""


def test_what_it_keeps_is_open_to_itself_alone(kind: str) -> None:
    for path in (DATA, DATA / "initial-api-key", Path("/etc/ash/ash.env"), Path("/var/cache/ash")):
        assert path.stat().st_mode & 0o077 == 0, path
    server = owner(main_pid())
    assert (server == 0) == (kind == "root")
    assert DATA.stat().st_uid == server
    for path in (Path("/usr/local/lib/ash/ash.pyz"), Path(ASH), Path("/etc/systemd/system/ash.service")):
        assert path.stat().st_uid == 0
        assert path.stat().st_mode & 0o022 == 0


def test_agents_are_isolated_and_every_limit_is_the_kernels(client: AshClient) -> None:
    health = client.health()
    assert health.isolation == "bwrap", health.warnings
    limits = health.raw["limits"]
    assert all("cgroup v2" in limits[name] for name in ("memory", "cpu", "processes")), limits


def test_an_agent_answers_and_uses_a_tool(client: AshClient, session: str) -> None:
    turn = client.send_message(session, "run `echo a$((40+2))b`")
    assert not turn.is_error
    assert "a42b" in json.dumps(turn.messages)


def test_sandboxes_stand_in_groups_below_the_service_with_a_uid_that_is_not_the_servers_root(
    kind: str, client: AshClient, session: str
) -> None:
    assert client.exec(session, "sleep 300 & echo started", timeout=60).stdout == "started\n"
    sleeper = next(pid for pid in sandbox_pids() if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00300\x00")
    assert "/system.slice/ash.service/" in Path(f"/proc/{sleeper}/cgroup").read_text()
    assert {"memory", "pids", "cpu"} <= set((GROUP / "cgroup.subtree_control").read_text().split())
    uid = owner(sleeper)
    assert uid in range(65_600, 99_900) if kind == "root" else uid == owner(main_pid()) != 0


def test_no_memory_for_one_session_is_no_trouble_for_the_service(client: AshClient, session: str) -> None:
    before = main_pid()
    bystander = client.create_session("kind").id
    assert client.exec(bystander, "echo here", timeout=60).stdout == "here\n"
    with contextlib.suppress(AshError):
        client.exec(session, f"/usr/bin/python3 -I -S -c '{EAT_MEMORY}'; sleep 60", timeout=120)
    events = (GROUP / "memory.events").read_text()
    assert int(events.partition("oom_kill ")[2].split()[0]) > 0, events
    assert client.exec(bystander, "echo still here", timeout=60).stdout == "still here\n"
    assert (main_pid(), property_of("NRestarts"), property_of("ActiveState")) == (before, "0", "active")
    client.end_session(bystander)


def test_a_fork_bomb_meets_its_limit_and_nobody_else(client: AshClient, session: str) -> None:
    result = client.exec(session, f"/usr/bin/python3 -I -S -c '{FORK_BOMB}'", timeout=120)
    assert 1 < int(result.stdout or 0) <= 64, result
    assert client.health().status == "ok"


def test_a_session_that_spins_leaves_the_others_their_share(client: AshClient, session: str) -> None:
    bystander = client.create_session("kind").id
    assert (
        client.exec(session, "for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; echo spinning", timeout=60).stdout == "spinning\n"
    )
    assert not client.send_message(bystander, "run `echo hello`").is_error
    client.end_session(bystander)


def test_doctor_finds_nothing_that_is_missing(kind: str) -> None:
    result = run(ASH, "doctor", "--data-dir", str(DATA))
    assert result.returncode == 0, result.stdout


def test_every_probe_of_the_attack_fails(kind: str) -> None:
    report = f"/var/results/attack-{kind}.json"
    result = run(ASH, "attack", "--data-dir", str(DATA), "--report", report, timeout=1200.0)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_an_ordinary_user_needs_the_key(kind: str) -> None:
    as_guest = ("setpriv", "--reuid=guest", "--regid=guest", "--clear-groups", "env", "HOME=/home/guest", ASH, "agent", "list")
    refused = run(*as_guest)
    assert refused.returncode == 1
    assert "key" in refused.stderr
    key = (DATA / "initial-api-key").read_text().strip()
    assert "kind" in done(*as_guest, "--api-key", key)


def test_a_reload_is_no_restart(kind: str) -> None:
    before = main_pid()
    _ = done("systemctl", "reload", "ash")
    until(lambda: property_of("StatusText") == "the policy was read again")
    assert (main_pid(), property_of("ActiveState")) == (before, "active")


# Its end, by force and otherwise


def test_a_killed_server_is_started_again_and_nothing_of_the_old_one_stays(client: AshClient, session: str) -> None:
    assert client.exec(session, "echo kept > /workspace/file; sleep 1000 & echo started", timeout=60).stdout == "started\n"
    before, old_pids, old_groups = main_pid(), sandbox_pids(), sandbox_groups()
    assert old_pids
    assert old_groups
    os.kill(before, 9)
    until(lambda: property_of("ActiveState") == "active" and main_pid() not in (0, before))
    assert property_of("NRestarts") == "1"
    assert not [pid for pid in old_pids if Path(f"/proc/{pid}").exists()]
    assert not old_groups & sandbox_groups()
    assert not client.send_message(session, "run `cat file`").is_error
    assert client.exec(session, "cat /workspace/file", timeout=60).stdout == "kept\n"


def test_a_restart_ends_every_sandbox_before_systemd_has_to(client: AshClient, session: str) -> None:
    assert client.exec(session, "setsid sleep 1000 & echo started", timeout=60).stdout == "started\n"
    old_pids, old_groups = sandbox_pids(), sandbox_groups()
    marker = done("date", "+%Y-%m-%d %H:%M:%S").strip()
    _ = done("systemctl", "restart", "ash")
    assert not [pid for pid in old_pids if Path(f"/proc/{pid}").exists()]
    assert not old_groups & sandbox_groups()
    said = done("journalctl", "--no-pager", "--output=cat", "--unit=ash", f"--since={marker}")
    assert "Killing process" not in said, said
    assert "stopping: SIGTERM" in said


def test_an_upgrade_keeps_kind_settings_and_data(kind: str, client: AshClient, session: str) -> None:
    before, unit = main_pid(), Path("/etc/systemd/system/ash.service").read_text()
    installed = Path("/usr/local/lib/ash/ash.pyz")
    _ = installed.write_bytes(installed.read_bytes() + b"older")
    answer = install()
    assert answer["runsAs"] == {"user": "ash"}.get(kind, kind)
    assert main_pid() != before
    assert installed.read_bytes() == Path(PYZ).read_bytes()
    assert Path("/usr/local/lib/ash/ash.pyz.previous").read_bytes().endswith(b"older")
    assert Path("/etc/systemd/system/ash.service").read_text() == unit
    assert client.get_session(session).id == session
    other = "root" if kind != "root" else "user"
    refused = run("python3", PYZ, "service", "install", *(OPTIONS[other] or ["--root"]))
    assert refused.returncode == 1
    assert "has data in" in refused.stderr


def test_a_setting_that_is_wrong_is_told_at_once_and_not_tried_again(kind: str) -> None:
    Path("/etc/ash/ash.env").write_text(SMALL + "ASH_NO_SUCH=1\n")
    result = run("python3", PYZ, "service", "install")
    assert result.returncode == 1
    assert "unknown variable ASH_NO_SUCH" in result.stderr
    assert property_of("ActiveState") == "failed"
    Path("/etc/ash/ash.env").write_text(SMALL)
    assert install()["started"]


def test_uninstalled_nothing_of_it_is_left(kind: str) -> None:
    refused = run(ASH, "service", "uninstall")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    uid = owner(main_pid())
    _ = done(ASH, "service", "uninstall", "--yes")
    places = ("/etc/systemd/system/ash.service", "/etc/ash", "/usr/local/lib/ash", ASH, "/var/lib/ash", "/var/cache/ash")
    assert not [place for place in (*places, "/var/lib/private/ash", "/var/cache/private/ash") if os.path.lexists(place)]
    assert not GROUP.exists()
    assert "ash" not in [entry.pw_name for entry in pwd.getpwall()]
    sandboxes = range(65_600, 99_900)
    owners = [owner(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [found for found in owners if found in sandboxes or (uid and found == uid)]
    assert property_of("LoadState") == "not-found"


def test_data_that_is_kept_is_found_again() -> None:
    _ = install("--user", "keeper", "--data-dir", "/srv/ash-kept")
    _ = done(ASH, "service", "uninstall", "--keep-data")
    assert Path("/srv/ash-kept/ash.db").exists()
    assert pwd.getpwnam("keeper")
    key = Path("/srv/ash-kept/initial-api-key").read_text()
    _ = install("--user", "keeper", "--data-dir", "/srv/ash-kept")
    assert Path("/srv/ash-kept/initial-api-key").read_text() == key
    _ = done(ASH, "service", "uninstall", "--yes")
    assert not Path("/srv/ash-kept").exists()
    _ = shutil.which("userdel") and run("userdel", "keeper")
