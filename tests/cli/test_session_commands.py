"""`ash session` and `ash agent`: JSON on stdout, words on stderr, exit codes passed on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Ash
from tests.cli.stub_server import HELLO, StubServer, delta, turn


@pytest.fixture
def id(stub: StubServer) -> str:
    return str(stub.session("my-agent")["id"])


def test_create_prints_the_session_as_json(ash: Ash, stub: StubServer) -> None:
    done = ash("session", "create", "my-agent", "--model", "offline", "-e", "A=1", "--allowed-tools", "Bash,Read")
    session = json.loads(done.out)
    assert (session["agentName"], session["status"]) == ("my-agent", "active")
    assert session["id"] in stub.sessions
    assert done.err == "Session created:\n"
    assert stub.posts("/api/sessions") == [
        {"agent": "my-agent", "model": "offline", "allowedTools": ["Bash", "Read"], "extraEnv": {"A": "1"}}
    ]


def test_send_prints_the_answer(ash: Ash, id: str) -> None:
    assert ash("session", "send", id, "Hi") == (0, "Hello, Ada.\n", "")
    assert ash("session", "send", id, stdin="piped").out == "Hello, Ada.\n"


@pytest.mark.parametrize(
    ("verb", "status", "word"),
    [
        ("pause", "paused", "paused"),
        ("resume", "active", "resumed"),
        ("stop", "stopped", "stopped"),
        ("end", "ended", "ended"),
        ("fork", "paused", "forked"),
    ],
)
def test_changes_print_the_session_and_what_happened(ash: Ash, id: str, verb: str, status: str, word: str) -> None:
    done = ash("session", verb, id)
    assert json.loads(done.out)["status"] == status
    assert done.err == f"Session {word}:\n"
    assert ash("session", verb, id, "--json").err == ""


def test_get_and_list_are_json_when_piped(ash: Ash, id: str) -> None:
    assert json.loads(ash("session", "get", id).out)["id"] == id
    assert [session["id"] for session in json.loads(ash("session", "list").out)] == [id]


def test_interrupt_says_whether_a_turn_ran(ash: Ash, stub: StubServer, id: str) -> None:
    assert ash("session", "interrupt", id).out == "Interrupted.\n"
    assert stub.interrupted.is_set()


def test_exec_passes_everything_on(ash: Ash, stub: StubServer, id: str) -> None:
    stub.exec_result = {"exitCode": 3, "stdout": "out\n", "stderr": "err\n"}
    assert ash("session", "exec", id, "false") == (3, "out\n", "err\n")
    stub.exec_result = {"exitCode": 124, "stdout": "", "stderr": "", "timedOut": True}
    done = ash("session", "exec", id, "--timeout", "100", "sleep 9")
    assert (done.code, "100 ms" in done.err) == (124, True)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["ls", "-la", "--json", "a b"], "ls -la --json 'a b'"),
        (["echo $HOME | wc"], "echo $HOME | wc"),
        (["grep", "--", "-x", "f"], "grep -- -x f"),
        (["--", "ls", "-h", "--"], "ls -h --"),
        (["--cwd", "/tmp", "ls", "--cwd", "x"], "ls --cwd x"),
    ],
)
def test_exec_takes_the_command_literally(ash: Ash, stub: StubServer, id: str, words: list[str], command: str) -> None:
    assert ash("--no-color", "session", "exec", id, *words).code == 0
    assert stub.posts("/exec")[-1]["command"] == command


def test_tail_shows_an_event_a_line_and_no_deltas(ash: Ash, stub: StubServer, id: str) -> None:
    stub.script = turn(delta("Hel"), *HELLO[1:-1])
    ash("session", "send", id, "Hi")
    ash("session", "end", id)
    done = ash("session", "tail", id)
    assert done.out.splitlines() == ["#1 session_start", "#3 message: Hello, Ada.", "#4 turn_complete", "#6 done: completed"]
    assert [json.loads(line)["id"] for line in ash("session", "tail", id, "--json", "--after", "3", "-t", "done").out.splitlines()] == [6]


def test_tail_behind_the_last_event_of_an_ended_session_is_silent(ash: Ash, id: str) -> None:
    ash("session", "send", id, "Hi")
    ash("session", "end", id)
    assert ash("session", "tail", id, "--after", str(len(HELLO))) == (0, "", "")


def test_messages_and_logs(ash: Ash, id: str) -> None:
    ash("session", "send", id, "Hi")
    assert [row["role"] for row in json.loads(ash("session", "messages", id).out)] == ["user", "assistant", "assistant"]
    assert ash("session", "logs", id).out == "stderr: one line\n"


def test_agents_are_listed_shown_and_deleted(ash: Ash, stub: StubServer) -> None:
    assert [agent["name"] for agent in json.loads(ash("agent", "list").out)] == ["my-agent"]
    assert json.loads(ash("agent", "info", "my-agent").out)["version"] == 1
    assert ash("agent", "delete", "my-agent").out == "Deleted agent: my-agent\n"
    assert stub.agents == {}


def test_health_is_json(ash: Ash) -> None:
    assert json.loads(ash("health").out)["status"] == "ok"


def test_status_without_a_local_server_tells_of_the_one_that_is_talked_to(ash: Ash, stub: StubServer) -> None:
    done = ash("status")
    assert done.code == 0
    assert f"Running: {stub.url}\n" in done.out
    assert json.loads(ash("status", "--json").out)["running"] is True


def test_status_of_a_data_folder_tells_of_no_other_server(ash: Ash, tmp_path: Path) -> None:
    done = ash("status", "--data-dir", str(tmp_path))
    assert (done.code, done.out.startswith(f"No server runs on {tmp_path}.")) == (1, True)
    assert json.loads(ash("status", "--data-dir", str(tmp_path), "--json").out) == {"running": False, "dataDir": str(tmp_path)}


def test_create_takes_limits(ash: Ash, stub: StubServer) -> None:
    ash("session", "create", "my-agent", "--limit", "memory_mb=512", "--limit", "turn_timeout=1.5")
    assert stub.posts("/api/sessions")[-1]["limits"] == {"memoryMb": 512, "turnTimeout": 1.5}
