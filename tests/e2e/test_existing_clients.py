"""PyPI's ash-ai-sdk 0.0.22, unmodified, against the built file: create, stream, pause, resume, stop, fork, end, and its models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ash_sdk import AshClient

from tests.e2e.servers import Server, running


@pytest.fixture(scope="module")
def server(ash_pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(ash_pyz, tmp_path_factory.mktemp("sdk") / "data", "--auth", "always") as started:
        yield started


@pytest.fixture
def client(server: Server) -> AshClient:
    return AshClient(server.url, token=server.key())


@pytest.fixture
def agent(client: AshClient) -> str:
    examples = Path(__file__).parents[2] / "examples" / "quickstart"
    assert client.deploy_agent("sdk-agent", str(examples)).name == "sdk-agent"
    return "sdk-agent"


def events_of(client: AshClient, session_id: object, text: str, **options: Any) -> list[Any]:
    return list(client.send_message_stream(str(session_id), text, **options))


def test_a_stream_begins_with_the_session_and_ends_with_one_done(client: AshClient, agent: str) -> None:
    session = client.create_session(agent)
    names = [type(event).__name__ for event in events_of(client, session.id, "Hello")]
    assert names[0] == "SessionStartEvent"
    assert names.count("DoneEvent") == 1
    assert names[-1] == "DoneEvent"
    assert "TurnCompleteEvent" in names
    client.end_session(str(session.id))


def test_partial_messages_give_the_same_text_as_the_whole_one(client: AshClient, agent: str) -> None:
    session = client.create_session(agent)
    events = events_of(client, session.id, "What is a closure in JavaScript?", include_partial_messages=True)
    deltas = "".join(event.delta for event in events if type(event).__name__ == "TextDeltaEvent")
    whole = [event.data for event in events if type(event).__name__ == "MessageEvent" and event.data["type"] == "assistant"]
    assert deltas == "".join(block["text"] for message in whole for block in message["message"]["content"] if block["type"] == "text")
    client.end_session(str(session.id))


def test_a_tool_call_shows_its_use_and_its_result(client: AshClient, agent: str) -> None:
    session = client.create_session(agent)
    events = {type(event).__name__: event for event in events_of(client, session.id, "Run the command `echo \u2028 sea`")}
    assert events["ToolUseEvent"].name == "Bash"
    assert "sea" in str(events["ToolResultEvent"].content)
    assert not events["ToolResultEvent"].is_error
    client.end_session(str(session.id))


def test_pause_resume_stop_and_end(client: AshClient, agent: str) -> None:
    id = str(client.create_session(agent).id)
    events_of(client, id, "My name is Grace.")
    assert client.pause_session(id).status == "paused"
    with pytest.raises(httpx.HTTPStatusError) as refused:
        events_of(client, id, "Hello?")
    assert refused.value.response.status_code == 400
    assert client.resume_session(id).status == "active"
    assert client.stop_session(id).status == "stopped"
    assert client.resume_session(id).status == "active"
    answer = str(events_of(client, id, "What is my name?"))
    assert "Grace" in answer, "the conversation was lost on the way"
    assert client.end_session(id).status == "ended"


def test_fork_has_the_conversation_and_the_files(client: AshClient, agent: str) -> None:
    id = str(client.create_session(agent).id)
    events_of(client, id, "My name is Grace.")
    events_of(client, id, "Write anchor to kept.txt")
    fork = client.fork_session(id)
    assert str(fork.parent_session_id) == id
    assert client.resume_session(str(fork.id)).status == "active"
    assert "Grace" in str(events_of(client, fork.id, "What is my name?"))
    assert "anchor" in str(events_of(client, fork.id, "Read kept.txt"))
    for each in (id, str(fork.id)):
        client.end_session(each)


def test_lists_and_health_parse_into_the_clients_models(client: AshClient, agent: str) -> None:
    session = client.create_session(agent)
    assert str(session.id) in {str(found.id) for found in client.list_sessions(agent=agent, status="active")}
    assert client.get_session(str(session.id)).agent_name == agent
    assert agent in {found.name for found in client.list_agents()}
    assert client.health()["status"] == "ok"
    client.end_session(str(session.id))


def test_an_agent_that_does_not_exist_is_404(client: AshClient) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        client.create_session("nobody")
    assert refused.value.response.status_code == 404


async def test_the_async_stream_ends_too(client: AshClient, agent: str) -> None:
    session = client.create_session(agent)
    names = [type(event).__name__ async for event in client.asend_message_stream(str(session.id), "Hello")]
    assert names[-1] == "DoneEvent"
    client.end_session(str(session.id))
