"""One turn on a terminal, for `chat` and `session send`: the answer on stdout as it arrives, tool calls on stderr, Ctrl-C interrupts."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from ash.cli.terminal import CYAN, DIM, RED, YELLOW, Terminal, shorten
from ash.errors import AshError

if TYPE_CHECKING:
    from ash.client import AshClient, Event, MessageOptions

FAILED, INTERRUPTED = 1, 130
_TOLD_BY = ("command", "file_path", "path", "pattern", "url", "query", "description", "prompt")


class Answer:
    """Turns events into text to print, each part once, however the deltas, the whole messages and repeated attempts overlap. Pure."""

    def __init__(self) -> None:
        self._shown = ""  # of the message that is being said
        self._attempt = ""  # what its deltas add up to since its last beginning
        self._has_spoken = False

    def feed(self, event: Event) -> str:
        """What to print because of `event`."""
        if event.type == "text_delta":
            self._attempt += str(event.data)
            return self._show(self._attempt)
        if event.type != "message" or event.data.get("parent_tool_use_id"):
            return ""
        if event.data.get("type") == "assistant":
            text = self._show(event.text)
            self._finish()
            return text
        if event.data.get("type") == "stream_event" and _begins(event.data):
            self._attempt = ""  # the model call was repeated: it may say the same again
        return ""

    def _show(self, text: str) -> str:
        if self._shown.startswith(text):
            return ""
        new = text[len(self._shown) :] if text.startswith(self._shown) else "\n" + text
        if not self._shown and self._has_spoken:
            new = "\n\n" + new
        self._shown = text
        self._has_spoken = True
        return new

    def _finish(self) -> None:
        self._shown = self._attempt = ""


def _begins(data: Any) -> bool:
    inner = data.get("event")
    return isinstance(inner, dict) and inner.get("type") == "message_start"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a message."""
    parser.add_argument("--model", help="model for this message")
    parser.add_argument("--max-turns", type=int, metavar="N", help="most calls of the model in this turn")
    parser.add_argument("--quiet", "-q", action="store_true", help="do not show tool calls")


def options_of(args: argparse.Namespace) -> MessageOptions:
    options: MessageOptions = {"include_partial_messages": True}
    if args.model:
        options["model"] = args.model
    if args.max_turns is not None:
        options["max_turns"] = args.max_turns
    return options


class TurnView:
    """Shows the events of one turn and knows, at its end, how it went."""

    def __init__(self, terminal: Terminal, *, is_quiet: bool) -> None:
        self._terminal = terminal
        self._is_quiet = is_quiet
        self._answer = Answer()
        self._shortfall = ""
        self.exit_code = 0

    def show(self, event: Event) -> None:
        if self._terminal.is_json:
            self._terminal.json_line({"type": event.type, "id": event.id, "data": event.data})
        else:
            self._print(event)
        self._judge(event)

    def _print(self, event: Event) -> None:
        self._terminal.answer(self._answer.feed(event))
        if event.type == "tool_use" and not self._is_quiet:
            self._terminal.pause_answer()
            self._terminal.note(f"→ {tool_call(event.data, self._terminal.width() - 4)}", CYAN)
        elif event.type == "tool_result" and not self._is_quiet:
            failed = bool(event.data.get("is_error"))
            self._terminal.pause_answer()
            self._terminal.note("  " + tool_result(event.data, self._terminal.width() - 4), RED if failed else DIM)
        elif event.type == "error":
            self._terminal.pause_answer()
            self._terminal.error(str(event.data))

    def _judge(self, event: Event) -> None:
        if event.type == "error":
            self.exit_code = FAILED
        elif event.type == "message" and event.data.get("type") == "result" and event.data.get("is_error"):
            self.exit_code = FAILED
            self._shortfall = str(event.data.get("subtype") or "").removeprefix("error_").replace("_", " ") or "error"
        elif event.type == "done" and event.data.get("status") == "interrupted":
            self.exit_code = INTERRUPTED
        elif event.type == "done":
            self._say_shortfall()
            if event.data.get("status") == "failed":
                self.exit_code = FAILED

    def _say_shortfall(self) -> None:
        """Why the turn ended early; said at its end, because an interrupted turn is no error."""
        if self._shortfall and not self._terminal.is_json:
            self._terminal.pause_answer()
            self._terminal.error(f"the turn ended early: {self._shortfall}")


def tool_call(data: Any, width: int) -> str:
    """`Bash: ls -la` for a tool_use event."""
    given = data.get("input")
    given = given if isinstance(given, dict) else {}
    main = next((given[key] for key in _TOLD_BY if isinstance(given.get(key), str)), None)
    told = main if main is not None else json.dumps(given) if given else ""
    return shorten(f"{data.get('name')}: {told}" if told else str(data.get("name")), width)


def tool_result(data: Any, width: int) -> str:
    """The beginning of a tool's result, on one line."""
    content = data.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))
    return shorten(str(content or "(nothing)"), width)


def play(client: AshClient, session_id: str, content: str, terminal: Terminal, options: MessageOptions, *, is_quiet: bool) -> int:
    """Send a message and show the turn up to its end. Returns the exit code it deserves."""
    view = TurnView(terminal, is_quiet=is_quiet)
    with interrupting(client, session_id, terminal), client.send_message_stream(session_id, content, **options) as stream:
        for event in stream:
            view.show(event)
    terminal.end_answer()
    if view.exit_code == INTERRUPTED and not terminal.is_json:
        terminal.note("(interrupted)", YELLOW)
    return view.exit_code


@contextmanager
def interrupting(client: AshClient, session_id: str, terminal: Terminal) -> Iterator[None]:
    """The first Ctrl-C ends the turn, whose stream then comes to its own end; the second one leaves at once."""
    asked = False

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        threading.Thread(target=_interrupt, args=(client, session_id, terminal), daemon=True).start()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(client: AshClient, session_id: str, terminal: Terminal) -> None:
    try:
        client.interrupt(session_id)
    except AshError as error:
        terminal.note(f"could not interrupt the turn: {error}; press Ctrl-C again to leave", YELLOW)
