"""The server's end of a bridge's socket, against a bridge that this test plays itself, line by line."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ash import protocol
from ash.errors import ProtocolError, SandboxFailed
from ash.isolation import link as links
from ash.isolation.link import Inbox, Lines, Link, Rules, parse_event
from tests.sandboxes import one_by_one

READY = {"ev": "ready", "n": 0, "pid": 2, "version": protocol.VERSION}


class Peer:
    """The bridge's end: sends events, and reads the commands that arrive."""

    def __init__(self) -> None:
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.connected = asyncio.Event()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.send(READY)
        self.connected.set()

    def send(self, *events: dict[str, Any]) -> None:
        self.writer.write(b"".join(protocol.encode(event) for event in events))

    async def command(self) -> dict[str, Any]:
        return protocol.decode_command(await asyncio.wait_for(self.reader.readline(), 5))


@pytest.fixture
async def peer() -> Peer:
    return Peer()


@pytest.fixture
async def link(peer: Peer, data_dir: str) -> AsyncIterator[Link]:
    path = str(Path(data_dir, "bridge.sock"))
    server = await asyncio.start_unix_server(peer.accept, path, limit=protocol.MAX_LINE_BYTES)
    link = await Link.open(path, lambda level, text: None)
    await asyncio.wait_for(peer.connected.wait(), 5)
    yield link
    link.close("the test is over")
    peer.writer.close()
    server.close()
    await server.wait_closed()


async def broken(link: Link) -> str:
    """Why the bridge was found to break the rules."""
    with pytest.raises(ProtocolError) as caught:
        await asyncio.wait_for(link.run(), 5)
    return caught.value.message


def delta(n: int, turn: str = "t1", **data: Any) -> dict[str, Any]:
    return {"ev": "delta", "n": n, "turn_id": turn, "data": data}


def done(n: int, turn: str = "t1") -> dict[str, Any]:
    return {"ev": "done", "n": n, "turn_id": turn, "status": "completed"}


async def begin_turn(link: Link, peer: Peer) -> None:
    await link.query("t1", content="hi", options={})
    assert (await peer.command())["cmd"] == "query"


async def test_a_turns_events_arrive_in_order_and_are_acknowledged(link: Link, peer: Peer) -> None:
    reading = asyncio.create_task(link.run())
    await begin_turn(link, peer)
    peer.send(delta(1), delta(2), done(3))
    events = one_by_one(link.batches())
    seen = [(await asyncio.wait_for(anext(events), 5))["n"] for _ in range(3)]
    following = asyncio.ensure_future(anext(events))
    assert seen == [1, 2, 3]
    assert (await peer.command())["n"] == 3
    reading.cancel()
    following.cancel()
    await asyncio.gather(reading, following, return_exceptions=True)


async def test_an_event_is_not_acknowledged_before_it_was_dealt_with(link: Link, peer: Peer) -> None:
    reading = asyncio.create_task(link.run())
    await begin_turn(link, peer)
    peer.send(delta(1))
    assert (await asyncio.wait_for(anext(link.batches()), 5))[0]["n"] == 1
    asking = asyncio.create_task(link.ask("exec", command="true", timeout=1))
    command = await peer.command()
    result = {"exit_code": 0, "stdout": "", "stderr": "", "timed_out": False, "truncated": False}
    peer.send({"ev": "exec_result", "n": 2, "command_id": command["id"], **result})
    await asyncio.wait_for(asking, 5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(peer.reader.readline(), 0.05)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_answers_find_their_commands_in_any_order(link: Link, peer: Peer) -> None:
    reading = asyncio.create_task(link.run())
    asked = [asyncio.create_task(link.ask("exec", command=str(i), timeout=1)) for i in range(3)]
    commands = [await peer.command() for _ in asked]
    for n, command in enumerate(reversed(commands), 1):
        result = {"exit_code": 0, "stdout": command["command"], "stderr": "", "timed_out": False, "truncated": False}
        peer.send({"ev": "exec_result", "n": n, "command_id": command["id"], **result})
    assert [answer["stdout"] for answer in await asyncio.wait_for(asyncio.gather(*asked), 5)] == ["0", "1", "2"]
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_giving_up_on_a_command_cancels_it_and_its_late_answer_does_no_harm(link: Link, peer: Peer) -> None:
    reading = asyncio.create_task(link.run())
    asking = asyncio.create_task(link.ask("exec", command="sleep 9", timeout=9))
    command = await peer.command()
    asking.cancel()
    assert (await peer.command())["command_id"] == command["id"]
    result = {"exit_code": 143, "stdout": "", "stderr": "", "timed_out": False, "truncated": False}
    peer.send({"ev": "exec_result", "n": 1, "command_id": command["id"], **result})
    assert (await peer.command())["cmd"] == "ack"
    assert not reading.done()
    reading.cancel()
    await asyncio.gather(reading, asking, return_exceptions=True)


async def test_whoever_waits_for_an_answer_is_told_when_the_bridge_is_gone(link: Link, peer: Peer) -> None:
    asking = asyncio.create_task(link.ask("init", agent={}, options={}, transcript=[]))
    await peer.command()
    link.close("it was killed")
    with pytest.raises(SandboxFailed, match="it was killed"):
        await asyncio.wait_for(asking, 5)
    with pytest.raises(SandboxFailed):
        await link.tell("shutdown")


async def test_a_query_that_the_bridge_refuses_ends_its_turn(link: Link, peer: Peer) -> None:
    reading = asyncio.create_task(link.run())
    await link.query("t1", content="hi", options={})
    command = await peer.command()
    peer.send({"ev": "error", "n": 1, "command_id": command["id"], "error": "no"})
    events = one_by_one(link.batches())
    got = [await asyncio.wait_for(anext(events), 5) for _ in range(2)]
    assert [(event["ev"], event["turn_id"], event["error"]) for event in got] == [("error", "t1", "no"), ("done", "t1", "no")]
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_only_one_turn_at_a_time_is_handed_over(link: Link, peer: Peer) -> None:
    await begin_turn(link, peer)
    with pytest.raises(SandboxFailed, match="already running"):
        await link.query("t2", content="hi", options={})


async def test_a_command_that_is_too_large_is_refused_and_the_link_stays_usable(
    link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_LINE_BYTES", 1000)
    with pytest.raises(SandboxFailed, match="more than a sandbox takes"):
        await link.query("t1", content="x" * 1000, options={})
    await begin_turn(link, peer)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([delta(2)], "event 2 after event 0"),
        ([delta(1, "another")], "for a turn that is not running"),
        ([done(1), delta(2)], "for a turn that is not running"),
        ([READY], "no `ready` is due"),
        ([{"ev": "ok", "n": 1, "command_id": 99}], "for a command that was not given"),
        ([{**done(1), "status": "splendid"}], "unknown status"),
        ([{**done(1), "error": {"a": 1}}], "error must be a text"),
        ([{"ev": "message", "n": 1, "turn_id": "t1", "data": []}], "data must be dict"),
    ],
)
async def test_a_broken_rule_ends_the_connection(link: Link, peer: Peer, events: list[dict[str, Any]], reason: str) -> None:
    await begin_turn(link, peer)
    peer.send(*events)
    assert reason in await broken(link)


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b"\n", b'{"ev":"log"}\n', b'{"n": NaN}\n', "\u00e9\n".encode(), b"\0\n"])
async def test_a_malformed_line_ends_the_connection(link: Link, peer: Peer, line: bytes) -> None:
    peer.writer.write(line)
    await broken(link)


async def test_a_line_without_an_end_is_cut_off(link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_lines", Lines(limit=200_000))
    peer.writer.write(b"x" * 1_000_000)
    assert "longer than 200000 bytes" in await broken(link)


async def test_a_flood_waits_in_the_socket_when_nobody_consumes(link: Link, peer: Peer) -> None:
    await begin_turn(link, peer)
    reading = asyncio.create_task(link.run())
    text = "x" * 10_000
    sent = 0
    while sent < 2000 and peer.writer.transport.get_write_buffer_size() < 5_000_000:
        sent += 1
        peer.send(delta(sent, text=text))
        await asyncio.sleep(0)
    assert peer.writer.transport.get_write_buffer_size() > 1_000_000
    assert len(link._inbox._events) <= links.INBOX_EVENTS
    reading.cancel()
    peer.writer.transport.abort()
    await asyncio.gather(reading, return_exceptions=True)


async def test_logs_that_nobody_reads_hold_nothing_up(link: Link, peer: Peer) -> None:
    reading = asyncio.create_task(link.run())
    peer.send(*({"ev": "log", "n": n, "level": "info", "text": "x"} for n in range(1, 1001)))
    asking = asyncio.create_task(link.ask("init", agent={}, options={}, transcript=[]))
    command = await peer.command()
    peer.send({"ev": "ok", "n": 1001, "command_id": command["id"]})
    await asyncio.wait_for(asking, 5)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


# The pure parts


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 100])
def test_lines_are_found_however_the_bytes_are_cut(pieces: int) -> None:
    text = b"one\n\ntwo and more\nthree\n"
    lines = Lines()
    found = [line for i in range(0, len(text), pieces) for line in lines.feed(text[i : i + pieces])]
    assert found == [b"one", b"", b"two and more", b"three"]


def log_line(text: str) -> bytes:
    return b'{"ev":"log","n":1,"level":"info","text":"' + text.encode() + b'"}'


def test_half_a_surrogate_pair_becomes_something_that_can_be_stored() -> None:
    assert parse_event(log_line("\\ud83d\\ude00 \\ud83d"))["text"] == "\U0001f600 ?"


def test_deep_nesting_is_refused() -> None:
    line = b'{"ev":"delta","n":1,"turn_id":"t","data":' + b'{"a":' * 150 + b"1" + b"}" * 151
    with pytest.raises(ProtocolError, match="nested deeper"):
        parse_event(line)


def test_wide_data_is_allowed() -> None:
    event = delta(1, items=[[i] for i in range(5000)])
    assert parse_event(json.dumps(event).encode()) == event


def test_a_line_of_very_many_values_is_refused_before_it_is_built() -> None:
    line = b'{"ev":"delta","n":1,"turn_id":"t","data":{"a":[' + b"[]," * 600_000 + b"1]}}"
    with pytest.raises(ProtocolError, match="more than 1000000 values"):
        parse_event(line)


def test_a_large_text_full_of_commas_is_allowed() -> None:
    assert len(parse_event(log_line("[1,2],{" * 400_000))["text"]) == 2_800_000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know_are_refused(number: str) -> None:
    with pytest.raises(ProtocolError):
        parse_event(b'{"ev":"delta","n":1,"turn_id":"t","data":{"x":' + number.encode() + b"}}")


def test_the_first_event_has_to_be_ready_with_our_version() -> None:
    with pytest.raises(ProtocolError, match="`ready` is due"):
        Rules().check(done(1))
    with pytest.raises(ProtocolError, match="protocol version 99"):
        Rules().check({**READY, "version": 99})


async def test_an_inbox_takes_one_event_of_any_size_and_then_waits() -> None:
    inbox = Inbox()
    await inbox.put(done(1), links.INBOX_BYTES * 10)
    waiting = asyncio.create_task(inbox.put(done(2), 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await inbox.get() == [done(1)]
    await asyncio.wait_for(waiting, 5)


async def test_a_closed_inbox_gives_what_it_has_and_then_ends() -> None:
    inbox = Inbox()
    await inbox.put(done(1), 1)
    inbox.close()
    assert [await inbox.get(), await inbox.get()] == [[done(1)], []]


@pytest.mark.parametrize("piece", [b'"",', b'"\\\\",', b"{},", b"1,"])
def test_a_line_of_nothing_but_values_is_refused_at_little_cost(piece: bytes) -> None:
    line = b'{"ev":"delta","n":1,"turn_id":"t","data":{"a":[' + piece * 8_000_000 + b"1]}}"
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ProtocolError, match="more than 1000000 values"):
        parse_event(line)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 3
    assert peak < 4 * len(line) + 200_000_000


def test_escapes_do_not_hide_where_a_text_ends() -> None:
    text = '\\"' * 1_200_000 + "\\" + '"],[' * 1_200_000
    assert parse_event(json.dumps({"ev": "log", "n": 1, "level": "info", "text": text}).encode())["text"] == text


async def test_a_large_line_is_read_beside_the_loop_and_stays_in_its_place(link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = {}

    def watched(line: bytes) -> dict[str, Any]:
        event = parse_event(line)
        threads[event["n"]] = threading.current_thread() is threading.main_thread()
        return event

    monkeypatch.setattr(links, "parse_event", watched)
    reading = asyncio.create_task(link.run())
    await begin_turn(link, peer)
    peer.send(delta(1), delta(2, text="x" * 2_000_000), done(3))
    events = one_by_one(link.batches())
    assert [(await asyncio.wait_for(anext(events), 5))["n"] for _ in range(3)] == [1, 2, 3]
    assert threads == {0: True, 1: True, 2: False, 3: True}
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
