"""The request of a model call, the transcript's repair and the answer's assembly: pure code."""

from __future__ import annotations

from typing import Any

import pytest

from ash.runtime import request
from ash.runtime.reply import Reply
from ash.runtime.transcript import LOST, repair, without_media
from tests.runtime.fakes import events

Json = dict[str, Any]
TOOLS = [{"name": "a"}, {"name": "b"}]


def build(transcript: list[Json], **options: Any) -> Json:
    return request.build("m", ["prompt", "place"], TOOLS, transcript, options)


def marks(built: Json) -> list[str]:
    found = [f"system{index}" for index, block in enumerate(built["system"]) if "cache_control" in block]
    found += [f"tool{index}" for index, tool in enumerate(built.get("tools", [])) if "cache_control" in tool]
    for index, message in enumerate(built["messages"]):
        blocks = message["content"] if isinstance(message["content"], list) else []
        found += [f"message{index}.{place}" for place, block in enumerate(blocks) if "cache_control" in block]
    return found


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def assistant(*blocks: Json) -> Json:
    return {"role": "assistant", "content": list(blocks)}


def use(call: str) -> Json:
    return {"type": "tool_use", "id": call, "name": "Bash", "input": {}}


def answer(call: str, content: Any = "x") -> Json:
    return {"type": "tool_result", "tool_use_id": call, "content": content}


SAID = {"type": "text", "text": "said"}


# Breakpoints


def test_system_tools_and_the_last_two_user_messages_are_cached() -> None:
    assert marks(build([user("a"), assistant(SAID), user("b"), assistant(SAID), user("c")])) == [
        "system1",
        "tool1",
        "message2.0",
        "message4.0",
    ]


def test_the_transcript_itself_is_not_marked() -> None:
    transcript = [user("a"), user([SAID])]
    build(transcript)
    assert transcript == [user("a"), user([{"type": "text", "text": "said"}])]


@pytest.mark.parametrize("own", [1, 2, 3, 4, 6])
def test_there_are_never_more_than_four_breakpoints_of_ours_and_the_user_s(own: int) -> None:
    marked = [{**SAID, "cache_control": {"type": "ephemeral"}} for _ in range(own)]
    found = marks(build([user([*marked, SAID]), assistant(SAID), user("b")]))
    assert len(found) == max(4, own)


def test_a_block_that_cannot_be_marked_is_left_alone() -> None:
    assert "message0.0" not in marks(build([user([{"type": "new_block"}]), user("b")]))


def test_without_tools_there_is_no_list_of_tools() -> None:
    assert "tools" not in request.build("m", ["p"], [], [user("a")], {})


# Options


@pytest.mark.parametrize(
    ("model", "thinking", "expected"),
    [
        ("claude-sonnet-5", None, 32_000),
        ("claude-3-5-haiku-latest", None, 8_192),
        ("anthropic.claude-3-haiku-20240307-v1:0", None, 4_096),
        ("offline", {"type": "enabled", "budget_tokens": 50_000}, 58_192),
    ],
)
def test_the_answer_s_limit_fits_the_model_and_the_thinking(model: str, thinking: Json | None, expected: int) -> None:
    assert request.max_tokens(model, thinking) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "enabled", "budgetTokens": 2000}, {"type": "enabled", "budget_tokens": 2000}),
        ({"type": "enabled"}, {"type": "enabled", "budget_tokens": 10_000}),
        ({"type": "adaptive"}, {"type": "adaptive"}),
        ({"type": "disabled"}, {"type": "disabled"}),
        ({"type": "adaptive", "display": "summarized"}, {"type": "adaptive", "display": "summarized"}),
    ],
)
def test_thinking_takes_the_form_of_the_api(given: Json, expected: Json) -> None:
    assert build([user("a")], thinking=given)["thinking"] == expected


def test_options_that_are_not_given_are_not_sent() -> None:
    assert set(build([user("a")])) == {"model", "max_tokens", "stream", "system", "messages", "tools"}


# Repair


def test_a_good_transcript_stays_as_it_is() -> None:
    good = [user("a"), assistant(SAID, use("1")), user([answer("1"), SAID]), assistant(SAID), user("b")]
    assert repair(good) == good


def test_calls_without_results_get_one() -> None:
    lost = {"type": "tool_result", "tool_use_id": "2", "content": LOST, "is_error": True}
    assert repair([user("a"), assistant(use("1"), use("2")), user([answer("1")])])[2]["content"] == [answer("1"), lost]
    assert repair([user("a"), assistant(use("2"))])[2:] == [user([lost])]
    assert repair([user("a"), assistant(use("2")), assistant(SAID)])[2:] == [user([lost]), assistant(SAID)]
    assert repair([user("a"), assistant(use("2")), user("b")])[2:] == [user([lost, {"type": "text", "text": "b"}])]


def test_stray_results_and_empty_messages_are_dropped() -> None:
    transcript = [
        user([answer("9")]),
        user("a"),
        assistant(),
        assistant({"type": "text", "text": " "}),
        user(""),
        {"role": "x", "content": "y"},
        user("b"),
    ]
    assert repair(transcript) == [user("a"), user("b")]


def test_results_of_a_message_come_before_its_text_and_in_the_order_of_the_calls() -> None:
    repaired = repair([user("a"), assistant(use("1"), use("2")), user([SAID, answer("2"), answer("1")])])
    assert repaired[2]["content"] == [answer("1"), answer("2"), SAID]


def test_repairing_twice_changes_nothing() -> None:
    once = repair([user("a"), assistant(use("1")), user("b"), assistant(use("2"))])
    assert repair(once) == once


def test_media_are_replaced_by_notes() -> None:
    image = {"type": "image", "source": {}}
    cleaned = without_media(user([answer("1", [image, SAID]), {"type": "document"}]))
    kinds = [part["type"] for part in cleaned["content"][0]["content"]]
    assert kinds == ["text", "text"]
    assert cleaned["content"][1]["text"].startswith("[document left out")
    assert without_media(user("plain")) == user("plain")


# Assembly


def assemble(stream: list[Json]) -> Reply:
    reply = Reply()
    for event in stream:
        reply.add(event)
    return reply


def test_a_message_is_put_together_from_its_events() -> None:
    reply = assemble(
        events({"type": "text", "text": "hello"}, {"type": "tool_use", "id": "1", "name": "Bash", "input": {"a": [1]}}, stop="tool_use")
    )
    message = reply.build()
    assert reply.is_complete
    assert message["content"] == [{"type": "text", "text": "hello"}, {"type": "tool_use", "id": "1", "name": "Bash", "input": {"a": [1]}}]
    assert (message["stop_reason"], message["usage"]) == ("tool_use", {"input_tokens": 10, "output_tokens": 5})


def test_citations_are_collected() -> None:
    cite = {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": {"n": 1}}}
    stream = events({"type": "text", "text": "x"})
    assert assemble([*stream[:3], cite, cite, *stream[3:]]).build()["content"][0]["citations"] == [{"n": 1}, {"n": 1}]


def test_input_that_is_cut_or_no_object_is_marked() -> None:
    reply = assemble(events(*({"type": "tool_use", "id": raw, "name": "x", "input": {}, "raw": raw} for raw in ('{"a', "[1]", ""))))
    assert [block["input"] for block in reply.build()["content"]] == [{}, {}, {}]
    assert reply.cut_calls == {'{"a', "[1]"}


def test_half_a_message_can_be_built() -> None:
    assert assemble(events({"type": "text", "text": "hello"})[:3]).build()["content"] == [{"type": "text", "text": "he"}]
    assert assemble([]).build()["content"] == []
