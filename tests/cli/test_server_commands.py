"""`ash start`, `stop`, `status`, `logs` and the embedded server of `ash chat`, each with a real server process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash.cli import local
from ash.client import AshClient
from tests.cli.conftest import command, environment, run

SETTINGS = {"ASH_SANDBOX": "none", "ASH_MODEL": "offline", "ASH_WARM_SANDBOXES": "0"}


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data folder; whatever server runs on it in the end is stopped."""
    yield tmp_path / "data"
    server = local.find(str(tmp_path / "data"))
    if server is not None:
        local.stop(server, 5.0, by_force=True)


def env(tmp_path: Path) -> dict[str, str]:
    return {**SETTINGS, "ASH_HOME": str(tmp_path / "home"), "ASH_DATA_DIR": str(tmp_path / "data")}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_detached_server_is_found_logged_and_stopped(tmp_path: Path, data_dir: Path) -> None:
    started = run("start", "--detach", "--port", "0", "--json", env=env(tmp_path))
    assert started.code == 0, started.err
    server = json.loads(started.out)
    assert "unprotected" in started.err, "a warning of the server"
    again = run("start", "--detach", "--port", "0", env=env(tmp_path))
    assert (again.code, f"export ASH_SERVER_URL={server['url']} " in again.out, "Ignored" in again.err) == (0, True, False)
    assert "on that data folder: --port, --model. `ash stop`" in run("start", "-d", "--port", "1", "--model", "x", env=env(tmp_path)).err
    assert f"Running: {server['url']} (pid {server['pid']}" in run("status", env=env(tmp_path)).out
    assert server["url"] in run("logs", env=env(tmp_path)).out
    assert (data_dir / "server.log").stat().st_mode & 0o777 == 0o600
    assert run("stop", env=env(tmp_path)).out.startswith("Stopped")
    assert gone(server["pid"])
    assert run("stop", env=env(tmp_path)).code == 0
    assert run("status", env={**env(tmp_path), "ASH_SERVER_URL": "http://127.0.0.1:1"}).code == 1


def test_the_first_key_is_taken_and_is_in_no_log(tmp_path: Path, data_dir: Path) -> None:
    home, port = tmp_path / "home", str(free_port())
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"server_url": f"http://localhost:{port}"}))
    started = run("start", "-d", "--port", port, "--auth", "always", env=env(tmp_path))
    assert started.code == 0, started.err
    key = json.loads((home / "config.json").read_text())["api_key"]
    assert (data_dir / "initial-api-key").read_text() == key, "config.json is in another folder, where the server does not look"
    assert key not in started.out + started.err + (data_dir / "server.log").read_text()
    assert run("agent", "list", env=env(tmp_path)).out.strip() == "[]"
    assert run("agent", "list", "--api-key", "wrong", env=env(tmp_path)).code == 1


@pytest.mark.parametrize("home", ["home", "data"])
def test_starts_on_the_same_data_folder_make_one_key(tmp_path: Path, data_dir: Path, home: str) -> None:
    (tmp_path / home).mkdir()
    port = str(free_port())
    (tmp_path / home / "config.json").write_text(json.dumps({"server_url": f"http://127.0.0.1:{port}"}))
    settings = {**env(tmp_path), "ASH_HOME": str(tmp_path / home)}
    for _ in range(3):
        assert run("start", "-d", "--port", port, "--auth", "always", env=settings).code == 0
        key = json.loads((tmp_path / home / "config.json").read_text())["api_key"]
        assert [made.label for made in AshClient(f"http://127.0.0.1:{port}", key).list_api_keys()] == ["auto-generated"]
        assert run("stop", env=settings).code == 0
    assert (data_dir / "initial-api-key").exists() == (home == "home")


def test_a_server_that_cannot_start_shows_why(tmp_path: Path, data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("start", "--detach", "--port", port, env=env(tmp_path))
    assert done.code == 1
    assert port in done.err
    assert "server.log" in done.err
    assert local.find(str(data_dir)) is None


def test_a_host_that_is_no_name_is_said_so(tmp_path: Path) -> None:
    done = run("start", "--host", "bad..host", env=env(tmp_path))
    assert (done.code, done.out, "Traceback" in done.err) == (2, "", False)
    assert "cannot listen on bad..host" in done.err


def test_a_secret_flag_does_not_reach_the_arguments_of_the_server(tmp_path: Path, data_dir: Path) -> None:
    started = run("start", "--detach", "--port", "0", "--api-key", "ash_static_secret", "--json", env=env(tmp_path))
    server = json.loads(started.out)
    assert "ash_static_secret" not in Path(f"/proc/{server['pid']}/cmdline").read_text()
    assert run("agent", "list", "--server", server["url"], "--api-key", "ash_static_secret", env=env(tmp_path)).code == 0


def test_a_foreground_server_stops_when_its_standard_input_does(tmp_path: Path, data_dir: Path) -> None:
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            command("start", "--port", "0", "--stop-with-stdin"), env=environment(**env(tmp_path)),
            stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
    assert process.stdin is not None
    deadline = time.monotonic() + 10
    while local.find(str(data_dir)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.stdin.close()
    assert process.wait(10) == 0
    assert not (data_dir / "server.json").exists()


def test_an_old_server_json_never_gets_an_innocent_process_killed(tmp_path: Path, data_dir: Path) -> None:
    with subprocess.Popen(["sleep", "30"]) as innocent:
        data_dir.mkdir()
        card = {"pid": innocent.pid, "url": "http://127.0.0.1:1", "version": "0", "startedAt": "2020-01-01T00:00:00.000Z"}
        (data_dir / "server.json").write_text(json.dumps(card))
        assert run("stop", env=env(tmp_path)).code == 0
        assert innocent.poll() is None
        innocent.kill()


def test_logs_of_a_server_that_never_detached_say_where_they_are(tmp_path: Path, data_dir: Path) -> None:
    done = run("logs", env=env(tmp_path))
    assert done.code == 1
    assert "--detach" in done.err


def test_logs_can_be_followed(tmp_path: Path, data_dir: Path) -> None:
    data_dir.mkdir()
    log = data_dir / "server.log"
    log.write_text("one\ntwo\nthree\n")
    process = subprocess.Popen(command("logs", "-f", "-n", "2"), env=environment(**env(tmp_path)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["two\n", "three\n"]
    with log.open("a") as file:
        file.write("four\n")
    assert process.stdout.readline() == "four\n"
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(5) == 130


# The embedded server


def embedded(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return {"ASH_SANDBOX": "none", "ASH_MODEL": "offline", "ASH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def no_server_on_4100() -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 4100)) == 0:
            pytest.skip("something listens on port 4100, so no server would be embedded")


@pytest.mark.usefixtures("no_server_on_4100")
def test_a_folder_can_be_talked_to_without_a_server_and_nothing_is_left(tmp_path: Path, agent_folder: Path) -> None:
    done = run("chat", "./my-folder", "Run the command `echo $((6*7))`", cwd=agent_folder.parent, env=embedded(tmp_path))
    assert done.code == 0, done.err
    assert "42" in done.out
    assert "→ Bash" in done.err
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "home").exists()


def test_a_given_data_folder_is_kept(tmp_path: Path, agent_folder: Path, data_dir: Path) -> None:
    first = run("chat", "--data-dir", str(data_dir), "--keep", str(agent_folder), "My name is Ada.", env=embedded(tmp_path))
    assert first.code == 0, first.err
    assert local.find(str(data_dir)) is None
    again = run("chat", "--data-dir", str(data_dir), "my-folder", "Hello", env=embedded(tmp_path))
    assert again.code == 0, again.err


def test_a_session_kept_on_a_data_folder_is_continued_there(tmp_path: Path, agent_folder: Path, data_dir: Path) -> None:
    first = run("chat", "--data-dir", str(data_dir), "--keep", str(agent_folder), "My name is Ada.", env=embedded(tmp_path))
    id = first.err.rpartition("Session: ")[2].strip()
    again = run("chat", "--session", id, "--data-dir", str(data_dir), "What is my name?", env=embedded(tmp_path))
    assert (again.code, "Ada" in again.out) == (0, True), again.err
    assert local.find(str(data_dir)) is None


def test_a_session_is_not_looked_for_in_a_folder_without_any(tmp_path: Path) -> None:
    done = run("chat", "--session", "x", "--data-dir", str(tmp_path / "typo"), "Hi", env=embedded(tmp_path))
    assert (done.code, "is not the data folder of a server" in done.err) == (2, True)
    assert not (tmp_path / "typo").exists()


@pytest.mark.usefixtures("no_server_on_4100")
def test_a_session_is_not_kept_on_a_folder_that_goes(tmp_path: Path, agent_folder: Path) -> None:
    done = run("chat", "--keep", str(agent_folder), "Hi", env=embedded(tmp_path))
    assert (done.code, done.out, "--data-dir" in done.err) == (2, "", True)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["other", "ash-chat-x/inner", "ash-chat-link"])
def test_a_server_removes_no_folder_but_that_of_a_chat(tmp_path: Path, name: str) -> None:
    (tmp_path / "tmp" / "ash-chat-x" / "inner").mkdir(parents=True)
    (tmp_path / "tmp" / "other").mkdir()
    (tmp_path / "tmp" / "ash-chat-link").symlink_to(tmp_path / "tmp" / "other")
    folder = str(tmp_path / "tmp" / name)
    done = run("start", "--port", "0", "--remove-data-dir", "--data-dir", folder, env=embedded(tmp_path))
    assert (done.code, "no temporary folder" in done.err) == (2, True)
    assert os.path.isdir(folder)


@pytest.mark.usefixtures("no_server_on_4100")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_embedded_server_ends_with_its_chat_however_that_ends(tmp_path: Path, agent_folder: Path, number: int) -> None:
    process = subprocess.Popen(
        command("chat", str(agent_folder), "Run the command `sleep 20`"), env=environment(**embedded(tmp_path)),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "→ Bash" not in process.stderr.readline():
        assert process.poll() is None
    (folder,) = (tmp_path / "tmp").iterdir()
    pid = json.loads((folder / "server.json").read_text())["pid"]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert gone(pid)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_program_runs_no_code_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(
        [*local.program(), "version"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.path.isabs(local.program()[0])
