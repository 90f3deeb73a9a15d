"""The server's end of bridge.sock: commands out, checked events in. Everything that comes in is treated as hostile.

A line that breaks a rule raises ProtocolError and ends that sandbox only. Memory is bounded: one line, one small inbox; when
nobody consumes, the socket is not read. Knows no processes and no sessions.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from ash import protocol
from ash.errors import ProtocolError, SandboxFailed

Event = dict[str, Any]

READ_BYTES = 64 * 1024
INBOX_BYTES = 4 * 1024 * 1024
INBOX_EVENTS = 256
SEND_TIMEOUT = 30.0
ACK_EVERY = 32
MAX_DEPTH = 100
# A line may be large because of its strings. Objects in memory take many times their text, so their number has a limit of its own.
MAX_OBJECTS = 1_000_000
LARGE_LINE_BYTES = 1024 * 1024
_STRINGS = re.compile(rb'"[^"]*+"')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TURN_EVENTS = ("message", "delta", "permission_request")


def parse_event(line: bytes) -> Event:
    """`protocol.decode_event`, with what only the server must fear: too many objects, too deep, half characters. Raises ProtocolError."""
    openings = line.count(b"[") + line.count(b"{")
    if openings + line.count(b",") > MAX_OBJECTS:
        _check_objects(line)
    event = protocol.decode_event(line)
    if openings > MAX_DEPTH:
        _check_depth(event)
    if _SURROGATE.search(line):
        # Half of a surrogate pair is no character: it could neither be stored nor sent on.
        text = json.dumps(event, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            event = json.loads(text.encode("utf-8", "replace"))
    return event


def _check_objects(line: bytes) -> None:
    """Count a line's values without those characters that are only text. Each step must be cheap on whatever the line holds."""
    # Strings are counted before they are cut out. A closing quote may look escaped (`\\"`), so this finds at least half of them.
    if line.count(b'"') - line.count(b'\\"') <= 2 * MAX_OBJECTS:
        rest = _STRINGS.sub(b"", line.replace(b"\\\\", b"").replace(b'\\"', b""))
        if rest.count(b",") + rest.count(b"[") + rest.count(b"{") <= MAX_OBJECTS:
            return
    raise ProtocolError(f"a line with more than {MAX_OBJECTS} values")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for container in level if isinstance(container, dict | list) for item in _items(container)]
        if not level:
            return
    raise ProtocolError(f"a line nested deeper than {MAX_DEPTH} levels")


def _items(container: dict[str, Any] | list[Any]) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else container


class Lines:
    """Cuts chunks into lines; holds at most one line that has not ended yet."""

    def __init__(self, limit: int = protocol.MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        *ended, rest = chunk.split(b"\n")
        if len(self._rest) + len(chunk) > self._limit + READ_BYTES:
            raise ProtocolError(f"a line longer than {self._limit} bytes")
        lines = []
        for line in ended:
            lines.append(bytes(self._rest) + line if self._rest else line)
            self._rest.clear()
        self._rest += rest
        return lines


class Rules:
    """What a bridge may say next, given what it was told. Pure."""

    def __init__(self) -> None:
        self.turn_id: str | None = None
        self.last_n = 0
        self._is_ready = False
        self._query_id = 0
        self._commands: dict[int, str] = {}

    def sent(self, id: int, name: str) -> None:
        """A command that will be answered."""
        self._commands[id] = name

    def begin_turn(self, id: int, turn_id: str) -> None:
        self._query_id, self.turn_id = id, turn_id

    def is_refusal(self, event: Event) -> bool:
        """Whether an `error` says that the running turn's query could not be carried out."""
        return self.turn_id is not None and event.get("command_id") == self._query_id

    def is_answer(self, event: Event) -> bool:
        id = event.get("command_id")
        return event["ev"] in ("ok", "exec_result", "error") and isinstance(id, int) and id in self._commands

    def check(self, event: Event) -> None:
        """Raises ProtocolError unless `event` is allowed here; otherwise it is counted."""
        name = event["ev"]
        if not self._is_ready or name == "ready":
            self._check_ready(event)
            return
        if event["n"] != self.last_n + 1:
            raise ProtocolError(f"event {event['n']} after event {self.last_n}")
        if name in _TURN_EVENTS or name == "done" or (name == "error" and "turn_id" in event):
            self._check_turn(event)
        elif name != "log" and (name != "error" or self.is_answer(event)):
            self._check_command(event)
        self.last_n += 1

    def _check_ready(self, event: Event) -> None:
        if self._is_ready or event["ev"] != "ready" or event["n"] != 0:
            raise ProtocolError(f"{event['ev']} where {'no' if self._is_ready else 'a'} `ready` is due")
        if event["version"] != protocol.VERSION:
            raise ProtocolError(f"protocol version {event['version']!r:.20}, not {protocol.VERSION}")
        self._is_ready = True

    def _check_turn(self, event: Event) -> None:
        if event["turn_id"] != self.turn_id:
            raise ProtocolError(f"{event['ev']} for a turn that is not running")
        if not isinstance(event.get("error", ""), str | None):
            raise ProtocolError(f"{event['ev']}: error must be a text")
        if event["ev"] == "done":
            self.turn_id = None

    def _check_command(self, event: Event) -> None:
        allowed = {"ok": ("init",), "exec_output": ("exec",), "exec_result": ("exec",), "error": ("init", "exec")}
        if self._commands.get(event["command_id"]) not in allowed[event["ev"]]:
            raise ProtocolError(f"{event['ev']} for a command that was not given")

    def answered(self, id: int) -> None:
        del self._commands[id]


class Inbox:
    """Events on their way to one consumer, bounded in number and bytes; `put` waits for room. Counts what was consumed."""

    def __init__(self) -> None:
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._is_closed = False

    def has_room(self) -> bool:
        return not self._events or (self._bytes < INBOX_BYTES and len(self._events) < INBOX_EVENTS)

    async def put(self, event: Event, size: int) -> None:
        while not self.has_room() and not self._is_closed:
            self._changed.clear()
            await self._changed.wait()
        if not self._is_closed:
            self._events.append((event, size))
            self._bytes += size
            self._changed.set()

    async def get(self) -> list[Event]:
        """All events that are here, at least one; none at the end."""
        while not self._events:
            if self._is_closed:
                return []
            self._changed.clear()
            await self._changed.wait()
        events = [event for event, _ in self._events]
        self._events.clear()
        self._bytes = 0
        self._changed.set()
        return events

    def first_n(self) -> int | None:
        return self._events[0][0]["n"] if self._events else None

    def close(self) -> None:
        self._is_closed = True
        self._changed.set()


class Link:
    """One connection to one bridge. `on_log` gets the text of `log` events. `run` must be awaited by its owner."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_log: Callable[[str, str], None]) -> None:
        self._reader, self._writer, self._on_log = reader, writer, on_log
        self._rules, self._inbox, self._lines = Rules(), Inbox(), Lines()
        self._next_id = 1
        self._answers: dict[int, asyncio.Future[Event]] = {}
        self._ready: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._acked = 0
        self._held: int | None = None  # the event that the consumer is busy with
        self._is_closed = False

    @classmethod
    async def open(cls, path: str, on_log: Callable[[str, str], None]) -> Link:
        reader, writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)
        return cls(reader, writer, on_log)

    async def ready(self) -> None:
        """Until the bridge has said that it is there."""
        await asyncio.shield(self._ready)

    async def run(self) -> None:
        """Read until the bridge's end. Returns when it hangs up; raises ProtocolError when it breaks a rule."""
        try:
            while chunk := await self._reader.read(READ_BYTES):
                began = time.perf_counter()
                for line in self._lines.feed(chunk):
                    await self._take(line)
                # A flood gets half of the loop at most, and never keeps it.
                took = time.perf_counter() - began
                await asyncio.sleep(took if took > 0.002 else 0)
        except (ConnectionError, BrokenPipeError):
            return

    async def _take(self, line: bytes) -> None:
        # One after the other, so that they stay in order; a large one must not keep the loop from everybody else.
        event = parse_event(line) if len(line) <= LARGE_LINE_BYTES else await asyncio.to_thread(parse_event, line)
        self._rules.check(event)
        name = event["ev"]
        if name == "ready":
            if not self._ready.done():
                self._ready.set_result(event)
        elif self._rules.is_answer(event):
            self._answer(event)
        elif name == "log":
            self._on_log(event["level"], event["text"])
            if self._inbox.has_room():
                await self._inbox.put(event, len(line))
        elif name == "error" and "turn_id" not in event:
            await self._refused(event)
        elif name != "exec_output":
            await self._inbox.put(event, len(line))

    async def _refused(self, event: Event) -> None:
        """A command without an answer of its own failed. A turn that did not even begin ends like any other."""
        self._on_log("stderr", event["error"])
        if self._rules.is_refusal(event):
            turn, self._rules.turn_id = self._rules.turn_id, None
            for name, more in (("error", {}), ("done", {"status": "failed"})):
                await self._inbox.put({"ev": name, "n": event["n"], "turn_id": turn, "error": event["error"], **more}, 0)

    def _answer(self, event: Event) -> None:
        self._rules.answered(event["command_id"])
        future = self._answers.pop(event["command_id"], None)
        if future is not None and not future.done():
            future.set_result(event)
        self._acknowledge(event["ev"])

    # Commands

    async def ask(self, name: str, **fields: Any) -> Event:
        """Send a command and wait for its answer. Raises SandboxFailed when the bridge is gone. Cancelling leaves the command running."""
        id = self._take_id()
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._rules.sent(id, name)
        self._answers[id] = future
        try:
            await self._send(protocol.command(name, id, **fields))
            return await future
        except SandboxFailed:
            self._answers.pop(id, None)
            raise
        except asyncio.CancelledError:
            if name == "exec" and not self._is_closed:
                self._writer.write(protocol.command("cancel", self._take_id(), command_id=id))
            raise

    async def tell(self, name: str, **fields: Any) -> None:
        """Send a command that has no answer of its own."""
        await self._send(protocol.command(name, self._take_id(), **fields))

    async def query(self, turn_id: str, **fields: Any) -> None:
        if self._rules.turn_id is not None:
            raise SandboxFailed("a turn is already running in this sandbox")
        id = self._take_id()
        self._rules.begin_turn(id, turn_id)
        try:
            await self._send(protocol.command("query", id, turn_id=turn_id, **fields))
        except SandboxFailed:
            self._rules.turn_id = None
            raise

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    async def _send(self, line: bytes) -> None:
        """Write a line; a bridge that does not read for SEND_TIMEOUT seconds has failed."""
        if self._is_closed:
            raise SandboxFailed("the sandbox is gone")
        if len(line) > protocol.MAX_LINE_BYTES:
            raise SandboxFailed(f"a command of {len(line)} bytes is more than a sandbox takes ({protocol.MAX_LINE_BYTES})")
        try:
            self._writer.write(line)
            async with asyncio.timeout(SEND_TIMEOUT):
                await self._writer.drain()
        except TimeoutError as error:
            raise SandboxFailed(f"the agent's process has taken no input for {SEND_TIMEOUT:g} s") from error
        except OSError as error:
            raise SandboxFailed("the sandbox is gone") from error

    # Events

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Events in order, those that came together in one list, until the link is closed and all were consumed.

        Asking for the next list acknowledges the last.
        """
        while events := await self._inbox.get():
            self._held = events[0]["n"]
            yield events
            self._held = None
            self._acknowledge(events[-1]["ev"])

    def _acknowledge(self, name: str) -> None:
        """Tell the bridge up to which event it need not keep them; deltas are counted together."""
        first = self._inbox.first_n() if self._held is None else self._held
        consumed = self._rules.last_n if first is None else first - 1
        if self._is_closed or consumed <= self._acked or (name == "delta" and consumed - self._acked < ACK_EVERY):
            return
        if self._writer.transport.get_write_buffer_size() > INBOX_BYTES:
            return  # a bridge that sends but does not read; a later number covers this one
        self._acked = consumed
        self._writer.write(protocol.command("ack", self._take_id(), n=consumed))

    # The end

    def close(self, reason: str) -> None:
        """Hang up; whoever waits for an answer gets SandboxFailed with `reason`. Events already here can still be consumed."""
        if self._is_closed:
            return
        self._is_closed = True
        self._inbox.close()
        error = SandboxFailed(reason)
        for future in (*self._answers.values(), self._ready):
            if not future.done():
                future.set_exception(error)
                future.exception()  # not every one of them has somebody who waits
        self._answers.clear()
        self._writer.transport.abort()
