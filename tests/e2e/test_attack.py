"""`ash attack` and `ash doctor` of the built file, on a live server: nothing gets through, without isolation much does, nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ash.client import AshClient
from tests.e2e.servers import Server, as_user, ash, environment, running

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
STRANGER = 61236
# What gets through where nothing stands in the way, whoever runs the server.
OPEN = {
    "see-the-hosts-users", "read-a-file-of-the-data-folder", "read-another-sessions-file", "follow-a-link-out-of-the-workspace",
    "find-a-process-of-the-host-by-its-name", "signal-the-server", "find-a-secret-in-an-environment", "reach-a-port-of-the-host",
    "connect-to-a-socket-of-the-host", "connect-to-an-abstract-socket-of-the-host", "run-without-a-filter", "outlive-its-session",
}  # fmt: skip


def attack(ash_pyz: Path, server: Server, *arguments: str, cwd: Path) -> tuple[int, dict[str, Any]]:
    """The exit code and the report."""
    done = run_attack(ash_pyz, server, "--json", *arguments, cwd=cwd)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def run_attack(ash_pyz: Path, server: Server, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = environment(ASH_HOME=str(cwd / "client"), ASH_DATA_DIR=str(server.data_dir))
    return subprocess.run(
        [sys.executable, str(ash_pyz), "attack", *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )


def verdicts(report: dict[str, Any], verdict: str) -> dict[str, str]:
    return {probe["id"]: probe["detail"] for probe in report["probes"] if probe["verdict"] == verdict}


def left_behind(server: Server) -> list[str]:
    """What of an attack the server still has, its ended sessions apart."""
    with AshClient(server.url, server.key()) as client:
        found = [f"agent {agent.name}" for agent in client.list_agents()]
        found += [f"session {session.id} {session.status}" for session in client.list_sessions() if session.status != "ended"]
    with closing(sqlite3.connect(f"file:{server.data_dir}/ash.db?mode=ro", uri=True)) as database:
        found += [f"key {label}" for (label,) in database.execute("SELECT label FROM api_keys WHERE label LIKE 'ash attack%'")]
        found += [f"agent of {tenant}" for (tenant,) in database.execute("SELECT tenant_id FROM agents WHERE tenant_id <> 'default'")]
        alive = database.execute("SELECT tenant_id FROM sessions WHERE status <> 'ended'")
        found += [f"session of {tenant}" for (tenant,) in alive]
    return found + [path.name for path in server.data_dir.iterdir() if path.name.startswith("attack-")]


@needs_bwrap
def test_on_a_live_server_nothing_gets_through_and_nothing_is_left(ash_pyz: Path, tmp_path: Path) -> None:
    with running(ash_pyz, tmp_path / "data") as server:
        pages = [tmp_path / "report.md", tmp_path / "report.json"]
        code, report = attack(ash_pyz, server, "--report", str(pages[1]), cwd=tmp_path)
        if report["server"]["isolation"] == "unavailable":
            pytest.skip("this host cannot isolate")
        assert verdicts(report, "fail") == {}
        assert (code, report["holds"], report["leftovers"]) == (0, True, [])
        assert report["totals"]["pass"] > 80
        assert [why for why in verdicts(report, "not applicable").values() if not why] == []
        assert json.loads(pages[1].read_text()) == report
        assert run_attack(ash_pyz, server, "--only", "outlive-its-session", "--report", str(pages[0]), cwd=tmp_path).returncode == 0
        assert "| pass | outlive its session |" in pages[0].read_text()
        assert left_behind(server) == []


def test_without_isolation_it_says_what_got_through_and_fails(ash_pyz: Path, tmp_path: Path) -> None:
    core_pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    with running(ash_pyz, tmp_path / "data", "--sandbox", "none") as server:
        named = [
            word for id in sorted(OPEN | {"mount-something", "write-into-the-system", "change-the-core-pattern"}) for word in ("--only", id)
        ]
        code, report = attack(ash_pyz, server, *named, cwd=tmp_path)
        assert (code, report["holds"]) == (1, False)
        assert verdicts(report, "fail").keys() >= OPEN
        assert "would do harm" in verdicts(report, "not applicable")["mount-something"]
        assert left_behind(server) == []
    assert Path("/proc/sys/kernel/core_pattern").read_text() == core_pattern


@needs_bwrap
def test_a_policy_that_opens_the_host_is_found_out(ash_pyz: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[egress]\nallow = ["*:*"]\nallow_private = ["127.0.0.0/8"]\n')
    policy.chmod(0o600)
    with running(ash_pyz, tmp_path / "data", "--policy-file", str(policy)) as server:
        code, report = attack(ash_pyz, server, "--only", "through-the-proxy", cwd=tmp_path)
        assert (code, set(verdicts(report, "fail"))) == (1, {"reach-the-host-through-the-proxy"})


@needs_bwrap
def test_from_afar_what_needs_the_machine_is_not_applicable(ash_pyz: Path, tmp_path: Path) -> None:
    with running(ash_pyz, tmp_path / "data", "--auth", "always") as server:
        env = environment(ASH_HOME=str(tmp_path / "client"))
        done = ash(
            ash_pyz, "attack", "--json", "--server", server.url, "--api-key", server.key(), "--only", "tenant",
            "--only", "call-the-api", "--only", "make-a", "--only", "data-folder", env=env, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        report = json.loads(done.stdout)
        assert verdicts(report, "not applicable").keys() >= {"read-a-file-of-the-data-folder", "delete-the-key-of-another-tenant"}
        assert verdicts(report, "pass").keys() >= {"call-the-api-without-a-key", "make-a-device"}
        assert left_behind(server) == []


@needs_bwrap
def test_an_attack_that_is_interrupted_takes_everything_away(ash_pyz: Path, tmp_path: Path) -> None:
    with running(ash_pyz, tmp_path / "data") as server:
        env = environment(ASH_HOME=str(tmp_path / "client"), ASH_DATA_DIR=str(server.data_dir))
        process = subprocess.Popen([sys.executable, str(ash_pyz), "attack"], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("pass"):
                    break
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
            process.stderr.close()
        assert left_behind(server) == []


def test_a_name_that_no_probe_has_is_a_usage_error_and_the_list_shows_them(ash_pyz: Path, tmp_path: Path) -> None:
    env = environment(ASH_HOME=str(tmp_path))
    wrong = ash(ash_pyz, "attack", "--only", "nonsense", env=env, cwd=tmp_path)
    assert (wrong.returncode, "ash attack --list" in wrong.stderr) == (2, True)
    listed = json.loads(ash(ash_pyz, "attack", "--list", "--json", env=env, cwd=tmp_path).stdout)
    assert {"outlive-its-session", "read-roots-home"} <= {probe["id"] for probe in listed}


@needs_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user")
def test_an_ordinary_user_can_ask_the_doctor_and_attack_a_server_of_their_own(ash_pyz: Path) -> None:
    folder = Path("/tmp") / f"ash-user-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        shutil.copy(ash_pyz, folder / "ash.pyz")
        for path in (folder, folder / "ash.pyz"):
            os.chown(path, STRANGER, STRANGER)
        env = environment(HOME=str(folder), ASH_CACHE_DIR=str(folder / "cache"), ASH_DATA_DIR=str(folder / "data"))
        command = [*as_user(STRANGER), "/usr/bin/python3", "ash.pyz"]

        def call(*arguments: str) -> dict[str, Any]:
            done = subprocess.run(
                [*command, *arguments, "--json"], env=env, cwd=folder, capture_output=True, text=True, timeout=240, check=False
            )
            assert done.stdout, done.stderr
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        checks = {check["id"]: check["verdict"] for check in call("doctor", "--port", "0")["checks"]}
        if checks["user-namespaces"] == "fail":
            pytest.skip("this host cannot isolate for ordinary users")
        assert {id for id, verdict in checks.items() if verdict in ("fail", "unknown")} == set()
        with running(folder / "ash.pyz", folder / "data", env=env, prefix=as_user(STRANGER)):
            report = call("attack")
        assert verdicts(report, "fail") == {}
        assert report["totals"]["pass"] > 80
    finally:
        shutil.rmtree(folder)
