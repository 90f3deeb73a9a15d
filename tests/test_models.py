"""Records and the log's derived entries: frames in order, and a conversation that can be rebuilt from whatever was logged."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash import dialect, models, sse
from ash.models import Event, Json

SESSION = str(uuid.UUID(int=1))
CALL: Json = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}}
RESULT: Json = {"type": "tool_result", "tool_use_id": "t1", "content": "a.txt", "is_error": False}

FORGED = "x\n\nid: 999999\nevent: done\ndata: {}\n\n"

# Any JSON, made mostly of the words that the product looks for, in places where they do not belong.
_KEYS = ("type", "subtype", "message", "content", "event", "delta", "text", "thinking", "tool_names", "tool_use_id", "id", "name",
         "input", "is_error", "streamed", "turnId", "role", "stop_reason", "tool_name", "t1")  # fmt: skip
_WORDS = ("assistant", "user", "stream_event", "result", "system", "init", "text", "tool_use", "tool_result", "thinking", "text_delta",
          "thinking_delta", "content_block_delta", "done", "message", "session_end", "t1", "é", FORGED)  # fmt: skip
_KEY = st.sampled_from(_KEYS) | st.text(max_size=3)
_LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(_WORDS) | st.text()
_ANY: st.SearchStrategy[Any] = st.recursive(
    _LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEY, inner, max_size=6), max_leaves=20
)
_OBJECT = st.dictionaries(_KEY, _ANY, max_size=8)
_BLOCK = st.fixed_dictionaries({"type": st.sampled_from(_WORDS)}, optional={key: _ANY for key in _KEYS if key != "type"})
_MESSAGE = st.fixed_dictionaries(
    {"type": st.sampled_from(_WORDS)},
    optional={
        "message": st.fixed_dictionaries({"content": st.lists(_BLOCK, max_size=4)}) | _ANY,
        "event": st.fixed_dictionaries({"type": st.just("content_block_delta"), "delta": _BLOCK}) | _ANY,
        "tool_names": _ANY,
        "subtype": _ANY,
    },
)


def assistant(*blocks: Json) -> Json:
    return {"type": "assistant", "message": {"role": "assistant", "content": list(blocks)}}


def user(*blocks: Json) -> Json:
    return {"type": "user", "message": {"role": "user", "content": list(blocks)}, "tool_names": {"t1": "Bash"}}


def logged(*entries: tuple[str, Json]) -> list[Event]:
    return [Event(SESSION, seq, type, data, models.now()) for seq, (type, data) in enumerate(entries, 1)]


def frames(message: Json, *, streamed: bool = False) -> list[str]:
    events = logged(*models.expand(message, streamed=streamed))
    return [frame[0] for event in events if (frame := dialect.frame(event))]


def test_derived_frames_come_in_block_order_before_the_message() -> None:
    thinking = {"type": "thinking", "thinking": "hm"}
    other = {"type": "redacted_thinking", "data": "x"}
    assert frames(assistant(thinking, {"type": "text", "text": "hi"}, CALL, other)) == [
        "thinking_delta", "tool_use", "redacted_thinking", "message",
    ]  # fmt: skip


def test_thinking_that_was_streamed_is_not_sent_again() -> None:
    assert frames(assistant({"type": "thinking", "thinking": "hm"}), streamed=True) == ["message"]


def test_a_result_gives_turn_complete_first() -> None:
    assert frames({"type": "result", "num_turns": 2, "result": "done"}) == ["turn_complete", "message"]


def test_deltas_get_a_frame_of_their_own_kind() -> None:
    def delta(**fields: str) -> Json:
        return {"type": "stream_event", "event": {"type": "content_block_delta", "index": 0, "delta": fields}}

    assert frames(delta(type="text_delta", text="a")) == ["text_delta", "message"]
    assert frames(delta(type="input_json_delta", partial_json="{")) == ["input_json_delta", "message"]
    assert frames({"type": "stream_event", "event": {"type": "message_stop"}}) == ["message"]


def check_wire(event: Event) -> None:
    """Every way in which an event can be shown gives what readers can read."""
    frame = dialect.frame(event)
    if frame is not None:
        assert re.fullmatch("[a-z][a-z0-9_]{0,63}", frame[0])
        assert isinstance(frame[1], dict)
        assert list(sse.Decoder().feed(sse.encode(*frame, id=event.seq))) == [(*frame, str(event.seq))]
    if event.type in dialect.timeline_sources(None):
        assert isinstance(json.loads(dialect.timeline(event, "default")["data"]), dict)
    if event.type in dialect.MESSAGE_TYPES:
        assert isinstance(json.loads(dialect.message(event, "default", 1)["content"]), dict)


@given(message=_MESSAGE | _OBJECT, streamed=st.booleans())
def test_whatever_a_sandbox_says_becomes_events_that_can_be_shown(message: Json, streamed: bool) -> None:
    events = logged(*models.expand(message, streamed=streamed))
    assert all(event.type in models.EVENT_TYPES and isinstance(event.data, dict) for event in events)
    for event in events:
        check_wire(event)
    assert all(set(said) == {"role", "content"} for said in models.rebuild_transcript(events))


@given(type=st.sampled_from(models.EVENT_TYPES), data=_OBJECT | _BLOCK)
def test_whatever_an_event_holds_it_can_be_shown(type: str, data: Json) -> None:
    check_wire(Event(SESSION, 1, type, data, models.now()))


@pytest.mark.parametrize("name", [
    FORGED, "done", "error", "message", "session_end", "resync", "text_delta", "é", "", "Upper", "9", "a b", "a\n", "a" * 65, 5, None, [1],
])  # fmt: skip
def test_a_block_cannot_forge_a_frame(name: Any) -> None:
    block = {"type": name, "data": 1}
    assert frames(assistant(block)) == ["block", "message"]
    assert [dialect.frame(event) for event in logged((models.BLOCK_DELTA, block))] == [("block", block)]


@pytest.mark.parametrize(("id", "names"), [("t1", ["x"]), ("t1", "t1"), ("t1", 5), ("t1", None), (["t1"], {"t1": "Bash"}), (None, {})])
def test_results_with_unusable_names_and_ids_are_kept_without_a_name(id: Any, names: Any) -> None:
    [entry, _] = models.expand({**user({**RESULT, "tool_use_id": id}), "tool_names": names}, streamed=False)
    assert (entry.data["tool_use_id"], entry.data["tool_name"]) == (id, None)


def test_text_that_is_none_is_shown_as_nothing() -> None:
    [event] = logged(*models.expand(assistant({"type": "text", "text": 5}, {"type": "text", "text": "a"}), streamed=False))
    assert json.loads(dialect.timeline(event, "default")["data"]) == {"text": "a"}


def test_the_conversation_is_rebuilt_from_the_log() -> None:
    events = logged(
        (models.TURN_STARTED, {"turnId": "1", "content": "list"}),
        (models.ASSISTANT_MESSAGE, assistant(CALL)),
        (models.USER_MESSAGE, user(RESULT)),
        (models.ASSISTANT_MESSAGE, assistant({"type": "text", "text": "a.txt"})),
    )
    assert [message["role"] for message in models.rebuild_transcript(events)] == ["user", "assistant", "user", "assistant"]


def test_a_call_that_lost_its_result_is_answered_with_an_error() -> None:
    events = logged(
        (models.TURN_STARTED, {"turnId": "1", "content": "list"}),
        (models.ASSISTANT_MESSAGE, assistant(CALL)),
        (models.TURN_STARTED, {"turnId": "2", "content": "again"}),
    )
    rebuilt = models.rebuild_transcript(events)
    assert rebuilt[2]["content"][0]["tool_use_id"] == "t1"
    assert rebuilt[2]["content"][0]["is_error"]
    assert rebuilt[3]["content"] == "again"


def test_a_turn_that_failed_before_an_answer_or_was_refused_is_left_out() -> None:
    refused = {"type": "assistant", "message": {"role": "assistant", "content": [{"type": "text", "text": "no"}], "stop_reason": "refusal"}}
    events = logged(
        (models.TURN_STARTED, {"turnId": "1", "content": "too large"}),
        (models.TURN_ENDED, {"turnId": "1", "status": "failed"}),
        (models.TURN_STARTED, {"turnId": "2", "content": "not allowed"}),
        (models.ASSISTANT_MESSAGE, refused),
        (models.TURN_ENDED, {"turnId": "2", "status": "completed"}),
        (models.TURN_STARTED, {"turnId": "3", "content": "hello"}),
    )
    assert models.rebuild_transcript(events) == [{"role": "user", "content": "hello"}]


def test_long_results_of_a_failed_turn_are_left_out() -> None:
    events = logged(
        (models.TURN_STARTED, {"turnId": "1", "content": "read it all"}),
        (models.ASSISTANT_MESSAGE, assistant(CALL, {**CALL, "id": "t2"})),
        (models.USER_MESSAGE, user({**RESULT, "content": "x" * 1_000_000}, {**RESULT, "tool_use_id": "t2"})),
        (models.TURN_ENDED, {"turnId": "1", "status": "failed"}),
    )
    results = models.rebuild_transcript(events)[2]["content"]
    assert "left out because the turn failed" in results[0]["content"]
    assert (results[0]["tool_use_id"], results[1]["content"]) == ("t1", "a.txt")


def test_timeline_rows_carry_the_names_that_readers_look_for() -> None:
    use, result = logged((models.TOOL_USE, CALL), *models.expand(user(RESULT), streamed=False)[:1])
    started = dialect.timeline(use, "default")
    assert (started["type"], '"toolName":"Bash"' in started["data"], '"name":"Bash"' in started["data"]) == ("tool_start", True, True)
    assert '"stdout":"a.txt"' in dialect.timeline(result, "default")["data"]
    uuid.UUID(started["id"])


def test_every_event_type_is_noun_and_verb() -> None:
    assert all(type.count(".") == 1 for type in models.EVENT_TYPES)
    assert len(set(models.EVENT_TYPES)) == len(models.EVENT_TYPES)
