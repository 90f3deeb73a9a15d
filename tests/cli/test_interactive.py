"""`ash chat` without a message, on a real pseudo-terminal: prompt, history, Ctrl-C, Ctrl-D, and hostile text on the screen."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import command, environment
from tests.cli.stub_server import StubServer, assistant, delta, turn


class Conversation:
    """A command on a terminal of its own: what it shows, and what is typed."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self._master = process, master
        self.screen = ""

    def expect(self, text: str) -> str:
        """Read until `text` shows; gives everything up to it and takes it off."""
        deadline = time.monotonic() + 10
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} did not show: {self.screen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._master, 65536).decode()
                except OSError:
                    break  # the other end is closed
        before, found, self.screen = self.screen.partition(text)
        assert found, f"{text!r} did not show before the end: {before!r}"
        return before

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self) -> int:
        deadline = time.monotonic() + 10
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self.screen += os.read(self._master, 65536).decode()
                except OSError:
                    break
        return self.process.wait(5)


@contextmanager
def conversation(*arguments: str, **env: str) -> Iterator[Conversation]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(*arguments), env=environment(**{"TERM": "xterm", **env}), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    try:
        yield Conversation(process, master)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(5)
        os.close(master)


Chat = Callable[..., Iterator[Conversation]]


@pytest.fixture
def chat(stub: StubServer, tmp_path: Path) -> Iterator[Conversation]:
    with conversation("chat", "my-agent", ASH_SERVER_URL=stub.url, ASH_HOME=str(tmp_path / "home"), NO_COLOR="1") as talk:
        talk.expect("Ctrl-D leaves.")
        talk.expect("> ")
        yield talk


def test_a_conversation_goes_on_until_ctrl_d(chat: Conversation, stub: StubServer) -> None:
    for text in ("first", "second"):
        chat.type(f"{text}\n")
        chat.expect("Hello, Ada.")
        chat.expect("> ")
    chat.type("\x04")
    assert chat.wait() == 0
    assert [body["content"] for body in stub.posts("/messages")] == ["first", "second"]
    assert [session["status"] for session in stub.sessions.values()] == ["ended"]


@pytest.mark.parametrize("word", ["exit", "quit"])
def test_a_word_leaves_the_conversation_too(chat: Conversation, stub: StubServer, word: str) -> None:
    chat.type(f"{word}\n")
    assert chat.wait() == 0
    assert stub.posts("/messages") == []


def test_the_history_is_kept_in_a_private_file(chat: Conversation, stub: StubServer, tmp_path: Path) -> None:
    chat.type("remember me\n")
    chat.expect("Hello, Ada.")
    chat.expect("> ")
    chat.type("\x1b[A\n")  # the arrow up
    chat.expect("Hello, Ada.")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.wait() == 0
    assert [body["content"] for body in stub.posts("/messages")] == ["remember me", "remember me"]
    history = tmp_path / "home" / "history"
    assert "remember me" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_interrupts_the_answer_and_the_conversation_goes_on(chat: Conversation, stub: StubServer) -> None:
    stub.hold, stub.script = stub.interrupted, turn(delta("It is"), status="interrupted")
    chat.type("long\n")
    chat.expect("It is")
    chat.type("\x03")
    chat.expect("(interrupted)")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.wait() == 0


def test_ctrl_c_at_the_prompt_only_says_how_to_leave(chat: Conversation) -> None:
    chat.type("half a line\x03")
    chat.expect("(Ctrl-D leaves)")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.wait() == 0


def test_a_failed_turn_does_not_end_the_conversation(chat: Conversation, stub: StubServer) -> None:
    stub.script = turn(("error", {"error": "overloaded"}), status="failed")
    chat.type("one\n")
    chat.expect("error: overloaded")
    chat.expect("> ")
    stub.script = turn(assistant("Better."))
    chat.type("two\n")
    chat.expect("Better.")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.wait() == 0


def test_the_model_cannot_steer_the_terminal(chat: Conversation, stub: StubServer) -> None:
    stub.script = turn(
        delta("\x1b]0;owned\x07safe\x1b"), delta("[2Jtext"), ("tool_use", {"name": "Bash", "input": {"command": "\x1b[8mls"}})
    )
    chat.type("go\n")
    chat.expect("safetext")
    shown = chat.expect("Bash: ls")
    assert "\x1b]" not in shown
    assert "\x1b[8m" not in shown
    chat.expect("> ")
    chat.type("\x04")
    assert chat.wait() == 0


def test_tool_calls_are_coloured_on_a_terminal(stub: StubServer, tmp_path: Path) -> None:
    stub.script = turn(("tool_use", {"name": "Bash", "input": {"command": "ls"}}), assistant("Done."))
    with conversation("chat", "my-agent", "go", ASH_SERVER_URL=stub.url, ASH_HOME=str(tmp_path)) as talk:
        talk.expect("\x1b[36m→ Bash: ls\x1b[0m")
        talk.expect("Done.")
        assert talk.wait() == 0


def test_lists_are_tables_on_a_terminal(stub: StubServer, tmp_path: Path) -> None:
    id = stub.session("my-agent")["id"]
    with conversation("session", "list", ASH_SERVER_URL=stub.url, ASH_HOME=str(tmp_path)) as talk:
        talk.expect("ID ")
        talk.expect(f"{id}  my-agent  active")
        assert talk.wait() == 0
