"""What dies, and what is left: the bridge or the server killed in a turn, a client that leaves, on real sandboxes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ash.client import AshClient, Event
from tests.e2e.servers import Server, running

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture
def server(ash_pyz: Path, tmp_path: Path) -> Iterator[Server]:
    with running(ash_pyz, tmp_path / "data") as started:
        yield started


def client_of(server: Server) -> AshClient:
    return AshClient(server.url, server.key())


def new_session(client: AshClient) -> str:
    client.deploy_agent("helper", str(EXAMPLE))
    return client.create_session("helper").id


def bridges(server: Server) -> list[psutil.Process]:
    """The bridge processes below a server, as the host sees them."""
    tree = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in tree if "python" in process.name() and "--listen-fd" in process.cmdline()]


def busy_bridge(server: Server) -> psutil.Process:
    """The one that runs a command."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for bridge in bridges(server):
            if any("sleep" in child.name() for child in bridge.children(recursive=True)):
                return bridge
        time.sleep(0.02)
    raise AssertionError("no sandbox runs the command")


def frames(server: Server, path: str, body: Any = None, **headers: str) -> list[tuple[int, str, Any]]:
    """A whole stream, read by hand: (id, event, data)."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=30) as answer:
        blocks = answer.read().decode().split("\n\n")
    parsed = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks if "data: " in block]
    return [(int(fields["id"]), fields["event"], json.loads(fields["data"])) for fields in parsed]


def test_a_killed_bridge_ends_its_turn_and_the_session_goes_on(server: Server) -> None:
    client = client_of(server)
    session = new_session(client)
    killer = threading.Thread(target=lambda: busy_bridge(server).send_signal(signal.SIGKILL))
    killer.start()
    events = [event.type for event in client.send_message_stream(session, "Run the command `sleep 20`")]
    killer.join()
    assert events[-2:] == ["error", "done"]
    assert client.get_session(session).status == "active"
    assert "sleep 20" in client.send_message(session, "What did I say before?").text


def test_a_server_killed_in_a_turn_leaves_nothing_that_the_next_one_does_not_put_right(ash_pyz: Path, tmp_path: Path) -> None:
    with running(ash_pyz, tmp_path / "data") as first:
        session = new_session(client_of(first))
        client_of(first).send_message(session, "Write anchor to kept.txt")
        left = client_of(first).send_message_stream(session, "Run the command `sleep 30`")
        orphans = [busy_bridge(first), *bridges(first)]
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(5)
        left.close()
    with running(ash_pyz, tmp_path / "data") as second:
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in orphans)
        client = client_of(second)
        *_, error, done = history(client, session, turns=2)
        assert (error.type, done.type) == ("error", "done")
        assert "server stopped" in error.data["error"]
        assert "anchor" in client.send_message(session, "Read kept.txt").text


def history(client: AshClient, session: str, turns: int) -> list[Event]:
    """The events of a session up to the end of its n-th turn."""
    found: list[Event] = []
    for event in client.follow(session):
        found.append(event)
        if [one.type for one in found].count("done") == turns:
            break
    return found


def test_a_stream_that_was_cut_anywhere_continues_exactly_there(server: Server) -> None:
    session = new_session(client_of(server))
    body = {"content": "Run the command `echo one; echo two`", "includePartialMessages": True}
    whole = frames(server, f"/api/sessions/{session}/messages", body)
    ids = [id for id, _, _ in whole]
    assert ids == sorted(set(ids))
    for position in range(0, len(whole) - 1, 5):
        rest = frames(server, f"/api/sessions/{session}/messages", {}, **{"Last-Event-ID": str(ids[position])})
        assert rest == whole[position + 1 :]


def test_a_client_that_leaves_does_not_end_its_turn(server: Server) -> None:
    client = client_of(server)
    session = new_session(client)
    for event in client.send_message_stream(session, "Run the command `sleep 1; echo finished > done.txt`"):
        if event.type == "tool_use":
            break
    deadline = time.monotonic() + 5
    while client.get_session(session).raw["turn"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.exec(session, "cat done.txt").stdout == "finished\n"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to see which uid a sandbox has on the host")
def test_every_sandbox_of_a_root_server_has_an_unprivileged_uid_of_its_own(server: Server) -> None:
    client = client_of(server)
    for _ in range(3):
        new_session(client)
    uids = [bridge.uids().real for bridge in bridges(server)]
    assert len(uids) >= 3
    assert len(set(uids)) == len(uids)
    assert 0 not in uids
