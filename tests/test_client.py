"""The client library against a real HTTP server: records, errors, uploads, and streams that break and go on."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import json
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ash_ai
from ash import client as client_module
from ash.client import AshClient, AsyncAshClient, Event, EventData
from ash.errors import (
    AgentNotFound,
    AgentUnusable,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    RateLimited,
    Timeout,
    TurnFailed,
    TurnRunning,
    Unauthorized,
)
from ash.remote import calls, cursor
from ash.remote.folder import Upload, scan
from ash.remote.http1 import BrokenResponse, ResponseParser, request_head
from tests.cli.stub_server import HELLO, StubServer, assistant, delta, result, stub_server, turn
from tests.harness import Server, eventually


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with stub_server() as server:
        server.agents["my-agent"] = {"id": "1", "name": "my-agent", "version": 1}
        yield server


@pytest.fixture
def client(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> AshClient:
    monkeypatch.setattr(cursor, "_DELAYS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(cursor, "_SEARCH_DELAYS", (0.0, 0.01))
    return AshClient(server_url=stub.url, timeout=5, stream_timeout=5)


@pytest.fixture
def agent_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my agent"
    folder.mkdir()
    (folder / "CLAUDE.md").write_text("You help.")
    return folder


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


# The quickstart


def test_the_quickstart_snippet_prints_the_text_once(client: AshClient, capsys: pytest.CaptureFixture[str]) -> None:
    session = client.create_session("my-agent")
    for event in client.send_message_stream(session.id, "What is a closure?"):
        if event.type == "message":
            print(event.data, end="")  # noqa: T201
    assert client.end_session(session.id).status == "ended"
    assert capsys.readouterr().out == "Hello, Ada."


def test_the_data_of_an_event_is_still_the_whole_object(client: AshClient) -> None:
    session = client.create_session("my-agent")
    events = list(client.send_message_stream(session.id, "Hi"))
    assert [event.type for event in events] == ["session_start", "message", "turn_complete", "message", "done"]
    assert [event.id for event in events] == [1, 2, 3, 4, 5]
    message = events[1].data
    assert isinstance(message, dict)
    assert message["message"]["content"][0]["text"] == f"{message:s}" == events[1].text


def test_event_data_survives_copy_pickle_and_json() -> None:
    data = EventData({"delta": "x"}, "text_delta")
    assert str(copy.deepcopy(data)) == str(pickle.loads(pickle.dumps(data))) == "x"
    assert json.loads(json.dumps(data)) == {"delta": "x"}
    assert str(EventData({"id": "1"}, "tool_use")) == "{'id': '1'}"


def test_ash_ai_offers_the_same_names() -> None:
    assert ash_ai.AshClient is AshClient
    assert all(hasattr(ash_ai, name) for name in ash_ai.__all__)
    assert set(client_module.__all__) <= set(ash_ai.__all__)


def test_importing_the_client_loads_no_http_asyncio_or_ssl_module() -> None:
    heavy = ("asyncio", "ssl", "socket", "http.client", "urllib.parse", "threading")
    code = f"import sys, ash.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.strip() == "[]"


# Plain calls


def test_records_have_python_names_and_keep_the_raw_object(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent", system_prompt="Be brief.", allowed_tools=["Bash"], extra_env={"A": "1"})
    assert (session.agent_name, session.status) == ("my-agent", "active")
    assert session.raw["agentName"] == "my-agent"
    assert repr(session).startswith("Session(id='")
    assert stub.posts("/api/sessions") == [
        {"agent": "my-agent", "systemPrompt": "Be brief.", "allowedTools": ["Bash"], "extraEnv": {"A": "1"}}
    ]


def test_every_plain_method_reaches_its_route(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    assert client.pause_session(session.id).status == "paused"
    assert client.resume_session(session.id).status == "active"
    assert client.stop_session(session.id).status == "stopped"
    assert client.fork_session(session.id).parent_session_id == session.id
    assert client.update_session_config(session.id, model="offline").model == "offline"
    assert client.interrupt(session.id) is True
    assert client.session_logs(session.id)[0].text == "one line"
    assert client.list_session_events(session.id)[0].data == {"text": "hi"}
    assert [agent.name for agent in client.list_agents()] == [client.get_agent("my-agent").name] == ["my-agent"]
    assert client.health().is_offline is False
    client.delete_agent("my-agent")
    assert client.list_agents() == []


def test_files_are_listed_read_and_moved_as_archives(client: AshClient, stub: StubServer) -> None:
    id = client.create_session("my-agent").id
    stub.files = {"a b/ü": b"\xff"}
    files = client.list_session_files(id)
    assert [(file.path, file.size, file.modified_at[:4]) for file in files] == [("a b/ü", 1, "2026")]
    assert (files.is_cut, client.list_session_files(id, hidden=False).is_cut) == (False, True)
    assert client.read_session_file(id, "a b/ü") == b"\xff"
    assert client.upload_workspace(id, b"archive") == 2
    assert client.download_workspace(id) == b"archive"
    with pytest.raises(NotFound, match="File not found"):
        client.read_session_file(id, "missing")
    with pytest.raises(InvalidRequest, match="names no file"):
        client.read_session_file(id, "/")


async def test_the_asynchronous_client_moves_files_too(stub: StubServer) -> None:
    client = AsyncAshClient(server_url=stub.url)
    id = (await client.create_session("my-agent")).id
    stub.files = {"x": b"1"}
    assert [file.path for file in await client.list_session_files(id)] == ["x"]
    assert await client.read_session_file(id, "x") == b"1"
    assert await client.upload_workspace(id, b"archive") == 2
    assert await client.download_workspace(id) == b"archive"


async def test_a_real_server_gives_back_what_it_was_given(server: Server) -> None:
    client = AsyncAshClient(server_url=server.url)
    id = await server.session()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(member := tarfile.TarInfo("folder/file"))
        assert member.size == 0
    assert await client.upload_workspace(id, content.getvalue()) == 1
    assert [file.path for file in await client.list_session_files(id)] == ["folder/file"]
    assert await client.read_session_file(id, "folder/file") == b""
    with tarfile.open(fileobj=io.BytesIO(await client.download_workspace(id))) as archive:
        assert archive.getnames() == ["folder", "folder/file"]


def test_a_page_of_sessions_knows_the_total(client: AshClient) -> None:
    for _ in range(3):
        client.create_session("my-agent")
    page = client.list_sessions(limit=2)
    assert (len(page), page.total) == (2, 3)


def test_messages_are_unpacked(client: AshClient) -> None:
    session = client.create_session("my-agent")
    client.send_message(session.id, "Hi")
    question, answer, *_ = client.list_messages(session.id)
    assert (question.role, question.content, question.text) == ("user", "Hi", "Hi")
    assert (answer.role, answer.text) == ("assistant", "Hello, Ada.")


def test_exec_gives_the_exit_code_and_sends_milliseconds(client: AshClient, stub: StubServer) -> None:
    stub.exec_result = {"exitCode": 3, "stdout": "out", "stderr": "err"}
    done = client.exec(client.create_session("my-agent").id, "false", timeout=1.5)
    assert (done.exit_code, done.stdout, done.stderr, done.timed_out) == (3, "out", "err", False)
    assert stub.posts("/exec") == [{"command": "false", "timeout": 1500}]


def test_a_new_api_key_is_not_in_the_repr(client: AshClient) -> None:
    key = client.create_api_key("ci")
    assert key.key == "ash_secret"
    assert "ash_secret" not in repr(key)
    assert client.list_api_keys()[0].label == "first"
    client.delete_api_key("2")


def test_an_unknown_option_is_a_type_error_that_lists_the_options(client: AshClient) -> None:
    with pytest.raises(TypeError, match=r"modle.*system_prompt"):
        client.create_session("my-agent", modle="x")  # type: ignore[call-arg]


@pytest.mark.parametrize("id", ["", ".", ".."])
def test_an_id_that_would_change_the_path_is_refused(client: AshClient, id: str) -> None:
    with pytest.raises(InvalidRequest):
        client.end_session(id)


def test_names_are_quoted(client: AshClient, stub: StubServer) -> None:
    with pytest.raises(AgentNotFound):
        client.get_agent("a/b?c")
    assert stub.requests[-1][1] == "/api/agents/a%2Fb%3Fc"


# Errors


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (409, {"error": "busy", "code": "turn_running"}, TurnRunning),
        (401, {"error": "Invalid API key"}, Unauthorized),
        (429, {"statusCode": 429, "error": "Too Many Requests", "message": "slow down"}, RateLimited),
    ],
)
def test_an_answer_becomes_the_error_it_stands_for(client: AshClient, stub: StubServer, status: int, body: Any, kind: Any) -> None:
    stub.refusals["/api/agents"] = (status, body)
    with pytest.raises(kind) as caught:
        client.list_agents()
    assert caught.value.status == status
    assert caught.value.message == body["error"]
    assert isinstance(caught.value, ash_ai.AshApiError)


def test_an_overloaded_server_is_asked_again_after_the_time_it_asks_for(client: AshClient, stub: StubServer) -> None:
    stub.overloads = [0, 0]
    session = client.create_session("my-agent")
    assert len(stub.posts("/api/sessions")) == 3
    assert len(stub.sessions) == 1
    stub.overloads = [0]
    assert [event.type for event in client.send_message_stream(session.id, "Hi")][-1] == "done"
    assert len(stub.posts("/messages")) == 2


async def test_the_async_client_is_as_patient(stub: StubServer) -> None:
    stub.overloads = [0, 0, 0]
    client = AsyncAshClient(stub.url)
    session = await client.create_session("my-agent")
    stub.overloads = [0]
    assert [event.type async for event in client.send_message_stream(session.id, "Hi")][-1] == "done"


@pytest.mark.parametrize("overloads", [[0] * 5, [60]])
def test_a_client_is_patient_but_not_for_ever(client: AshClient, stub: StubServer, overloads: list[int]) -> None:
    stub.overloads = list(overloads)
    with pytest.raises(Overloaded, match="short of memory") as caught:
        client.create_session("my-agent")
    assert caught.value.retry_after == overloads[0]
    assert caught.value.hint == f"try again in {overloads[0]} s"


def test_no_server_says_how_to_start_one() -> None:
    with pytest.raises(ConnectionFailed, match="ash start"):
        AshClient(f"http://127.0.0.1:{free_port()}").health()


async def test_no_server_says_so_to_the_async_client_too() -> None:
    with pytest.raises(ConnectionFailed, match="ash start"):
        await AsyncAshClient(f"http://localhost:{free_port()}").health()


@pytest.mark.parametrize("url", ["localhost:4100", "ftp://x", "http://", "http://x:y", "http://user:pw@x", "http://x/?a=b"])
def test_an_address_that_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest):
        AshClient(url)


def test_a_key_with_a_line_break_inside_cannot_add_a_header(stub: StubServer) -> None:
    with pytest.raises(InvalidRequest, match="line break"):
        AshClient(stub.url, api_key="a\r\nX: y").list_agents()


def test_a_key_is_sent_and_stays_out_of_reprs(stub: StubServer) -> None:
    stub.key = "ash_secret"
    with pytest.raises(Unauthorized) as caught:
        AshClient(stub.url).list_agents()
    assert caught.value.hint == "send a key"
    client = AshClient(stub.url, api_key="ash_secret\n")
    assert client.list_agents()
    assert "ash_secret" not in repr(client) + repr(client._server)


def test_a_server_that_is_not_ash_is_named_as_such(client: AshClient, stub: StubServer) -> None:
    stub.refusals["/health"] = (200, {"hello": "world"})
    with pytest.raises(ProtocolError, match="Ash server"):
        client.health()


def talk(reply: bytes) -> tuple[str, threading.Thread]:
    """A socket that answers one connection with `reply` and keeps it open for a while."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(reply)
            if not reply:
                connection.settimeout(5)
                connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", thread


def test_a_server_that_says_nothing_times_out() -> None:
    url, thread = talk(b"")
    with pytest.raises(Timeout):
        AshClient(url, timeout=0.1).health()
    thread.join(5)


@pytest.mark.parametrize("reply", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\nhello"])
def test_an_answer_that_is_not_ours_is_a_connection_failure(reply: bytes) -> None:
    url, thread = talk(reply)
    with pytest.raises(ConnectionFailed):
        AshClient(url, timeout=5).health()
    thread.join(5)


def test_a_redirect_is_told_not_followed() -> None:
    url, thread = talk(b"HTTP/1.1 301 Moved\r\nLocation: https://x/\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(ash_ai.AshError, match="https://x/"):
        AshClient(url).health()
    thread.join(5)


# Turns


def test_send_message_collects_the_turn(client: AshClient, stub: StubServer) -> None:
    stub.script = turn(assistant("Let me look."), assistant("It is 42."), result("It is 42.", total_cost_usd=0.5))
    done = client.send_message(client.create_session("my-agent").id, "Hi", max_turns=3)
    assert (done.text, str(done), done.status, done.cost_usd) == ("It is 42.", "It is 42.", "completed", 0.5)
    assert done.usage == {"output_tokens": 3}
    assert [message["type"] for message in done.messages] == ["assistant", "assistant", "result"]
    assert stub.posts("/messages") == [{"content": "Hi", "maxTurns": 3}]


def test_a_failed_turn_raises_with_its_reason(client: AshClient, stub: StubServer) -> None:
    stub.script = turn(("error", {"error": "the model refused"}), status="failed")
    with pytest.raises(TurnFailed, match="the model refused"):
        client.send_message(client.create_session("my-agent").id, "Hi")


def test_an_interrupted_turn_is_a_result(client: AshClient, stub: StubServer) -> None:
    stub.script = turn(assistant("It is"), status="interrupted")
    done = client.send_message(client.create_session("my-agent").id, "Hi")
    assert (done.status, done.text) == ("interrupted", "It is")


def test_a_refused_message_raises_where_it_is_sent(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    stub.refusals[f"/api/sessions/{session.id}/messages"] = (409, {"error": "busy", "code": "turn_running"})
    with pytest.raises(TurnRunning):
        client.send_message_stream(session.id, "Hi")


# Streams that break

LONG = turn(*[delta(f"{n} ") for n in range(20)], assistant("all"), result("all"))


@pytest.mark.parametrize("cuts", [[1], [5], [22], [1, 1, 1], [3, 0, -1, 2]])
def test_a_broken_stream_goes_on_with_nothing_lost_and_nothing_twice(client: AshClient, stub: StubServer, cuts: list[int | str]) -> None:
    session = client.create_session("my-agent")
    stub.script, stub.cuts, breaks = LONG, list(cuts), len([cut for cut in cuts if cut != -1])
    stream = client.send_message_stream(session.id, "Hi")
    assert [event.id for event in stream] == list(range(1, len(LONG) + 1))
    assert stream.reconnects == breaks
    assert [body for body in stub.posts("/messages") if body] == [{"content": "Hi"}], "the message was sent again"


@pytest.mark.parametrize("cuts", [[1], [5], [3, 0, -1, 2]])
async def test_a_broken_async_stream_goes_on(client: AshClient, stub: StubServer, cuts: list[int | str]) -> None:
    seen: list[int] = []
    aclient = AsyncAshClient(stub.url, on_reconnect=lambda _, count: seen.append(count))
    session = await aclient.create_session("my-agent")
    stub.script, stub.cuts, breaks = LONG, list(cuts), len([cut for cut in cuts if cut != -1])
    events = [event async for event in aclient.send_message_stream(session.id, "Hi")]
    assert [event.id for event in events] == list(range(1, len(LONG) + 1))
    assert seen[-1] == breaks


def test_attempts_are_bounded(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    stub.cuts = [2, *[-1] * 50]
    stream = client.send_message_stream(session.id, "Hi")
    with pytest.raises(ConnectionFailed):
        list(stream)
    assert stream.last_event_id == 2
    assert len(stub.cuts) == 50 - 3


def test_a_message_whose_answer_never_began_is_found_not_sent_again(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    client.send_message(session.id, "Hi")
    stub.script, stub.cuts = LONG, [0]
    events = list(client.send_message_stream(session.id, "Hi"))
    assert [event.id for event in events] == list(range(6, 6 + len(LONG)))
    assert len(stub.posts("/messages")) == 2


def test_a_message_that_was_lost_is_not_confused_with_an_earlier_one(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    client.send_message(session.id, "Hi")
    stub.cuts = ["lost"]
    with pytest.raises(ConnectionFailed, match="may or may not"):
        list(client.send_message_stream(session.id, "Hi"))
    assert len(stub.posts("/messages")) == 2


def test_a_lost_message_to_a_session_of_somebody_else_is_an_honest_error(client: AshClient, stub: StubServer) -> None:
    stub.cuts = [0]
    with pytest.raises(ConnectionFailed, match="may or may not"):
        list(client.send_message_stream(stub.session("my-agent")["id"], "Hi"))


def test_a_stream_without_ids_cannot_be_continued(client: AshClient) -> None:
    state = cursor.TurnState("s", "Hi", None)
    assert [event.id for event in state.decode(b'event: text_delta\ndata: {"delta": "a"}\n\n')] == [None]
    with pytest.raises(ConnectionFailed):
        list(state.plan(BrokenResponse("x")))


def test_a_farewell_without_an_id_is_no_event_of_the_turn() -> None:
    state = cursor.TurnState("s", "Hi", None)
    events = state.decode(b'id: 1\nevent: session_start\ndata: {}\n\nid: 2\nevent: text_delta\ndata: {"delta": "a"}\n\n')
    state.connected()
    assert len(events) == 2
    assert state.decode(b'event: error\ndata: {"error": "the server stops"}\n\n') == []


def test_following_a_session_ends_when_it_has_ended(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    client.send_message(session.id, "one")
    client.send_message(session.id, "two")
    client.end_session(session.id)
    stub.cuts = [3]
    with client.follow(session.id, after=1) as stream:
        assert [event.id for event in stream] == list(range(2, 2 * len(HELLO) + 1))


@pytest.mark.parametrize("after", [5, 0])
def test_following_a_session_with_nothing_to_come_is_over_at_once(client: AshClient, stub: StubServer, after: int) -> None:
    session = client.create_session("my-agent")
    if after:
        client.send_message(session.id, "Hi")
    client.end_session(session.id)
    stream = client.follow(session.id, after)
    assert list(stream) == []
    assert (stream.reconnects, stream.last_event_id) == (0, after)


def test_a_session_that_ends_while_its_stream_is_away_is_over_at_the_return(client: AshClient, stub: StubServer) -> None:
    session = client.create_session("my-agent")
    client.send_message(session.id, "Hi")
    stream = client.follow(session.id)
    assert [next(stream).id for _ in range(5)] == [1, 2, 3, 4, 5]
    client.end_session(session.id)
    assert list(stream) == []


async def test_both_clients_stop_following_a_real_server_where_nothing_comes(server: Server) -> None:
    aclient, client, id = AsyncAshClient(server.url), AshClient(server.url), await server.session()
    await aclient.send_message(id, "Hi")
    await aclient.end_session(id)
    events = [event async for event in aclient.follow(id)]
    last = events[-1].id
    assert last is not None
    async with asyncio.timeout(5):
        assert [event async for event in aclient.follow(id, last)] == []
        assert await asyncio.to_thread(lambda: list(client.follow(id, last))) == []


def test_a_turn_without_an_end_is_over_where_nothing_follows_and_is_no_result(client: AshClient, stub: StubServer) -> None:
    stub.script = LONG[:-1]
    session = client.create_session("my-agent")
    assert len(list(client.send_message_stream(session.id, "Hi"))) == len(LONG) - 1
    with pytest.raises(TurnFailed, match="before the turn did"):
        client.send_message(session.id, "Hi")


async def test_an_async_turn_without_an_end_is_over_where_nothing_follows(client: AshClient, stub: StubServer) -> None:
    stub.script = LONG[:-1]
    aclient = AsyncAshClient(stub.url)
    session = await aclient.create_session("my-agent")
    assert len([event async for event in aclient.send_message_stream(session.id, "Hi")]) == len(LONG) - 1


def test_closing_a_stream_from_another_thread_ends_its_loop(client: AshClient, stub: StubServer) -> None:
    stub.hold = threading.Event()
    stream = client.send_message_stream(client.create_session("my-agent").id, "Hi")
    events = [next(stream) for _ in range(4)]
    timer = threading.Timer(0.05, stream.close)
    timer.start()
    assert list(stream) == []
    assert events[-1].type == "message"
    timer.join(5)
    stub.hold.set()


def test_a_stream_that_is_dropped_leaves_no_open_socket(client: AshClient, stub: StubServer) -> None:
    stub.hold = threading.Event()
    for _event in client.send_message_stream(client.create_session("my-agent").id, "Hi"):
        break
    gc.collect()  # an unclosed socket would warn, and warnings are errors here
    stub.hold.set()


async def test_a_cancelled_async_stream_closes_its_socket(stub: StubServer) -> None:
    stub.hold = threading.Event()
    aclient = AsyncAshClient(stub.url)
    session = await aclient.create_session("my-agent")
    stream = aclient.send_message_stream(session.id, "Hi")

    async def read() -> list[Event]:
        return [event async for event in stream]

    task = asyncio.create_task(read())
    await eventually(lambda: stream.last_event_id == 4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream._connection is None
    stub.hold.set()


async def test_a_dropped_async_stream_leaves_no_open_socket(stub: StubServer) -> None:
    stub.hold = threading.Event()
    aclient = AsyncAshClient(stub.url)
    session = await aclient.create_session("my-agent")
    async for _event in aclient.send_message_stream(session.id, "Hi"):
        break
    gc.collect()  # an unclosed transport would warn, and warnings are errors here
    await asyncio.sleep(0)
    stub.hold.set()


async def test_the_async_client_has_every_method_of_the_other() -> None:
    names = {name for name in vars(AshClient) if not name.startswith("_")} - {"close"}
    assert names == {name for name in vars(AsyncAshClient) if not name.startswith("_")} - {"aclose"}


async def test_the_async_client_sends_and_collects(stub: StubServer, agent_folder: Path) -> None:
    async with AsyncAshClient(stub.url) as aclient:
        assert (await aclient.deploy_agent("other", str(agent_folder))).version == 1
        session = await aclient.create_session("other")
        assert (await aclient.send_message(session.id, "Hi")).text == "Hello, Ada."
        assert [message.role for message in await aclient.list_messages(session.id)] == ["user", "assistant", "assistant"]
        assert (await aclient.end_session(session.id)).status == "ended"


# Uploads


def test_deploying_uploads_the_folder_but_not_what_must_stay(client: AshClient, stub: StubServer, agent_folder: Path) -> None:
    for path in (".claude/skills/x/SKILL.md", "a/.git/config", "node_modules/x.js", "prod.env", ".env", ".env.local", "x.pid", ".DS_Store"):
        (agent_folder / path).parent.mkdir(parents=True, exist_ok=True)
        (agent_folder / path).write_text(path)
    (agent_folder / "data.bin").write_bytes(bytes(range(256)) * 9000)
    progress: list[tuple[int, int]] = []
    client.deploy_agent("my-agent", str(agent_folder), env={"A": "1"}, on_progress=lambda done, total: progress.append((done, total)))
    deployed = stub.agents["my-agent"]
    assert sorted(deployed["files"]) == [".claude/skills/x/SKILL.md", "CLAUDE.md", "data.bin"]
    assert deployed["files"]["data.bin"] == bytes(range(256)) * 9000
    assert deployed["env"] == {"A": "1"}
    assert progress[-1][0] == progress[-1][1] == max(done for done, _ in progress)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 786431, 786432, 786433])
def test_the_length_of_an_upload_is_known_before_it_is_read(agent_folder: Path, size: int) -> None:
    (agent_folder / 'a "name".txt').write_bytes(os.urandom(size))
    upload = Upload(scan(str(agent_folder)), {"name": "x"})
    body = b"".join(upload.pieces())
    assert len(body) == upload.size
    assert [file["path"] for file in json.loads(body)["files"]] == ["CLAUDE.md", 'a "name".txt']


def test_a_folder_without_instructions_is_refused(client: AshClient, tmp_path: Path) -> None:
    with pytest.raises(AgentUnusable, match=r"CLAUDE\.md"):
        client.deploy_agent("x", str(tmp_path))
    with pytest.raises(AgentUnusable, match="not a folder"):
        client.deploy_agent("x", str(tmp_path / "missing"))


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(agent_folder: Path, tmp_path: Path) -> None:
    (agent_folder / "AGENTS.md").symlink_to("CLAUDE.md")
    assert [file.path for file in scan(str(agent_folder))] == ["AGENTS.md", "CLAUDE.md"]
    (tmp_path / "secret").write_text("x")
    (agent_folder / "notes").symlink_to(tmp_path / "secret")
    with pytest.raises(AgentUnusable, match="notes"):
        scan(str(agent_folder))


def test_a_file_that_changes_during_the_upload_stops_it(agent_folder: Path) -> None:
    upload = Upload(scan(str(agent_folder)), {"name": "x"})
    (agent_folder / "CLAUDE.md").write_text("You help a lot more than before.")
    with pytest.raises(AgentUnusable, match=r"CLAUDE\.md changed"):
        b"".join(upload.pieces())


# HTTP

ANSWERS = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n",
    "to the end": b"HTTP/1.0 200 OK\r\nX: y\r\n\r\nhello",
    "after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_response_may_be_cut_anywhere(name: str, size: int) -> None:
    parser, body, raw = ResponseParser(), b"", ANSWERS[name]
    for start in range(0, len(raw), size):
        body += parser.feed(raw[start : start + size])
    if not parser.is_complete:
        parser.end()
    assert parser.head is not None
    assert (parser.head.status, body) == (200, b"hello")


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\n", ANSWERS["length"][:-1], ANSWERS["chunked"][:-2]])
def test_a_response_that_ends_early_is_broken(raw: bytes) -> None:
    parser = ResponseParser()
    parser.feed(raw)
    with pytest.raises(BrokenResponse):
        parser.end()


@pytest.mark.parametrize("head", ["Content-Length: -1", "Content-Length: x", "Transfer-Encoding: chunked\r\n\r\nzz\r\n", "X" * 70000])
def test_a_response_with_a_bad_head_is_broken(head: str) -> None:
    with pytest.raises(BrokenResponse):
        ResponseParser().feed(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode()[:70000])


def test_a_request_names_the_key_complaint_in_words() -> None:
    with pytest.raises(InvalidRequest, match="API key"):
        request_head("GET", "/", {"Authorization": "Bearer ключ"})


def test_an_address_with_a_path_keeps_it(stub: StubServer) -> None:
    head = AshClient("https://[::1]:8443/ash/")._server.head(calls.health()).decode()
    assert head.startswith("GET /ash/health HTTP/1.1\r\nHost: [::1]:8443\r\n")


@pytest.fixture
def tls_stub(tmp_path: Path) -> Iterator[tuple[StubServer, ssl.SSLContext]]:
    """The stub behind TLS with a certificate of its own, and a context that trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, to make a certificate")
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run([*made, *files], check=True, capture_output=True, timeout=20)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with stub_server(context) as server:
        server.agents["my-agent"] = {"id": "1", "name": "my-agent", "version": 1}
        yield server, ssl.create_default_context(cafile=str(tmp_path / "cert"))


async def test_both_clients_speak_tls(tls_stub: tuple[StubServer, ssl.SSLContext]) -> None:
    server, context = tls_stub
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    client, aclient = AshClient(url, ssl_context=context), AsyncAshClient(url, ssl_context=context)
    session = await asyncio.to_thread(client.create_session, "my-agent")
    assert (await aclient.send_message(session.id, "Hi")).text == "Hello, Ada."
    assert (await asyncio.to_thread(client.send_message, session.id, "Hi")).text == "Hello, Ada."
    with pytest.raises(ConnectionFailed, match="certificate"):
        await AsyncAshClient(url).health()


def test_tls_without_a_trusted_certificate_is_a_connection_failure(stub: StubServer) -> None:
    with pytest.raises(ConnectionFailed):
        AshClient(stub.url.replace("http", "https"), timeout=2, ssl_context=ssl.create_default_context()).health()


async def test_the_async_client_sends_a_stored_key_only_when_asked(stub: StubServer) -> None:
    stub.key = "kept"
    client = AsyncAshClient(stub.url, stored_key="kept")
    assert [agent.name for agent in await client.list_agents()] == ["my-agent"]
    assert (await client.send_message((await client.create_session("my-agent")).id, "Hi")).text == "Hello, Ada."
    assert [headers.get("Authorization") for *_, headers in stub.requests] == [None, "Bearer kept"] * 3


def test_credentials_are_stored_with_where_they_go_and_never_shown(client: AshClient, stub: StubServer) -> None:
    made = client.store_credential("custom", "ghp_secret", host="api.github.com", variable="TOKEN", agent="helper")
    assert (made.host, made.variable, made.agent) == ("api.github.com", "TOKEN", "helper")
    assert stub.posts("/api/credentials")[0]["key"] == "ghp_secret"
    assert "ghp_secret" not in repr(client.list_credentials())
    client.delete_credential(made.id)
    assert client.list_credentials() == []
