"""The session's limit for one tool call, as the program inside the sandbox keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ash.runtime.interrupt import Interrupt
from ash.runtime.tools import TOOLS, ToolError, Workbench, check
from ash.runtime.tools.bash import BASH, bash_tool
from tests.runtime.fakes import Driver, calls, results, text, tool


def run(bench: Workbench, name: str, **given: object) -> str:
    found = TOOLS[name].run(bench, check(TOOLS[name], given), Interrupt()).content
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("asked", [{}, {"timeout": 60_000}])
def test_a_command_is_ended_at_the_sessions_limit_whatever_the_model_asks_for(bench: Workbench, asked: dict[str, int]) -> None:
    bench.tool_timeout = 0.3
    found = run(bench, "Bash", command="echo begun; sleep 60", **asked)
    assert (
        found
        == "[The command was ended because it took longer than 0.3 s, the session's limit for a tool; its output so far follows]\nbegun"
    )


def test_a_command_may_ask_for_less_and_a_longer_limit_is_used(bench: Workbench) -> None:
    bench.tool_timeout = 5_000
    assert "longer than 0.2 s; its output" in run(bench, "Bash", command="sleep 60", timeout=200)
    assert run(bench, "Bash", command="echo a", timeout=4_000_000) == "a"


def test_a_search_is_ended_at_the_sessions_limit(bench: Workbench) -> None:
    Path(bench.paths.workspace, "a.txt").write_text("a" * 40)
    bench.tool_timeout = 0.001
    with pytest.raises(ToolError, match=r"The search took longer than 0.001 s"):
        run(bench, "Grep", pattern="(a+)+$", path="a.txt")


def test_the_model_is_told_the_limit_it_has() -> None:
    assert "at most 600000" in BASH.description
    short = bash_tool(1.5)
    assert "(default 1500, at most 1500)" in short.description
    assert short.schema["properties"]["timeout"]["description"] == "Time limit in milliseconds, at most 1500"
    assert {**BASH.schema, "properties": None} == {**short.schema, "properties": None}


def test_the_limit_comes_with_init_and_holds_for_tools_and_exec(bridge: Driver) -> None:
    bridge.init(toolTimeout=0.4, permissionMode="bypassPermissions")
    ended = bridge.exec("echo begun; sleep 60", timeout=50)
    assert (ended["timed_out"], ended["stdout"]) == (True, "begun\n")
    bridge.gateway.script += [calls(tool("Bash", command="sleep 60")), text("done")]
    (result,) = results(bridge.turn())
    assert "longer than 0.4 s, the session's limit for a tool" in json.dumps(result, ensure_ascii=False)
    offered = {entry["name"]: entry for entry in bridge.gateway.requests[0]["tools"]}
    assert "at most 400)" in offered["Bash"]["description"]


def test_a_longer_limit_lets_exec_take_its_time(bridge: Driver) -> None:
    bridge.init(toolTimeout=100)
    assert bridge.exec("echo a", timeout=50)["exit_code"] == 0
    assert bridge.exec("sleep 60", timeout=0.2)["timed_out"]
