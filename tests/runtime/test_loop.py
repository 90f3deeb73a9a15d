"""The agent loop, in a real bridge against a gateway with scripted answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ash.runtime.calls import Calls
from ash.runtime.interrupt import Interrupt
from ash.runtime.paths import Paths
from ash.runtime.permissions import Permissions
from ash.runtime.settings import Settings
from ash.runtime.tools import Workbench
from tests.runtime.fakes import HOLD, Driver, api_error, calls, driver, events, messages, results, text, tool, until

Json = dict[str, Any]


def result(turn: list[Json]) -> Json:
    return messages(turn, "result")[0]


def sent(bridge: Driver, index: int = -1) -> list[Json]:
    """The messages of a request, without cache breakpoints and with text in its short form."""
    cleaned = json.loads(json.dumps(bridge.gateway.requests[index]["messages"]).replace(', "cache_control": {"type": "ephemeral"}', ""))
    for message in cleaned:
        if [block["type"] for block in message["content"] if isinstance(block, dict)] == ["text"]:
            message["content"] = message["content"][0]["text"]
    return cleaned  # type: ignore[no-any-return]


# A turn


def test_an_answer_is_announced_sent_and_summed_up(bridge: Driver) -> None:
    bridge.gateway.script = [text("hello", usage={"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": 3})]
    turn = bridge.turn("hi")
    assert [message["type"] for message in messages(turn)] == ["system", "assistant", "result"]
    assert turn[-1] == {"ev": "done", "n": turn[-1]["n"], "turn_id": "t1", "status": "completed"}
    assert messages(turn, "assistant")[0]["message"]["content"] == [{"type": "text", "text": "hello"}]
    final = result(turn)
    assert (final["subtype"], final["is_error"], final["result"], final["num_turns"]) == ("success", False, "hello", 1)
    assert final["usage"] == {"input_tokens": 7, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3}
    assert final["stop_reason"] == "end_turn"
    assert final["duration_ms"] >= final["duration_api_ms"]


def test_the_first_message_says_what_the_session_is(bridge: Driver) -> None:
    init = messages(bridge.turn())[0]
    assert (init["subtype"], init["model"], init["permissionMode"]) == ("init", "m", "bypassPermissions")
    assert init["cwd"] == str(bridge.root / "workspace")
    assert init["tools"] == ["Bash", "Read", "Write", "Edit", "Glob", "Grep", "TodoWrite"]
    assert init["session_id"] == "00000000-0000-4000-8000-000000000001"


def test_partial_messages_are_sent_only_when_wanted(bridge: Driver) -> None:
    bridge.gateway.script = [[*text("hello")[:1], {"type": "ping"}, *text("hello")[1:]], text("again")]
    turn = bridge.turn(includePartialMessages=True)
    kinds = [event["data"]["event"]["type"] for event in turn if event["ev"] == "delta"]
    assert kinds[:3] == ["message_start", "content_block_start", "content_block_delta"]
    assert kinds[-1] == "message_stop"
    assert "ping" not in kinds
    assert not [event for event in bridge.turn(turn_id="t2") if event["ev"] == "delta"]


def test_content_reaches_the_model_untouched(bridge: Driver) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    content = [{"type": "text", "text": "look "}, image, {"type": "new_block", "x": [1]}]
    bridge.turn(content)
    assert bridge.gateway.requests[0]["messages"] == [{"role": "user", "content": content}]


def test_the_conversation_goes_on_from_turn_to_turn(bridge: Driver) -> None:
    bridge.gateway.script = [text("one"), text("two")]
    bridge.turn("first")
    bridge.turn("second", turn_id="t2")
    assert [(message["role"], message["content"]) for message in sent(bridge)] == [
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second"),
    ]


def test_a_transcript_restores_the_conversation(bridge: Driver) -> None:
    bridge.init([{"role": "user", "content": "my name is Ada"}, {"role": "assistant", "content": [{"type": "text", "text": "noted"}]}])
    bridge.turn("who am I?")
    assert [message["content"] for message in sent(bridge)] == ["my name is Ada", "noted", "who am I?"]


def test_the_prompt_is_the_agent_s_claude_md_unless_the_session_has_one(bridge: Driver) -> None:
    (bridge.root / "agent" / "CLAUDE.md").write_text("You are a parrot.")
    bridge.init()
    bridge.turn()
    bridge.init(systemPrompt="You are a fish.")
    bridge.turn(turn_id="t2")
    first, second = (request["system"] for request in bridge.gateway.requests)
    assert first[0]["text"] == "You are a parrot."
    assert second[0]["text"] == "You are a fish."
    assert str(bridge.root / "workspace") in first[1]["text"]


# Tools


def test_calls_are_run_and_their_results_sent_back_in_order_in_one_message(bridge: Driver) -> None:
    (bridge.root / "workspace" / "a.txt").write_text("A")
    uses = (tool("Read", "r1", file_path="a.txt"), tool("Bash", "b1", command="echo B"), tool("Read", "r2", file_path="none"))
    bridge.gateway.script = [calls(*uses), text("done")]
    turn = bridge.turn()
    assert [block["tool_use_id"] for block in results(turn)] == ["r1", "b1", "r2"]
    assert [block.get("is_error", False) for block in results(turn)] == [False, False, True]
    assert len(messages(turn, "user")) == 1
    assert messages(turn, "user")[0]["tool_names"] == {"r1": "Read", "b1": "Bash", "r2": "Read"}
    assert sent(bridge)[-1]["content"] == results(turn)


def test_calls_that_only_read_run_at_the_same_time(bridge: Driver) -> None:
    program = bridge.root / "home" / "rg"
    # Each of the two waits until it sees the other.
    program.write_text(
        '#!/bin/sh\nfor last; do :; done\ntouch "$last/$$"\nuntil [ "$(ls "$last" | wc -l)" = 2 ]; do sleep 0.01; done\necho x\n'
    )
    program.chmod(0o755)
    (bridge.root / "workspace" / "met").mkdir()
    bridge.init(env={"PATH": f"{bridge.root}/home:{os.environ['PATH']}"})
    bridge.gateway.script = [calls(tool("Grep", "g1", pattern="x", path="met"), tool("Grep", "g2", pattern="y", path="met")), text("ok")]
    assert [block["content"] for block in results(bridge.turn())] == ["Found 1 file\nx", "Found 1 file\nx"]


def test_the_shell_keeps_its_folder_and_variables_between_calls_and_turns(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", command="mkdir d; cd d; export WHO=me; x=hidden")), text("x")]
    bridge.turn()
    bridge.gateway.script = [calls(tool("Bash", command='pwd; echo "$WHO[$x]"')), text("x")]
    turn = bridge.turn(turn_id="t2")
    assert results(turn)[0]["content"] == f"{bridge.root}/workspace/d\nme[]"


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (tool("Nonsense"), "There is no tool 'Nonsense'"),
        (tool("Bash"), "`command` is missing"),
        (tool("Bash", command=5), "`command` must be of type string"),
        (tool("Bash", command="x", run_in_background=True), "no parameter `run_in_background`"),
        (tool("Grep", pattern="x", output_mode="all"), "`output_mode` must be one of"),
        (tool("TodoWrite", todos=[{"content": "x", "status": "done", "activeForm": "x"}]), "`todos[0].status` must be one of"),
    ],
)
def test_a_wrong_call_is_a_tool_error_that_names_the_field(bridge: Driver, use: Json, words: str) -> None:
    bridge.gateway.script = [calls(use), text("sorry")]
    turn = bridge.turn()
    assert results(turn)[0]["is_error"]
    assert words in results(turn)[0]["content"]
    assert turn[-1]["status"] == "completed"


def test_input_that_is_not_json_is_a_tool_error(bridge: Driver) -> None:
    bridge.gateway.script = [calls({**tool("Bash"), "raw": '{"command": "touch ran'}), text("sorry")]
    assert "did not arrive whole" in results(bridge.turn())[0]["content"]
    assert not (bridge.root / "workspace" / "ran").exists()


def test_a_denied_call_reaches_the_model_and_the_result(bridge: Driver) -> None:
    bridge.init(disallowedTools=["Bash(rm:*)"])
    bridge.gateway.script = [calls(tool("Bash", command="true && rm -rf x")), text("sorry")]
    turn = bridge.turn()
    assert "denied by the rule 'Bash(rm:*)'" in results(turn)[0]["content"]
    denial = {"tool_name": "Bash", "tool_use_id": "toolu_1", "tool_input": {"command": "true && rm -rf x"}}
    assert result(turn)["permission_denials"] == [denial]


def test_a_tool_that_is_denied_altogether_is_not_offered(bridge: Driver) -> None:
    bridge.init(disallowedTools=["Bash"])
    turn = bridge.turn()
    assert "Bash" not in messages(turn)[0]["tools"]
    assert "Bash" not in [offered["name"] for offered in bridge.gateway.requests[0]["tools"]]


def test_options_of_a_turn_win_over_those_of_the_session(bridge: Driver) -> None:
    bridge.init(permissionMode="bypassPermissions", model="one")
    bridge.gateway.script = [calls(tool("Write", file_path="x", content="x")), text("sorry")]
    turn = bridge.turn(permissionMode="plan", model="two")
    assert "plan mode" in results(turn)[0]["content"]
    assert bridge.gateway.requests[0]["model"] == "two"
    assert "Plan mode is on" in bridge.gateway.requests[0]["system"][-1]["text"]


def test_a_broken_settings_file_stops_all_tools_and_names_the_line(bridge: Driver) -> None:
    (bridge.root / "agent" / ".claude").mkdir()
    (bridge.root / "agent" / ".claude" / "settings.json").write_text('{\n "permissions": {\n}')
    bridge.init()
    bridge.gateway.script = [calls(tool("Read", file_path="x")), text("sorry")]
    turn = bridge.turn()
    assert "settings.json line 3" in results(turn)[0]["content"]
    assert [event["level"] for event in turn if event["ev"] == "log"] == ["system"]


def test_settings_env_reaches_tools_but_cannot_redirect_the_model(bridge: Driver) -> None:
    (bridge.root / "agent" / ".claude").mkdir()
    env = {"MINE": "yes", "ANTHROPIC_BASE_URL": "http://evil", "CLAUDE_CODE_X": "1"}
    (bridge.root / "agent" / ".claude" / "settings.json").write_text(json.dumps({"env": env}))
    bridge.init(env={"EXTRA": "1"})
    bridge.gateway.script = [calls(tool("Bash", command="env")), text("x")]
    lines = results(bridge.turn())[0]["content"].split("\n")
    assert {"MINE=yes", "EXTRA=1"} <= set(lines)
    assert not [line for line in lines if line.startswith(("ANTHROPIC_", "CLAUDE_CODE_"))]


def test_a_file_name_that_is_no_text_does_no_harm(bridge: Driver) -> None:
    with open(os.fsencode(bridge.root / "workspace") + b"/bad\xff\xf0.txt", "w") as file:
        file.write("x")
    bridge.gateway.script = [calls(tool("Glob", pattern="*"), tool("Grep", "g", pattern="x")), text("smile \U0001f600 \ud83d"), text("ok")]
    turn = bridge.turn(includePartialMessages=True)
    assert all(json.dumps(event, ensure_ascii=False).encode() for event in turn)
    assert result(turn)["result"] == "smile \U0001f600 \ufffd"
    assert json.dumps(bridge.gateway.requests[-1], ensure_ascii=False).encode()


def test_a_tool_that_takes_long_gives_signs_of_life(bench: Workbench, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.runtime.calls.PROGRESS_INTERVAL", 0.05)
    running = Calls(bench, Permissions(Settings(), paths), Interrupt(), [tool("Bash", command="sleep 0.3")], set())
    seen: list[float] = []
    running.run(lambda call, seconds: seen.append(seconds))
    assert seen
    assert running.results()[0]["content"] == "(The command succeeded and printed nothing.)"


def test_results_that_are_too_large_together_are_refused(bench: Workbench, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash.runtime.calls.MAX_RESULT_BYTES", 10)
    uses = [tool("Bash", f"b{n}", command="echo 1234567") for n in range(2)]
    running = Calls(bench, Permissions(Settings(), paths), Interrupt(), uses, set())
    running.run(lambda call, seconds: None)
    assert [block.get("is_error", False) for block in running.results()] == [False, True]


@pytest.mark.parametrize("content", [[], [5], ["text"], [{}]])
def test_content_that_is_no_content_is_left_to_the_provider_to_refuse(bridge: Driver, content: Any) -> None:
    bridge.gateway.script = [api_error(400, "invalid_request_error", "content: wrong"), text("fine")]
    assert "content: wrong" in bridge.turn(content)[-1]["error"]
    assert bridge.turn("better", turn_id="t2")[-1]["status"] == "completed"


# Stop reasons


def test_unknown_blocks_and_deltas_are_carried_through(bridge: Driver) -> None:
    new = {"type": "new_thing", "data": {"x": 1}}
    answer = events({"type": "thinking", "thinking": "", "signature": ""}, new, {"type": "text", "text": "ok"})
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "new_delta", "more": "a"}},
    ]
    bridge.gateway.script = [[*answer[:4], *deltas, *answer[4:]]]
    content = messages(bridge.turn(), "assistant")[0]["message"]["content"]
    assert content == [{"type": "thinking", "thinking": "hm", "signature": "s"}, {**new, "more": "a"}, {"type": "text", "text": "ok"}]
    bridge.turn("and?", turn_id="t2")
    assert sent(bridge)[1]["content"] == content


def test_pause_turn_is_continued(bridge: Driver) -> None:
    bridge.gateway.script = [text("wait…", stop="pause_turn"), text("done")]
    turn = bridge.turn()
    assert result(turn)["result"] == "done"
    assert [message["role"] for message in sent(bridge)] == ["user", "assistant"]


@pytest.mark.parametrize("stop", ["max_tokens", "stop_sequence", "something_new"])
def test_a_text_that_stopped_for_another_reason_ends_the_turn(bridge: Driver, stop: str) -> None:
    bridge.gateway.script = [text("half", stop=stop)]
    final = result(bridge.turn())
    assert (final["result"], final["stop_reason"], final["is_error"]) == ("half", stop, False)


def test_a_call_in_a_reply_that_was_cut_off_is_not_run(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", command="touch ran"), stop="max_tokens"), text("ok")]
    turn = bridge.turn()
    assert "was not run" in results(turn)[0]["content"]
    assert not (bridge.root / "workspace" / "ran").exists()
    assert result(turn)["result"] == "ok"


def test_replies_that_are_cut_off_again_and_again_end_the_turn(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", command="x"), stop="max_tokens") for _ in range(9)]
    final = result(bridge.turn())
    assert final["is_error"]
    assert final["num_turns"] == 4


def test_a_refusal_is_explained_and_forgotten(bridge: Driver) -> None:
    bridge.gateway.script = [text("I", stop="refusal", stop_details={"type": "refusal", "explanation": "Not this."}), text("hello")]
    turn = bridge.turn("something bad")
    assert result(turn)["is_error"]
    assert "Not this." in result(turn)["result"]
    assert turn[-1]["status"] == "completed"
    bridge.turn("something good", turn_id="t2")
    assert [message["content"] for message in sent(bridge)] == ["something good"]


def test_a_full_context_window_is_explained(bridge: Driver) -> None:
    bridge.gateway.script = [text("ha", stop="model_context_window_exceeded")]
    final = result(bridge.turn())
    assert "Start a new session" in final["result"]
    assert final["is_error"]


def test_max_turns_ends_the_turn_and_the_next_one_goes_on(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", f"b{n}", command="true")) for n in range(2)]
    turn = bridge.turn(maxTurns=2)
    assert (result(turn)["subtype"], result(turn)["num_turns"]) == ("error_max_turns", 2)
    bridge.gateway.script = [text("more")]
    assert result(bridge.turn("go on", turn_id="t2"))["result"] == "more"
    assert [message["role"] for message in sent(bridge)] == ["user", "assistant", "user", "assistant", "user", "user"]


def test_an_empty_answer_does_not_spoil_the_conversation(bridge: Driver) -> None:
    bridge.gateway.script = [events(), text("x")]
    bridge.turn("one")
    bridge.turn("two", turn_id="t2")
    assert [message["content"] for message in sent(bridge)] == ["one", "two"]


# Failures


def broken(value: str = "hello") -> list[Json]:
    return text(value)[:3]


def test_a_stream_that_breaks_is_tried_again_and_no_tool_runs_twice(bridge: Driver) -> None:
    use = calls(tool("Bash", command="echo x >> ran"))
    bridge.gateway.script = [use[:-1], use, broken(), text("done")]
    turn = bridge.turn()
    retries = [message for message in messages(turn, "system") if message["subtype"] == "api_retry"]
    assert [retry["attempt"] for retry in retries] == [1, 1]
    assert "broke off" in retries[0]["message"]
    assert (bridge.root / "workspace" / "ran").read_text() == "x\n"
    assert result(turn)["result"] == "done"
    assert len(messages(turn, "assistant")) == 2


def test_an_overloaded_provider_is_tried_again_after_the_time_it_asks_for(bridge: Driver) -> None:
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    bridge.gateway.script = [
        api_error(529, "overloaded_error", "Overloaded", **{"retry-after": "0"}),
        [*text("x")[:2], overloaded],
        text("ok"),
    ]
    turn = bridge.turn()
    retries = [message for message in messages(turn, "system") if message["subtype"] == "api_retry"]
    assert [(retry["error_status"], retry["error"]) for retry in retries] == [(529, "overloaded_error"), (None, "overloaded_error")]
    assert retries[0]["retry_delay_ms"] == 0
    assert result(turn)["result"] == "ok"


def test_a_provider_that_keeps_failing_fails_the_turn_in_words(bridge: Driver) -> None:
    bridge.gateway.script = [api_error(500, "api_error", "Internal", **{"retry-after": "0"}) for _ in range(9)]
    turn = bridge.turn()
    assert len(bridge.gateway.requests) == 4
    assert [event["ev"] for event in turn[-2:]] == ["error", "done"]
    assert turn[-1]["status"] == "failed"
    assert "Internal" in turn[-1]["error"]


def test_what_the_gateway_has_retried_is_final(bridge: Driver) -> None:
    bridge.gateway.script = [api_error(529, "overloaded_error", "The model is overloaded", **{"x-should-retry": "false"})]
    assert "The model is overloaded" in bridge.turn()[-1]["error"]
    assert len(bridge.gateway.requests) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (api_error(401, "authentication_error", "The model provider refused the key"), "refused the key"),
        (api_error(404, "not_found_error", "model: m"), "model: m"),
        (api_error(429, "rate_limit_error", "slow down"), "slow down"),
        (api_error(400, "invalid_request_error", "prompt is too long"), "prompt is too long"),
        (b"HTTP/1.1 502 Bad\r\nretry-after: 0\r\n\r\n<html>", "<html>"),
        (b"nonsense\r\n\r\n", "did not answer in HTTP"),
    ],
)
def test_an_error_of_the_provider_is_passed_on_and_the_session_stays_usable(bridge: Driver, answer: bytes, words: str) -> None:
    bridge.gateway.script = [answer] * 4
    turn = bridge.turn("first")
    assert words in turn[-1]["error"]
    assert result(turn)["is_error"]
    bridge.gateway.script = [text("fine")]
    assert result(bridge.turn("second", turn_id="t2"))["result"] == "fine"


def test_a_message_that_the_provider_calls_wrong_is_not_sent_again(bridge: Driver) -> None:
    bridge.gateway.script = [text("hello"), api_error(400, "invalid_request_error", "bad image"), text("fine")]
    bridge.turn("one")
    bridge.turn([{"type": "image", "source": {}}], turn_id="t2")
    bridge.turn("three", turn_id="t3")
    assert [message["content"] for message in sent(bridge)] == ["one", "hello", "three"]


def test_an_image_of_a_tool_that_the_provider_refuses_is_replaced_by_a_note(bridge: Driver) -> None:
    (bridge.root / "workspace" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 10)
    bridge.gateway.script = [calls(tool("Read", file_path="x.png")), api_error(400, "invalid_request_error", "bad image"), text("fine")]
    bridge.turn("one")
    bridge.turn("two", turn_id="t2")
    assert sent(bridge)[2]["content"][0]["content"][0]["text"].startswith("[image left out")


TOO_LONG = api_error(400, "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum")


@pytest.mark.parametrize("answer", [TOO_LONG, api_error(413, "request_too_large", "no")])
def test_results_that_outgrow_the_context_are_left_out_of_the_next_turn(bridge: Driver, answer: bytes) -> None:
    big = tool("Bash", command="head -c 20000 /dev/zero | tr '\\0' x")
    bridge.gateway.script = [text("hello"), calls(tool("Bash", command="echo kept")), calls(big), answer, text("fine")]
    bridge.turn("first")
    assert result(bridge.turn("second", "t2"))["is_error"]
    assert result(bridge.turn("third", "t3"))["result"] == "fine"
    conversation = json.dumps(sent(bridge))
    assert "result of 20002 characters left out" in conversation
    assert "kept" in conversation
    assert len(conversation) < 5000


@pytest.mark.parametrize("answer", [TOO_LONG, api_error(400, "invalid_request_error", "messages.1: wrong")])
def test_a_turn_that_cannot_be_shortened_is_forgotten(bridge: Driver, answer: bytes) -> None:
    big = tool("Write", file_path="x", content="y" * 20000)
    bridge.gateway.script = [text("hello"), calls(big), answer, text("fine")]
    bridge.turn("first")
    bridge.turn("second", "t2")
    assert result(bridge.turn("third", "t3"))["result"] == "fine"
    assert [message["content"] for message in sent(bridge)] == ["first", "hello", "third"]


def test_an_image_and_a_long_text_are_both_left_out_when_they_are_too_long(bridge: Driver) -> None:
    (bridge.root / "workspace" / "x.png").write_bytes(b"\x89PNG\r\n" + b"x" * 3000)
    uses = calls(tool("Read", file_path="x.png"), tool("Bash", "b", command="head -c 20000 /dev/zero | tr '\\0' x"))
    bridge.gateway.script = [uses, TOO_LONG, text("fine")]
    bridge.turn("first")
    assert result(bridge.turn("second", "t2"))["result"] == "fine"
    assert len(json.dumps(sent(bridge))) < 5000


def test_a_gateway_that_comes_late_is_waited_for(bridge: Driver) -> None:
    path = bridge.gateway.path
    os.rename(path, path + ".away")
    bridge.query("hi")
    bridge.read_until(lambda event: event["ev"] == "message")
    os.rename(path + ".away", path)
    assert bridge.finish()[-1]["status"] == "completed"


def test_a_fault_of_the_bridge_fails_the_turn_only(bridge: Driver) -> None:
    bridge.init(betas=5)
    turn = bridge.turn()
    assert "internal error of the bridge" in turn[-1]["error"]
    assert [event["ev"] for event in turn[-2:]] == ["error", "done"]
    bridge.init()
    assert bridge.turn(turn_id="t2")[-1]["status"] == "completed"


def test_what_the_bridge_stumbled_over_is_not_met_again(bridge: Driver) -> None:
    assert bridge.turn([{"type": "text", "cache_control": {}}], turn_id="t0", model="m")[-1]["status"] == "completed"
    assert "internal error" in bridge.turn("one", maxTurns="many")[-1]["error"]
    bridge.turn("two", turn_id="t2")
    assert [message["content"] for message in sent(bridge)][-1] == "two"
    assert "one" not in json.dumps(sent(bridge))


# Interrupts


def interrupt_when(bridge: Driver, ready: Any) -> list[Json]:
    until(ready, "the moment to interrupt")
    started = time.monotonic()
    bridge.send("interrupt", turn_id="t1")
    turn = bridge.finish()
    assert time.monotonic() - started < 2
    assert turn[-1]["status"] == "interrupted"
    return turn


def test_an_interrupt_during_the_stream_keeps_what_was_said(bridge: Driver) -> None:
    bridge.gateway.script = [[*text("hello world")[:3], HOLD]]
    bridge.query("hi", includePartialMessages=True)
    bridge.read_until(lambda event: event["ev"] == "delta" and event["data"]["event"]["type"] == "content_block_delta")
    turn = interrupt_when(bridge, lambda: True)
    assert messages(turn, "assistant")[0]["message"]["content"] == [{"type": "text", "text": "hello"}]
    bridge.gateway.released.set()
    bridge.turn("go on", turn_id="t2")
    assert [message["content"] for message in sent(bridge)] == ["hi", "hello", "[Request interrupted by user]", "go on"]


def test_an_interrupt_before_the_first_byte_ends_the_turn(bridge: Driver) -> None:
    bridge.gateway.script = [[HOLD]]
    bridge.query("hi")
    turn = interrupt_when(bridge, bridge.gateway.holding.is_set)
    assert result(turn)["subtype"] == "error_during_execution"


def test_an_interrupt_during_a_tool_kills_its_processes_and_answers_every_call(bridge: Driver) -> None:
    child = bridge.root / "workspace" / "child"
    bridge.gateway.script = [
        calls(tool("Bash", "b1", command="echo begun; sleep 60 & echo $! > child; wait"), tool("Bash", "b2", command="touch ran"))
    ]
    bridge.query("hi")
    turn = interrupt_when(bridge, lambda: child.exists() and child.read_text() != "")
    first, second = results(turn)
    assert first["is_error"]
    assert "begun" in first["content"]
    assert "interrupted" in second["content"]
    assert not (bridge.root / "workspace" / "ran").exists()
    until(lambda: not Path(f"/proc/{child.read_text().strip()}/fd").exists(), "the child is gone")
    bridge.gateway.script = [text("ok")]
    bridge.turn("go on", turn_id="t2")
    assert [message["role"] for message in sent(bridge)] == ["user", "assistant", "user", "user", "user"]


def test_an_interrupt_between_two_tries_ends_the_turn(bridge: Driver) -> None:
    bridge.gateway.script = [api_error(503, "api_error", "x", **{"retry-after": "60"})]
    bridge.query("hi")
    bridge.read_until(lambda event: event["ev"] == "message" and event["data"].get("subtype") == "api_retry")
    interrupt_when(bridge, lambda: True)


def test_an_interrupt_of_another_turn_does_nothing(bridge: Driver) -> None:
    bridge.send("interrupt", turn_id="other")
    assert bridge.turn()[-1]["status"] == "completed"


# Requests


def test_options_reach_the_api_in_its_form(bridge: Driver) -> None:
    bridge.init(betas=["one-beta", "two-beta"])
    bridge.gateway.script = [text('{"a": 1}')]
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    turn = bridge.turn(effort="high", thinking={"type": "enabled", "budgetTokens": 2000}, outputFormat=schema)
    request = bridge.gateway.requests[0]
    assert request["thinking"] == {"type": "enabled", "budget_tokens": 2000}
    assert request["output_config"] == {"effort": "high", "format": schema}
    assert "Anthropic-Beta: one-beta,two-beta" in bridge.gateway.headers[0]
    assert result(turn)["structured_output"] == {"a": 1}


def test_a_budget_that_cannot_be_enforced_is_said(bridge: Driver) -> None:
    turn = bridge.turn(maxBudgetUsd=1.5)
    assert "maxBudgetUsd is not enforced" in next(event["text"] for event in turn if event["ev"] == "log")


def test_everything_before_the_newest_message_stays_the_same_from_call_to_call(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", command="true")), text("x"), text("y")]
    bridge.turn("one")
    bridge.turn("two", turn_id="t2")
    prefixes = [sent(bridge, index) for index in range(3)]
    assert prefixes[1][:1] == prefixes[0]
    assert prefixes[2][:3] == prefixes[1]
    for part in ("system", "tools"):
        assert len({json.dumps(request[part]) for request in bridge.gateway.requests}) == 1


def test_the_session_works_with_the_oldest_python_that_sandboxes_may_have(data_dir: str) -> None:
    oldest = shutil.which("python3.10")
    if oldest is None or subprocess.run([oldest, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("no python3.10 on this machine")
    with driver(Path(data_dir), python=oldest) as bridge:
        bridge.init()
        bridge.gateway.script = [calls(tool("Bash", command="echo x"), tool("Grep", "g", pattern="x")), text("ok")]
        assert result(bridge.turn())["result"] == "ok"
