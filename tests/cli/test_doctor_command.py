"""`ash doctor` as a command: what it prints, what it returns, and that it leaves a live server and its data alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ash.cli import checkup, local
from ash.config import load_config
from tests.cli.conftest import Done, run

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ash-"))
    yield path
    server = local.find(str(path))
    if server is not None:
        local.stop(server, 10.0)
    shutil.rmtree(path)


def doctor(data_dir: Path, *arguments: str, **env: str) -> Done:
    given = {"ASH_DATA_DIR": str(data_dir), "ASH_HOME": str(data_dir / "home"), "ASH_PORT": "0", **env}
    return run("doctor", "--json", *arguments, env=given)


def checks_of(done: Done) -> dict[str, dict[str, Any]]:
    return {check["id"]: check for check in json.loads(done.out)["checks"]}


def test_a_sound_host_is_found_sound_with_a_fix_for_whatever_is_not(data_dir: Path) -> None:
    done = doctor(data_dir)
    found = json.loads(done.out)
    ids = [check["id"] for check in found["checks"]]
    assert len(set(ids)) == len(ids)
    assert [check for check in found["checks"] if check["verdict"] != "ok" and not check["fix"]] == []
    assert (done.code, found["ok"]) == (int(found["totals"]["fail"] > 0), found["totals"]["fail"] == 0)
    assert {"kernel", "bubblewrap", "seccomp", "file-system", "database-log", "clock", "port", "policy", "certificates"} <= set(ids)
    assert os.listdir(data_dir) == []


def test_for_people_each_line_has_a_verdict_and_the_last_one_counts(data_dir: Path) -> None:
    done = run("doctor", env={"ASH_DATA_DIR": str(data_dir), "ASH_PORT": "0"})
    *lines, last = done.out.splitlines()
    assert all(line.startswith(("ok ", "warn ", "fail ", "unknown ", " " * 26 + "->")) for line in lines)
    assert " ok" in last


def test_a_taken_port_fails_with_exit_code_1(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = doctor(data_dir, "--port", str(taken.getsockname()[1]))
    assert (done.code, checks_of(done)["port"]["verdict"]) == (1, "fail")


def test_a_policy_that_is_wrong_fails_with_what_is_wrong(data_dir: Path) -> None:
    (data_dir / "policy.toml").write_text("[egress]\nalow = []\n")
    os.chmod(data_dir / "policy.toml", 0o600)
    found = checks_of(done := doctor(data_dir))["policy"]
    assert (done.code, found["verdict"], "alow" in found["found"]) == (1, "fail", True)


def test_a_data_folder_open_to_others_fails_with_the_command_that_closes_it(data_dir: Path) -> None:
    os.chmod(data_dir, 0o777)
    found = checks_of(doctor(data_dir))["data-folder"]
    assert (found["verdict"], found["fix"]) == ("fail", f"run `chmod go-w {data_dir}`")


def test_a_file_in_place_of_the_database_fails(data_dir: Path) -> None:
    (data_dir / "ash.db").write_text("this is not a database, and long enough to be taken for one" * 20)
    assert checks_of(doctor(data_dir))["database"]["verdict"] == "fail"


def test_a_database_that_is_ahead_of_the_clock_is_warned_of(data_dir: Path) -> None:
    with sqlite3.connect(data_dir / "ash.db") as database:
        database.execute("CREATE TABLE sessions (last_active_at TEXT)")
        database.execute("INSERT INTO sessions VALUES ('2999-01-01T00:00:00.000Z')")
    database.close()
    assert checks_of(doctor(data_dir))["clock"]["verdict"] == "warn"


def test_no_sandbox_by_choice_is_a_warning(data_dir: Path) -> None:
    done = doctor(data_dir, "--sandbox", "none")
    assert checks_of(done)["user-namespaces"]["verdict"] == "warn"
    assert "seccomp" not in checks_of(done)


def test_a_wrong_setting_is_a_usage_error(data_dir: Path) -> None:
    assert doctor(data_dir, "--port", "many").code == 2


def test_beside_a_running_server_it_says_so_and_changes_nothing(data_dir: Path) -> None:
    env = {"ASH_DATA_DIR": str(data_dir), "ASH_HOME": str(data_dir / "home"), "ASH_MODEL": "offline", "ASH_WARM_SANDBOXES": "0"}
    started = run("start", "--detach", "--port", "0", env=env)
    assert started.code == 0, started.err
    before = {path: path.lstat().st_mtime_ns for path in data_dir.rglob("*") if path.name != "server.log"}
    found = checks_of(doctor(data_dir))
    assert (found["server"]["verdict"], "runs" in found["server"]["found"]) == ("ok", True)
    assert found["database"]["verdict"] == "ok"
    after = {path: path.lstat().st_mtime_ns for path in data_dir.rglob("*") if path.name != "server.log"}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert set(after) == set(before)
    assert changed <= {"ash.db-shm"}  # SQLite counts its readers there
    assert run("status", env=env).code == 0


# The provider, without a network


@pytest.mark.parametrize(("settings", "verdict", "word"), [
    ({"model": "offline"}, "ok", "demo"), ({}, "warn", "no key"), ({"anthropic_api_key": "k"}, "ok", "with a key"),
    ({"use_bedrock": "1"}, "ok", "Bedrock"), ({"anthropic_base_url": "http://127.0.0.1:1"}, "ok", "without a key"),
])  # fmt: skip
def test_the_provider_is_named_and_never_its_key(settings: dict[str, str], verdict: str, word: str) -> None:
    [found] = checkup.check_provider(load_config(settings, environ={}), online=False)
    assert (found.verdict, word in found.found, "'k'" in found.found) == (verdict, True, False)


def test_a_provider_that_does_not_answer_fails_when_it_is_asked() -> None:
    config = load_config({"anthropic_base_url": "http://127.0.0.1:1", "anthropic_api_key": "k"}, environ={})
    found = list(checkup.check_provider(config, online=True))
    assert (found[-1].id, found[-1].verdict) == ("provider-online", "fail")


def test_the_python_of_this_test_run_is_good_enough() -> None:
    assert {finding.verdict for finding in checkup.check_python()} == {"ok"}
    assert sys.version_info >= (3, 11)
