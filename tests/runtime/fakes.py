"""A gateway with scripted answers, and a driver for the real bridge process: what the tests of the bridge share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ash import protocol, sse

Json = dict[str, Any]
ROOT = Path(protocol.__file__).parent.parent
WAIT = 5.0


# Scripted answers: each is a list of chunks to send, or a callable that gets the connection.


def events(*blocks: Json, stop: str = "end_turn", usage: Json | None = None, **delta: Any) -> list[Json]:
    """The stream events of a message with these blocks."""
    start: Json = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    found: list[Json] = [{"type": "message_start", "message": {**start, "usage": usage or {"input_tokens": 10, "output_tokens": 1}}}]
    for index, block in enumerate(blocks):
        found += _block_events(index, block)
    found.append({"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None, **delta}, "usage": {"output_tokens": 5}})
    return [*found, {"type": "message_stop"}]


def _block_events(index: int, block: Json) -> list[Json]:
    empty, deltas = dict(block), []
    if block["type"] == "text":
        empty["text"] = ""
        half = len(block["text"]) // 2
        deltas = [{"type": "text_delta", "text": part} for part in (block["text"][:half], block["text"][half:])]
    elif block["type"] == "tool_use":
        empty["input"] = {}
        deltas = [{"type": "input_json_delta", "partial_json": part} for part in _halves(block.get("raw", json.dumps(block["input"])))]
        empty.pop("raw", None)
    return [
        {"type": "content_block_start", "index": index, "content_block": empty},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def _halves(value: str) -> tuple[str, str]:
    return value[: len(value) // 2], value[len(value) // 2 :]


def text(value: str, **more: Any) -> list[Json]:
    return events({"type": "text", "text": value}, **more)


def tool(name: str, call_id: str = "toolu_1", **given: Any) -> Json:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def calls(*uses: Json, **more: Any) -> list[Json]:
    return events(*uses, **{"stop": "tool_use", **more})


def http(status: int, body: Json, **headers: str) -> bytes:
    payload = json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} X",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


def api_error(status: int, kind: str, message: str, **headers: str) -> bytes:
    return http(status, {"type": "error", "error": {"type": kind, "message": message}}, **headers)


class FakeGateway:
    """Answers the n-th request with the n-th entry of `script`; keeps the requests. An event `Hold` waits until released."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.script: list[Any] = []
        self.requests: list[Json] = []
        self.headers: list[str] = []
        self.holding = threading.Event()
        self.released = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(WAIT)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head, _, begun = _until(connection, b"\r\n\r\n")
        rest = bytearray(begun)
        length = int(next(line.split(":")[1] for line in head.decode().split("\r\n") if line.lower().startswith("content-length")))
        while len(rest) < length:
            rest += connection.recv(1 << 20)
        self.headers.append(head.decode())
        self.requests.append(json.loads(rest))
        answer = self.script.pop(0) if self.script else text("nothing scripted")
        if isinstance(answer, bytes):
            connection.sendall(answer)
            return
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in answer:
            if event == HOLD:
                self.holding.set()
                self.released.wait(WAIT)
                continue
            data = sse.encode(event["type"], event)
            for part in (data[:7], data[7:]):
                connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        connection.sendall(b"0\r\n\r\n")


HOLD = {"type": "hold"}


def _until(connection: socket.socket, end: bytes) -> tuple[bytes, bytes, bytes]:
    data = b""
    while end not in data:
        chunk = connection.recv(65536)
        if not chunk:
            raise OSError("closed")
        data += chunk
    return data.partition(end)


class Driver:
    """The server's side of one real bridge process on plain folders."""

    def __init__(self, root: Path, orphan_timeout: float = 10.0, env: dict[str, str] | None = None, python: str = sys.executable) -> None:
        self.root = root
        for name in ("agent", "workspace", "home"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.gateway = FakeGateway(str(root / "gw.sock"))
        self.socket_path = str(root / "b.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.socket_path)
        self._listener.listen(4)
        self.process = self._start(orphan_timeout, env, python)
        self.connection: socket.socket | None = None
        self._buffer = bytearray()
        self._next_id = 0
        self.acknowledges = True
        self.events: list[Json] = []

    def _start(self, orphan_timeout: float, env: dict[str, str] | None, python: str) -> subprocess.Popen[bytes]:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ash.bridge import main; main()"
        number = str(self._listener.fileno())
        arguments = [
            "--listen-fd",
            number,
            "--orphan-timeout",
            str(orphan_timeout),
            "--root",
            str(self.root),
            "--gateway-socket",
            self.gateway.path,
        ]
        base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(env or {})}
        return subprocess.Popen([python, "-I", "-S", "-B", "-c", code, *arguments], env=base, pass_fds=[self._listener.fileno()])

    def connect(self) -> Json:
        """Connect as a (new) server does; the greeting."""
        if self.connection:
            self.connection.close()
        self._buffer.clear()
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(WAIT)
        self.connection.connect(self.socket_path)
        return self.read()

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self._listener.close()
        self.process.kill()
        self.process.wait()
        self.gateway.close()

    def send(self, name: str, **fields: Any) -> int:
        self._next_id += 1
        self.send_raw(protocol.command(name, self._next_id, **fields))
        return self._next_id

    def send_raw(self, data: bytes) -> None:
        assert self.connection is not None
        self.connection.sendall(data)

    def read(self) -> Json:
        """The next event, checked as the server does and acknowledged."""
        assert self.connection is not None
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            chunk = self.connection.recv(1 << 20)
            if not chunk:
                raise EOFError("the bridge closed the connection")
            self._buffer += chunk
        event = protocol.decode_event(bytes(self._buffer[:end]))
        del self._buffer[: end + 1]
        self.events.append(event)
        if self.acknowledges and event["n"]:
            with suppress(BrokenPipeError):  # a bridge that shuts down is gone by now
                self.send("ack", n=event["n"])
        return event

    def read_until(self, found: Callable[[Json], bool]) -> Json:
        while not found(event := self.read()):
            pass
        return event

    def init(self, transcript: list[Json] | None = None, **options: Any) -> Json:
        agent = {"name": "test", "version": 1, "sessionId": "00000000-0000-4000-8000-000000000001"}
        number = self.send("init", agent=agent, options={"model": "m", **options}, transcript=transcript or [])
        return self.read_until(lambda event: event.get("command_id") == number)

    def query(self, content: Any, turn_id: str = "t1", **options: Any) -> None:
        self.send("query", turn_id=turn_id, content=content, options=options)

    def turn(self, content: Any = "hi", turn_id: str = "t1", **options: Any) -> list[Json]:
        """Run a whole turn; its events."""
        self.query(content, turn_id, **options)
        return self.finish(turn_id)

    def finish(self, turn_id: str = "t1") -> list[Json]:
        first = len(self.events)
        self.read_until(lambda event: event["ev"] == "done" and event["turn_id"] == turn_id)
        return self.events[first:]

    def exec(self, command: str, timeout: float = 5, **more: Any) -> Json:
        number = self.send("exec", command=command, timeout=timeout, **more)
        return self.read_until(lambda event: event.get("command_id") == number)


@contextmanager
def driver(root: Path, **options: Any) -> Iterator[Driver]:
    """A bridge that is connected; ended afterwards."""
    started = Driver(root, **options)
    try:
        started.connect()
        yield started
    finally:
        started.close()


def messages(turn: list[Json], kind: str | None = None) -> list[Json]:
    """The SDK messages of a turn."""
    return [event["data"] for event in turn if event["ev"] == "message" and kind in (None, event["data"]["type"])]


def results(turn: list[Json]) -> list[Json]:
    """The tool_result blocks of a turn."""
    blocks = [block for message in messages(turn, "user") for block in message["message"]["content"]]
    return [block for block in blocks if block["type"] == "tool_result"]


def until(claim: Callable[[], bool], what: str) -> None:
    """Poll a claim for WAIT seconds."""
    deadline = time.monotonic() + WAIT
    while not claim():
        assert time.monotonic() < deadline, f"waited {WAIT} s in vain: {what}"
        time.sleep(0.01)
