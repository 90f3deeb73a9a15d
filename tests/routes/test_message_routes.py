"""Messages and streams over HTTP: what a turn looks like to those who send, leave, come back, or only watch."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from ash import dialect, models
from ash.errors import StoreFailed
from ash.models import NewEvent
from tests import fakes
from tests.harness import Server, eventually, read_frames

Start = Callable[..., Awaitable[Server]]


def names(frames: list[Any]) -> list[str]:
    return [frame.event for frame in frames]


def open_turn(server: Server, id: str, content: Any = "Hello", **headers: str) -> Any:
    return server.http.post(f"{server.url}/api/sessions/{id}/messages", json={"content": content}, headers=headers)


def open_stream(server: Server, id: str, query: str = "", **headers: str) -> Any:
    return server.http.get(f"{server.url}/api/sessions/{id}/stream{query}", headers=headers)


async def waiting_turn(server: Server) -> str:
    """A session in a turn that has said something and waits."""
    server.sandboxes.script = fakes.wait
    id = await server.session()
    async with open_turn(server, id) as answer:
        await read_frames(answer, until="message")
    return id


async def ended_turns(server: Server, id: str) -> list[str]:
    return [event.data["status"] for event in await server.parts.log.read(id, types=(models.TURN_ENDED,))]


# A turn


async def test_a_turn_streams_in_the_order_of_the_contract_and_ends_with_one_done(server: Server) -> None:
    frames = await server.frames(await server.session())
    assert names(frames) == ["session_start", "message", "turn_complete", "message", "done"]
    assert [frame.data.get("type") for frame in frames if frame.event == "message"] == ["assistant", "result"]
    assert frames[2].data == {"numTurns": 1, "result": "You said: Hello"}


async def test_with_partial_messages_each_delta_comes_before_its_raw_event(server: Server) -> None:
    frames = await server.frames(await server.session(), "a b", includePartialMessages=True)
    assert names(frames)[:3] == ["session_start", "text_delta", "message"]
    assert [frame.data["delta"] for frame in frames if frame.event == "text_delta"] == ["You", "said:", "a", "b"]


async def test_the_answer_is_an_unbuffered_event_stream(server: Server) -> None:
    async with open_turn(server, await server.session()) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Accel-Buffering"] == "no"
        raw = await answer.read()
    assert raw.startswith(b"id: 2\nevent: session_start\ndata: {")


async def test_a_stream_is_ascii_whatever_is_said(server: Server) -> None:
    said = 'größer \u2028\u2029\x85\x0b\x0c 😀 \\ " \r\n'
    async with open_turn(server, await server.session(), said) as answer:
        raw = await answer.read()
    assert raw.isascii()
    assert not set(raw) & set(b"\x0b\x0c\r\x85")


@pytest.mark.parametrize("content", [
    "Hello",
    " größer \u2028 😀 \x00 \r\n ",
    [{"type": "text", "text": "see", "cache_control": {"type": "ephemeral"}},
     {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
     {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}, "title": "T", "extra": [1, None, 2.5]}],
])  # fmt: skip
async def test_content_reaches_the_agent_and_the_history_untouched(server: Server, content: Any) -> None:
    id = await server.session()
    await server.frames(id, content)
    assert server.sandboxes.claimed[0].queries[0][1] == content
    rows = (await server.call("GET", f"/api/sessions/{id}/messages"))["messages"]
    assert json.loads(rows[0]["content"]) == {"type": "user", "content": content}


async def test_the_options_of_a_message_reach_the_agent(server: Server) -> None:
    options = {"model": "m", "maxTurns": 3, "maxBudgetUsd": 0.5, "effort": "high", "thinking": {"type": "enabled", "budgetTokens": 9},
               "outputFormat": {"type": "json_schema", "schema": {}}, "includePartialMessages": False}  # fmt: skip
    id = await server.session()
    await server.frames(id, **options, unknown=1)
    assert server.sandboxes.claimed[0].queries[0][2] == options


async def test_half_a_million_characters_and_tens_of_megabytes_are_accepted(server: Server) -> None:
    id = await server.session()
    assert names(await server.frames(id, "ü" * 500_000))[-1] == "done"
    server.sandboxes.script = fakes.fail
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 40_000_000}}
    assert names(await server.frames(id, [image])) == ["session_start", "error", "done"]
    assert server.sandboxes.claimed[0].queries[1][1] == [image]


async def test_more_than_fifty_mebibytes_are_refused_before_they_are_read(server: Server) -> None:
    id = await server.session()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    length = 50 * 1024 * 1024 + 1
    writer.write(f"POST /api/sessions/{id}/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
    assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"413"
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(("body", "complaint"), [
    ({}, "content is required"),
    ({"content": ""}, "content must have 1 to 500,000 characters"),
    ({"content": "x" * 500_001}, "content must have 1 to 500,000 characters; it has 500,001"),
    ({"content": 5}, "content must be a string or a list of blocks"),
    ({"content": []}, "content must have 1 to 20 blocks; it has 0"),
    ({"content": [{"type": "text", "text": "x"}] * 21}, "content must have 1 to 20 blocks; it has 21"),
    ({"content": ["x"]}, "content[0] must be an object"),
    ({"content": [{"type": "video"}]}, "content[0].type must be one of text, image, document"),
    ({"content": [{"type": "text"}]}, "content[0].text must be a string"),
    ({"content": [{"type": "image"}]}, "content[0].source must be an object"),
    ({"content": "x", "maxTurns": 0}, "maxTurns must be a whole number of at least 1"),
    ({"content": "x", "maxBudgetUsd": -1}, "maxBudgetUsd must be a number of at least 0"),
    ({"content": "x", "effort": "huge"}, "effort must be one of low, medium, high, max"),
    ({"content": "x", "includePartialMessages": "yes"}, "includePartialMessages must be true or false"),
])  # fmt: skip
async def test_an_unusable_message_is_refused_with_what_is_wrong(server: Server, body: dict[str, Any], complaint: str) -> None:
    id = await server.session()
    assert complaint in (await server.call("POST", f"/api/sessions/{id}/messages", body, expect=400))["error"]
    assert server.sandboxes.claimed[0].queries == []


@pytest.mark.parametrize(("script", "reason"), [(fakes.fail, "the model refused"), (fakes.die, "signal 9")])
async def test_a_turn_that_fails_ends_with_error_then_done_and_the_session_stays_usable(
    server: Server, script: fakes.Script, reason: str
) -> None:
    id = await server.session()
    server.sandboxes.script = script
    frames = await server.frames(id)
    assert names(frames)[-2:] == ["error", "done"]
    assert reason in frames[-2].data["error"]
    assert frames[-1].data["status"] == "failed"
    server.sandboxes.script = fakes.echo
    assert names(await server.frames(id))[-2:] == ["message", "done"]


async def test_a_second_message_during_a_turn_is_refused(server: Server) -> None:
    id = await waiting_turn(server)
    assert (await server.call("POST", f"/api/sessions/{id}/messages", {"content": "me too"}, expect=409))["code"] == "turn_running"


async def test_a_message_to_a_paused_session_says_how_to_resume(server: Server) -> None:
    id = await server.session()
    await server.call("POST", f"/api/sessions/{id}/pause")
    answer = await server.call("POST", f"/api/sessions/{id}/messages", {"content": "hi"}, expect=400)
    assert answer["error"].startswith("Session is paused")
    assert "resume" in answer["error"]


# Leaving and coming back


async def test_a_client_that_leaves_does_not_stop_the_turn(server: Server) -> None:
    id = await waiting_turn(server)
    server.sandboxes.claimed[0].proceed.set()
    assert await eventually(lambda: ended_turns(server, id)) == ["completed"]


async def test_a_client_that_comes_back_gets_exactly_the_rest(server: Server) -> None:
    id = await server.session()
    whole = await server.frames(id, includePartialMessages=True)
    for cut in range(len(whole) - 1):
        async with open_turn(server, id, **{"Last-Event-ID": str(whole[cut].id)}) as answer:
            assert await read_frames(answer) == whole[cut + 1 :]
    assert len(server.sandboxes.claimed[0].queries) == 1


async def test_a_client_that_comes_back_during_the_turn_follows_it_to_its_end(server: Server) -> None:
    id = await waiting_turn(server)
    async with open_turn(server, id, **{"Last-Event-ID": "2"}) as answer:
        server.sandboxes.claimed[0].proceed.set()
        assert names(await read_frames(answer)) == ["message", "done"]


async def test_there_is_nothing_after_the_end_of_a_turn(server: Server) -> None:
    id = await server.session()
    done = (await server.frames(id))[-1]
    await server.frames(id, "again")
    for cursor in (done.id, "1"):
        async with open_turn(server, id, **{"Last-Event-ID": str(cursor)}) as answer:
            assert (answer.status, await answer.read()) == (204, b"")


async def test_coming_back_while_no_turn_runs_does_not_wait_for_the_next_one(server: Server) -> None:
    id = await server.session()
    async with open_turn(server, id, **{"Last-Event-ID": "1"}) as answer:
        assert answer.status == 204


@pytest.mark.parametrize(("cursor", "complaint"), [
    ("99", "the session's log ends at 1"), ("x", "Last-Event-ID must be"), ("-1", "Last-Event-ID must be"),
])  # fmt: skip
async def test_a_cursor_that_cannot_be_is_refused(server: Server, cursor: str, complaint: str) -> None:
    id = await server.session()
    for opened in (open_turn(server, id, **{"Last-Event-ID": cursor}), open_stream(server, id, **{"Last-Event-ID": cursor})):
        async with opened as answer:
            assert answer.status == 400
            assert complaint in (await answer.json())["error"]


async def test_silence_is_broken_by_comments(start_server: Start) -> None:
    server = await start_server(keepalive_interval=0.1)
    id = await waiting_turn(server)
    async with open_stream(server, id) as answer:
        raw = b""
        async with asyncio.timeout(5):
            while raw.count(b": ping\n\n") < 3:
                raw += await answer.content.readany()
    assert raw.startswith(b"id: 2\nevent: session_start\n")


async def flood(sandbox: fakes.FakeSandbox, turn_id: str, content: Any, options: Any) -> AsyncIterator[dict[str, Any]]:
    for _ in range(80):
        yield {"ev": "message", "turn_id": turn_id, "data": fakes.assistant("x" * 100_000)}
        await asyncio.sleep(0)
    yield {"ev": "done", "turn_id": turn_id, "status": "completed"}


async def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("ash.routes.streams.WRITE_TIMEOUT", 0.2)
    server.sandboxes.script = flood
    id = await server.session()
    with socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.connect(("127.0.0.1", server.port))
        body = b'{"content":"go"}'
        idle.sendall(f"POST /api/sessions/{id}/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert await eventually(lambda: ended_turns(server, id)) == ["completed"]
        await eventually(lambda: "dropped a client" in caplog.text)
    async with open_stream(server, id) as answer:
        assert len(await read_frames(answer, until="done")) == 82


async def test_a_stopping_server_ends_running_turns_and_their_streams_with_error_and_done(server: Server) -> None:
    id = await waiting_turn(server)
    async with open_turn(server, id, **{"Last-Event-ID": "2"}) as turn, open_stream(server, id, "?after=2") as stream:
        stopping = asyncio.create_task(server.runner.cleanup())
        frames = await read_frames(turn)
        assert names(frames) == ["message", "error", "done"]
        assert "shutting down" in frames[1].data["error"]
        assert names(await read_frames(stream))[:3] == names(frames)
        await asyncio.wait_for(stopping, 5)


async def test_a_stream_whose_log_fails_still_ends_with_error_and_done(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> AsyncIterator[list[models.Event]]:
        raise StoreFailed("the database is gone")
        yield []

    id = await server.session()
    monkeypatch.setattr(server.parts.log, "follow", broken)
    _, *last = [(frame.event, frame.data) for frame in await server.frames(id)]
    assert last == [("error", {"error": "the database is gone"}), ("done", {"sessionId": id})]


async def test_an_error_nobody_thought_of_ends_the_stream_and_is_logged(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = dialect.frame
    monkeypatch.setattr(dialect, "frame", lambda event: 1 / 0 if event.type == models.ASSISTANT_MESSAGE else real(event))
    *_, error, done = await server.frames(await server.session())
    assert (error.event, done.event) == ("error", "done")
    assert error.data["error"].split()[2].rstrip(";") in caplog.text
    assert "ZeroDivisionError" in caplog.text


# A log in which the end of the first turn is late: the server could not write it at once, and the second turn began before it

LATE_END = 5
_LATE = (
    (models.TURN_STARTED, {"turnId": "1", "content": "a"}), (models.ASSISTANT_MESSAGE, fakes.assistant("one")),
    (models.TURN_STARTED, {"turnId": "2", "content": "b"}), (models.TURN_ENDED, {"turnId": "1", "status": "failed"}),
    (models.ASSISTANT_MESSAGE, fakes.assistant("two")), (models.TURN_ENDED, {"turnId": "2", "status": "completed"}),
)  # fmt: skip


async def late_log(server: Server) -> str:
    id = await server.session()
    assert (await server.parts.log.append(id, [NewEvent(*entry) for entry in _LATE]))[3].seq == LATE_END
    return id


@pytest.mark.parametrize(("cursor", "seen"), [
    (0, ["session_start", "message", "error", "done"]), (2, ["message", "error", "done"]), (3, ["error", "done"]),
    (4, ["message", "done"]), (LATE_END, ["message", "done"]), (6, ["done"]),
])  # fmt: skip
async def test_a_turn_ends_with_its_own_end_only(server: Server, cursor: int, seen: list[str]) -> None:
    id = await late_log(server)
    async with open_turn(server, id, **{"Last-Event-ID": str(cursor)}) as answer:
        frames = await read_frames(answer)
    assert names(frames) == seen
    assert frames[-1].data.get("turnId") == ("2" if cursor > 3 else None)


async def test_the_end_of_the_turn_before_is_no_part_of_a_new_turn(server: Server) -> None:
    id = await waiting_turn(server)
    late = NewEvent(models.TURN_ENDED, {"turnId": "before", "status": "failed"})
    async with open_turn(server, id, **{"Last-Event-ID": "2"}) as answer:
        await server.parts.log.append(id, [late])
        server.sandboxes.claimed[0].proceed.set()
        frames = await read_frames(answer)
    assert [(frame.event, frame.data.get("status")) for frame in frames] == [("message", None), ("done", "completed")]


async def test_coming_back_asks_about_this_session_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    id = await waiting_turn(server)
    monkeypatch.delattr(type(server.parts.store), "open_turns")
    async with open_turn(server, id, **{"Last-Event-ID": "3"}) as answer:
        server.sandboxes.claimed[0].proceed.set()
        assert names(await read_frames(answer)) == ["done"]


# Watching


async def test_a_stream_goes_through_all_turns_and_ends_with_the_session(server: Server) -> None:
    id = await server.session()
    first, second = await server.frames(id), await server.frames(id, "again")
    async with open_stream(server, id) as answer:
        assert await read_frames(answer, until="done") == first
    async with open_stream(server, id, f"?after={first[-1].id}") as answer:
        assert await read_frames(answer, until="done") == second
        await server.call("DELETE", f"/api/sessions/{id}")
        assert names(await read_frames(answer)) == ["session_end"]


async def test_the_stream_of_an_ended_session_replays_and_then_tells_a_browser_not_to_come_back(server: Server) -> None:
    id = await server.session()
    frames = await server.frames(id)
    await server.call("DELETE", f"/api/sessions/{id}")
    async with open_stream(server, id) as answer:
        replayed = await read_frames(answer)
    assert replayed[:-1] == frames
    assert replayed[-1].event == "session_end"
    async with open_stream(server, id, **{"Last-Event-ID": str(replayed[-1].id)}) as answer:
        assert answer.status == 204


async def stubborn(sandbox: fakes.FakeSandbox, turn_id: str, content: Any, options: Any) -> AsyncIterator[dict[str, Any]]:
    """Does not care that it is interrupted."""
    yield {"ev": "message", "turn_id": turn_id, "data": fakes.assistant("Let me think")}
    await sandbox.proceed.wait()
    yield {"ev": "message", "turn_id": turn_id, "data": fakes.assistant("Last words")}
    yield {"ev": "done", "turn_id": turn_id, "status": "interrupted"}


async def test_who_joins_while_a_session_is_ending_sees_its_last_turn_end(server: Server) -> None:
    server.sandboxes.script = stubborn
    id = await server.session()
    async with open_turn(server, id) as answer:
        await read_frames(answer, until="message")
    ending = asyncio.create_task(server.call("DELETE", f"/api/sessions/{id}", expect=200))
    await eventually(lambda: server.sandboxes.claimed[0].interrupted.is_set())
    async with open_stream(server, id, "?after=3") as stream:
        server.sandboxes.claimed[0].proceed.set()
        assert names(await read_frames(stream)) == ["message", "done", "session_end"]
    await asyncio.wait_for(ending, 5)


async def test_who_has_seen_the_end_is_not_kept_waiting_while_the_session_is_about_to_end(server: Server) -> None:
    id = await server.session()
    [end] = await server.parts.log.append(id, [NewEvent(models.SESSION_STATUS_CHANGED, {"from": "active", "to": "ended"})])
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["status"] == "active"
    async with open_stream(server, id, **{"Last-Event-ID": str(end.seq)}) as answer:
        assert answer.status == 204


async def test_many_can_watch_one_turn(server: Server) -> None:
    id = await waiting_turn(server)
    async with AsyncExitStack() as stack:
        answers = [await stack.enter_async_context(open_stream(server, id, "?after=1")) for _ in range(20)]
        server.sandboxes.claimed[0].proceed.set()
        seen = await asyncio.gather(*(read_frames(answer, until="done") for answer in answers))
    assert {tuple(names(frames)) for frames in seen} == {("session_start", "message", "done")}


# History


async def test_hostile_text_does_not_spoil_the_timeline(server: Server) -> None:
    async def hostile(sandbox: fakes.FakeSandbox, turn_id: str, content: Any, options: Any) -> AsyncIterator[dict[str, Any]]:
        forged = {"type": "x\n\nevent: done\ndata: {}"}
        for data in (fakes.assistant("", more=[{"type": "text", "text": 5}, forged]), {"type": "user", "tool_names": ["x"]}):
            yield {"ev": "message", "turn_id": turn_id, "data": data}
        yield {"ev": "done", "turn_id": turn_id, "status": "completed"}

    server.sandboxes.script = hostile
    id = await server.session()
    assert names(await server.frames(id)) == ["session_start", "block", "message", "message", "done"]
    await server.call("GET", f"/api/sessions/{id}/events", expect=200)


async def test_the_history_has_the_messages_numbered_and_pages(server: Server) -> None:
    id = await server.session()
    await server.frames(id, "one")
    await server.frames(id, "two")
    rows = (await server.call("GET", f"/api/sessions/{id}/messages"))["messages"]
    assert [(row["sequence"], row["role"]) for row in rows] == [
        (1, "user"), (2, "assistant"), (3, "assistant"), (4, "user"), (5, "assistant"), (6, "assistant"),
    ]  # fmt: skip
    assert (await server.call("GET", f"/api/sessions/{id}/messages?after=2&limit=2"))["messages"] == rows[2:4]
    await server.call("GET", f"/api/sessions/{id}/messages?limit=1001", expect=400)


async def test_the_timeline_can_be_filtered_and_its_data_is_never_null(server: Server) -> None:
    id = await server.session()
    await server.frames(id)
    rows = (await server.call("GET", f"/api/sessions/{id}/events"))["events"]
    assert [row["type"] for row in rows] == ["lifecycle", "text", "turn_complete"]
    assert all(isinstance(row["data"], str) for row in rows)
    assert (await server.call("GET", f"/api/sessions/{id}/events?type=text"))["events"] == rows[1:2]
    assert (await server.call("GET", f"/api/sessions/{id}/events?after={rows[1]['sequence']}&limit=1"))["events"] == rows[2:]
    assert (await server.call("GET", f"/api/sessions/{id}/events?type=mcp_status"))["events"] == []
    assert "type must be one of text" in (await server.call("GET", f"/api/sessions/{id}/events?type=x", expect=400))["error"]
