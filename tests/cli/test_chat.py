"""`ash chat` with one message: what lands on stdout and on stderr, what becomes of the session, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import Ash, command, environment
from tests.cli.stub_server import StubServer, assistant, delta, result, turn

TOOL_TURN = turn(
    assistant("Let me look."),
    ("tool_use", {"id": "t1", "name": "Bash", "input": {"command": "ls"}}),
    ("tool_result", {"tool_use_id": "t1", "tool_name": "Bash", "content": "notes.txt\nb", "is_error": False}),
    delta("One "), delta("file."), assistant("One file."), result("One file."),
)  # fmt: skip


def status(stub: StubServer) -> list[str]:
    return [session["status"] for session in stub.sessions.values()]


def test_only_the_answer_is_on_stdout_and_the_session_is_ended(ash: Ash, stub: StubServer) -> None:
    done = ash("chat", "my-agent", "What is a closure?")
    assert done == (0, "Hello, Ada.\n", "")
    assert stub.posts("/messages") == [{"content": "What is a closure?", "includePartialMessages": True}]
    assert status(stub) == ["ended"]


def test_tool_calls_are_on_stderr(ash: Ash, stub: StubServer) -> None:
    stub.script = TOOL_TURN
    assert ash("chat", "my-agent", "Hi") == (0, "Let me look.\n\nOne file.\n", "→ Bash: ls\n  notes.txt…\n")
    assert ash("chat", "my-agent", "Hi", "--quiet") == (0, "Let me look.\n\nOne file.\n", "")


def test_tool_calls_begin_on_a_line_of_their_own_where_both_streams_are_one(stub: StubServer, tmp_path: Path) -> None:
    stub.script = TOOL_TURN
    settings = environment(ASH_SERVER_URL=stub.url, ASH_HOME=str(tmp_path))
    done = subprocess.run(
        command("chat", "my-agent", "Hi"), env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20, check=True
    )
    assert done.stdout == "Let me look.\n→ Bash: ls\n  notes.txt…\n\nOne file.\n"


def test_keep_prints_the_session_id_on_stderr_alone(ash: Ash, stub: StubServer) -> None:
    done = ash("chat", "--keep", "my-agent", "Hi")
    (id,) = stub.sessions
    assert (done.out, done.err) == ("Hello, Ada.\n", f"Session: {id}\n")
    assert status(stub) == ["active"]


@pytest.mark.parametrize("words", [["More"], ["my-agent", "More"]])
def test_a_session_is_continued_and_not_ended(ash: Ash, stub: StubServer, words: list[str]) -> None:
    id = stub.session("my-agent")["id"]
    assert ash("chat", *words, "--session", id).out == "Hello, Ada.\n"
    assert stub.posts("/messages")[0]["content"] == "More"
    assert status(stub) == ["active"]


def test_a_session_of_another_agent_is_not_continued(ash: Ash, stub: StubServer) -> None:
    done = ash("chat", "other-agent", "More", "-s", stub.session("my-agent")["id"])
    assert done.code == 2
    assert stub.posts("/messages") == []


@pytest.mark.parametrize(
    ("words", "stdin", "expected"),
    [
        ([], "piped\n", "piped"),
        (["-"], "piped\n", "piped"),
        (["Sum up:", "-"], "a\nb\n", "Sum up:\n\na\nb"),
        (["said"], "not read", "said"),
    ],
)
def test_a_message_may_be_piped(ash: Ash, stub: StubServer, words: list[str], stdin: str, expected: str) -> None:
    assert ash("chat", "my-agent", *words, stdin=stdin).code == 0
    assert stub.posts("/messages")[0]["content"] == expected


def test_an_empty_message_is_wrong_usage(ash: Ash, stub: StubServer) -> None:
    assert ash("chat", "my-agent", stdin="\n").code == 2
    assert stub.sessions == {}


def test_json_gives_one_event_a_line(ash: Ash, stub: StubServer) -> None:
    stub.script, stub.provider = TOOL_TURN, "offline"
    done = ash("chat", "my-agent", "Hi", "--json")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["type"] for event in events] == [name for name, _ in TOOL_TURN]
    assert [event["id"] for event in events] == list(range(1, len(TOOL_TURN) + 1))
    assert done.err == ""


def test_a_failed_turn_exits_1_and_still_ends_the_session(ash: Ash, stub: StubServer) -> None:
    stub.script = turn(delta("Well"), ("error", {"error": "the model is overloaded"}), status="failed")
    assert ash("chat", "my-agent", "Hi") == (1, "Well\n", "error: the model is overloaded\n")
    assert status(stub) == ["ended"]


def test_a_turn_that_ran_into_its_limit_exits_1(ash: Ash, stub: StubServer) -> None:
    stub.script = turn(assistant("So far."), result("", is_error=True, subtype="error_max_turns"))
    assert ash("chat", "my-agent", "Hi", "--max-turns", "1") == (1, "So far.\n", "error: the turn ended early: max turns\n")
    assert stub.posts("/messages")[0]["maxTurns"] == 1


def test_a_broken_connection_is_bridged_unseen(ash: Ash, stub: StubServer) -> None:
    stub.script, stub.cuts = TOOL_TURN, [2, 3, 0]
    assert ash("chat", "my-agent", "Hi").out == "Let me look.\n\nOne file.\n"


def test_the_offline_model_is_announced_once_on_stderr(ash: Ash, stub: StubServer) -> None:
    stub.provider = "offline"
    done = ash("chat", "my-agent", "Hi")
    assert done == (0, "Hello, Ada.\n", "No provider is configured: the offline demo model answers.\n")


def test_an_unknown_agent_names_those_that_exist(ash: Ash, stub: StubServer) -> None:
    done = ash("chat", "nobody", "Hi")
    assert done.code == 1
    assert "deployed: my-agent" in done.err


def test_a_name_is_not_deployed_again_though_a_folder_has_it(
    ash: Ash, stub: StubServer, agent_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(agent_folder.parent)
    agent_folder.rename("my-agent")
    assert ash("chat", "my-agent", "Hi").code == 0
    assert stub.agents["my-agent"]["version"] == 1


@pytest.mark.parametrize("word", ["./my-folder", "my-folder"])
def test_a_folder_is_deployed_to_the_server_that_runs(
    ash: Ash, stub: StubServer, agent_folder: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(agent_folder.parent)
    assert ash("chat", word, "Hi", "-e", "TOKEN=1").out == "Hello, Ada.\n"
    assert stub.agents["my-folder"]["version"] == 1
    assert stub.posts("/api/sessions")[-1]["extraEnv"] == {"TOKEN": "1"}
    assert stub.agents["my-folder"]["env"] is None, "the deployed agent does not keep what was for this session"


def test_a_path_without_instructions_is_named(ash: Ash, tmp_path: Path) -> None:
    done = ash("chat", str(tmp_path), "Hi")
    assert done.code == 1
    assert "CLAUDE.md" in done.err


def test_a_folder_does_not_hide_that_the_named_server_is_down(call: Ash, agent_folder: Path) -> None:
    done = call("chat", str(agent_folder), "Hi", "--server", "http://127.0.0.1:1")
    assert done.code == 1
    assert "no server answers at http://127.0.0.1:1" in done.err


def chat(stub: StubServer, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    env = environment(ASH_SERVER_URL=stub.url, ASH_HOME=str(tmp_path))
    return subprocess.Popen(
        command("chat", "my-agent", "Hi", *arguments),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_interrupts_the_turn_and_the_answer_so_far_stays(stub: StubServer, tmp_path: Path) -> None:
    stub.hold, stub.script = stub.interrupted, turn(delta("It is"), status="interrupted")
    process = chat(stub, tmp_path)
    assert process.stdout is not None
    assert process.stdout.read(5) == "It is"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "\n", "(interrupted)\n")
    assert status(stub) == ["ended"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_leave_ends_the_session_first(stub: StubServer, tmp_path: Path, number: int, code: int) -> None:
    stub.hold, stub.script = threading.Event(), turn(delta("It is"))
    process = chat(stub, tmp_path)
    assert process.stdout is not None
    process.stdout.read(5)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == code
    assert status(stub) == ["ended"]
    stub.hold.set()


def test_a_second_ctrl_c_leaves_at_once(stub: StubServer, tmp_path: Path) -> None:
    stub.hold, stub.script = threading.Event(), turn(delta("It is"))
    process = chat(stub, tmp_path)
    assert process.stdout is not None
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    assert stub.interrupted.wait(5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    stub.hold.set()


def test_no_history_or_config_is_written_by_a_single_message(ash: Ash, home: Path) -> None:
    ash("chat", "my-agent", "Hi")
    assert not os.path.exists(home)
