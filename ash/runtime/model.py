"""The model client: one streaming Messages API request over the gateway's socket, its events, its errors in the gateway's words.

A client of its own because http.client costs 48 ms and megabytes in every session; the peer is always our own gateway, so
little of HTTP is needed. It holds no key and decides nothing about retries; `loop` does.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from ash import sse
from ash.runtime.interrupt import Interrupt

Json = dict[str, Any]
READ_TIMEOUT = 600.0
"""Seconds without a byte after which a model call counts as broken; less than the server's hang timeout."""
CONNECT_TIMEOUT = 30.0
"""Seconds to wait for the gateway to come (back): the time a server takes to restart."""
MAX_ERROR_BYTES = 1024 * 1024
_CHUNK = 65536
_PASSING = ("overloaded_error", "api_error", "timeout_error", "rate_limit_error")
_RETRIED_STATUSES = (408, 500, 502, 503, 504, 529)


class ModelError(Exception):
    """A model call that failed. `status` is None when no answer came or the stream broke after it had begun."""

    def __init__(
        self, message: str, *, retryable: bool, status: int | None = None, kind: str = "connection_error", delay: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.retryable, self.delay = status, kind, retryable, delay


class _Head(NamedTuple):
    status: int
    headers: dict[str, str]
    rest: bytes


def stream(socket_path: str, request: Json, betas: list[str], interrupt: Interrupt) -> Iterator[Json]:
    """The events of one call, in order, until and with `message_stop`. Raises ModelError or Interrupted."""
    body = json.dumps(request, separators=(",", ":")).encode("ascii")
    connection = _connect(socket_path, interrupt)
    try:
        with interrupt.calling(lambda: _shut(connection)):
            yield from _exchange(connection, _request_head(len(body), betas) + body)
    except (OSError, ValueError) as error:
        interrupt.check()
        raise ModelError(f"the connection to the model broke: {error}", retryable=True) from error
    except ModelError:
        interrupt.check()  # a socket that was shut for the interrupt looks like a broken stream
        raise
    finally:
        connection.close()


def _connect(path: str, interrupt: Interrupt) -> socket.socket:
    waited = 0.0
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            if waited >= CONNECT_TIMEOUT:
                raise ModelError(f"the gateway to the model cannot be reached: {error.strerror}", retryable=False) from error
            interrupt.pause(0.2)
            waited += 0.2
        else:
            connection.settimeout(READ_TIMEOUT)
            return connection


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


def _request_head(length: int, betas: list[str]) -> bytes:
    lines = [
        "POST /v1/messages HTTP/1.1",
        "Host: gateway",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        "Anthropic-Version: 2023-06-01",
        f"Content-Length: {length}",
        "Connection: close",
    ]
    if betas:
        lines.append("Anthropic-Beta: " + ",".join(betas))
    # A line break in a beta's name would start another header.
    return ("\r\n".join(line.replace("\r", "").replace("\n", "") for line in lines) + "\r\n\r\n").encode("utf-8")


def _exchange(connection: socket.socket, request: bytes) -> Iterator[Json]:
    with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was read: the answer says why
        connection.sendall(request)
    head = _read_head(connection)
    body = _body(connection, head)
    if head.status != 200:
        raise _answered_error(head, _read_error(body))
    yield from _events(body)


def _read_head(connection: socket.socket) -> _Head:
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) < 0:
        chunk = connection.recv(_CHUNK)
        if not chunk or len(data) > MAX_ERROR_BYTES:
            raise ModelError("the gateway closed the connection without an answer", retryable=True)
        data += chunk
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = first.split(" ")[1:2]
    if not status or not status[0].isdigit():
        raise ModelError(f"the gateway did not answer in HTTP: {first:.80}", retryable=False)
    return _Head(int(status[0]), headers, bytes(data[end + 4 :]))


def _body(connection: socket.socket, head: _Head) -> Iterator[bytes]:
    raw = _received(connection, head.rest)
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        return _unchunk(raw)
    return _limited(raw, int(head.headers["content-length"])) if "content-length" in head.headers else raw


def _received(connection: socket.socket, rest: bytes) -> Iterator[bytes]:
    if rest:
        yield rest
    while chunk := connection.recv(_CHUNK):
        yield chunk


def _limited(raw: Iterator[bytes], length: int) -> Iterator[bytes]:
    while length > 0:
        chunk = next(raw, b"")
        if not chunk:
            return
        yield chunk[:length]
        length -= len(chunk)


def _unchunk(raw: Iterator[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    while True:
        while (end := buffer.find(b"\r\n")) < 0:
            chunk = next(raw, b"")
            if not chunk:
                return
            buffer += chunk
        size = int(buffer[:end].split(b";")[0], 16)
        del buffer[: end + 2]
        if size == 0:
            return
        left = size
        while left > 0:
            if not buffer:
                buffer += next(raw, b"")
                if not buffer:
                    return
            part = bytes(buffer[:left])
            del buffer[: len(part)]
            left -= len(part)
            yield part
        while len(buffer) < 2:
            chunk = next(raw, b"")
            if not chunk:
                return
            buffer += chunk
        del buffer[:2]


def _events(body: Iterator[bytes]) -> Iterator[Json]:
    decoder = sse.Decoder()
    for chunk in body:
        for frame in decoder.feed(chunk):
            event = frame.data
            if not isinstance(event, dict):
                continue
            if event.get("type") == "error":
                raise _streamed_error(event)
            yield event
            if event.get("type") == "message_stop":
                return
    raise ModelError("the model's answer broke off before its end", retryable=True)


def _read_error(body: Iterator[bytes]) -> bytes:
    data = bytearray()
    for chunk in body:
        data += chunk
        if len(data) > MAX_ERROR_BYTES:
            break
    return bytes(data)


def _streamed_error(event: Json) -> ModelError:
    inner = event.get("error")
    error = inner if isinstance(inner, dict) else {}
    kind = str(error.get("type") or "api_error")
    text = f"the model's answer broke off: {error.get('message') or kind}"
    return ModelError(text, kind=kind, retryable=kind in _PASSING)


def _answered_error(head: _Head, body: bytes) -> ModelError:
    try:
        error = json.loads(body)["error"]
        kind, message = str(error["type"]), str(error["message"])
    except (ValueError, TypeError, KeyError):
        kind, message = "api_error", body[:500].decode("utf-8", "replace").strip() or "no explanation was given"
    request_id = head.headers.get("request-id")
    text = message + (f" (request id {request_id})" if request_id else "")
    return ModelError(text, status=head.status, kind=kind, retryable=_may_retry(head), delay=_delay(head.headers.get("retry-after")))


def _may_retry(head: _Head) -> bool:
    """The gateway puts errors in words and says which of them it has retried already; those are final."""
    return head.status in _RETRIED_STATUSES and head.headers.get("x-should-retry") != "false"


def _delay(value: str | None) -> float | None:
    try:
        return min(60.0, max(0.0, float(value))) if value is not None else None
    except ValueError:
        return None
