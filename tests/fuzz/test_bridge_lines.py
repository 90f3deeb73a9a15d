"""Lines of a bridge, made up and mutated: all that comes of them is an event, or a ProtocolError, within bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ash import protocol
from ash.errors import ProtocolError
from ash.isolation import link as links
from ash.isolation.link import Lines, Link, Rules, parse_event

TIMES = settings(max_examples=150, deadline=None, derandomize=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
FIELDS = sorted({field for table in (protocol.EVENTS, protocol.COMMANDS) for fields in table.values() for field in fields} - {"n"})
words = st.sampled_from(["t1", "t2", "completed", "failed", "stdout", "info"])
fields = st.dictionaries(st.sampled_from(FIELDS), words | values, max_size=5)
heads = st.fixed_dictionaries({"ev": st.sampled_from([*protocol.EVENTS, "x"]), "n": st.integers(-1, 5) | scalars})
# Whole events too, which random fields would hardly ever make.
wholes = st.sampled_from([
    {"turn_id": "t1", "data": {}}, {"turn_id": "t1", "status": "completed"}, {"command_id": 2}, {"error": "x"},
    {"level": "info", "text": "x"},
    {"command_id": 2, "exit_code": 0, "stdout": "", "stderr": "", "timed_out": False, "truncated": False},
])  # fmt: skip
messages = st.builds(lambda head, whole, more: {**whole, **more, **head}, heads, wholes, fields)
READY = {"ev": "ready", "n": 0, "pid": 2, "version": protocol.VERSION}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A line of JSON with some of its bytes cut, repeated or replaced."""
    line = bytearray(json.dumps(draw(messages)).encode())
    for _ in range(draw(st.integers(0, 4))):
        at, end = sorted((draw(st.integers(0, len(line))), draw(st.integers(0, len(line)))))
        line[at:end] = draw(st.sampled_from([b"", bytes(line[at:end]) * 2, b"\\ud800", b"\xff", b"1e999", b"[[", b"{}", b"\n"]))
    return bytes(line)


@pytest.mark.parametrize("decode", [protocol.decode_event, protocol.decode_command, parse_event])
@TIMES
@given(line=st.binary(max_size=200) | mutated())
@example(line=b"[" * 100_000)
@example(line=b'{"ev":' * 100_000)
@example(line=b"9" * 10_000)
@example(line=b'{"ev":"log","n":' + b"9" * 10_000 + b',"level":"","text":""}')
def test_a_line_is_decoded_or_refused_with_one_error(decode: Any, line: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        json.dumps(decode(line), ensure_ascii=decode is not parse_event).encode()


@TIMES
@given(events=st.lists(messages, max_size=8))
def test_the_rules_allow_or_refuse_with_one_error(events: list[dict[str, Any]]) -> None:
    rules = Rules()
    rules.begin_turn(1, "t1")
    rules.sent(2, "exec")
    with contextlib.suppress(ProtocolError):
        for event in ({**READY}, *events):
            rules.check(protocol.decode_event(protocol.encode(event)))
            assert 0 <= rules.last_n <= 8


@TIMES
@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_lines_are_the_same_however_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    lines, found, before = Lines(), list[bytes](), 0
    for cut in [*sorted(cuts), len(data)]:
        found += lines.feed(data[before:cut]) if cut > before else []
        before = max(before, cut)
    assert found == data.split(b"\n")[:-1]


class Nowhere(asyncio.Transport):
    """Takes all that is written, until it is closed."""

    _is_closed = False

    def write(self, data: Any) -> None:
        assert not self._is_closed

    def is_closing(self) -> bool:
        return self._is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self._is_closed = True

    abort = close


async def feed(data: bytes) -> None:
    """What a server does with a bridge that sends `data`, with a turn under way and somebody who waits for an answer."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    link = Link(reader, asyncio.StreamWriter(Nowhere(), asyncio.StreamReaderProtocol(reader), reader, loop), lambda level, text: None)
    await link.query("t1", content="", options={})
    asking = asyncio.create_task(link.ask("exec", command="", timeout=1))
    reader.feed_data(protocol.encode(READY) + data)
    reader.feed_eof()

    async def consume() -> None:
        async for _ in link.batches():
            pass

    consuming = asyncio.create_task(consume())
    try:
        async with asyncio.timeout(10):
            with contextlib.suppress(ProtocolError):
                await link.run()
    finally:
        link.close("over")
        _ = await asyncio.gather(asking, consuming, return_exceptions=True)
    assert consuming.exception() is None


@settings(TIMES, max_examples=60)
@given(lines=st.lists(mutated() | messages.map(lambda message: json.dumps(message).encode()), max_size=6))
@example(lines=[b'{"ev":"error","n":1,"error":"x","command_id":[]}'])
@example(lines=[b'{"ev":"error","n":1,"error":"x","command_id":{"a":1}}'])
@example(lines=[b'{"ev":"error","n":1,"error":"x","turn_id":[]}'])
@example(lines=[b'{"ev":"error","n":1,"error":"x","turn_id":null}'])
@example(lines=[b'{"ev":"error","n":1,"error":"x","command_id":true}'])
def test_a_bridge_that_sends_anything_ends_its_own_connection_and_nothing_else(lines: list[bytes]) -> None:
    asyncio.run(feed(b"".join(line + b"\n" for line in lines)))


def test_a_line_without_an_end_takes_no_more_memory_than_a_line_may(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(limit=1 << 20)
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="longer than"):
        _ = [lines.feed(b"x" * links.READ_BYTES) for _ in range(1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
