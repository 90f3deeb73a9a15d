"""Records and the log's derived entries: frames in order, and a conversation that can be rebuilt from whatever was logged."""

from __future__ import annotations

import uuid

from ash import dialect, models
from ash.models import Event, Json

SESSION = str(uuid.UUID(int=1))
CALL: Json = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}}
RESULT: Json = {"type": "tool_result", "tool_use_id": "t1", "content": "a.txt", "is_error": False}


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


def test_hostile_messages_do_not_break_the_expansion() -> None:
    for message in ({}, {"type": "assistant"}, {"type": "assistant", "message": []}, {"type": "user", "message": {"content": 3}}):
        models.expand(message, streamed=False)
    models.expand({"type": "stream_event", "event": "x"}, streamed=True)
    models.expand({"type": "assistant", "message": {"content": [None, 1, {"type": None}]}}, streamed=True)


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


def test_timeline_rows_carry_the_names_that_readers_look_for() -> None:
    use, result = logged((models.TOOL_USE, CALL), *models.expand(user(RESULT), streamed=False)[:1])
    started = dialect.timeline(use, "default")
    assert (started["type"], '"toolName":"Bash"' in started["data"], '"name":"Bash"' in started["data"]) == ("tool_start", True, True)
    assert '"stdout":"a.txt"' in dialect.timeline(result, "default")["data"]
    uuid.UUID(started["id"])


def test_every_event_type_is_noun_and_verb() -> None:
    assert all(type.count(".") == 1 for type in models.EVENT_TYPES)
    assert len(set(models.EVENT_TYPES)) == len(models.EVENT_TYPES)
