"""What of a turn is printed: each part of the answer once, tools in a line each, and an exit code that tells the truth."""

from __future__ import annotations

import io
from typing import Any

import pytest

from ash.cli.terminal import Terminal
from ash.cli.turn import Answer, TurnView, tool_call, tool_result
from ash.client import Event, EventData
from tests.cli.stub_server import assistant, delta, result

START = ("message", {"type": "stream_event", "event": {"type": "message_start"}})


def event(name: str, data: dict[str, Any]) -> Event:
    return Event(name, EventData(data, name), 1)


def printed(*script: tuple[str, dict[str, Any]]) -> str:
    answer = Answer()
    return "".join(answer.feed(event(*one)) for one in script)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([assistant("Hello"), result("Hello")], "Hello"),
        ([START, delta("Hel"), delta("lo"), assistant("Hello"), result("Hello")], "Hello"),
        ([START, delta("Hel"), assistant("Hello")], "Hello"),
        ([delta("one"), assistant("one"), START, delta("two"), assistant("two")], "one\n\ntwo"),
        ([assistant("one"), assistant(""), assistant("two")], "one\n\ntwo"),
        ([assistant("same"), assistant("same")], "same\n\nsame"),
        ([START, delta("Hello wor"), START, delta("Hello"), delta(" world"), assistant("Hello world")], "Hello world"),
        ([START, delta("Maybe"), START, delta("No"), assistant("No")], "Maybe\nNo"),
    ],
)
def test_each_part_of_the_answer_is_printed_once(script: list[tuple[str, dict[str, Any]]], expected: str) -> None:
    assert printed(*script) == expected


def test_text_of_a_subagent_is_not_the_answer() -> None:
    name, data = assistant("inner")
    assert printed((name, {**data, "parent_tool_use_id": "toolu_1"})) == ""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ([result("x"), ("done", {"status": "completed"})], 0),
        ([("done", {})], 0),
        ([("error", {"error": "x"}), ("done", {"status": "failed"})], 1),
        ([result("x", is_error=True, subtype="error_max_turns"), ("done", {"status": "completed"})], 1),
        ([("done", {"status": "interrupted"})], 130),
        ([result("x", is_error=True, subtype="error_during_execution"), ("done", {"status": "interrupted"})], 130),
    ],
)
def test_the_exit_code_says_how_the_turn_went(script: list[tuple[str, dict[str, Any]]], code: int) -> None:
    err = io.StringIO()
    view = TurnView(Terminal(out=io.StringIO(), err=err), is_quiet=False)
    for one in script:
        view.show(event(*one))
    assert view.exit_code == code
    assert bool(err.getvalue()) == (code == 1)


def test_a_tool_call_fits_on_one_line() -> None:
    assert tool_call({"name": "Bash", "input": {"command": "ls -la\nrm x", "timeout": 3}}, 80) == "Bash: ls -la…"
    assert tool_call({"name": "Read", "input": {"file_path": "/a/b"}}, 80) == "Read: /a/b"
    assert tool_call({"name": "X", "input": {"n": 1}}, 80) == 'X: {"n": 1}'
    assert len(tool_call({"name": "X", "input": {"command": "y" * 500}}, 80)) == 80


def test_a_tool_result_shows_its_first_line() -> None:
    assert tool_result({"content": "one\ntwo"}, 80) == "one…"
    assert tool_result({"content": [{"type": "text", "text": "one"}, {"type": "image"}]}, 80) == "one…"
    assert tool_result({"content": ""}, 80) == "(nothing)"
